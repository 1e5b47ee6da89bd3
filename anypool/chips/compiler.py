"""The compilers that turn a model into a program for a chip: what they are, and what they refuse.

One file a compiler in `data/compilers/`; a chip's file names its compiler and says what to pass to it.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources

from anypool.chips.errors import ChipFileError, nearest
from anypool.chips.facts import Source, check_keys, read_sources, wrong

PROOFS = ("compiled", "code generation only", "lowered and linted", "none")


@dataclass(frozen=True)
class Compiler:
    """What builds programs for a chip.

    platform: JAX's name for it ("tpu", "cuda", "rocm", "neuron", "cpu"), "" where JAX has none.
    package: what provides it. extra: the extra of this package that installs it, "" if there is none.
    proof: what can be shown without the chip, one of PROOFS.
    environment: variables it needs in order to compile with no such chip present.
    jax: the versions of JAX it takes, "" where it comes with JAX.
    pallas: the Pallas back ends that lower for it. refuses: what it does not compile, in words.
    """

    name: str
    title: str
    platform: str
    package: str
    extra: str
    proof: str
    environment: Mapping[str, str]
    pallas: tuple[str, ...]
    refuses: tuple[str, ...]
    sources: Mapping[str, Source]
    jax: str = ""
    note: str = ""


@functools.cache
def load_compiler(name: str) -> Compiler:
    """The compiler of this name. Raises ChipFileError."""
    folder = resources.files("anypool.chips") / "data" / "compilers"
    file = folder / f"{name}.toml"
    if not file.is_file():
        known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir())
        raise ChipFileError(f"compiler.name = {name!r}: there is no data/compilers/{name}.toml{nearest(name, known)}")
    return parse_compiler(file.read_text(encoding="utf-8"), f"compilers/{name}.toml")


def parse_compiler(text: str, file: str) -> Compiler:
    """A compiler's file, checked. Raises ChipFileError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ChipFileError(f"{file}: not valid TOML: {error}") from None
    check_keys(data, [field.name for field in fields(Compiler)], file, "")
    for key in ("name", "title", "platform", "package", "extra"):
        if not isinstance(data.get(key), str):
            raise wrong(file, key, data.get(key), "must be a text")
    sources = read_sources(data.get("sources"), file)
    if data.get("proof") not in PROOFS:
        raise wrong(file, "proof", data.get("proof"), f"must be one of {', '.join(PROOFS)}")
    return Compiler(
        name=data["name"],
        title=data["title"],
        platform=data["platform"],
        package=data["package"],
        extra=data["extra"],
        proof=data["proof"],
        environment=dict(data.get("environment", {})),
        pallas=tuple(data.get("pallas", ())),
        refuses=tuple(data.get("refuses", ())),
        sources=sources,
        jax=data.get("jax", ""),
        note=data.get("note", ""),
    )
