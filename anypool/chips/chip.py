"""The chips: one TOML file each in `data/`, read and checked when first asked for.

Three ways in:

    load_chip("v6e").hbm_bytes        a Fact, or None where the number is not known
    load_chip("trillium")             the same chip, by another of its names
    chips()                           all of them
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from anypool.chips.compiler import Compiler, load_compiler
from anypool.chips.errors import ChipFileError, UnknownChipError, nearest
from anypool.chips.facts import Fact, Quantity, Source, check_keys, read_fact, read_sources, wrong
from anypool.chips.plausible import check_numbers
from anypool.chips.topology import Topology, write

DTYPES = ("f64", "f32", "tf32", "bf16", "f16", "fp8", "int8", "mxfp8", "fp4", "mxfp4")
POWER_BASES = {
    "tdp": "the vendor's limit for the board",
    "measured": "measured on the chip while it worked",
    "rack/chips": "a rack's power divided by its chips: holds the hosts, the network and the fans",
    "pod/chips": "a pod's power divided by its chips: holds the hosts, the network and the fans",
}
# Every number of a chip but its peak rates: the field of the file, the attribute, and what is counted.
FIELDS: dict[str, tuple[str, Quantity]] = {
    "memory.capacity": ("hbm_bytes", Quantity.amount),
    "memory.usable_per_device": ("usable_hbm_bytes_per_device", Quantity.amount),
    "memory.bandwidth": ("hbm_bytes_per_second", Quantity.bytes_per_second),
    "scale_up.bandwidth": ("scale_up_bytes_per_second_one_way", Quantity.bytes_per_second),
    "scale_up.link": ("scale_up_link_bytes_per_second_one_way", Quantity.bytes_per_second),
    "scale_up.chips": ("scale_up_chips", Quantity.count),
    "scale_out.bandwidth": ("scale_out_bytes_per_second_one_way", Quantity.bytes_per_second),
    "power.watts": ("watts", Quantity.watts),
    "layout.devices_per_chip": ("devices_per_chip", Quantity.count),
    "layout.chips_per_host": ("chips_per_host", Quantity.count),
}
_TABLES = {
    "memory": ("capacity", "usable_per_device", "bandwidth"),
    "scale_up": ("bandwidth", "link", "chips", "kind"),
    "scale_out": ("bandwidth",),
    "power": ("watts", "power_basis"),
    "layout": ("devices_per_chip", "chips_per_host"),
    "topology": ("dimensions", "shapes", "multiple_of", "largest", "name_counts", "source"),
    "compiler": ("name", "target", "options", "device", "source"),
    "kubernetes": ("resource", "node_labels", "source"),
    "ray": ("resource", "accelerator_type", "source"),
}
_KEYS = ("name", "title", "vendor", "aliases", "note", "sources", "flops", *_TABLES)


@dataclass(frozen=True)
class CompilerTarget:
    """How a chip is named to its compiler.

    target: the name it knows the chip by: "v5e" of libtpu, "sm_90" of XLA's GPU compiler, "trn2" of neuronx-cc.
    options: what else is passed when a topology is asked for. device: the properties of a device that the GPU
    compiler reads from a target description (`shared_memory_per_core`, `core_count`, ...), {} elsewhere.
    """

    compiler: Compiler
    target: str
    options: Mapping[str, Any]
    device: Mapping[str, int | float | str]
    source: str


@dataclass(frozen=True)
class Kubernetes:
    """What a pod asks for (`resource`, in whole chips unless the note says otherwise) and which nodes have it."""

    resource: str
    node_labels: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class Ray:
    """Ray's resource of this chip, and its accelerator type where Ray has one."""

    resource: str
    accelerator_type: str | None
    source: str


