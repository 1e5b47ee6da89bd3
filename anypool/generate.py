"""`anypool generate`: one text, made in this process, with the engine and the text rules of the server."""

import json
import logging
import queue
import sys
import time

from rich.console import Console

from anypool.engine.engine import Engine, StepResult, Update
from anypool.engine.request import Request, SamplingParams
from anypool.engine.runner import Limits, Runner, cache_bytes, persistent_compilation_cache
from anypool.gateway.text import TextStream, TokenBatch
from anypool.gateway.vocabulary import vocabulary_of
from anypool.models import ModelConfig, Tokenizer
from anypool.ops.paged_attention import BLOCK
from anypool.progress import Reporter, bars, resolve_shown

CHUNK_TOKENS = 256
"""Prompt tokens computed in one step."""
MAX_CONTEXT = 8192

log = logging.getLogger(__name__)


def run(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    dtype: str,
    format: str,
) -> None:
    """Prints the text as it is generated, or one JSON document at the end.

    Raises ModelError for a model that cannot be read, RequestError for a prompt too long or values out of range.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    started = time.monotonic()
    with bars(Console(stderr=True)) as shown:
        directory = resolve_shown(model, shown)
        config = ModelConfig.load(directory)
        tokenizer = Tokenizer.load(directory)
        persistent_compilation_cache()
        context = min(config.max_position, MAX_CONTEXT)
        limits = Limits(1, CHUNK_TOKENS + BLOCK, context, cache_bytes(config, context, dtype))
        runner = Runner.load(directory, limits, dtype, progress=Reporter(shown, model))
    text = tokenizer.render_chat([{"role": "user", "content": prompt}]) if chat else prompt
    prompt_ids = tokenizer.encode(text, add_special_tokens=not chat)
    news: queue.Queue[Update | BaseException] = queue.Queue()

    def deliver(result: StepResult) -> None:
        for update in result.updates:
            news.put(update)

    engine = Engine(runner, max_waiting=1, deliver=deliver, died=news.put)
    request = Request("generate", prompt_ids, params)
    loaded = time.monotonic()
    engine.start()
    try:
        engine.add(request)
        stream = TextStream(
            vocabulary_of(tokenizer.to_json()), ending_ids=frozenset(runner.config.eos_token_ids), continues=not chat
        )
        whole, reason = "", None
        while reason is None:
            update = news.get()
            if isinstance(update, BaseException):
                raise update
            reason = update.finish_reason
            visible = stream.push(TokenBatch(update.token_ids, finish_reason=reason)).text
            whole += visible
            if format == "text":
                sys.stdout.write(visible)
                sys.stdout.flush()
    finally:
        engine.stop()
    seconds = time.monotonic() - loaded
    if format == "text":
        sys.stdout.write("\n")
        log.info("%d tokens in %.2f s after %.1f s of loading", request.num_output, seconds, loaded - started)
        return
    document = {
        "model": model,
        "text": whole,
        "token_ids": request.output_token_ids,
        "finish_reason": reason,
        "prompt_tokens": request.num_prompt,
        "completion_tokens": request.num_output,
        "load_seconds": round(loaded - started, 3),
        "generate_seconds": round(seconds, 3),
        "kernels": runner.kernels.report(),
    }
    print(json.dumps(document, indent=2))
