"""What every back end does alike."""

import itertools
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from anypool.store import (
    ExistsError,
    NotFoundError,
    Store,
    StoreError,
    StoreKeyError,
    StoreUrlError,
    Uploaded,
)
from anypool.store.ranges import REQUEST_BYTES, read_ranges, spans_for

MIB = 1024 * 1024


def test_objects_come_back_as_they_were_written(store):
    store.put("runs/a/run.toml", b"one")
    store.put("runs/a/run.toml", memoryview(b"second"))
    store.create("runs/a/empty", b"")
    assert store.get("runs/a/run.toml") == b"second"
    assert store.get("runs/a/empty") == b""
    assert (store.size("runs/a/run.toml"), store.size("runs/a/empty")) == (6, 0)
    assert store.exists("runs/a/run.toml") and not store.exists("runs/a")


def test_nothing_there(store):
    assert store.list() == [] and store.folders() == [] and store.list("runs/x") == []
    assert not store.exists("a")
    for read in (store.get, store.size, lambda key: store.get_range(key, 0, 1), lambda key: list(store.stream(key))):
        with pytest.raises(NotFoundError, match=r"a/b: no such object; .*the store ") as raised:
            read("a/b")
        assert (raised.value.store, raised.value.key) == (store.url, "a/b")
    store.delete("a/b")


def test_create_writes_once(store):
    store.create("k", b"first")
    with pytest.raises(ExistsError, match="k: already exists, and is written only once"):
        store.create("k", b"second")
    assert store.get("k") == b"first"


def test_of_many_threads_that_create_one_key_one_succeeds(store):
    start = threading.Barrier(8)

    def creates(number: int) -> list[bool]:
        won = []
        for key in ("a", "b/c", "b/d"):
            start.wait()
            try:
                store.create(key, str(number).encode())
                won.append(True)
            except ExistsError:
                won.append(False)
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(creates, range(8)))
    for column, key in enumerate(("a", "b/c", "b/d")):
        winners = [number for number in range(8) if won[number][column]]
        assert len(winners) == 1
        assert store.get(key) == str(winners[0]).encode()


def test_readers_see_one_write_or_the_other(store):
    size = 3 * MIB
    store.put("k", b"\0" * size)
    stop = threading.Event()

    def writes() -> None:
        for value in itertools.cycle(range(1, 7)):
            store.put("k", bytes([value]) * size)
            if stop.is_set():
                return

    writer = threading.Thread(target=writes)
    writer.start()
    try:
        for _ in range(20):
            data = store.get("k")
            assert len(data) == size
            assert data == data[:1] * size
    finally:
        stop.set()
        writer.join()


def test_upload_hashes_what_it_sends(store):
    parts = [b"", b"head", np.arange(6 * MIB, dtype=np.int32).reshape(2, -1), bytearray(100), np.zeros((0, 4))]
    whole = b"".join(np.asarray(part).tobytes() if isinstance(part, np.ndarray) else bytes(part) for part in parts)
    assert store.upload("big", iter(parts)) == Uploaded(len(whole), blake3(whole).hexdigest())
    assert store.size("big") == len(whole)
    assert store.get("big") == whole
    assert b"".join(store.stream("big", part_bytes=5 * MIB)) == whole
    assert store.upload("none", []) == Uploaded(0, blake3(b"").hexdigest())
    assert store.get("none") == b""


def test_a_buffer_may_be_reused_for_the_next_chunk(store):
    buffer = bytearray(3 * MIB)

    def chunks():
        for value in range(8):
            buffer[:] = bytes([value]) * len(buffer)
            yield buffer

    store.upload("k", chunks())
    assert store.get("k") == b"".join(bytes([value]) * len(buffer) for value in range(8))


def test_an_upload_whose_maker_fails_leaves_nothing(store):
    store.put("old", b"old")

    def chunks():
        yield bytes(20 * MIB)
        raise OSError(28, "the maker's own disk")

    for key in ("new", "old"):
        with pytest.raises(OSError, match="the maker's own disk"):
            store.upload(key, chunks())
    assert [entry.key for entry in store.list()] == ["old"]
    assert store.get("old") == b"old"
    assert store.sweep(0.0) == []


