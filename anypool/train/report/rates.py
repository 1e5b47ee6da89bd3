"""Model FLOPs utilisation: how much of what the chips could do became work on the model."""

from __future__ import annotations

from anypool.chips import ChipError, load_chip
from anypool.train.report.lines import PoolFacts

# A chip's file writes dtypes in short.
_SHORT = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


def peak_flops(pool: PoolFacts, compute_dtype: str) -> float | None:
    """Dense operations a second of the whole pool in `compute_dtype`; None where the chip's file has no such number."""
    try:
        fact = load_chip(pool.chip).peak_flops.get(_SHORT.get(compute_dtype, compute_dtype))
    except ChipError:
        return None
    return None if fact is None else fact.value * pool.chips


def utilisation(
    flops_per_token: float | None, tokens: float, seconds: float, pool: PoolFacts, compute_dtype: str
) -> float | None:
    """The model's FLOPs of `tokens` over what the pool can do in `seconds`; None where either is not known.

    The FLOPs are the model's own, forward and back, as `anypool.models.counts` counts them: what remat computes again
    is none of them, and causal attention counts once. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    peak = peak_flops(pool, compute_dtype)
    if peak is None or flops_per_token is None or seconds <= 0:
        return None
    return flops_per_token * tokens / seconds / peak
