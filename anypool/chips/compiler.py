"""The compilers that turn a model into a program for a chip: what they are, and what they refuse.

One file a compiler in `data/compilers/`; a chip's file names its compiler and says what to pass to it.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from anypool.chips.errors import ChipFileError, nearest
from anypool.chips.facts import Source, check_keys, read_sources, wrong

PROOFS = ("compiled", "code generation only", "lowered and linted", "none")
SEVERITIES = ("error", "warning")


@dataclass(frozen=True)
class Rejection:
    """Something in StableHLO that a compiler refuses, or that is known to go wrong with it.

    operation: the StableHLO operation, "custom_call", or "type" for element types.
    when: the condition, in words; "" for always. `types`: the element types it is about; () for any.
    rule: the compiler's own error code where it has one. write: what to write instead.
    chips: the chips it holds for; () for all of this compiler's.
    """

    operation: str
    rule: str
    write: str
    severity: str
    source: Source
    when: str = ""
    types: tuple[str, ...] = ()
    chips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiler:
    """What builds programs for a chip.

    platform: JAX's name for it ("tpu", "cuda", "rocm", "neuron", "cpu"), "" where JAX has none.
    package: what provides it. extra: the extra of this package that installs it, "" if there is none.
    proof: what can be shown without the chip, one of PROOFS.
    environment: variables it needs in order to compile with no such chip present.
    pallas: the Pallas back ends that lower for it. custom_calls: the custom calls it accepts, () if not listed.
    """

    name: str
    title: str
    platform: str
    package: str
    extra: str
    proof: str
    environment: Mapping[str, str]
    pallas: tuple[str, ...]
    custom_calls: tuple[str, ...]
    rejects: tuple[Rejection, ...]
    sources: Mapping[str, Source]
    note: str = ""

    def rejections(self, chip: str) -> tuple[Rejection, ...]:
        """What it refuses for one chip."""
        return tuple(rejection for rejection in self.rejects if not rejection.chips or chip in rejection.chips)


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
    sources = read_sources(data.get("sources"), file)
    if data.get("proof") not in PROOFS:
        raise wrong(file, "proof", data.get("proof"), f"must be one of {', '.join(PROOFS)}")
    rejects = tuple(
        _rejection(entry, file, f"rejects[{index}]", sources) for index, entry in enumerate(data.get("rejects", []))
    )
    return Compiler(
        name=data["name"],
        title=data["title"],
        platform=data["platform"],
        package=data["package"],
        extra=data["extra"],
        proof=data["proof"],
        environment=dict(data.get("environment", {})),
        pallas=tuple(data.get("pallas", ())),
        custom_calls=tuple(data.get("custom_calls", ())),
        rejects=rejects,
        sources=sources,
        note=data.get("note", ""),
    )


def _rejection(data: Any, file: str, field: str, sources: Mapping[str, Source]) -> Rejection:
    check_keys(data, [entry.name for entry in fields(Rejection)], file, field)
    for key in ("operation", "rule", "write", "severity", "source"):
        if not isinstance(data.get(key), str) or not data[key]:
            raise wrong(file, f"{field}.{key}", data.get(key), "must be a text")
    if data["severity"] not in SEVERITIES:
        raise wrong(file, f"{field}.severity", data["severity"], f"must be one of {', '.join(SEVERITIES)}")
    if data["source"] not in sources:
        fix = f"must name one of this file's sources: {', '.join(sources)}"
        raise wrong(file, f"{field}.source", data["source"], fix)
    return Rejection(
        operation=data["operation"],
        rule=data["rule"],
        write=data["write"],
        severity=data["severity"],
        source=sources[data["source"]],
        when=data.get("when", ""),
        types=tuple(data.get("types", ())),
        chips=tuple(data.get("chips", ())),
    )