def test_chunks_may_come_from_the_store_itself(store):
    store.put("a", b"x" * MIB)
    sent = store.upload("b", (store.get_range("a", start, MIB // 4) for start in range(0, MIB, MIB // 4)))
    assert sent == Uploaded(MIB, blake3(store.get("a")).hexdigest())


def test_ranges(store):
    data = np.random.default_rng(0).bytes(300_000)
    store.put("k", data)
    ranges = [(0, 10), (299_990, 10), (5, 0), (100, 200_000), (300_000, 0), (7, 3)]
    assert store.get_ranges("k", ranges) == [data[start : start + length] for start, length in ranges]
    assert store.get_range("k", 1, 299_999) == data[1:]
    assert store.get_ranges("k", []) == []


def test_large_ranges_are_many_requests_and_near_ones_are_one(store):
    data = np.random.default_rng(0).bytes(40 * MIB)
    store.put("k", data)
    ranges = [(1, 39 * MIB), (5, 6), (39 * MIB, MIB), (20 * MIB, 17 * MIB)]
    assert store.get_ranges("k", ranges) == [data[start : start + length] for start, length in ranges]


RANGES = st.tuples(st.integers(0, 100 * MIB), st.sampled_from([0, 1, 1000, MIB, 16 * MIB, 50 * MIB]))


@given(ranges=st.lists(RANGES, max_size=8))
def test_spans_cover_the_ranges_and_are_bounded(ranges):
    spans = spans_for(ranges)
    assert spans == sorted(spans)
    assert all(0 < stop - start <= REQUEST_BYTES for start, stop in spans)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    for start, length in ranges:
        covered = sum(max(0, min(stop, start + length) - max(first, start)) for first, stop in spans)
        assert covered == length
    wanted = [(start, start + length) for start, length in ranges if length]
    for first, stop in spans:
        assert any(first < end and begin < stop for begin, end in wanted), "read for nothing"


@given(size=st.integers(0, 60), ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=6))
def test_ranges_are_cut_out_of_spans(size, ranges):
    data = bytes(range(size))
    with mock.patch("anypool.store.ranges.REQUEST_BYTES", 10), mock.patch("anypool.store.ranges._GAP_BYTES", 3):
        found = read_ranges(lambda span: data[span[0] : span[1]], ranges)
    assert found == [data[start : start + length] for start, length in ranges]


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (500, 3)])
def test_a_range_past_the_end_is_an_error(store, start, length):
    store.put("k", bytes(10))
    with pytest.raises(StoreError, match=f"k: bytes {start} to {start + length} were asked for, but the object has 10"):
        store.get_range("k", start, length)


def test_a_negative_range_is_a_mistake(store):
    with pytest.raises(ValueError, match=r"range \(-1, 5\) of 'k': start and length must be 0 or more"):
        store.get_range("k", -1, 5)


def test_an_object_replaced_while_it_is_streamed_is_an_error(store):
    store.put("k", b"a" * 10)
    parts = store.stream("k", part_bytes=5)
    assert next(parts) == b"aaaaa"
    store.put("k", b"b" * 10)
    with pytest.raises(StoreError, match="replaced while it was read"):
        next(parts)


def test_list_and_folders_name_whole_segments(store):
    before = time.time()
    for key in ("runs/a/x", "runs/a/y/z", "runs/ab/x", "top"):
        store.put(key, key.encode())
    assert [(entry.key, entry.size) for entry in store.list()] == [
        ("runs/a/x", 8),
        ("runs/a/y/z", 10),
        ("runs/ab/x", 9),
        ("top", 3),
    ]
    assert [entry.key for entry in store.list("runs/a")] == [entry.key for entry in store.list("runs/a/")]
    assert [entry.key for entry in store.list("runs/a")] == ["runs/a/x", "runs/a/y/z"]
    assert store.list("run") == []
    assert store.folders() == ["runs"]
    assert store.folders("runs") == ["runs/a", "runs/ab"]
    assert store.folders("runs/a") == ["runs/a/y"]
    # S3 keeps whole seconds; file times may come from a coarser clock than time.time().
    assert all(before - 2 < entry.modified < time.time() + 2 for entry in store.list())


def test_at_is_a_store_of_its_own(store):
    below = store.at("runs/a")
    below.put("x/y", b"1")
    assert below.url == f"{store.url}/runs/a"
    assert store.get("runs/a/x/y") == below.at("x").get("y") == b"1"
    assert [entry.key for entry in below.list()] == ["x/y"]
    assert below.folders() == ["x"] and below.list("x")[0].key == "x/y"
    assert store.at("").url == store.url and store.at("runs/").at("a/").exists("x/y")


def test_deleting_also_what_is_not_there(store):
    for key in ("a/1", "a/2", "b"):
        store.put(key, b"")
    store.delete("a/1", "nope", "b", "nope/too")
    assert [entry.key for entry in store.list()] == ["a/2"]
    store.delete("a/2")
    store.delete()
    assert store.folders() == []


