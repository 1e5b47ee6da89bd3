"""Was anything lost? One stream that was interrupted against the same stream that was not."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher

from anypool.measure import Stream


@dataclass(frozen=True)
class Difference:
    """tokens_lost: of the unbroken stream and missing here. tokens_repeated: here and not in the unbroken stream.

    what: one line for each thing that differs; none if the streams are the same to the last byte.
    """

    tokens_lost: int
    tokens_repeated: int
    what: tuple[str, ...]


def compare(unbroken: Stream, broken: Stream) -> Difference:
    """Text, token ids, finish reason, usage and errors of two streams of the same request."""
    what = []
    if broken.error is not None:
        what.append(f"it failed: {broken.error}")
    if broken.text != unbroken.text:
        at = _first_difference(unbroken.text, broken.text)
        what.append(
            f"text from character {at}: {broken.text[at : at + 60]!r} instead of {unbroken.text[at : at + 60]!r}"
        )
    if broken.token_ids != unbroken.token_ids:
        at = _first_difference(unbroken.token_ids, broken.token_ids)
        what.append(
            f"token ids from {at} of {len(unbroken.token_ids)}: "
            f"{broken.token_ids[at : at + 12]} instead of {unbroken.token_ids[at : at + 12]}"
        )
    if broken.finish_reason != unbroken.finish_reason:
        what.append(f"finish_reason {broken.finish_reason!r} instead of {unbroken.finish_reason!r}")
    if broken.usage != unbroken.usage:
        what.append(f"usage {broken.usage} instead of {unbroken.usage}")
    lost, repeated = _lost_and_repeated(unbroken.token_ids, broken.token_ids)
    return Difference(lost, repeated, tuple(what))


def _lost_and_repeated(unbroken: list[int], broken: list[int]) -> tuple[int, int]:
    """Tokens missing and tokens too many; one that was replaced by another is neither, but a difference."""
    lost = repeated = 0
    for kind, start, end, other_start, other_end in SequenceMatcher(
        None, unbroken, broken, autojunk=False
    ).get_opcodes():
        if kind != "equal":
            surplus = (other_end - other_start) - (end - start)
            lost += max(0, -surplus)
            repeated += max(0, surplus)
    return lost, repeated


def _first_difference(one: str | list[int], other: str | list[int]) -> int:
    """The first index at which two sequences differ, which may be the end of the shorter."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
