"""Buckets: what is sent, retries, lost answers, no connection; against moto's S3 server on loopback."""

import socket
from datetime import timedelta

import pytest
from blake3 import blake3

from anypool.store import (
    ExistsError,
    Holder,
    LeaseHeldError,
    Leases,
    Manifest,
    NotFoundError,
    ObjectRecord,
    Store,
    StoreError,
    StoreFullError,
    StoreGoneError,
    StoreUrlError,
    Uploaded,
    claim,
    commit,
    load,
    places,
)
from tests.store.faulty import Fault, faulty_server, unfinished_uploads

MIB = 1024 * 1024
HOLDER = Holder("pool", "host", 1, "an id")


@pytest.fixture
def server(s3_address, monkeypatch):
    """A server that can fail, named by the environment, and quick retries."""
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    monkeypatch.setattr(places, "RETRIES", {**places.RETRIES, "max_retries": 3, "backoff": quick})
    with faulty_server(*s3_address) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        yield faulty


@pytest.fixture
def bucket(server, s3_url):
    return Store.open(s3_url)


def test_a_large_upload_goes_in_parts(server, bucket):
    data = b"".join(bytes([value]) * MIB for value in range(21))
    assert bucket.upload("k", [data[: 13 * MIB], data[13 * MIB :]]) == Uploaded(len(data), blake3(data).hexdigest())
    sent = [line for line in server.seen if "partNumber" in line]
    assert len(sent) == 3
    assert bucket.get_ranges("k", [(MIB - 1, 2), (20 * MIB, MIB)]) == [b"\0\1", bytes([20]) * MIB]
    server.seen.clear()
    assert bucket.get_range("k", 0, len(data)) == data
    assert len(server.seen) == 2, "no request is larger than 16 MiB"
    server.seen.clear()
    assert bucket.get_ranges("k", [(start, 10) for start in range(0, MIB, 1000)]) == [data[:10]] * 1049
    assert len(server.seen) == 1, "near ranges share a request"
    assert bucket.get("k") == data


def test_a_failed_upload_is_aborted(bucket, s3_address):
    before = unfinished_uploads(*s3_address)

    def chunks():
        yield bytes(20 * MIB)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        bucket.upload("k", chunks())
    assert unfinished_uploads(*s3_address) == before
    assert not bucket.exists("k")


def test_an_upload_with_a_store_that_fails_ends(server, bucket):
    server.faults = [Fault("PUT", "partNumber", times=100, status=507)]
    made = []

    def chunks():
        for number in range(100):
            made.append(number)
            yield bytes(8 * MIB)

    with pytest.raises(StoreFullError, match=r"k: no room left in the store"):
        bucket.upload("k", chunks())
    assert len(made) < 20, "the maker is stopped when the store fails"
    assert not bucket.exists("k")


def test_transient_errors_are_tried_again(server, bucket):
    server.faults = [Fault("PUT", "/k", times=2, status=503), Fault("GET", "/k", times=2, status=500)]
    bucket.put("k", b"1")
    assert bucket.get("k") == b"1"
    assert sum(line.startswith("PUT") for line in server.seen) == 3


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (503, StoreGoneError, "k: the store answers with errors, also after retries; try again later"),
        (507, StoreFullError, "k: no room left in the store; free space or raise the quota"),
        (403, StoreGoneError, "k: permission denied; check the credentials"),
        (401, StoreGoneError, "k: permission denied; check the credentials"),
        (400, StoreError, "k: the store did not do it"),
    ],
)
def test_answers_and_their_errors(server, bucket, status, kind, message):
    server.faults = [Fault("PUT", "/k", times=100, status=status)]
    for call in (bucket.put, bucket.create, lambda key, data: bucket.upload(key, [data])):
        with pytest.raises(kind, match=message):
            call("k", b"1")
    assert not bucket.exists("k")


def test_no_such_bucket(server):
    store = Store.open("s3://no-such-bucket/x")
    calls = (
        lambda: store.put("k", b""),
        lambda: store.create("k", b""),
        lambda: store.upload("k", [bytes(10 * MIB)]),
        lambda: store.get("k"),
        store.list,
        store.folders,
    )
    for call in calls:
        with pytest.raises(StoreGoneError, match="the bucket does not exist or these credentials do not open it"):
            call()


