"""Texts to rows of tokens, and which of them each step learns from.

- `Source(kind, path, …)`: documents, as a user names them; `kind_of(path)` guesses the kind, `named(sources)`
  makes their names differ;
- `prepare(source, tokenizer, home, sequence_length=…)` -> `Prepared`, with `train` and `eval` rows: tokenised and
  packed
  once, found again under a key of all that decides them; interrupted work goes on where it was; `home_dir()` is where;
- `Mixture([(prepared.train, weight), …], seed=…, rows=…).rows_at(step, part)` -> `Rows`: a function of seed and step;
- `Reader(mixture, first_step, part)`: the same, read before it is needed;
- `RowStore.in_order(rows)`: all rows once, for evaluation;
- `train_tokenizer(texts, vocab_size, directory)`, `texts_of(source, home)`: a vocabulary for a model that begins from
  nothing;
- `check_fits(tokenizer, sequence_length, model)`, `TextTokenizer`: whether rows are for a model;
- `DataError`: what can be wrong with the texts.
"""

from anypool.train.data.errors import DataError
from anypool.train.data.order import Mixture
from anypool.train.data.prepare import Prepared, home_dir, prepare
from anypool.train.data.reader import Reader
from anypool.train.data.rows import Rows, RowStore, SampleId
from anypool.train.data.source import KINDS, Source, kind_of, named
from anypool.train.data.tokens import TextTokenizer, check_fits
from anypool.train.data.vocabulary import texts_of, train_tokenizer

__all__ = [
    "KINDS",
    "DataError",
    "Mixture",
    "Prepared",
    "Reader",
    "RowStore",
    "Rows",
    "SampleId",
    "Source",
    "TextTokenizer",
    "check_fits",
    "home_dir",
    "kind_of",
    "named",
    "prepare",
    "texts_of",
    "train_tokenizer",
]
