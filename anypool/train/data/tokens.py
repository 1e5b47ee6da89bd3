"""The tokenizer of a model as preparing data needs it: whole batches, places in the text, what ends a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from blake3 import blake3

from anypool.models import ModelConfig, ModelError, Tokenizer
from anypool.train.data.errors import DataError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "config.json",
)  # fmt: skip
"""Files of a model directory that decide how texts become tokens and which of them end something."""


@dataclass(frozen=True)
class TextTokenizer:
    """eot_id: put after each document. endings: tokens that can end a turn of a chat. largest_id: of any token."""

    model: Tokenizer
    core: tokenizers.Tokenizer
    eot_id: int
    endings: frozenset[int]
    largest_id: int

    @classmethod
    def load(cls, directory: Path) -> TextTokenizer:
        """Raises DataError if there is no tokenizer, or none of its tokens ends a text."""
        try:
            model = Tokenizer.load(directory)
        except ModelError as error:
            raise DataError(f"tokenizer: {error}") from error
        core = tokenizers.Tokenizer.from_str(model.to_json())
        named = model.named_tokens.get("eos_token")
        eot = core.token_to_id(named) if named is not None else None
        if eot is None:
            eot = model.eos_ids[0] if model.eos_ids else None
        if eot is None:
            raise DataError(
                f"the tokenizer in {directory} has no token that ends a text; add eos_token to tokenizer_config.json"
            )
        special = {id for id, token in core.get_added_tokens_decoder().items() if token.special}
        largest = max(core.get_vocab(with_added_tokens=True).values())
        return cls(model, core, int(eot), frozenset(special | set(model.eos_ids) | {eot}), int(largest))

    @property
    def token_type(self) -> str:
        return "<u2" if self.largest_id < 2**16 else "<u4"

    def texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each as tokens, with the tokenizer's own first token if it has one, and the token that ends a text."""
        found = []
        for encoding in self.core.encode_batch_fast(list(texts), add_special_tokens=True):
            ids = encoding.ids
            if not ids or ids[-1] != self.eot_id:
                ids.append(self.eot_id)
            found.append(np.asarray(ids, self.token_type))
        return found

    def hash(self, directory: Path, chats: bool) -> str:
        """Of what decides a text's tokens; for chats that is the template too."""
        state = blake3(f"{self.eot_id} {sorted(self.endings)}".encode())
        for name in FILES[:4] if chats else FILES[:1]:
            path = directory / name
            if path.is_file():
                state.update(f"{name} {path.stat().st_size} ".encode()).update(path.read_bytes())
        return state.hexdigest()


def check_fits(tokenizer: TextTokenizer, sequence_length: int, model: ModelConfig | None = None) -> None:
    """Raises DataError if rows of this length and of these tokens are not for the model."""
    if sequence_length < 2:
        raise DataError(f"sequence_length = {sequence_length}: a row needs at least 2 tokens, one to predict the other")
    if model is None:
        return
    if sequence_length > model.max_position:
        raise DataError(
            f"sequence_length = {sequence_length}: the model has {model.max_position} positions "
            f"(max_position_embeddings); use at most that"
        )
    if tokenizer.largest_id >= model.vocab_size:
        raise DataError(
            f"tokenizer: its tokens go up to {tokenizer.largest_id}, but the model's vocab_size is {model.vocab_size}; "
            f"use the model's own tokenizer, or a vocab_size of at least {tokenizer.largest_id + 1}"
        )