def test_no_connection(server, s3_url, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        store = Store.open(s3_url)
        for call in (lambda: store.put("k", b""), lambda: store.get("k"), store.list, lambda: store.exists("k")):
            with pytest.raises(StoreGoneError, match="no connection to the store; check the address and the network"):
                call()


def test_http_must_be_allowed_by_the_environment(server, s3_url, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError):
        Store.open(s3_url).put("k", b"")
    assert server.seen == []


def test_gs_and_az_are_opened_by_obstore(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert Store.open("gs://bucket/some/prefix").at("x").url == "gs://bucket/some/prefix/x"
    assert Store.open("az://container/prefix/").url == "az://container/prefix"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "not base64!")
    with pytest.raises(StoreUrlError, match=r"az://container' cannot be opened"):
        Store.open("az://container")


def test_a_claim_whose_answer_was_lost_is_known_again(server, bucket):
    server.faults = [Fault("PUT", "/k")]
    claim(bucket, "k", b"mine, 4711")
    assert bucket.get("k") == b"mine, 4711"
    assert server.faults[0].times == 0
    with pytest.raises(ExistsError):
        claim(bucket, "k", b"another's, 1234")


def test_a_create_whose_answer_was_lost_is_told_as_such(server, bucket):
    server.faults = [Fault("PUT", "/k")]
    with pytest.raises((ExistsError, StoreGoneError)):
        bucket.create("k", b"1")
    assert bucket.get("k") == b"1"


def test_a_claim_that_never_arrived_is_not_taken_for_done(server, bucket):
    server.faults = [Fault("PUT", "/k", times=100, status=503)]
    with pytest.raises(StoreGoneError):
        claim(bucket, "k", b"1")


def test_a_claim_that_failed_where_another_wrote(server, bucket):
    bucket.put("k", b"another's")
    server.faults = [Fault("PUT", "/k", times=100, status=503)]
    with pytest.raises(ExistsError, match="k: already exists, written by another"):
        claim(bucket, "k", b"mine")


def test_a_claim_that_cannot_look_tells_the_first_error(server, bucket):
    server.faults = [Fault("PUT", "/k", times=100, status=507), Fault("GET", "/k", times=100, status=500)]
    with pytest.raises(StoreFullError):
        claim(bucket, "k", b"mine")


def test_a_lease_whose_answer_was_lost_is_held(server, bucket):
    leases = Leases(bucket)
    server.faults = [Fault("PUT", "leases/000001.json")]
    lease = leases.take(HOLDER)
    leases.check(lease)
    assert leases.current() == lease

    server.faults = [Fault("PUT", "000001.base"), Fault("PUT", "000001.released")]
    leases.set_base(lease, "checkpoints/step-00000010-e1")
    leases.release(lease, "done")
    assert (leases.base(1), leases.released(1)) == ("checkpoints/step-00000010-e1", "done")


def test_a_lease_of_the_same_holder_is_not_taken_for_this_one(server, bucket):
    # The same holder, number and time in another call: only the nonce tells them apart.
    first, second = Leases(bucket, clock=lambda: 1000.0), Leases(bucket, clock=lambda: 1000.0)
    lease = first.take(HOLDER)
    second.current = lambda: None  # what it saw before the first one took it
    with pytest.raises(LeaseHeldError, match="in the same moment"):
        second.take(HOLDER)
    first.check(lease)


def test_a_commit_whose_answer_was_lost_is_committed(server, bucket):
    manifest = Manifest({"x": ObjectRecord(1, blake3(b"1").hexdigest())}, {"step": 1})
    server.faults = [Fault("PUT", "manifest.json")]
    commit(bucket, "folder", manifest)
    assert load(bucket, "folder") == manifest
    with pytest.raises(ExistsError):
        commit(bucket, "folder", manifest)
    with pytest.raises(NotFoundError, match="not committed"):
        load(bucket, "other")
