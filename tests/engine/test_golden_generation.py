"""The bundled model through the real engine: transformers' own greedy texts, generated side by side in one batch.

How the goldens came about: tests/goldens/README.md.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from anypool.engine.request import SamplingParams
from anypool.engine.runner import Limits, Runner, cache_bytes, persistent_compilation_cache
from anypool.models import ModelConfig, Tokenizer, resolve
from anypool.ops import cpu
from tests.engine.tiny_engine import Driver
from tests.goldens import tiny

CASES = json.loads((Path(tiny.__file__).parent / "smollm2_greedy.json").read_text())
MAX_TOKENS = 64
MAX_NUM_SEQS = 12
TOKEN_BUDGET = 64


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_twenty_texts_at_once():
    """With room for twelve at a time, requests join and leave while others decode, prompts come in chunks."""
    directory = resolve("smollm2-135m-instruct")
    persistent_compilation_cache()
    longest = max(len(case["prompt_ids"]) for case in CASES) + MAX_TOKENS
    # Too few blocks for twelve of the longest: some are preempted, too.
    cache = cache_bytes(ModelConfig.load(directory), 5 * longest, jnp.float32)
    runner = Runner.load(directory, Limits(MAX_NUM_SEQS, TOKEN_BUDGET, longest, cache))
    driver = Driver(runner)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    results = [driver.add(case["prompt_ids"], params) for case in CASES]
    driver.finish()

    tokenizer = Tokenizer.load(directory)
    for case, result in zip(CASES, results, strict=True):
        assert result.token_ids == case["output_ids"], case["prompt"]
        assert tokenizer.decode(result.token_ids) == case["text"]
        ended = result.token_ids[-1] in runner.config.eos_token_ids
        assert result.finish_reason == ("stop" if ended else "length")
    assert driver.engine.counters.steps < sum(len(case["output_ids"]) for case in CASES) / 3, "one after the other"
    totals = driver.engine.scheduler.totals
    assert totals.preemptions
    assert totals.prefix_hits, "all conversations begin with the same system message"
