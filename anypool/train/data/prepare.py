"""Texts to rows, once: the same texts, tokenizer and options are found again under their key.

<home>/hashes.json                    what files hashed to, so that big ones are read once
<home>/<kind>-<key>/job.json          what is to be done, in units
                   /tokenizer/…       what it is done with
                   /train-00000.array_record, eval-00000.array_record
                   /unit-00000.json   a unit that is done
                   /manifest.json     written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from anypool.models import ModelConfig
from anypool.paths import cache_dir
from anypool.train.data import manifest, python_docs, reading, workers
from anypool.train.data.errors import DataError, complaint
from anypool.train.data.manifest import FORMAT, Manifest, Options, SourceFile
from anypool.train.data.rows import RowStore
from anypool.train.data.source import MADE, Source, files_of
from anypool.train.data.tokens import FILES, TextTokenizer, check_fits
from anypool.train.data.unit import Job, finished

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how far it is, of what, in MiB."""

ROWS_OF_A_UNIT = 256
"""At least about so many, because the last row of a unit is not full."""
SMALLEST_UNIT, LARGEST_UNIT = 2**20, 2**30
UNITS = 256
"""About how many units big sources are divided into. Each becomes a file, and all of them are open when rows are read.
"""


def home_dir() -> Path:
    """Where prepared data is kept unless told otherwise."""
    return cache_dir() / "data"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Rows on disk, and what is known of them. eval: None if nothing was to be held out."""

    name: str
    folder: Path
    manifest: Manifest
    train: RowStore
    eval: RowStore | None

    @classmethod
    def open(cls, folder: Path, name: str = "") -> Prepared:
        """name: of the dataset, in sample ids; "" is the folder's. Raises DataError if nothing whole is there."""
        found, name = manifest.read(folder), name or folder.name
        masked = found.options.learn == "answers"

        def store(name: str, part: manifest.Part) -> RowStore:
            return RowStore(name, folder, part.shards, found.options.sequence_length, found.token_type, masked)

        held = store(f"{name} (held out)", found.eval) if found.eval.rows else None
        return cls(name, folder, found, store(name, found.train), held)


def prepare(
    source: Source,
    tokenizer: Path,
    home: Path,
    *,
    sequence_length: int,
    eval_fraction: float = 0.0,
    model: ModelConfig | None = None,
    workers: int | None = None,
    progress: Progress = lambda *_: None,
) -> Prepared:
    """Rows of a source, made unless they are there. Work that was interrupted goes on where it was.

    Args:
        tokenizer: the directory of a Hugging Face model, or only of its tokenizer.
        home: where prepared data is kept.
        sequence_length: tokens of a row.
        eval_fraction: the part of all documents that is held out. Which ones depends on their text alone.
        model: what is to learn from them, to check that it can.
        workers: processes; None is one for each core.

    Raises DataError, which names the file and the place in it.
    """
    try:
        return _prepare(source, tokenizer, home, sequence_length, eval_fraction, model, workers, progress)
    except OSError as error:
        raise DataError(complaint(error)) from error


def _prepare(
    source: Source,
    tokenizer: Path,
    home: Path,
    sequence_length: int,
    eval_fraction: float,
    model: ModelConfig | None,
    workers: int | None,
    progress: Progress,
) -> Prepared:
    if not 0 <= eval_fraction < 1:
        raise DataError(
            f"eval_fraction = {eval_fraction}: must be from 0 to below 1, 0.01 for one document in a hundred"
        )
    if workers is not None and workers < 1:
        raise DataError(f"workers = {workers}: must be at least 1")
    loaded = TextTokenizer.load(tokenizer)
    check_fits(loaded, sequence_length, model)
    home = home.expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    if source.kind in MADE:
        paths = [python_docs.write(source.kind, home)]
    else:
        paths = [path.absolute() for path in files_of(source.kind, source.path)]
    before = [_stamp(path) for path in paths]
    files = _hashed(paths, home / "hashes.json", progress)
    options = Options(source.kind, source.field, source.split, source.learn, sequence_length, float(eval_fraction))
    tokenizer_hash = loaded.hash(tokenizer, source.chats)
    # Not the files' names: what they hold decides.
    described = [FORMAT, options, [(file.size, file.blake3) for file in files], tokenizer_hash]
    key = blake3(msgspec.json.encode(described)).hexdigest()
    folder = home / f"{source.kind}-{key[:16]}"
    if (folder / manifest.FILE).is_file():
        return Prepared.open(folder, source.name)

    folder.mkdir(exist_ok=True)
    with _alone(folder / "lock"):
        if not (folder / manifest.FILE).is_file():
            _copy_tokenizer(tokenizer, folder / "tokenizer")
            result = _units(source, paths, options, folder, workers or _cores(), progress)
            if changed := [path for path, stamp in zip(paths, before, strict=True) if _stamp(path) != stamp]:
                raise DataError(f"{changed[0]} was changed while it was read; prepare it again once it stays as it is")
            _check_result(source, eval_fraction, result)
            whole = Manifest(
                FORMAT, key, options, files, tokenizer_hash, loaded.largest_id + 1, loaded.eot_id, loaded.token_type,
                result.train, result.eval, result.counts,
            )  # fmt: skip
            manifest.publish(folder / manifest.FILE, whole)
    return Prepared.open(folder, source.name)


