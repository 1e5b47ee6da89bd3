"""The text of a stream is the tokenizer's own decoding, however ids and batches fall; stop strings never leak."""

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from anypool.gateway.text import TextBatch, TextStream, TokenBatch
from anypool.gateway.vocabulary import UnsupportedDecoderError, Vocabulary, vocabulary_of
from tests.gateway.tiny_tokenizer import byte_level_core, sentencepiece_core

CORES = {"byte": byte_level_core(), "pieces": sentencepiece_core(), "unstripped": sentencepiece_core(strip=False)}
VOCABULARIES = {name: vocabulary_of(core.to_str()) for name, core in CORES.items()}
KINDS = st.sampled_from(sorted(CORES))


def decode(kind: str, ids: list[int]) -> str:
    return str(CORES[kind].decode(ids, skip_special_tokens=True))


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A tokenizer and ids: text, random ids (mostly broken UTF-8), bytes of characters, or a mixture."""
    kind = draw(KINDS)
    core = CORES[kind]
    size = core.get_vocab_size()
    parts = st.one_of(
        st.text(max_size=8).map(lambda text: list(core.encode(text, add_special_tokens=False).ids)),
        st.lists(st.integers(0, size + 3), max_size=6),  # a few beyond the vocabulary, as a padded model may give
        st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=3).map(
            lambda text: byte_ids(kind, text.encode())
        ),
        st.binary(max_size=4).map(lambda data: byte_ids(kind, data)),
    )
    return kind, [token_id for part in draw(st.lists(parts, max_size=6)) for token_id in part]


def byte_ids(kind: str, data: bytes) -> list[int]:
    """One id for every byte."""
    vocabulary = VOCABULARIES[kind]
    single = {vocabulary.token_bytes(i): i for i in reversed(range(vocabulary.size)) if kind == "byte"}
    if kind != "byte":
        single = {bytes([value]): i for i in range(vocabulary.size) if (value := vocabulary.token_byte(i)) is not None}
    return [single[bytes([value])] for value in data]


def cuts(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    """The ids in batches of any sizes, empty ones among them."""
    places = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *places], [*places, len(ids)], strict=True)]


def run(stream: TextStream, batches: list[list[int]], finish: str = "length") -> list[TextBatch]:
    """Feed batches, the last with a finish reason, until the stream says that it is over."""
    shown: list[TextBatch] = []
    for index, ids in enumerate(batches):
        batch = TokenBatch(ids, [float(i) for i in ids], [[(i, 0.0)] for i in ids])
        batch.finish_reason = finish if index == len(batches) - 1 else None
        shown.append(stream.push(batch))
        if shown[-1].finish_reason is not None:
            break
    return shown


@given(streams(), st.data(), st.booleans())
def test_deltas_join_to_the_full_decoding(stream, data, logprobs):
    kind, ids = stream
    shown = run(TextStream(VOCABULARIES[kind], logprobs=logprobs), cuts(data.draw, ids))
    assert "".join(batch.text for batch in shown) == decode(kind, ids)
    assert [i for batch in shown for i in batch.token_ids] == ids
    assert shown[-1].finish_reason == "length"


@given(KINDS, st.text())
def test_valid_text_comes_back_without_replacement_characters(kind, text):
    ids = CORES[kind].encode(text, add_special_tokens=False).ids
    for token_id in (
        TextStream(VOCABULARIES[kind], continues=True).push(TokenBatch(list(ids), finish_reason="stop")).text
    ):
        assert token_id != "\ufffd" or "\ufffd" in text
    stream = TextStream(VOCABULARIES[kind], continues=True)
    shown = "".join(stream.push(TokenBatch([token_id])).text for token_id in ids)
    assert ("\ufffd" in shown) <= ("\ufffd" in text)


def test_a_character_waits_for_its_last_byte():
    stream = TextStream(VOCABULARIES["byte"])
    first, *rest = byte_ids("byte", "😀".encode())
    assert [stream.push(TokenBatch([token_id])).text for token_id in [first, *rest]] == ["", "", "", "😀"]


def test_a_run_of_byte_tokens_is_replaced_as_a_whole_if_any_of_it_is_broken():
    ids = [*byte_ids("pieces", "é".encode()), *byte_ids("pieces", b"\xff")]
    stream = TextStream(VOCABULARIES["pieces"])
    assert [stream.push(TokenBatch([token_id])).text for token_id in ids] == ["", "", ""]
    assert stream.push(TokenBatch([], finish_reason="length")).text == "\ufffd" * 3 == decode("pieces", ids)


def test_a_completion_keeps_the_space_that_a_message_loses():
    ids = CORES["pieces"].encode("▁hello▁world").ids
    message, completion = (
        "".join(batch.text for batch in run(TextStream(VOCABULARIES["pieces"], continues=continues), [list(ids)]))
        for continues in (False, True)
    )
    assert (message, completion) == ("hello world", " hello world")


# ---- stop strings


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(end, start) of the stop string that is complete first; of two the longer."""
    found = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    return min(found) if found else None


