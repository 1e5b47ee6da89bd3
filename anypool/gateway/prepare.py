"""From a checked OpenAI request to the gateway's own form: text to token ids, limits against the model."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from anypool.engine.prefix import block_hashes
from anypool.gateway.errors import (
    ApiError,
    context_exceeded,
    invalid_value,
    model_not_found,
)
from anypool.gateway.openai_api import prompts_of, stops_of
from anypool.gateway.openai_schema import MAX_CHOICES, ChatRequest, CommonRequest, CompletionRequest
from anypool.gateway.request import GenerationRequest, Prompt, Sampling

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`; a chat may go on to the end of the context."""

_LONG_TEXT = 20_000
"""Characters from which on encoding is worth another thread, so that other streams do not wait."""


class Tokenizer(Protocol):
    """What the gateway needs of `models.Tokenizer`. `to_json`: the content of its tokenizer.json."""

    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str: ...
    def to_json(self) -> str: ...


class Preparer:
    """Prepares requests for one model."""

    def __init__(self, tokenizer: Tokenizer, model: str):
        self._tokenizer = tokenizer
        self._model = model

    async def chat(self, request: ChatRequest, context: int | None) -> GenerationRequest:
        """context: the model's context length in tokens, None if unknown. Raises ApiError."""
        self._check_model(request.model)
        messages = [_plain(message) for message in request.messages]
        try:
            text = self._tokenizer.render_chat(messages)
        except ValueError as error:
            raise invalid_value("messages", f"Invalid 'messages': {error}") from error
        token_ids = await self._encode(text, add_special_tokens=False)
        max_tokens = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompts = [self._prompt(token_ids, max_tokens, context, "messages", request.cache_salt)]
        return self._request(request, "chat", prompts, logprobs)

    async def completion(self, request: CompletionRequest, context: int | None) -> GenerationRequest:
        """As `chat`."""
        self._check_model(request.model)
        given = prompts_of(request)
        if len(given) * (request.n or 1) > MAX_CHOICES:
            raise invalid_value(
                "n", f"Invalid 'n': {len(given)} prompts x {request.n or 1} choices are more than {MAX_CHOICES}."
            )
        max_tokens = request.max_tokens or DEFAULT_COMPLETION_TOKENS
        prompts = []
        for index, prompt in enumerate(given):
            param = "prompt" if len(given) == 1 else f"prompt[{index}]"
            if isinstance(prompt, str):
                token_ids = await self._encode(prompt, add_special_tokens=True)
            else:
                self._check_ids(prompt, param)
                token_ids = prompt
            if not token_ids and self._tokenizer.bos_id is not None:
                token_ids = [self._tokenizer.bos_id]
            if not token_ids:
                raise invalid_value(param, f"Invalid '{param}': it has no tokens. Give at least one.", "empty_prompt")
            prompts.append(self._prompt(token_ids, max_tokens, context, "prompt", request.cache_salt))
        return self._request(request, "completion", prompts, request.logprobs)

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise model_not_found(model, self._model)

    def _check_ids(self, token_ids: Iterable[int], param: str) -> None:
        size = self._tokenizer.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise invalid_value(
                    param, f"Invalid '{param}': token id {token_id} is not one of the model's, 0 to {size - 1}."
                )

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < _LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    def _prompt(
        self, token_ids: Sequence[int], max_tokens: int | None, context: int | None, param: str, salt: str | None
    ) -> Prompt:
        count = len(token_ids)
        if context is not None and count + (max_tokens or 1) > context:
            raise context_exceeded(context, count, max_tokens, param)
        if max_tokens is None:
            if context is None:
                raise ApiError(
                    400,
                    "The pools of this server do not tell their context length: set 'max_completion_tokens'.",
                    param="max_completion_tokens",
                    code="missing_required_parameter",
                )
            max_tokens = context - count
        return Prompt(token_ids, max_tokens, block_hashes(token_ids, salt or ""))

    def _request(
        self, request: CommonRequest, kind: Any, prompts: Sequence[Prompt], logprobs: int | None
    ) -> GenerationRequest:
        stop_token_ids = tuple(request.stop_token_ids or ())
        self._check_ids(stop_token_ids, "stop_token_ids")
        ignore_eos = bool(request.ignore_eos)
        options = request.stream_options
        return GenerationRequest(
            id=("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12),
            kind=kind,
            model=self._model,
            created=int(time.time()),
            prompts=tuple(prompts),
            sampling=self._sampling(request, stop_token_ids, ignore_eos, logprobs),
            # Without a seed of its own a stream could not be continued elsewhere as the same stream.
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            n=request.n or 1,
            stop=stops_of(request),
            ending_ids=frozenset(stop_token_ids) | (frozenset() if ignore_eos else frozenset(self._tokenizer.eos_ids)),
            cache_salt=request.cache_salt or "",
            priority=request.priority or 0,
            stream=bool(request.stream),
            include_usage=bool(options and options.include_usage),
            return_token_ids=bool(request.return_token_ids),
            trace=bool(request.anypool and request.anypool.trace),
        )

    def _sampling(
        self, request: CommonRequest, stop_token_ids: tuple[int, ...], ignore_eos: bool, logprobs: int | None
    ) -> Sampling:
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        if top_p == 0:
            # No probability mass at all leaves the likeliest token only, which is greedy.
            temperature, top_p = 0.0, 1.0
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, request.top_k or 0),
            min_p=request.min_p or 0.0,
            repetition_penalty=request.repetition_penalty or 1.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._logit_bias(request.logit_bias or {}),
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )

    def _logit_bias(self, bias: Mapping[str, float]) -> dict[str, float]:
        for key in bias:
            if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < self._tokenizer.vocab_size):
                last = self._tokenizer.vocab_size - 1
                raise invalid_value(
                    "logit_bias", f"Invalid key in 'logit_bias': {key[:80]}. Keys are token ids from 0 to {last}."
                )
        return {str(int(key)): value for key, value in bias.items()}


def _plain(message: Any) -> dict[str, Any]:
    """A message as chat templates know it: content as one text, and `developer` by its older name."""
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain if message.name is None else plain | {"name": message.name}