def _units(
    source: Source, paths: list[Path], options: Options, folder: Path, processes: int, progress: Progress
) -> manifest.UnitResult:
    """Makes the units that are not made yet, and adds all up."""
    total = sum(path.stat().st_size for path in paths)
    # About four bytes to a token. The division must not depend on how many processes there are.
    least = max(SMALLEST_UNIT, ROWS_OF_A_UNIT * options.sequence_length * 4)
    target = max(least, min(total // UNITS, LARGEST_UNIT))
    kind = "chat" if source.kind == "python-chat" else "jsonl" if source.kind == "python-docs" else source.kind
    readable = dataclasses.replace(source, kind=kind, path=str(paths[0]))
    units: list[list[tuple[int, int, int]]] = [[]]
    sizes = [0]
    for part, size in reading.parts(readable, paths, target):
        if sizes[-1] >= target:
            units.append([])
            sizes.append(0)
        units[-1].append((part.file, part.start, part.stop))
        sizes[-1] += size
    manifest.publish(folder / "job.json", Job(options, [str(path) for path in paths], units))

    results = {number: found for number in range(len(units)) if (found := finished(folder, number))}
    left = [number for number in range(len(units)) if number not in results]
    done = sum(sizes[number] for number in results)

    def made(number: int) -> None:
        nonlocal done
        done += sizes[number]
        progress("tokenising", _mib(done), _mib(sum(sizes)))

    if left:
        progress("tokenising", _mib(done), _mib(sum(sizes)))
        workers.make(folder, left, processes, made)
    return manifest.add([_certain(folder, number, results.get(number)) for number in range(len(units))])


def _certain(folder: Path, number: int, known: manifest.UnitResult | None) -> manifest.UnitResult:
    found = known or finished(folder, number)
    if found is None:
        raise DataError(f"{folder}: unit {number} vanished while others were made; prepare the data again")
    return found


def _check_result(source: Source, eval_fraction: float, result: manifest.UnitResult) -> None:
    what = source.path or source.kind
    if not result.train.rows and not result.eval.rows:
        counts = result.counts
        why = (
            "it has no document"
            if not sum(counts.lengths)
            else "none of its answers fits in a row; use a longer sequence_length"
        )
        raise DataError(f"{what} gives no row: {why}")
    if not result.train.rows:
        raise DataError(
            f"eval_fraction = {eval_fraction}: all documents of {what} are held out; use less, or more documents"
        )
    if eval_fraction and not result.eval.rows:
        raise DataError(
            f"eval_fraction = {eval_fraction}: none of the {result.train.documents} documents of {what} is held out; "
            "use more, or 0; a text file can be divided with split = 'blank-line'"
        )


def _hashed(paths: list[Path], cache: Path, progress: Progress) -> list[SourceFile]:
    """Hashes of files, from the cache for those that have not changed since."""
    try:
        known = msgspec.json.decode(cache.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        known = {}
    total, done = sum(path.stat().st_size for path in paths), 0
    found, new = [], False
    for path in paths:
        stamp = _stamp(path)
        if stamp not in known:
            known[stamp] = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
            new = True
        done += path.stat().st_size
        progress("reading", _mib(done), _mib(total))
        found.append(SourceFile(str(path), path.stat().st_size, known[stamp]))
    if new:
        manifest.publish(cache, known)
    return found


def _stamp(path: Path) -> str:
    """What changes when a file does."""
    state = path.stat()
    return f"{path} {state.st_size} {state.st_mtime_ns} {state.st_ino}"


def _copy_tokenizer(directory: Path, into: Path) -> None:
    into.mkdir(exist_ok=True)
    for name in FILES:
        if (directory / name).is_file():
            unfinished = into / f".{name}.{os.getpid()}"
            shutil.copyfile(directory / name, unfinished)
            unfinished.replace(into / name)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits for others who prepare the same. On a file system without locks both do the work, to the same result."""
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mib(size: int) -> int:
    return -(-size // 2**20)