@dataclass(frozen=True)
class Chip:
    """One physical accelerator package. A number that is not known is None; nothing here is guessed.

    peak_flops: peak dense operations a second of the whole chip, by dtype of the operands. Never sparse.
    lacks_dtypes: dtypes that its matrix units do not take, which is known and not a missing number.
    usable_hbm_bytes_per_device: what the compiler or the driver lets one device use.
    scale_up_*: the fast network between chips (ICI, NVLink, NeuronLink, Infinity Fabric, UB): bytes a second one
        way out of one chip over all its links, over one link where there are links, and chips in a domain.
    scale_out_*: the network beyond it, one way, a chip's share.
    devices_per_chip: how many devices JAX shows for one chip.
    """

    name: str
    title: str
    vendor: str
    aliases: tuple[str, ...]
    peak_flops: Mapping[str, Fact]
    topology: Topology
    compiler: CompilerTarget
    sources: Mapping[str, Source]
    lacks_dtypes: tuple[str, ...] = ()
    hbm_bytes: Fact | None = None
    usable_hbm_bytes_per_device: Fact | None = None
    hbm_bytes_per_second: Fact | None = None
    scale_up_kind: str = ""
    scale_up_bytes_per_second_one_way: Fact | None = None
    scale_up_link_bytes_per_second_one_way: Fact | None = None
    scale_up_chips: Fact | None = None
    scale_out_bytes_per_second_one_way: Fact | None = None
    watts: Fact | None = None
    power_basis: str | None = None
    devices_per_chip: Fact | None = None
    chips_per_host: Fact | None = None
    kubernetes: Kubernetes | None = None
    ray: Ray | None = None
    note: str = ""

    @property
    def jax_platform(self) -> str | None:
        """The JAX platform that drives it, None where there is none."""
        return self.compiler.compiler.platform or None

    @property
    def numbers(self) -> dict[str, Fact | None]:
        """Every number by its field of the file, None where it is not known."""
        rates: dict[str, Fact | None] = {f"flops.{dtype}": self.peak_flops.get(dtype) for dtype in ("bf16", "fp8")}
        rates |= {f"flops.{dtype}": fact for dtype, fact in self.peak_flops.items()}
        return rates | {field: getattr(self, attribute) for field, (attribute, _) in FIELDS.items()}


def load_chip(name: str) -> Chip:
    """The chip of this name or alias, in any case. Raises UnknownChipError with the nearest name."""
    names = _names()
    found = names.get(name.strip().lower())
    if found is None:
        hint = nearest(name, names) or ": `anypool chips` lists them"
        raise UnknownChipError(f"there is no chip {name!r}{hint}")
    return _room()[found]


def chips() -> tuple[Chip, ...]:
    """Every chip of the room, by vendor and name."""
    return tuple(_room().values())


def chip_names() -> tuple[str, ...]:
    """Every name and alias, for suggestions."""
    return tuple(_names())


@functools.cache
def _room() -> dict[str, Chip]:
    folder = resources.files("anypool.chips") / "data"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]
    room = [parse_chip(file.read_text(encoding="utf-8"), file.name) for file in files]
    return {chip.name: chip for chip in sorted(room, key=lambda chip: (chip.vendor, chip.name))}


@functools.cache
def _names() -> dict[str, str]:
    names: dict[str, str] = {}
    for chip in _room().values():
        for name in (chip.name, *chip.aliases):
            if name in names:
                raise wrong(f"{chip.name}.toml", "aliases", name, f"is already a name of {names[name]}: remove one")
            names[name] = chip.name
    return names


