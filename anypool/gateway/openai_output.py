"""Writes OpenAI responses: bodies, and the chunks of a stream as server-sent events.

A stream is: for a chat a chunk with the role for every choice; chunks with text; for every choice one with its
finish_reason; with `include_usage` one without choices; `data: [DONE]`.
"""

from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from anypool.gateway.generation import Generation, UsageCount
from anypool.gateway.request import GenerationRequest
from anypool.gateway.text import TextBatch, TokenLogprob
from anypool.gateway.vocabulary import Vocabulary

DONE = b"data: [DONE]\n\n"


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Delta(Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str
    refusal: None = None


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class Envelope(Struct):
    """A body or a chunk. `usage` is null in the chunks of a stream that was asked for usage, absent in others."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    anypool: dict[str, Any] | UnsetType = UNSET


class Answer:
    """A whole choice, put together from its batches."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = ""

    def add(self, batch: TextBatch) -> None:
        self.text.append(batch.text)
        self.token_ids += batch.token_ids
        self.logprobs += batch.logprobs
        self.finish_reason = batch.finish_reason or self.finish_reason


class Writer(Protocol):
    """One dialect. The `*_events` methods give server-sent events, ready to send."""

    def opening_events(self) -> bytes: ...
    def batch_event(self, choice: int, batch: TextBatch) -> bytes: ...
    def closing_events(self, generation: Generation) -> bytes: ...
    def body(self, answers: list[Answer], generation: Generation) -> bytes: ...


class _Writer:
    """What both dialects share. A subclass says what its choices look like."""

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary, chunk_object: str, body_object: str):
        self._request = request
        self._vocabulary = vocabulary
        self._body_object = body_object
        self._encode = msgspec.json.Encoder().encode
        self._chunk = Envelope(request.id, chunk_object, request.created, request.model, [])
        if request.include_usage:
            self._chunk.usage = None

    def _event(self, choices: list[Any]) -> bytes:
        self._chunk.choices = choices
        return b"data: " + self._encode(self._chunk) + b"\n\n"

    def _extension(self, generation: Generation) -> dict[str, Any] | UnsetType:
        return generation.trace if self._request.trace else UNSET

    def _token_ids(self, token_ids: list[int]) -> list[int] | UnsetType:
        return token_ids if self._request.return_token_ids else UNSET

    def opening_events(self) -> bytes:
        return b""

    def closing_events(self, generation: Generation) -> bytes:
        """The usage chunk, if asked for. A trace without it goes into a chunk of its own, as usage does."""
        if self._request.include_usage or self._request.trace:
            self._chunk.anypool = self._extension(generation)
            if self._request.include_usage:
                self._chunk.usage = _usage(generation.usage)
            return self._event([]) + DONE
        return DONE

    def _body(self, choices: list[Any], generation: Generation) -> bytes:
        request = self._request
        body = Envelope(request.id, self._body_object, request.created, request.model, choices)
        body.usage = _usage(generation.usage)
        body.anypool = self._extension(generation)
        return self._encode(body)


class ChatWriter(_Writer):
    """`/v1/chat/completions`"""

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary):
        super().__init__(request, vocabulary, "chat.completion.chunk", "chat.completion")

    def opening_events(self) -> bytes:
        return b"".join(self._event([ChunkChoice(index, Delta("assistant", ""))]) for index in range(self._request.n))

    def batch_event(self, choice: int, batch: TextBatch) -> bytes:
        """Nothing if the batch changes nothing that the client can see."""
        token_ids = self._token_ids(batch.token_ids)
        event = b""
        if batch.text or batch.logprobs or token_ids:
            delta = Delta(content=batch.text)
            event = self._event([ChunkChoice(choice, delta, self._logprobs(batch.logprobs), None, token_ids)])
        if batch.finish_reason is not None:
            event += self._event([ChunkChoice(choice, Delta(), None, batch.finish_reason)])
        return event

    def body(self, answers: list[Answer], generation: Generation) -> bytes:
        choices = [
            ChatChoice(
                index,
                ChatMessage(content="".join(answer.text)),
                ChatLogprobs([])
                if self._request.wants_logprobs and not answer.logprobs
                else self._logprobs(answer.logprobs),
                answer.finish_reason,
                self._token_ids(answer.token_ids),
            )
            for index, answer in enumerate(answers)
        ]
        return self._body(choices, generation)

    def _logprobs(self, entries: list[TokenLogprob]) -> ChatLogprobs | None:
        if not entries:
            return None
        display = self._vocabulary.display
        content = []
        for entry in entries:
            text, data = display(entry.token_id)
            top = [
                TopLogprob(name, logprob, raw) for token_id, logprob in entry.top for name, raw in [display(token_id)]
            ]
            content.append(ChatTokenLogprob(text, entry.logprob, data, top))
        return ChatLogprobs(content)


class CompletionWriter(_Writer):
    """`/v1/completions`"""

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary):
        super().__init__(request, vocabulary, "text_completion", "text_completion")

    def batch_event(self, choice: int, batch: TextBatch) -> bytes:
        """Nothing if the batch changes nothing that the client can see."""
        token_ids = self._token_ids(batch.token_ids)
        if not (batch.text or batch.logprobs or token_ids or batch.finish_reason):
            return b""
        logprobs = self._logprobs(batch.logprobs) if batch.logprobs else None
        return self._event([CompletionChoice(choice, batch.text, logprobs, batch.finish_reason, token_ids)])

    def body(self, answers: list[Answer], generation: Generation) -> bytes:
        choices = [
            CompletionChoice(
                index,
                "".join(answer.text),
                self._logprobs(answer.logprobs) if self._request.wants_logprobs else None,
                answer.finish_reason,
                self._token_ids(answer.token_ids),
            )
            for index, answer in enumerate(answers)
        ]
        return self._body(choices, generation)

    def _logprobs(self, entries: list[TokenLogprob]) -> CompletionLogprobs:
        name = self._vocabulary.display
        tops = [{name(token_id)[0]: logprob for token_id, logprob in entry.top} for entry in entries]
        return CompletionLogprobs(
            tokens=[name(entry.token_id)[0] for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=tops if self._request.sampling.logprobs else None,
            text_offset=[entry.offset for entry in entries],
        )


def writer_for(request: GenerationRequest, vocabulary: Vocabulary) -> Writer:
    return (ChatWriter if request.kind == "chat" else CompletionWriter)(request, vocabulary)


def _usage(count: UsageCount) -> Usage:
    total = count.prompt_tokens + count.completion_tokens
    return Usage(count.prompt_tokens, count.completion_tokens, total, PromptTokensDetails(count.cached_tokens))
