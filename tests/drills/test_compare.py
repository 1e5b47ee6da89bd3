"""What counts as lost, as repeated and as different."""

import pytest

from anypool.drills.compare import compare
from anypool.measure.stream import Stream

IDS = [5, 6, 7, 5, 6, 8, 9, 2]


def stream(ids, **fields):
    return Stream(
        **{"text": "".join(map(str, ids)), "token_ids": ids, "finish_reason": "stop", "usage": {"total_tokens": 9}}
        | fields
    )


def test_the_same_is_the_same():
    difference = compare(stream(IDS), stream(list(IDS), pool="elsewhere", sent_at=7.0))
    assert (difference.tokens_lost, difference.tokens_repeated, difference.what) == (0, 0, ())


@pytest.mark.parametrize(
    ("ids", "lost", "repeated"),
    [
        ([5, 6, 7, 6, 8, 9, 2], 1, 0),
        ([5, 6, 7, 7, 5, 6, 8, 9, 2], 0, 1),
        ([5, 6, 7, 5, 6, 7, 5, 6, 8, 9, 2], 0, 3),
        ([5, 6, 7], 5, 0),
        ([], 8, 0),
        ([5, 6, 7, 5, 6, 4, 9, 2], 0, 0),
        ([6, 7, 5, 6, 8, 9, 2, 2], 1, 1),
    ],
)
def test_tokens_that_differ(ids, lost, repeated):
    difference = compare(stream(IDS), stream(ids))
    assert (difference.tokens_lost, difference.tokens_repeated) == (lost, repeated)
    assert len(difference.what) == 2, "text and token ids"


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"text": "5675689\u00e9"}, "text from character 7: 'é' instead of '2'"),
        ({"finish_reason": "length"}, "finish_reason 'length' instead of 'stop'"),
        ({"usage": {"total_tokens": 10}}, "usage {'total_tokens': 10} instead of {'total_tokens': 9}"),
        ({"error": "the stream broke off"}, "it failed: the stream broke off"),
    ],
)
def test_everything_else_that_a_client_sees(fields, what):
    difference = compare(stream(IDS), stream(IDS, **fields))
    assert difference.what == (what,)
    assert (difference.tokens_lost, difference.tokens_repeated) == (0, 0)
