"""What each token id contributes to the text, read from a `tokenizer.json`.

Two families cover the models served here, and each can be decoded exactly one token at a time:
byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM: `ByteLevel`) and sentencepiece with byte fallback (Llama 2, Mistral:
`Replace`, `ByteFallback`, `Fuse`, `Strip`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoderError(ValueError):
    """The tokenizer's decoder is of a kind that cannot be streamed exactly."""


def _byte_characters() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes as (GPT-2's `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_CHARACTERS = _byte_characters()


class Vocabulary:
    """Bytes, piece and special flag of every id. Special tokens have no text; unknown ids (padding rows) neither."""

    def __init__(self, tokenizer: Mapping[str, Any]):
        """tokenizer: a parsed `tokenizer.json`. Raises UnsupportedDecoderError."""
        steps = _decoder_steps(tokenizer.get("decoder"))
        kinds = [step["type"] for step in steps]
        self.byte_level = kinds == ["ByteLevel"]
        self.strip_start = 0
        self._replace: list[tuple[str, str]] = []
        if not self.byte_level:
            self._read_steps(steps, kinds)
        pieces: dict[int, str] = _model_pieces(tokenizer["model"])
        special: set[int] = set()
        for token in tokenizer.get("added_tokens") or []:
            pieces[token["id"]] = token["content"]
            if token["special"]:
                special.add(token["id"])
        self.size = max(pieces, default=-1) + 1
        self._names = [pieces.get(token_id, "") for token_id in range(self.size)]
        self._bytes: list[bytes] = [b""] * self.size
        self._single: list[int | None] = [None] * self.size
        self._pieces: list[str] = [""] * self.size
        for token_id, name in pieces.items():
            if token_id not in special:
                self._fill(token_id, name)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to the text; none for special and unknown tokens."""
        return self._bytes[token_id] if 0 <= token_id < self.size else b""

    def token_byte(self, token_id: int) -> int | None:
        """The byte of a byte-fallback token, None for any other."""
        return self._single[token_id] if 0 <= token_id < self.size else None

    def token_piece(self, token_id: int) -> str:
        """The text of a sentencepiece token; empty for byte-fallback, special and unknown tokens."""
        return self._pieces[token_id] if 0 <= token_id < self.size else ""

    def display(self, token_id: int) -> tuple[str, list[int]]:
        """How a token is shown in log-probabilities: its text, or its name if it has none; and its UTF-8 bytes."""
        data = self.token_bytes(token_id)
        if not data and 0 <= token_id < self.size:
            data = self._names[token_id].encode()
        return data.decode("utf-8", "replace"), list(data)

    def _read_steps(self, steps: list[dict[str, Any]], kinds: list[str]) -> None:
        if "ByteFallback" not in kinds:
            raise UnsupportedDecoderError(_refusal(kinds))
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                    self._replace.append((pattern, content))
                case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                    self.strip_start = start
                case {"type": "ByteFallback" | "Fuse"}:
                    pass
                case _:
                    raise UnsupportedDecoderError(_refusal(kinds))

    def _fill(self, token_id: int, name: str) -> None:
        if self.byte_level:
            values = [BYTE_CHARACTERS.get(character) for character in name]
            # An added token may hold characters outside the byte alphabet; it then stands for itself.
            known = [value for value in values if value is not None]
            self._bytes[token_id] = bytes(known) if len(known) == len(values) else name.encode()
            return
        for pattern, content in self._replace:
            name = name.replace(pattern, content)
        if match := _BYTE_PIECE.fullmatch(name):
            self._single[token_id] = int(match[1], 16)
            self._bytes[token_id] = bytes([int(match[1], 16)])
        else:
            self._pieces[token_id] = name
            self._bytes[token_id] = name.encode()


def vocabulary_of(tokenizer_json: str) -> Vocabulary:
    """The vocabulary of a serialized tokenizer."""
    return Vocabulary(json.loads(tokenizer_json))


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise UnsupportedDecoderError(_refusal(["none"]))
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [dict(decoder)]


def _model_pieces(model: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
        return {index: entry[0] for index, entry in enumerate(vocabulary)}
    return {token_id: piece for piece, token_id in vocabulary.items()}


def _refusal(kinds: list[str]) -> str:
    return (
        f"tokenizer.json: decoder {' + '.join(kinds)} cannot be streamed; "
        "supported are ByteLevel, and ByteFallback with Replace, Fuse and Strip"
    )
