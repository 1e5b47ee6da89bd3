"""A run's texts as rows, and the model of a run that begins from nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from anypool.models import ConfigError, ModelConfig, UnsupportedModelError, resolve
from anypool.train.data import Mixture, Rows, RowStore, home_dir, named, prepare, texts_of, train_tokenizer
from anypool.train.errors import RunFileError
from anypool.train.run.file import RunFile

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how far it is, of what, in MiB."""


@dataclass(frozen=True)
class HeldOut:
    """The rows that are only evaluated on. batches: how many are taken, shared evenly by the stores."""

    stores: Sequence[RowStore]
    rows: int
    batches: int

    def __call__(self, part: slice | None = None) -> Iterator[Rows]:
        """The same batches every time, of which this host needs `part`."""
        each = -(-self.batches // len(self.stores))
        return chain.from_iterable(islice(store.in_order(self.rows, part), each) for store in self.stores)


def prepare_texts(
    file: RunFile, model: ModelConfig, folder: Path, progress: Progress = lambda *_: None
) -> tuple[Mixture, HeldOut | None]:
    """Rows to learn from and rows held out (None if there are none); quick when they were made before.

    folder: of the model's tokenizer. Raises DataError.
    """
    made = [
        (
            prepare(
                source,
                folder,
                home_dir(),
                sequence_length=file.data.sequence_length,
                eval_fraction=file.data.eval_fraction,
                model=model,
                progress=progress,
            ),
            source.weight,
        )
        for source in named(file.data.sources)
    ]
    mixture = Mixture([(prepared.train, weight) for prepared, weight in made], seed=file.seed, rows=file.rows)
    stores = [prepared.eval for prepared, _ in made if prepared.eval is not None]
    return mixture, HeldOut(stores, file.rows, file.evaluate.batches) if stores else None


def make_model(file: RunFile, folder: Path) -> None:
    """Writes config.json and tokenizer of a model that begins from nothing.

    Raises RunFileError, DataError, ModelError.
    """
    if file.model.tokenizer == "train":
        texts = chain.from_iterable(texts_of(source, home_dir()) for source in file.data.sources)
        train_tokenizer(texts, file.model.vocab_size, folder)
    else:
        for path in resolve(file.model.tokenizer).iterdir():
            if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_", "chat_template")):
                (folder / path.name).write_bytes(path.read_bytes())
    config = {"vocab_size": _vocabulary(folder), **_ids(folder), **file.model.config}
    try:
        model = ModelConfig.from_hf(config, "[model.config]")
    except (ConfigError, UnsupportedModelError) as error:
        raise RunFileError(str(error)) from None
    (folder / "config.json").write_text(json.dumps(model.to_hf(), indent=2) + "\n")


def _vocabulary(folder: Path) -> int:
    """How many tokens there are, in sixty-fours, so that meshes divide them."""
    import tokenizers

    count: int = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return -(-count // 64) * 64


def _ids(folder: Path) -> dict[str, Any]:
    """Ids of the tokens that begin and end a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    found = {}
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        found[f"{key}_id"] = None if text is None else tokenizer.token_to_id(text)
    return found