def test_copy_between_stores(store, tmp_path):
    other = Store.open(str(tmp_path / "other"))
    data = os.urandom(20 * MIB)
    other.put("x/y", data)
    assert store.copy_from(other, "x/y") == Uploaded(len(data), blake3(data).hexdigest())
    assert store.get("x/y") == data
    with pytest.raises(NotFoundError, match=r"other: x/z: no such object"):
        store.copy_from(other, "x/z")


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", ".", "a/../b", "a b", "a#1", "a\\b", "é", "a\n", "a%2fb", "~a", None]
)
def test_keys_that_not_every_back_end_keeps(key):
    store = Store.open("memory://keys")
    calls = (
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.create(key, b""),
        lambda: store.upload(key, [b""]),
        lambda: store.exists(key),
        lambda: store.delete("a", key),
    )
    for call in calls:
        with pytest.raises(StoreKeyError, match=r"key .*; (use letters|write segments)"):
            call()
    assert store.list() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "store '' names nothing; write file:///folder, a plain path, memory://NAME, s3://"),
        ("http://x/y", "store 'http://x/y' starts with http:, which is no store; write file:///folder"),
        ("ftp://x", "starts with ftp:, which is no store"),
        ("file://host/x", "names a host; write file:///folder with three slashes"),
        ("memory://", "needs one name of letters, digits"),
        ("memory://a/b", "needs one name of letters, digits"),
        ("s3://", "store 's3://' names no bucket; write s3://bucket/prefix"),
        ("gs:///x", "names no bucket; write gs://bucket/prefix"),
        ("s3://bucket/x?region=y", "has a query or fragment; options come from the environment"),
        ("s3://key:secret@bucket/x", "holds credentials; they come from the environment"),
        ("az://container/x", r"cannot be opened: .*Account must be specified; check the address and the credentials"),
        ("~nobody-has-this-name/x", "write the whole path"),
    ],
)
def test_addresses_that_name_no_store(url, message, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreUrlError, match=message) as raised:
        Store.open(url)
    assert "secret" not in str(raised.value)


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "x").write_text("")
    for path in (tmp_path / "x", tmp_path / "x" / "y" / "z"):
        with pytest.raises(StoreUrlError, match=f"store '{path}': '{tmp_path / 'x'}' is a file; name a folder"):
            Store.open(str(path))


def test_paths_become_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url, path in [
        ("runs", tmp_path / "runs"),
        ("./a/../b c#1", tmp_path / "b c#1"),
        ("~/x", tmp_path / "home" / "x"),
        (f"file://{tmp_path}/y/", tmp_path / "y"),
        (f"file:{tmp_path}/w", tmp_path / "w"),
        (f"file://localhost{tmp_path}/one%20two", tmp_path / "one two"),
        (f"file://{tmp_path}/q?#1", tmp_path / "q?#1"),
    ]:
        store = Store.open(url)
        assert store.url == f"file://{path}"
        assert not path.exists()
        store.put("k", b"1")
        assert (path / "k").read_bytes() == b"1"


def test_memory_is_shared_by_name():
    name = uuid.uuid4().hex
    Store.open(f"memory://{name}").put("k", b"1")
    assert Store.open(f"memory://{name}").get("k") == b"1"
    assert not Store.open(f"memory://{name}x").exists("k")


KEYS = st.sampled_from(["f1", "f2", "d1/f1", "d1/f2", "d1/e/f1", "d2/f1", "d2/e/f1", "d2/e/g/f1"])


class _LikeADict(RuleBasedStateMachine):
    """A store beside a dict of the same puts, creates, uploads and deletes."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, bytes] = {}
        self.store = self.make()

    def make(self) -> Store:
        return Store.open(f"memory://{uuid.uuid4().hex}")

    @rule(key=KEYS, data=st.binary(max_size=20))
    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.model[key] = data

    @rule(key=KEYS, data=st.binary(max_size=20))
    def create(self, key: str, data: bytes) -> None:
        if key in self.model:
            with pytest.raises(ExistsError):
                self.store.create(key, data)
        else:
            self.store.create(key, data)
            self.model[key] = data

    @rule(key=KEYS, chunks=st.lists(st.binary(max_size=9), max_size=3))
    def upload(self, key: str, chunks: list[bytes]) -> None:
        self.store.upload(key, chunks)
        self.model[key] = b"".join(chunks)

    @rule(keys=st.lists(KEYS, max_size=3))
    def delete(self, keys: list[str]) -> None:
        self.store.delete(*keys)
        for key in keys:
            self.model.pop(key, None)

    @rule(folder=st.sampled_from(["", "d1", "d2", "d2/e", "d3"]))
    def look(self, folder: str) -> None:
        below = {key: key.removeprefix(f"{folder}/" if folder else "") for key in self.model}
        below = {key: rest for key, rest in below.items() if not folder or rest != key}
        assert {entry.key: entry.size for entry in self.store.list(folder)} == {k: len(self.model[k]) for k in below}
        first = {rest.split("/")[0] for rest in below.values() if "/" in rest}
        assert self.store.folders(folder) == sorted(f"{folder}/{name}" if folder else name for name in first)

    @invariant()
    def the_same(self) -> None:
        assert {entry.key: self.store.get(entry.key) for entry in self.store.list()} == self.model


class _FolderLikeADict(_LikeADict):
    def make(self) -> Store:
        self.folder = Path(self.root) / uuid.uuid4().hex
        return Store.open(str(self.folder))

    root = "/nowhere"


def test_memory_is_like_a_dict():
    run = _LikeADict.TestCase
    run.settings = settings(max_examples=40, stateful_step_count=25)
    run("runTest").runTest()


def test_a_folder_is_like_a_dict(tmp_path):
    _FolderLikeADict.root = str(tmp_path)
    run = _FolderLikeADict.TestCase
    run.settings = settings(max_examples=40, stateful_step_count=25)
    run("runTest").runTest()
