"""The tokenizer in a GGUF file's metadata, as the `tokenizer.json` and `tokenizer_config.json` of Hugging
Face.

GGUF names the algorithm (`gpt2` for byte-level BPE, `llama` for SentencePiece's BPE) and, for the former, the
rule that splits text before merging (`tokenizer.ggml.pre`). Rules are those of the models that they are named
after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anypool.models.config import ModelConfig
from anypool.models.errors import GGUFError, UnsupportedModelError

if TYPE_CHECKING:
    from anypool.models.gguf import Metadata

# Kinds of token in tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_GPT2 = _byte_level(use_regex=True)
_LLAMA3 = _sequence(_split(_LLAMA3_SPLIT), _byte_level(use_regex=False))
_QWEN2 = _sequence(_split(_QWEN2_SPLIT), _byte_level(use_regex=False))
_SMOLLM = _sequence({"type": "Digits", "individual_digits": True}, _GPT2)

_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}


def tokenizer_files(metadata: Metadata, config: ModelConfig) -> dict[str, Any]:
    """File name -> content, for `tokenizer.json` and `tokenizer_config.json`.

    Raises UnsupportedModelError for algorithms and splitting rules not implemented, GGUFError for missing
    metadata.
    """
    tokens: list[str] = metadata.require("tokenizer.ggml.tokens", list)
    kinds: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(tokens) > config.vocab_size or len(kinds) != len(tokens):
        raise GGUFError(
            f"{metadata.path}: {len(tokens)} tokens with {len(kinds)} types for {config.vocab_size} rows of embeddings"
        )
    algorithm = metadata.require("tokenizer.ggml.model", str)
    if algorithm == "gpt2":
        parts = _byte_level_bpe(metadata, tokens)
        adds_bos = parts["model"]["ignore_merges"]  # llama-bpe puts one first unless the file says otherwise
    elif algorithm == "llama":
        parts = _sentencepiece_bpe(metadata, tokens)
        adds_bos = True
    else:
        raise UnsupportedModelError(
            f"{metadata.path}: the tokenizer {algorithm!r} is not supported; supported: gpt2, llama"
        )

    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[i] == _CONTROL,
        }
        for i, token in enumerate(tokens)
        if kinds[i] in (_CONTROL, _USER_DEFINED)
    ]
    bos = config.bos_token_id if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _starts_with(tokens[bos], bos) if bos is not None else None,
        **parts,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": _tokenizer_config(metadata, config, tokens)}


def _tokenizer_config(metadata: Metadata, config: ModelConfig, tokens: Sequence[str]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position,
    }
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for key, name in names.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            content[name] = tokens[token_id]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        content["chat_template"] = template
    return content


def _byte_level_bpe(metadata: Metadata, tokens: Sequence[str]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{metadata.path}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    splitter = _PRE_TOKENIZERS[pre]
    merges: list[str] = metadata.require("tokenizer.ggml.merges", list)
    return {
        "normalizer": {"type": "NFC"} if splitter is _QWEN2 else None,
        "pre_tokenizer": splitter,
        "decoder": _byte_level(use_regex=True) | {"add_prefix_space": True},
        "model": _bpe_model(tokens, [_pair(merge) for merge in merges], ignore_merges=splitter is _LLAMA3),
    }


def _pair(merge: str) -> list[str]:
    """Split at the one space that is not the first character (a token itself never holds a space)."""
    at = merge.index(" ", 1)
    return [merge[:at], merge[at + 1 :]]


def _sentencepiece_bpe(metadata: Metadata, tokens: Sequence[str]) -> dict[str, Any]:
    """SentencePiece keeps no merges: a pair merges if the whole is a piece, the best score first."""
    scores: list[float] = metadata.require("tokenizer.ggml.scores", list)
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = sorted(((-scores[i], ids[left], ids[right], left, right) for i, left, right in _possible_merges(ids)))
    # Some files state add_space_prefix; SentencePiece models have one unless told otherwise.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    model = _bpe_model(tokens, [[left, right] for *_, left, right in ranked], ignore_merges=False)
    model |= {
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": None if unknown is None else tokens[unknown],
    }
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _possible_merges(ids: Mapping[str, int]) -> Iterator[tuple[int, str, str]]:
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                yield i, left, right


def _bpe_model(tokens: Sequence[str], merges: list[list[str]], ignore_merges: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _starts_with(token: str, token_id: int) -> dict[str, Any]:
    """Put one token before the text, or before the first of two texts."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
