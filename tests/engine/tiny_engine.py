"""A tiny model, and an engine over it whose turns are taken by hand, so that arrivals fall where a test puts them."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from anypool.engine.engine import Engine, Logprobs, StepResult
from anypool.engine.request import FinishReason, Request, SamplingParams
from anypool.engine.runner import Limits, Runner, cache_bytes
from anypool.models import ModelConfig
from anypool.models.decoder import forward_dense, logits
from tests.goldens import tiny

VOCAB = tiny.VOCAB
EOS = 2
CONTEXT = 96
BLOCKS = 8
"""Blocks that requests can hold: one long sequence and a short one."""

MODEL: dict[str, Any] = {"sliding_window": 40, "max_position_embeddings": CONTEXT}
"""Makes of the tiny Mistral one whose window is felt within the context, on the edge of no block."""


def write_model(directory: Path, variant: str = "mistral", **changes: Any) -> Path:
    """The Hugging Face directory of a tiny model with some values of its config.json changed."""
    tiny.write(directory, variant)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def load_runner(directory: Path, faster: bool) -> Runner:
    """A runner with a cache so small that a few requests must preempt each other."""
    config = ModelConfig.load(directory)
    limits = Limits(4, 64, CONTEXT, cache_bytes(config, BLOCKS * 16, jnp.float32))
    runner = Runner.load(directory, limits, faster=faster)
    assert runner.num_blocks == BLOCKS + 1
    return runner


def dense_logits(runner: Runner, token_ids: Sequence[int]) -> np.ndarray:
    """Logits f32 (T, V) after every token, by the dense pass that is tested against transformers."""
    tokens = np.zeros((1, runner.limits.max_model_len), np.int32)
    tokens[0, : len(token_ids)] = token_ids
    hidden = forward_dense(runner.params, jnp.asarray(tokens), jnp.zeros_like(tokens), runner.config, runner.kernels)
    return np.asarray(logits(runner.params, hidden, runner.kernels))[0, : len(token_ids)]


@dataclass
class Result:
    """What one request got."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Driver:
    """An engine without its thread. Limits given here are at most the runner's; each driver's cache starts empty."""

    def __init__(self, runner: Runner, max_num_seqs: int | None = None, token_budget: int | None = None) -> None:
        self.results: dict[str, Result] = {}
        self.matchable: set[bytes] = set()
        whole = runner.limits
        runner.limits = dataclasses.replace(
            whole, max_num_seqs=max_num_seqs or whole.max_num_seqs, token_budget=token_budget or whole.token_budget
        )
        try:
            self.engine = Engine(runner, 64, self._deliver, self._died)
        finally:
            runner.limits = whole

    def add(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Result:
        """Queues a request; options as of Request."""
        request = Request(f"r{len(self.results)}", list(prompt), params, **options)
        self.engine.add(request)
        self.results[request.id] = Result(request)
        return self.results[request.id]

    def cancel(self, result: Result) -> None:
        self.engine.cancel(result.request.id)

    @property
    def busy(self) -> bool:
        return bool(self.engine.scheduler.requests)

    def turn(self) -> None:
        """One turn of the loop, if it has anything to do."""
        if self.busy:
            self.engine._turn()

    def finish(self) -> None:
        """Turns until every request has ended; then no block is held."""
        bound = 100 + sum(r.request.num_tokens + r.request.params.max_tokens for r in self.results.values()) * 4
        for _ in range(bound):
            if not self.busy:
                break
            self.turn()
        assert not self.busy, "the engine does not move on"
        assert self.engine.pool.num_used == 0

    def _deliver(self, step: StepResult) -> None:
        self.matchable = (self.matchable | set(step.blocks.stored)) - set(step.blocks.evicted)
        for update in step.updates:
            result = self.results[update.request.id]
            assert result.finish_reason is None, "an update after the last"
            assert result.request.finish_reason != "cancelled", "an update after the cancellation"
            assert (update.logprobs is None) == (result.request.params.logprobs is None)
            result.token_ids += update.token_ids
            result.logprobs += update.logprobs or []
            result.finish_reason = update.finish_reason

    def _died(self, error: BaseException) -> None:
        raise error


def alone(runner: Runner, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Result:
    """What a request gets in an engine of its own, with nothing in the cache."""
    driver = Driver(runner)
    result = driver.add(prompt, params, **options)
    driver.finish()
    return result
