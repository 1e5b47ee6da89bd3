"""Tokenizers and texts, small enough to make in a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from anypool.models import resolve
from anypool.train.data import Prepared, Source, TextTokenizer, prepare, train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards bake a pie and the dog sleeps on"


def byte_tokenizer(directory: Path, template: str = "", eos: str = "<|im_end|>") -> Path:
    """A token for each byte, and ChatML's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<|im_sep|>")]
    core.add_special_tokens(special)
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": eos, "bos_token": "<|im_start|>"} | ({"chat_template": template} if template else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `byte_tokenizer`, without a chat template."""
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens that was trained, with its chat template."""
    return train_tokenizer([WORDS, WORDS], 300, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def smollm2() -> TextTokenizer:
    return TextTokenizer.load(resolve("smollm2-135m-instruct"))


def write_chats(path: Path, count: int, turns: int = 1) -> Path:
    """JSONL with conversations of different lengths."""
    words = WORDS.split()
    lines = []
    for number in range(count):
        messages = []
        for turn in range(turns):
            some = " ".join(words[(number + turn) % 7 :][: 1 + number % 9])
            messages += [{"role": "user", "content": f"{number} {some}"}, {"role": "assistant", "content": some}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def prepared_chats(tmp_path: Path, small: Path) -> Callable[[str], Prepared]:
    """Forty chats in rows of 128 tokens, learning all of them or the answers."""

    def make(learn: str) -> Prepared:
        source = Source("chat", str(write_chats(tmp_path / "chats.jsonl", 40, turns=2)), learn=learn)
        return prepare(source, small, tmp_path / "home", sequence_length=128, workers=1)

    return make
