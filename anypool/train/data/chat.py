"""Conversations to tokens, and which of them are the assistant's own.

The chat template is the model's, so where an answer begins and ends is found by rendering: what the template writes
before it asks the model to go on is not the answer; what follows is, up to the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from anypool.models import ChatTemplateError, Tokenizer
from anypool.train.data.errors import DataError

_DAY = datetime(2024, 7, 26)
"""Templates that write today's date write this one, so that the same chats are the same tokens tomorrow. It is the one
that Llama 3's template falls back to."""

OPEN = -1

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation. answers: (start, stop), in characters, of what the assistant says. `stop` is OPEN where
    the template writes an answer differently once it is not the last; it then goes to the first token that ends a
    turn.
    """

    place: object
    text: str
    answers: tuple[tuple[int, int], ...]


def render(tokenizer: Tokenizer, place: object, value: Mapping[str, Any]) -> Conversation:
    """Render a record with `messages`, and `tools` if it has them.

    place: named in complaints. Raises DataError if there are no messages, the template refuses them, or nobody answers.
    """
    messages, tools = _checked(place, value.get("messages")), value.get("tools") or None

    def rendered(count: int, ask: bool) -> str:
        try:
            return tokenizer.render_chat(
                messages[:count],
                tools=tools,
                add_generation_prompt=ask,
                strftime_now=_DAY.strftime,
                date_string=_DAY.strftime("%d %b %Y"),
            )
        except ChatTemplateError as error:
            raise DataError(f"{place}: {error}") from error

    text = rendered(len(messages), False)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = rendered(index, True)
        if text.startswith(asked):
            start = len(asked)
        else:
            # Some templates ask with more than they keep, such as the beginning of a thought.
            before = rendered(index, False)
            start = _agreeing(text, asked)
            if not text.startswith(before) or start < len(before):
                raise DataError(
                    f"{place}: the model's chat template changes what came before message {index + 1} when the "
                    "conversation goes on, so the answers in it cannot be told apart; end the conversation there, "
                    "or use learn = 'all'"
                )
        until = rendered(index + 1, False)
        answers.append((start, len(until) if text.startswith(until) else OPEN))
    if not answers:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(f"{place}: no message has the role 'assistant' (roles: {roles}), so there is nothing to learn")
    return Conversation(place, text, tuple(answers))


def _agreeing(one: str, other: str) -> int:
    """How many characters both begin with."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def learned(
    conversation: Conversation, ids: Sequence[int], offsets: Sequence[tuple[int, int]], endings: Set[int]
) -> np.ndarray:
    """bool (T,), which tokens are answers, each with the token that ends its turn; white space after that is the
    template's.

    ids, offsets: of the text's tokens, the latter in characters. endings: tokens that can end a turn. Raises DataError
    if an answer has no end.
    """
    mask = np.zeros(len(ids), bool)
    starts, stops = np.asarray(offsets, np.int64).reshape(-1, 2).T
    ends = np.isin(np.asarray(ids, np.int64), list(endings))
    for start, stop in conversation.answers:
        inside = np.flatnonzero((starts >= start) & (stops > starts) & ((stops <= stop) | (stop == OPEN)))
        last = inside[ends[inside]]
        if stop == OPEN:
            if not last.size:
                raise DataError(
                    f"{conversation.place}: the model's chat template ends an answer with none of the model's special "
                    "tokens, so its end cannot be found; use learn = 'all'"
                )
            inside = inside[inside <= last[0]]
        elif last.size and not conversation.text[int(stops[last[-1]]) : stop].strip():
            inside = inside[inside <= last[-1]]
        mask[inside] = True
    return mask


def _checked(place: object, messages: Any) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{place}: no messages; write {{"messages": [{{"role": "user", "content": "…"}}, …]}}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f'{place}: message {number} has no role; write {{"role": "user", "content": "…"}}')
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"{place}: message {number} ({message['role']}) has no content that is text")
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{place}: the first message is the assistant's; put the user's, or a system message, before it"
        )
    return messages
