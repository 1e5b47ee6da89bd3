"""The arithmetic of the benchmark, on times that a person can check."""

import pytest

from anypool.bench.figures import Round, Row

# Two streams: the first has its tokens at 1, 2, 3 and 4 s, the second at 2, 2 (together), 3 and 5 s.
TWO = Round([[(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)], [(2.0, 2), (3.0, 1), (5.0, 1)]], waits=[1.0, 1.5])


def test_the_whole_run_ends_with_the_last_token():
    assert TWO.tokens_per_second == pytest.approx(8 / 5)


def test_decoding_is_measured_while_every_stream_decodes():
    assert TWO.decode_tokens_per_second == pytest.approx(3 / 2), "from 2 s to 4 s: two tokens of one, one of the other"


def test_streams_that_never_decode_together_have_no_such_rate():
    apart = Round([[(1.0, 1), (2.0, 1)], [(3.0, 1), (4.0, 1)]], waits=[1.0, 3.0])
    assert apart.decode_tokens_per_second is None
    report = Row("anypool", 1, 2, "cold", [apart], peer=Row("transformers", 1, 2, "none", [apart])).report()
    assert report["decode_tokens_per_second"] is None
    assert report["ratio_to_transformers"] == {"output_tokens_per_second": 1.0, "decode_tokens_per_second": None}


def test_tokens_that_came_together_share_the_time_before_them():
    assert Round([[(1.0, 1), (3.0, 2), (4.0, 1)]], waits=[1.0]).gaps == [1.0, 1.0, 1.0]


def test_a_row_has_medians_of_rates_and_percentiles_of_every_wait():
    def streamed(seconds):
        return Round([[(seconds, 1), (2 * seconds, 1)]], waits=[seconds])

    theirs = Row("transformers", 1, 1, "none", [streamed(2.0), streamed(2.0), streamed(20.0)])
    ours = Row("anypool", 1, 1, "cold", [streamed(1.0), streamed(0.5), streamed(10.0)], peer=theirs)
    assert ours.report() == {
        "engine": "anypool",
        "pools": 1,
        "streams": 1,
        "cache": "cold",
        "output_tokens_per_second": 1.0,
        "decode_tokens_per_second": 1.0,
        "time_to_first_token_ms": {"p50": 1000.0, "p95": 9100.0},
        "time_between_tokens_ms": {"p50": 1000.0, "p95": 9100.0},
        "ratio_to_transformers": {"output_tokens_per_second": 2.0, "decode_tokens_per_second": 2.0},
    }
    assert theirs.report()["ratio_to_transformers"] is None
