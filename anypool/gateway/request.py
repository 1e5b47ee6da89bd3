"""The one form a request has inside the gateway, whichever API it came through, and what a worker is sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen; names and meanings are the worker API's. Validated where requests are read."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt's ids, how many tokens may follow it, and the names of its full blocks (see `engine.prefix`)."""

    token_ids: Sequence[int]
    max_tokens: int
    block_hashes: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request. It gives `len(prompts) * n` choices; choice i belongs to prompt i // n.

    ending_ids: ids after which the worker ends a stream, the model's own (unless ignored) and the request's.
    """

    id: str
    kind: Literal["chat", "completion"]
    model: str
    created: int
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    seed: int
    n: int = 1
    stop: tuple[str, ...] = ()
    ending_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    priority: int = 0
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    trace: bool = False

    @property
    def wants_logprobs(self) -> bool:
        return self.sampling.logprobs is not None

    def seed_of(self, choice: int) -> int:
        """Choice 0 of every prompt has the request's seed; the others seeds derived from it, 63 bits."""
        number = choice % self.n
        if number == 0:
            return self.seed
        digest = blake2b(f"{self.seed}:{number}".encode(), digest_size=8, person=b"anypool-choice").digest()
        return int.from_bytes(digest, "little") >> 1


def worker_body(
    request: GenerationRequest,
    choice: int,
    emitted: Sequence[int],
    *,
    attempt: int,
    external_model: str | None = None,
) -> dict[str, Any]:
    """The worker API's request for one choice, going on after the ids already `emitted`.

    attempt: makes the id unique, since a worker may not have noticed yet that an earlier attempt is over.
    external_model: for a foreign engine, the model's name there; such an engine gets no keys of our own.
    """
    prompt, sampling = request.prompts[choice // request.n], request.sampling
    body: dict[str, Any] = msgspec.to_builtins(sampling)
    body |= {
        "prompt": [*prompt.token_ids, *emitted],
        "max_tokens": prompt.max_tokens - len(emitted),
        "stream": True,
        "seed": request.seed_of(choice),
        "return_token_ids": True,
    }
    if external_model is not None:
        return {key: value for key, value in body.items() if value is not None} | {"model": external_model}
    return body | {
        "cache_salt": request.cache_salt,
        "priority": request.priority,
        "anypool": {"resumed": len(emitted), "request_id": f"{request.id}-{choice}-{attempt}"},
    }
