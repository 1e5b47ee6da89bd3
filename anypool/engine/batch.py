"""From the scheduler's step to the arrays the device reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anypool.engine.request import Request
from anypool.engine.scheduler import Scheduled
from anypool.engine.shapes import Shape, ShapeSet
from anypool.ops.paged_attention import BLOCK
from anypool.ops.sampling import Sampler, SamplingRows

LEAST_EDITS = 256
"""The smallest compiled number of logits that a row may edit."""
MOST_TOP_K = 2**31 - 1
"""More than any vocabulary; what 32 bits hold."""


# T token  R row  M block of a table  S sample  E edit
@dataclass(frozen=True)
class Batch:
    """One step as arrays of a compiled shape (see ops/paged_attention.py).

    sample_S: index into the step's tokens of each token after which one is drawn; `requests` are those it is drawn for.
    """

    shape: Shape
    tokens_T: np.ndarray
    start_R: np.ndarray
    count_R: np.ndarray
    table_RM: np.ndarray
    sample_S: np.ndarray
    sampler: Sampler
    sampling: SamplingRows
    requests: list[Request]


def build(items: Sequence[Scheduled], block_table: np.ndarray, shapes: ShapeSet) -> Batch:
    """Lays the items of a step out in rows: single tokens first, then chunks in tiles of 16.

    block_table: int32, row `request.slot` holds a request's blocks in order (`Scheduler.block_table`).
    """
    singles = [item for item in items if item.count == 1]
    chunks = [item for item in items if item.count > 1]
    tiles = sum(-(-item.count // BLOCK) for item in chunks)
    longest = max(item.start + item.count for item in items)
    shape = shapes.fit(len(singles), tiles, -(-longest // BLOCK))
    tokens_T = np.zeros(shape.tokens, np.int32)
    start_R = np.zeros(shape.rows, np.int32)
    count_R = np.zeros(shape.rows, np.int32)
    table_RM = np.zeros((shape.rows, shape.blocks), np.int32)
    width = min(shape.blocks, block_table.shape[1])
    sample_S = np.zeros(shape.samples, np.int32)
    requests: list[Request] = []
    for row, item in enumerate(singles):
        tokens_T[row] = item.request.token_ids[item.start]
        start_R[row], count_R[row] = item.start, 1
        table_RM[row, :width] = block_table[item.request.slot, :width]
        if item.samples:
            sample_S[len(requests)] = row
            requests.append(item.request)
    row = shape.decode
    for item in chunks:
        end = item.start + item.count
        for start in range(item.start, end, BLOCK):
            count = min(BLOCK, end - start)
            first = shape.decode + BLOCK * (row - shape.decode)
            tokens_T[first : first + count] = item.request.token_ids[start : start + count]
            start_R[row], count_R[row] = start, count
            table_RM[row, :width] = block_table[item.request.slot, :width]
            row += 1
        if item.samples:
            sample_S[len(requests)] = first + count - 1
            requests.append(item.request)
    sampler, sampling = sampling_rows(requests, shape.samples)
    return Batch(shape, tokens_T, start_R, count_R, table_RM, sample_S, sampler, sampling, requests)


def sampling_rows(requests: Sequence[Request], rows: int) -> tuple[Sampler, SamplingRows]:
    """The sampling parameters of a step's draws, one row each, and the least sampler that serves them all."""
    draw = filters = logprobs = False
    edits: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for row, request in enumerate(requests):
        params = request.params
        draw |= params.temperature > 0
        filters |= params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        logprobs |= params.logprobs is not None
        edited = logit_edits(request)
        if edited is not None:
            edits[row] = edited
    widest = max((len(edited[0]) for edited in edits.values()), default=0)
    filters |= widest > 0  # one compiled sampler serves both
    width = edit_bucket(max(widest, 1) if filters else 0)
    sampling = SamplingRows.neutral(rows, width)
    for row, request in enumerate(requests):
        params = request.params
        sampling.temperature[row] = params.temperature
        sampling.top_k[row] = min(params.top_k, MOST_TOP_K)
        sampling.top_p[row] = params.top_p
        sampling.min_p[row] = params.min_p
        sampling.seed[row] = (params.seed & 0xFFFFFFFF, (params.seed >> 32) & 0xFFFFFFFF)
        sampling.position[row] = request.num_tokens
        sampling.repetition[row] = params.repetition_penalty
        if row in edits:
            ids, bias, seen = edits[row]
            sampling.edit_ids[row, : len(ids)] = ids
            sampling.edit_bias[row, : len(ids)] = bias
            sampling.edit_seen[row, : len(ids)] = seen
    return Sampler(draw=draw or filters, filters=filters, edits=width, logprobs=logprobs), sampling


def edit_bucket(widest: int) -> int:
    """The compiled number of edits that holds `widest`: 0, 256, 2048, ... eight times the one before, without end."""
    width = LEAST_EDITS if widest else 0
    while width < widest:
        width *= 8
    return width


def logit_edits(request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Ids whose logits a request edits, what is added to each, and 1 where the repetition penalty applies.

    Presence and frequency penalties count generated tokens (those of a resumed stream too); the repetition penalty
    also sees the prompt. None when nothing is edited.
    """
    params = request.params
    counted = params.presence_penalty != 0 or params.frequency_penalty != 0
    repeated = params.repetition_penalty != 1
    if not (counted or repeated or params.logit_bias):
        return None
    bias: dict[int, float] = dict(params.logit_bias)
    if counted:
        ids, counts = np.unique(request.token_ids[request.output_start :], return_counts=True)
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
            penalty = params.presence_penalty + params.frequency_penalty * count
            bias[token] = bias.get(token, 0.0) - penalty
    seen = set(request.token_ids) if repeated else set()
    every = np.array(sorted(seen | bias.keys()), np.int32)
    added = np.array([bias.get(token, 0.0) for token in every.tolist()], np.float32)
    marked = np.array([token in seen for token in every.tolist()], np.float32)
    return every, added, marked
