"""A tokenizer for a model that begins from nothing: byte-level BPE, learned from the run's own texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from anypool.train.data import python_docs, reading
from anypool.train.data.errors import DataError
from anypool.train.data.source import MADE, Source, files_of

BEGIN, END = "<|im_start|>", "<|im_end|>"
"""The special tokens. END ends a document and a turn of a chat alike."""

SMALLEST = 256 + 2
"""A token for every byte, and the special ones."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Numbers by up to three digits, words with the space before them, and runs of the rest. As GPT-4's, without its cases.
_WORDS = (
    r"""'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> Path:
    """Learns a vocabulary and writes it as a Hugging Face tokenizer that has a chat template; returns the directory.

    The same texts give the same files. vocab_size: special tokens included. Fewer if the texts have no more to merge.
    Raises DataError.
    """
    if vocab_size < SMALLEST:
        raise DataError(
            f"vocab_size = {vocab_size}: needs at least {SMALLEST}, one for each byte and {BEGIN} and {END}"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(iter(texts), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return directory


def texts_of(source: Source, home: Path) -> Iterator[str]:
    """The texts of a source's documents, and of chats those of every message. Raises DataError.

    home: where those that are made on this machine are kept.
    """
    if source.kind in MADE:
        made = python_docs.write(source.kind, home)
        source = Source("chat" if source.chats else "jsonl", str(made), learn=source.learn)
    files = files_of(source.kind, source.path)
    for part, _ in reading.parts(source, files, 2**24):
        for place, value in reading.documents(source, files[part.file], part):
            if not source.chats:
                yield value
                continue
            if not isinstance(value["messages"], list):
                raise DataError(f"{place}: no messages")
            yield from (str(message.get("content") or "") for message in value["messages"] if isinstance(message, dict))
