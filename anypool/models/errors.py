"""What can be wrong with a model that a user names.

All are `ValueError`s: the command line prints the message and exits with code 2. Messages name the file and
the field, the value that was found, and what to do about it.
"""


class ModelError(ValueError):
    """A model that cannot be used as given."""


class ModelNotFoundError(ModelError):
    """The name is no bundled model, no directory, no GGUF file, and cannot be fetched."""


class UnsupportedModelError(ModelError):
    """A sound model of a kind that this package does not implement; the message says what is implemented."""


class ConfigError(ModelError):
    """`config.json` lacks a field or holds a value that makes no sense."""


class WeightsError(ModelError):
    """Weights that are missing, cut short, or of the wrong shape."""


class GGUFError(ModelError):
    """A GGUF file that is damaged or cannot be expressed as a Hugging Face directory."""


class TokenizerError(ModelError):
    """A tokenizer that is missing or broken."""


class ChatTemplateError(ModelError):
    """The model has no chat template, or its template rejects these messages."""