@st.composite
def stopped_streams(draw: st.DrawFn) -> tuple[str, list[int], list[str]]:
    kind, ids = draw(streams())
    text = decode(kind, ids)
    stops: list[str] = draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        piece = text[start : start + draw(st.integers(1, 6))]
        stops += [piece + draw(st.sampled_from(["", "", "x"]))] if piece else []
    return kind, ids, stops


@given(stopped_streams(), st.data(), st.booleans())
def test_text_ends_before_the_first_complete_stop_string(stream, data, logprobs):
    kind, ids, stops = stream
    shown = run(TextStream(VOCABULARIES[kind], stops, logprobs=logprobs), cuts(data.draw, ids))
    text, visible = decode(kind, ids), "".join(batch.text for batch in shown)
    found = first_stop(text, stops)
    assert visible == (text if found is None else text[: found[1]])
    assert shown[-1].finish_reason == ("length" if found is None else "stop")


@given(stopped_streams(), st.data())
def test_tokens_consumed_do_not_depend_on_the_batches(stream, data):
    kind, ids, stops = stream
    one_by_one = run(TextStream(VOCABULARIES[kind], stops), [[token_id] for token_id in ids] + [[]])
    together = run(TextStream(VOCABULARIES[kind], stops), cuts(data.draw, ids))
    assert [i for batch in one_by_one for i in batch.token_ids] == [i for batch in together for i in batch.token_ids]


@given(stopped_streams())
def test_only_what_may_become_a_stop_string_is_held_back(stream):
    kind, ids, stops = stream
    plain, stopping = TextStream(VOCABULARIES[kind]), TextStream(VOCABULARIES[kind], stops)
    decoded = shown = ""
    for token_id in ids:
        decoded += plain.push(TokenBatch([token_id])).text
        batch = stopping.push(TokenBatch([token_id]))
        shown += batch.text
        if batch.finish_reason is not None:
            return
        longest = max((n for stop in stops for n in range(len(stop)) if decoded.endswith(stop[:n])), default=0)
        assert shown == decoded[: len(decoded) - longest]


def test_a_stop_string_that_spans_tokens_never_leaks():
    ids = byte_ids("byte", b"one\n\nUser: two")
    stream = TextStream(VOCABULARIES["byte"], ["\n\nUser:"])
    shown = run(stream, [[token_id] for token_id in ids])
    assert [batch.text for batch in shown] == ["o", "n", "e"] + [""] * 7
    assert shown[-1].finish_reason == "stop"


def test_held_back_text_is_shown_when_the_stop_string_does_not_come():
    stream = TextStream(VOCABULARIES["byte"], ["END"])
    shown = run(stream, [[token_id] for token_id in byte_ids("byte", b"an EN")], finish="stop")
    assert [batch.text for batch in shown] == ["a", "n", " ", "", "EN"]


def test_ending_tokens_are_not_shown():
    core = CORES["byte"]
    comma, end = core.token_to_id(","), core.token_to_id("<|im_end|>")
    stream = TextStream(VOCABULARIES["byte"], ending_ids={comma, end}, logprobs=True)
    shown = run(stream, [[*byte_ids("byte", b"a"), comma]], finish="stop")
    assert shown[0].text == "a"
    assert [entry.token_id for entry in shown[0].logprobs] == byte_ids("byte", b"a")
    assert shown[0].token_ids[-1] == comma


# ---- log-probabilities


