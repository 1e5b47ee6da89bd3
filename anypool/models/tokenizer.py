"""Text to token ids and back, and conversations to text, from the tokenizer files of a Hugging Face
directory.

Only the gateway and the command line use this: workers know no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anypool.models.config import ending_tokens, read_json
from anypool.models.errors import ChatTemplateError, TokenizerError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of one model. Safe to use from several threads."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        eos_ids: tuple[int, ...],
        templates: Mapping[str, str],
    ) -> None:
        self.eos_ids = eos_ids
        self.named_tokens = dict(named_tokens)
        self._core = core
        self._templates = dict(templates)
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template, if there is one.

        Raises TokenizerError when the tokenizer is missing or broken, ConfigError for broken JSON beside it.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            hint = ""
            if (directory / "tokenizer.model").is_file():
                hint = "; make it from its tokenizer.model with transformers (AutoTokenizer … save_pretrained)"
            raise TokenizerError(f"{directory} has no tokenizer.json{hint}")
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is no tokenizer: {error}") from error
        # A file may carry the truncation and padding of the training run that wrote it.
        core.no_truncation()
        core.no_padding()

        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (directory / name).is_file():
                settings |= read_json(directory / name)
        named = {name: _text(settings[name]) for name in _NAMED_TOKENS if settings.get(name)}
        eos_ids = ending_tokens(directory)
        if not eos_ids and "eos_token" in named:
            token_id = core.token_to_id(named["eos_token"])
            eos_ids = () if token_id is None else (token_id,)
        return cls(core, named, eos_ids, _templates(directory, settings))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; a model's table of embeddings may have more rows."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int | None:
        token = self.named_tokens.get("bos_token")
        return None if token is None else self._core.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it are recognised.

        add_special_tokens: put the model's own tokens around it (Llama's first token). Not for a rendered
        chat, whose template has put them in already.
        """
        return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, as a half-finished character does."""
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special))

    def to_json(self) -> str:
        """The tokenizer as a `tokenizer.json`, for those who need its vocabulary and decoder token by token."""
        return str(self._core.to_str())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation as the model was trained to see it.

        messages: with `role` and `content`, as the chat API has them; keys whose value is None are left out,
        because templates test for presence. tools: JSON schemas. variables: further names that the template
        may read. Raises ChatTemplateError when there is no template or it rejects the messages.
        """
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        template = self._template("tool_use" if tools and "tool_use" in self._templates else "default")
        try:
            return template.render(
                self.named_tokens
                | variables
                | {
                    "messages": present,
                    "tools": list(tools) if tools else None,
                    "documents": variables.get("documents"),
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template rejects the messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ChatTemplateError(
                f"the model's chat template cannot render the messages ({type(error).__name__}: {error}); "
                "check that every message has a role and a content that is text"
            ) from error

    def _template(self, name: str) -> jinja2.Template:
        if not self._templates:
            raise ChatTemplateError(
                "the model has no chat template: use the completions endpoint, or add chat_template.jinja to "
                "its "
                "directory"
            )
        if name not in self._templates:
            raise ChatTemplateError(f"the model has no chat template named {name!r}, only {', '.join(self._templates)}")
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._templates[name])
            except jinja2.TemplateSyntaxError as error:
                raise ChatTemplateError(
                    f"the model's chat template is broken at line {error.lineno}: {error}"
                ) from error
        return self._compiled[name]


def _text(token: Any) -> str:
    """A token in tokenizer_config.json is a string or an object with its content and how it is matched."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> chat template; the files beside tokenizer_config.json are newer than the key in it."""
    found: dict[str, str] = {}
    inside = settings.get("chat_template")
    if isinstance(inside, str):
        found["default"] = inside
    elif isinstance(inside, list):
        found |= {str(item["name"]): str(item["template"]) for item in inside}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        found["default"] = alone.read_text(encoding="utf-8")
    return found


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's own words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates may count on: the settings, filter and functions that transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML, which a model would read literally.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
