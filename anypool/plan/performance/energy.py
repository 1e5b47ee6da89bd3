"""Energy and carbon of a rate of tokens, and where a site's figures come from.

Three amounts, never mixed: of the chips, of the machines that hold them (IT), of the site (IT times PUE). A chip's
watts come with a basis. With `tdp` or `measured` they are the chip's alone, and IT is known only if the caller says by
how much machines and network add to it. With `rack/chips` or `pod/chips` machines and network are in it, and the chip's
share is not known. A TDP is a limit: joules from it are the most that a chip can need.

Carbon is location-based: the site's energy times the grid's yearly average. Embodied carbon is not in it.
"""

from __future__ import annotations

import csv
import functools
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any

from anypool.chips import Chip, nearest
from anypool.plan.performance.errors import PerformanceError

WITH_MACHINES = ("rack/chips", "pod/chips")
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Region:
    """Yearly figures of one cloud region, None where the source has none."""

    provider: str
    region: str
    pue: float | None
    grams_co2e_per_kwh: float | None
    year: str
    source: str


@dataclass(frozen=True)
class Site:
    """Where chips stand.

    pue: of the site. it_factor: watts of the machines, chips and network included, over the chips' watts, at least 1.
    grams_co2e_per_kwh: of the grid. source: of these figures. None: not known.
    """

    pue: float | None = None
    grams_co2e_per_kwh: float | None = None
    it_factor: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        """Raises PerformanceError."""
        for name, value, least, most in (
            ("pue", self.pue, 1.0, 3.0),
            ("it_factor", self.it_factor, 1.0, 5.0),
            ("grams_co2e_per_kwh", self.grams_co2e_per_kwh, 0.0, 2000.0),
        ):
            if value is not None and not least <= value <= most:
                raise PerformanceError(f"{name} = {value:g}: must be {least:g} to {most:g}")


@dataclass(frozen=True)
class Energy:
    """Of one token. None: not known, and `note` says why. power_basis: what the chip's watts are."""

    power_basis: str | None
    chip_joules_per_token: float | None
    it_joules_per_token: float | None
    facility_joules_per_token: float | None
    grams_co2e_per_million_tokens: float | None
    note: str

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@functools.cache
def regions() -> tuple[Region, ...]:
    """Every region with a figure."""
    text = (resources.files("anypool.plan") / "data" / "regions.csv").read_text(encoding="utf-8")

    def number(cell: str) -> float | None:
        return float(cell) if cell else None

    return tuple(
        Region(
            row["provider"],
            row["region"],
            number(row["pue"]),
            number(row["grams_co2e_per_kwh"]),
            row["year"],
            row["source"],
        )
        for row in csv.DictReader(io.StringIO(text))
    )


def site_of(name: str, it_factor: float | None = None) -> Site:
    """The site "provider/region" or "region". Raises PerformanceError, naming the nearest that is known."""
    known = {f"{r.provider}/{r.region}": r for r in regions()} | {r.region: r for r in regions()}
    found = known.get(name.strip().lower())
    if found is None:
        hint = nearest(name, known) or f"; known: {', '.join(r.region for r in regions())}"
        raise PerformanceError(f"region = {name!r}: no figures are known{hint}; or give pue and grams of CO2e yourself")
    return Site(found.pue, found.grams_co2e_per_kwh, it_factor, f"{found.source} ({found.year})")


def energy_per_token(
    chip: Chip, tokens_per_second_per_chip: float, site: Site, watts: float | None = None, basis: str | None = None
) -> Energy:
    """Joules of one token. watts, basis: of one chip at this work, where better is known than the chip's file."""
    if watts is None:
        watts = chip.watts.value if chip.watts else None
        basis = chip.power_basis
    if watts is None:
        return Energy(None, None, None, None, None, f"the watts of a {chip.name} are not known")
    joules = watts / tokens_per_second_per_chip
    chip_joules: float | None
    it_joules: float | None
    notes = []
    if basis in WITH_MACHINES:
        chip_joules, it_joules = None, joules
        notes.append(f"watts are {basis}: machines and network are in them")
    else:
        chip_joules = joules
        it_joules = joules * site.it_factor if site.it_factor is not None else None
        if basis == "tdp":
            notes.append("watts are a limit (tdp): these joules are the most")
        if it_joules is None:
            notes.append("IT is not known: say by how much machines and network add to the chips (it_factor)")
    facility = it_joules * site.pue if it_joules is not None and site.pue is not None else None
    if site.pue is None:
        notes.append("the site is not known: give its PUE or a region")
    grams = None
    if facility is not None and site.grams_co2e_per_kwh is not None:
        grams = facility * 1e6 / JOULES_PER_KWH * site.grams_co2e_per_kwh
    elif facility is not None:
        notes.append("the grid's carbon is not known: give grams of CO2e a kWh")
    return Energy(basis, chip_joules, it_joules, facility, grams, "; ".join(notes))
