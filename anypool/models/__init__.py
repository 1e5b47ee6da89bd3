"""The model, written once: configuration, parameters, forward pass, Hugging Face weights and tokenizer.

Other rooms use:
- `resolve(model, progress)` -> the Hugging Face directory of a bundled name, a path, a GGUF file or a hub id;
- `ModelConfig.load(directory)`, `Checkpoint.open(directory)`: what is in that directory;
- `Tokenizer.load(directory)` (gateway and command line only: workers know no text);
- `decoder` and `params`: the forward pass and its parameters;
- `ModelError` and its kinds: what can be wrong with a model that a user names.
"""

from anypool.models.config import SUPPORTED_ARCHITECTURES, ModelConfig
from anypool.models.errors import (
    ChatTemplateError,
    ConfigError,
    GGUFError,
    ModelError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
    WeightsError,
)
from anypool.models.rope import RopeConfig
from anypool.models.source import BUNDLED, resolve
from anypool.models.tokenizer import Tokenizer
from anypool.models.weights import Checkpoint

__all__ = [
    "BUNDLED",
    "SUPPORTED_ARCHITECTURES",
    "ChatTemplateError",
    "Checkpoint",
    "ConfigError",
    "GGUFError",
    "ModelConfig",
    "ModelError",
    "ModelNotFoundError",
    "RopeConfig",
    "Tokenizer",
    "TokenizerError",
    "UnsupportedModelError",
    "WeightsError",
    "resolve",
]