def offsets(kind: str, ids: list[int]) -> list[int]:
    """For every id, the place in the full text of its first character: byte by byte, without the code under test."""
    vocabulary = VOCABULARIES[kind]
    if kind == "byte":
        data = b"".join(vocabulary.token_bytes(token_id) for token_id in ids)
        place = places_of(data)
        starts = [sum(len(vocabulary.token_bytes(token_id)) for token_id in ids[:n]) for n in range(len(ids))]
        # A token without text stands after the characters that were finished when it came.
        finished = [len(codecs.getincrementaldecoder("utf-8")("replace").decode(data[:start])) for start in starts]
        return [
            place[start] if vocabulary.token_bytes(token_id) else done
            for token_id, start, done in zip(ids, starts, finished, strict=True)
        ]
    # A prefix that ends inside a run of bytes is completed by the rest of that run, whose text is then taken off.
    result = []
    for n in range(len(ids)):
        run_start, run_end = n, n
        while run_start > 0 and not vocabulary.token_piece(ids[run_start - 1]):
            run_start -= 1
        while run_end < len(ids) and not vocabulary.token_piece(ids[run_end]):
            run_end += 1
        data = bytes(v for i in ids[run_start:run_end] if (v := vocabulary.token_byte(i)) is not None)
        before = sum(vocabulary.token_byte(i) is not None for i in ids[run_start:n])
        head = "".join(chunk for chunk in [unstripped(kind, ids[:run_start])])
        try:
            data.decode()
            inside = places_of(data)[before]
        except UnicodeDecodeError:
            inside = before
        start = len(head) + inside
        whole = unstripped(kind, ids)
        result.append(max(0, start - (len(whole) - len(decode(kind, ids)))))
    return result


def unstripped(kind: str, ids: list[int]) -> str:
    return str(CORES["unstripped"].decode(ids, skip_special_tokens=True)) if kind != "byte" else decode(kind, ids)


def places_of(data: bytes) -> list[int]:
    """For every byte, and the end, how many characters of the decoded text come before the one it belongs to."""
    broken: list[tuple[int, int]] = []

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        broken.append((error.start, error.end))
        return "\ufffd", error.end

    codecs.register_error("note", note)
    data.decode("utf-8", "note")
    starts = {start for start, _ in broken}
    inside_broken = {at for start, end in broken for at in range(start + 1, end)}
    leads = [at in starts or (at not in inside_broken and (byte & 0xC0) != 0x80) for at, byte in enumerate(data)]
    place, count = [], 0
    for lead in leads:
        count += lead
        place.append(count - 1)
    return [*place, count]


@given(stopped_streams(), st.data())
def test_logprobs_follow_their_text_and_are_cut_with_it(stream, data):
    kind, ids, stops = stream
    shown = run(TextStream(VOCABULARIES[kind], stops, logprobs=True), cuts(data.draw, ids))
    consumed = [i for batch in shown for i in batch.token_ids]
    visible = sum(len(batch.text) for batch in shown)
    stopped = shown[-1].finish_reason == "stop"
    wanted = [
        (token_id, start)
        for token_id, start in zip(consumed, offsets(kind, ids), strict=False)
        if start < visible or not stopped
    ]
    entries = [entry for batch in shown for entry in batch.logprobs]
    assert [(entry.token_id, entry.offset) for entry in entries] == wanted
    assert all(entry.logprob == float(entry.token_id) and entry.top == [(entry.token_id, 0.0)] for entry in entries)
    so_far = 0
    for batch in shown[:-1]:
        so_far += len(batch.text)
        assert all(entry.offset < so_far for entry in batch.logprobs)


# ---- the vocabulary


def test_tokens_are_displayed_by_their_text_and_bytes():
    vocabulary, core = VOCABULARIES["byte"], CORES["byte"]
    assert vocabulary.display(core.token_to_id("Ġwor")) == (" wor", [0x20, 0x77, 0x6F, 0x72])
    assert vocabulary.display(core.token_to_id("ð")) == ("\ufffd", [0xF0])
    assert vocabulary.display(core.token_to_id("<|im_end|>")) == ("<|im_end|>", list(b"<|im_end|>"))
    assert vocabulary.display(10**6) == ("", [])


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder):
    tokenizer = json.loads(CORES["byte"].to_str()) | {"decoder": decoder}
    with pytest.raises(UnsupportedDecoderError, match="supported are ByteLevel"):
        Vocabulary(tokenizer)


def test_special_flags_come_from_the_added_tokens():
    core: Tokenizer = byte_level_core()
    plain = core.token_to_id("⟨tool 工具⟩")
    assert vocabulary_of(core.to_str()).token_bytes(plain) == "⟨tool 工具⟩".encode()