def parse_chip(text: str, file: str) -> Chip:
    """A chip's file, every number checked. Raises ChipFileError, naming file, field, value and fix."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ChipFileError(f"{file}: not valid TOML: {error}") from None
    _check_keys(data, file)
    sources = read_sources(data.get("sources"), file)
    facts: dict[str, Any] = {}
    for field, (attribute, quantity) in FIELDS.items():
        table, key = field.split(".")
        if key in data.get(table, {}):
            facts[attribute] = read_fact(data[table][key], file, field, quantity, sources)
    peak_flops = {
        dtype: read_fact(entry, file, f"flops.{dtype}", Quantity.operations_per_second, sources)
        for dtype, entry in data.get("flops", {}).items()
        if dtype != "lacks"
    }
    chip = Chip(
        name=data["name"],
        title=data["title"],
        vendor=data["vendor"],
        aliases=tuple(data.get("aliases", ())),
        peak_flops=peak_flops,
        topology=_topology(data["topology"], file, sources),
        compiler=_compiler(data["compiler"], file, sources),
        sources=sources,
        lacks_dtypes=tuple(data.get("flops", {}).get("lacks", ())),
        scale_up_kind=data.get("scale_up", {}).get("kind", ""),
        kubernetes=_kubernetes(data.get("kubernetes"), file, sources),
        ray=_ray(data.get("ray"), file, sources),
        note=data.get("note", ""),
    )
    chip = replace(chip, power_basis=_power_basis(data.get("power", {}), file), **facts)
    check_numbers(chip.peak_flops, {field: getattr(chip, name) for field, (name, _) in FIELDS.items()}, data, file)
    return chip


def _check_keys(data: Mapping[str, Any], file: str) -> None:
    check_keys(data, _KEYS, file, "")
    for key in ("name", "title", "vendor", "topology", "compiler"):
        if key not in data:
            raise ChipFileError(f"{file}: {key} is missing: add it")
    if file != f"{data['name']}.toml":
        raise wrong(file, "name", data["name"], f"must be the file's own name, {file.removesuffix('.toml')!r}")
    for table, keys in _TABLES.items():
        check_keys(data.get(table, {}), keys, file, table)
    flops = data.get("flops", {})
    for dtype in flops:
        if dtype not in (*DTYPES, "lacks"):
            fix = f"peak rates are dense, and by dtype: {', '.join(DTYPES)}"
            raise wrong(file, f"flops.{dtype}", flops[dtype], fix)
    for dtype in flops.get("lacks", ()):
        if dtype not in DTYPES or dtype in flops:
            raise wrong(file, "flops.lacks", dtype, f"must be one of {', '.join(DTYPES)}, and have no rate")


def _source(data: Mapping[str, Any], file: str, table: str, sources: Mapping[str, Source]) -> str:
    if data.get("source") not in sources:
        fix = f"must name one of this file's sources: {', '.join(sources)}"
        raise wrong(file, f"{table}.source", data.get("source"), fix)
    return sources[data["source"]].where


def _topology(data: Mapping[str, Any], file: str, sources: Mapping[str, Source]) -> Topology:
    dimensions = data.get("dimensions")
    if dimensions not in (1, 2, 3):
        raise wrong(file, "topology.dimensions", dimensions, "must be 1, 2 or 3")
    shapes = tuple(tuple(int(axis) for axis in str(shape).split("x")) for shape in data.get("shapes", ()))
    for shape in shapes:
        if len(shape) != dimensions or min(shape) < 1:
            raise wrong(file, "topology.shapes", write(shape), f"must have {dimensions} positive dimensions")
    if data.get("name_counts", "") not in ("", "cores", "chips"):
        raise wrong(file, "topology.name_counts", data["name_counts"], 'must be "cores" or "chips"')
    return Topology(
        dimensions=dimensions,
        shapes=shapes,
        multiple_of=data.get("multiple_of"),
        largest=data.get("largest"),
        name_counts=data.get("name_counts", ""),
        source=_source(data, file, "topology", sources),
    )


def _compiler(data: Mapping[str, Any], file: str, sources: Mapping[str, Source]) -> CompilerTarget:
    return CompilerTarget(
        compiler=load_compiler(data.get("name", "")),
        target=data.get("target", ""),
        options=dict(data.get("options", {})),
        device=dict(data.get("device", {})),
        source=_source(data, file, "compiler", sources),
    )


def _kubernetes(data: Any, file: str, sources: Mapping[str, Source]) -> Kubernetes | None:
    if data is None:
        return None
    source = _source(data, file, "kubernetes", sources)
    return Kubernetes(_resource(data, file, "kubernetes"), dict(data.get("node_labels", {})), source)


def _ray(data: Any, file: str, sources: Mapping[str, Source]) -> Ray | None:
    if data is None:
        return None
    return Ray(_resource(data, file, "ray"), data.get("accelerator_type"), _source(data, file, "ray", sources))


def _resource(data: Mapping[str, Any], file: str, table: str) -> str:
    if not isinstance(data.get("resource"), str):
        raise wrong(file, f"{table}.resource", data.get("resource"), "must be the name that a request for it uses")
    return str(data["resource"])


def _power_basis(data: Mapping[str, Any], file: str) -> str | None:
    if not data:
        return None
    basis = data.get("power_basis")
    if basis not in POWER_BASES:
        raise wrong(file, "power.power_basis", basis, f"watts need a basis: one of {', '.join(POWER_BASES)}")
    return str(basis)
