"""One generation: what was asked, and how far it is."""

import enum
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from anypool.engine.prefix import BLOCK_SIZE, block_hashes, next_hash, root_hash

FinishReason = Literal["stop", "length", "cancelled"]

MAX_LOGPROBS = 20


class RequestError(ValueError):
    """A request that cannot be served as asked. `param` names the field, as in OpenAI's error body."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen. Field names and meanings are the worker API's.

    Raises RequestError for a value out of range. (Decoded by msgspec, that error is the `__cause__` of a
    msgspec.ValidationError, which also covers wrong types.)
    """

    max_tokens: int
    """Tokens to generate at most, at least 1."""
    temperature: float = 1.0
    """0 is greedy: the likeliest token, whatever the seed."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) the logits of tokens already in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for every time it was generated."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """None: no log-probabilities; otherwise the chosen token's and those of this many of the likeliest."""
    seed: int = 0
    """With the absolute position it determines every draw. Any 64-bit number, signed or unsigned."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the stream, beside the model's own."""
    ignore_eos: bool = False
    """True: the model's own end tokens do not end the stream (`stop_token_ids` still do)."""

    def __post_init__(self) -> None:
        def need(param: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise RequestError(param, f"{param} is {getattr(self, param)!r}: it must be {wanted}")

        need("max_tokens", self.max_tokens >= 1, "at least 1")
        need("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive finite number")
        need("top_k", self.top_k >= 0, "0 (off) or a positive whole number")
        need("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        need("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        need("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive finite number")
        need("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        need("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        need("seed", -(2**63) <= self.seed < 2**64, "a 64-bit whole number")
        wanted = f"null or between 0 and {MAX_LOGPROBS}"
        need("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, wanted)
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise RequestError("logit_bias", f"logit_bias[{token}] is {bias!r}: it must be between -100 and 100")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError if a token id named here is not one of the model's `vocab_size` ids."""
        for param, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(param, f"{param} names token {token}: the model's ids are 0 to {vocab_size - 1}")


class RequestState(enum.Enum):
    """Where a request is. Preempted requests are waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One generation and its place in the engine. The caller gives the first group, the scheduler the rest.

    Tokens 0 .. num_computed - 1 have their keys and values in `block_ids`, 16 to a block. The request is in
    its prefill while more than one token is left to compute, and decoding when one is; nothing else tells
    them apart.
    """

    id: str
    prompt: Sequence[int]
    """Token ids, at least one."""
    params: SamplingParams
    cache_salt: str = ""
    """Cached prefixes are shared only between requests of equal salt."""
    priority: int = 0
    """Lower runs sooner; equals in order of arrival."""
    resumed: int = 0
    """How many of the prompt's last tokens are output generated elsewhere: penalties count them as output."""
    arrival: float = field(default_factory=time.monotonic)
    """time.monotonic() seconds. Only for measuring: the order of service is that of `Scheduler.add`."""

    state: RequestState = field(default=RequestState.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    token_ids: list[int] = field(init=False)
    """The prompt and, after it, the tokens generated here."""
    num_computed: int = field(default=0, init=False)
    block_ids: list[int] = field(default_factory=list, init=False)
    block_hashes: list[bytes] = field(init=False)
    """Prefix hashes of full blocks, at least of the prompt's; grows as output fills blocks."""
    slot: int = field(default=-1, init=False)
    """Row of `Scheduler.block_table`, kept while the request runs; -1 when it does not."""
    rank: tuple[int, int] = field(default=(0, 0), init=False)
    """(priority, order of arrival): smaller is served first and preempted last."""
    stop_ids: frozenset[int] = field(default=frozenset(), init=False)
    cached_tokens: int = field(default=0, init=False)
    """Prompt tokens found in the prefix cache when the request first ran."""
    num_preemptions: int = field(default=0, init=False)
    scheduled_at: float | None = field(default=None, init=False)
    """time.monotonic() seconds at which the request first ran, gave its first token, and finished."""
    first_token_at: float | None = field(default=None, init=False)
    finished_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        length = len(self.prompt)
        if not length:
            raise RequestError("prompt", "prompt is empty: give at least one token")
        if not 0 <= self.resumed < length:
            raise RequestError(
                "resumed", f"resumed is {self.resumed}: for a prompt of {length} it must be 0 to {length - 1}"
            )
        self.token_ids = list(self.prompt)
        self.block_hashes = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated here; those in `resumed` are not among them."""
        return len(self.token_ids) - len(self.prompt)

    @property
    def num_left(self) -> int:
        """Tokens still to compute before the next one can be sampled, at least 1."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_start(self) -> int:
        """Index in `token_ids` of the first generated token, here or elsewhere."""
        return len(self.prompt) - self.resumed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt) :]

    def hash_prompt(self) -> None:
        """Compute the prompt's block hashes: about a microsecond a block, so once, on arrival."""
        self.block_hashes = block_hashes(self.token_ids, self.cache_salt)

    def block_hash(self, index: int) -> bytes:
        """Prefix hash of full block `index`; blocks are asked for in order, so at most one is new."""
        if index == len(self.block_hashes):
            start = index * BLOCK_SIZE
            parent = self.block_hashes[-1] if index else root_hash(self.cache_salt)
            self.block_hashes.append(next_hash(parent, self.token_ids[start : start + BLOCK_SIZE]))
        return self.block_hashes[index]
