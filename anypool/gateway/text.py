"""From token ids to text, as the ids arrive: an exact incremental detokenizer, and stop strings that never leak.

Exact means: the deltas of a stream, joined, are the tokenizer's own decoding of all its ids, whatever the ids are and
however they were cut into batches. Half a UTF-8 character is therefore held until it is whole, or known to be broken.
"""

import codecs
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from anypool.gateway.vocabulary import Vocabulary

REPLACEMENT = "\ufffd"


@dataclass(slots=True)
class TokenBatch:
    """Ids a worker sent together. `logprobs` and `top_logprobs` run parallel to `token_ids`, or are None."""

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class TokenLogprob:
    """One token's log-probability. `offset`: where its text starts in the stream's text, in characters."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int


@dataclass(slots=True)
class TextBatch:
    """What a batch of tokens made visible. `token_ids` are those consumed, also where their text is still held back."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Decoder(Protocol):
    """Turns ids into text. `starts` has one character offset for every token whose place in the text is settled."""

    starts: list[int]

    def push(self, token_ids: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class ByteDecoder:
    """Byte-level BPE: every token is some bytes, and the text is those bytes as UTF-8, broken ones as U+FFFD."""

    def __init__(self, vocabulary: Vocabulary, track_starts: bool):
        self._bytes = vocabulary.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._track = track_starts
        self._length = 0
        self.starts: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        if not self._track:
            return self._utf8.decode(b"".join(map(self._bytes, token_ids)))
        text = ""
        for token_id in token_ids:
            data = self._bytes(token_id)
            pending = self._utf8.getstate()[0]
            self.starts.append(self._length + (1 if pending and data and _breaks(pending, data) else 0))
            delta = self._utf8.decode(data)
            self._length += len(delta)
            text += delta
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _breaks(pending: bytes, data: bytes) -> bool:
    """Whether `data` does not continue the unfinished character `pending`, which then becomes one U+FFFD."""
    try:
        (pending + data[:1]).decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return False


class PieceDecoder:
    """Sentencepiece style: every token is a string, or one byte of a character that the vocabulary has no piece for.

    A run of byte tokens is UTF-8 as a whole or becomes one U+FFFD a byte, so it is held until the run ends.
    """

    def __init__(self, vocabulary: Vocabulary, track_starts: bool, continues: bool):
        self._vocabulary = vocabulary
        self._track = track_starts
        self._strip = 0 if continues else vocabulary.strip_start
        self._run = bytearray()
        self._waiting: list[int] = []  # for each token of the open run, how many of its bytes come before it
        self._length = 0
        self.starts: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            byte = self._vocabulary.token_byte(token_id)
            piece = "" if byte is not None else self._vocabulary.token_piece(token_id)
            if piece and self._run:
                text += self._end_run()
            if self._run or byte is not None:
                self._waiting.append(len(self._run))
            elif self._track:
                self.starts.append(self._length)
            if byte is not None:
                self._run.append(byte)
            text += self._emit(piece)
        return text

    def finish(self) -> str:
        return self._end_run()

    def _end_run(self) -> str:
        run, waiting = bytes(self._run), self._waiting
        self._run, self._waiting = bytearray(), []
        try:
            text = run.decode()
            before = [0] * (len(run) + 1)  # characters that are whole before each byte
            at = 0
            for index, character in enumerate(text):
                width = len(character.encode())
                before[at : at + width] = [index] * width
                at += width
            before[len(run)] = len(text)
        except UnicodeDecodeError:
            text = REPLACEMENT * len(run)
            before = list(range(len(run) + 1))
        length, emitted = self._length, self._emit(text)
        if self._track:
            stripped = len(text) - len(emitted)
            self.starts += [length + max(0, before[position] - stripped) for position in waiting]
        return emitted

    def _emit(self, text: str) -> str:
        if self._strip and text:
            kept = text.lstrip(" ") if len(text) - len(text.lstrip(" ")) <= self._strip else text[self._strip :]
            # The tokenizer strips at the start of the text only: the first character that stays ends it.
            self._strip = 0 if kept else self._strip - len(text)
            text = kept
        self._length += len(text)
        return text


class StopFilter:
    """Ends the text before the first stop string that becomes complete; holds back what could be the start of one.

    Of two that become complete at the same character the longer one counts. So the visible text depends on the whole
    text only, not on how it was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text that may be shown now; sets `stopped` when a stop string is complete."""
        if not self._stops:
            return text
        self._held += text
        best: tuple[int, int] | None = None  # (end, start)
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        if best is not None:
            self.stopped = True
            shown, self._held = self._held[: best[1]], ""
            return shown
        keep = max(self._open_prefix(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The text ended without a stop string: what was held back is text after all."""
        shown, self._held = self._held, ""
        return shown

    def _open_prefix(self, stop: str) -> int:
        """Length of the longest end of the held text that is a beginning of `stop`."""
        at = max(0, len(self._held) - len(stop) + 1)
        while (at := self._held.find(stop[0], at)) >= 0:
            if stop.startswith(self._held[at:]):
                return len(self._held) - at
            at += 1
        return 0


class TextStream:
    """The text of one choice: ids in, visible text and the log-probabilities that belong to it out."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: Sequence[str] = (),
        *,
        ending_ids: Set[int] = frozenset(),
        logprobs: bool = False,
        continues: bool = False,
    ):
        """ending_ids: tokens that end the stream; like a stop string, they are not shown.

        continues: the text goes on from the prompt's, so that a leading space is part of it.
        """
        self._decoder: Decoder
        if vocabulary.byte_level:
            self._decoder = ByteDecoder(vocabulary, logprobs)
        else:
            self._decoder = PieceDecoder(vocabulary, logprobs, continues)
        self._stop = StopFilter(stops)
        self._per_token = bool(stops)
        self._ending_ids = ending_ids
        self._logprobs = logprobs
        self._entries: list[TokenLogprob] = []  # not shown yet; offsets are filled in when they are settled
        self._taken = 0  # entries already shown or dropped
        self._shown = 0  # characters

    def push(self, batch: TokenBatch) -> TextBatch:
        """Consume a batch; with a stop string inside, tokens after the one that completed it are not consumed."""
        token_ids, finish_reason = batch.token_ids, batch.finish_reason
        visible = token_ids[:-1] if token_ids and token_ids[-1] in self._ending_ids else token_ids
        if not self._per_token:
            text = self._decoder.push(visible)
        else:
            text = ""
            for count, token_id in enumerate(visible, 1):
                text += self._stop.push(self._decoder.push((token_id,)))
                if self._stop.stopped:
                    token_ids = visible = token_ids[:count]
                    finish_reason = "stop"
                    break
        if self._logprobs:
            self._remember(batch, len(visible))
        if finish_reason is not None and not self._stop.stopped:
            rest, stopped = self._flush()
            text += rest
            finish_reason = "stop" if stopped else finish_reason
        self._shown += len(text)
        return TextBatch(text, token_ids, self._release(finish_reason is not None), finish_reason)

    def _flush(self) -> tuple[str, bool]:
        """What is still held when no more ids come, and whether a stop string became complete in it."""
        text = self._stop.push(self._decoder.finish())
        return (text, True) if self._stop.stopped else (text + self._stop.finish(), False)

    def _remember(self, batch: TokenBatch, count: int) -> None:
        values = batch.logprobs or [0.0] * count
        tops: Sequence[list[tuple[int, float]]] = batch.top_logprobs or [[]] * count
        for token_id, logprob, top in zip(batch.token_ids[:count], values, tops, strict=False):
            self._entries.append(TokenLogprob(token_id, logprob, top, 0))

    def _release(self, finished: bool) -> list[TokenLogprob]:
        """Entries whose first character is visible; at the end all that are left, unless a stop string cut them off."""
        if not self._entries:
            return []
        settled = self._decoder.starts[self._taken : self._taken + len(self._entries)]
        everything = finished and not self._stop.stopped
        count = 0
        for entry, start in zip(self._entries, settled, strict=False):
            if start >= self._shown and not everything:
                break
            entry.offset = start
            count += 1
        released, self._entries = self._entries[:count], self._entries[count:]
        self._taken += count
        return released
