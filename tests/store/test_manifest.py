"""Manifests and mirrors: every changed byte is found, and a broken-off copy goes on where it was."""

import threading
import uuid
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.store import (
    CorruptObjectError,
    ExistsError,
    Manifest,
    Mirrored,
    NotFoundError,
    ObjectRecord,
    Store,
    StoreError,
    StoreKeyError,
    commit,
    load,
    mirror,
    verify,
)

FOLDER = "checkpoints/step-00000010-e1"
OBJECTS = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 50_000, "sub/empty": b"", "z": b"z"}


def write(store: Store, folder: str = FOLDER, objects: dict[str, bytes] | None = None) -> Manifest:
    """Upload and commit."""
    sent = {key: store.at(folder).upload(key, [data]) for key, data in (objects or OBJECTS).items()}
    manifest = Manifest({key: ObjectRecord(one.size, one.blake3) for key, one in sent.items()}, {"step": 10})
    commit(store, folder, manifest)
    return manifest


def memory() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def contents(store: Store) -> dict[str, bytes]:
    return {entry.key: store.get(entry.key) for entry in store.list()}


def test_a_committed_folder(store):
    with pytest.raises(
        NotFoundError, match=rf"{FOLDER}: not committed: it has no manifest.json; what it holds was begun"
    ):
        load(store, FOLDER)
    manifest = write(store)
    assert load(store, FOLDER) == manifest
    assert manifest.objects["z"] == ObjectRecord(1, blake3(b"z").hexdigest())
    told = []
    verify(store, FOLDER, manifest, progress=lambda done, total: told.append((done, total)))
    total = sum(map(len, OBJECTS.values()))
    assert told[-1] == (total, total) and sorted(told) == told and len(told) >= 4
    with pytest.raises(ExistsError, match=r"manifest.json: already exists"):
        commit(store, FOLDER, manifest)
    assert load(store, FOLDER) == manifest


def test_a_manifest_is_its_objects_in_order_whoever_wrote_first():
    store = memory()
    records = {key: ObjectRecord(1, "00") for key in "cab"}
    commit(store, "x", Manifest(records, {"list": [1, 2.5, None, "ä"]}))
    assert list(load(store, "x").objects) == ["a", "b", "c"]
    assert load(store, "x").known == {"list": [1, 2.5, None, "ä"]}


@settings(max_examples=40)
@given(data=st.data())
def test_every_change_is_found(data):
    store = memory()
    objects = data.draw(st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=50), min_size=1))
    manifest = write(store, objects=objects)
    verify(store, FOLDER, manifest)
    key = data.draw(st.sampled_from(sorted(objects)))
    old = objects[key]
    changes = [st.just(None), st.binary(min_size=1, max_size=5).map(lambda more: old + more)]
    if old:
        changes.append(st.integers(0, len(old) - 1).map(lambda end: old[:end]))
        flips = st.tuples(st.integers(0, len(old) - 1), st.integers(1, 255))
        changes.append(flips.map(lambda at: old[: at[0]] + bytes([old[at[0]] ^ at[1]]) + old[at[0] + 1 :]))
    new = data.draw(st.one_of(changes))
    if new is None:
        store.delete(f"{FOLDER}/{key}")
        now, found = "is missing", None
    else:
        store.put(f"{FOLDER}/{key}", new)
        found = blake3(new).hexdigest()
        now = f"is {len(new)} bytes with BLAKE3 {found}"
    expected = blake3(old).hexdigest()
    with pytest.raises(CorruptObjectError) as raised:
        verify(store, FOLDER, manifest)
    assert str(raised.value) == (
        f"{store.url}/{FOLDER}: {key} {now}; its manifest says {len(old)} bytes with BLAKE3 {expected}; "
        "use another copy"
    )
    assert (raised.value.key, raised.value.expected, raised.value.found) == (key, expected, found)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"objects": {"a": 1}, "known": {}, "nonce": ""}', b"\xff"])
def test_a_damaged_manifest(data):
    store = memory()
    store.put(f"{FOLDER}/manifest.json", data)
    with pytest.raises(CorruptObjectError, match=r"manifest.json is damaged or no manifest .*; use another copy"):
        load(store, FOLDER)


def test_a_manifest_cannot_list_itself_nor_lead_out_of_its_folder():
    store = memory()
    with pytest.raises(ValueError, match=r"lists 'manifest.json', which cannot hold its own hash; leave it out"):
        commit(store, FOLDER, Manifest({"manifest.json": ObjectRecord(0, "")}))
    with pytest.raises(StoreKeyError, match=r"key '../secret'"):
        verify(store, FOLDER, Manifest({"../secret": ObjectRecord(0, "")}))


def test_a_store_that_fails_while_verifying_is_told_as_that(tmp_path):
    store = Store.open(str(tmp_path / "s"))
    manifest = write(store)
    (tmp_path / "s").rename(tmp_path / "t")
    with pytest.raises(StoreError, match="the folder vanished"):
        verify(store, FOLDER, manifest)


def test_a_mirror_is_the_same_and_committed(store):
    source = memory()
    manifest = write(source)
    source.put("run.toml", b"toml")
    told = []
    size = sum(map(len, OBJECTS.values())) + 4
    done = mirror(source, store, progress=lambda done, total: told.append((done, total)))
    assert done == Mirrored(6, size + len(source.get(f"{FOLDER}/manifest.json")), 0)
    assert told[-1] == (size, size)
    assert contents(store) == contents(source)
    verify(store, FOLDER, load(store, FOLDER))
    assert load(store, FOLDER) == manifest
    again = mirror(source, store, FOLDER)
    assert again == Mirrored(0, 0, 5)


class _EndsEarly(Store):
    """A store that dies before its n-th object was begun; it notes the order of what was written."""

    def __init__(self, inner: Store, left: int) -> None:
        super().__init__(inner._place)
        self.left = left
        self.written: list[str] = []
        self.lock = threading.Lock()

    def _count(self, key: str) -> None:
        with self.lock:
            if self.left == 0:
                raise StoreError("ended early")
            self.left -= 1
            self.written.append(key)

    def upload(self, key, chunks):
        self._count(key)
        return super().upload(key, chunks)

    def create(self, key, data):
        self._count(key)
        super().create(key, data)


@pytest.mark.parametrize("after", range(5))
def test_a_broken_off_mirror_goes_on_and_commits_last(after, tmp_path):
    source, inner = memory(), Store.open(str(tmp_path))
    manifest = write(source)
    target = _EndsEarly(inner, after)
    with pytest.raises(StoreError, match="ended early"):
        mirror(source, target, FOLDER)
    assert not any(key.endswith("manifest.json") for key in target.written)
    with pytest.raises(NotFoundError, match="not committed"):
        load(inner, FOLDER)

    second = _EndsEarly(inner, 100)
    done = mirror(source, second, FOLDER)
    assert not set(second.written) & set(target.written), "what was there was copied again"
    assert second.written[-1] == f"{FOLDER}/manifest.json"
    assert (done.copied, done.kept) == (5 - after, after)
    assert contents(inner) == contents(source)
    verify(inner, FOLDER, manifest)


def test_what_is_there_but_wrong_is_copied_again():
    source, target = memory(), memory()
    write(source)
    target.put(f"{FOLDER}/z", b"y")  # of the same size
    target.put(f"{FOLDER}/config.json", b"{")
    target.put(f"{FOLDER}/sub/empty", b"")
    assert mirror(source, target, FOLDER).kept == 1
    assert contents(target) == contents(source)
    target.delete(f"{FOLDER}/z")  # from a committed copy
    assert mirror(source, target, FOLDER).copied == 1
    assert contents(target) == contents(source)


def test_a_corrupt_source_is_not_committed():
    source, target = memory(), memory()
    write(source)
    source.put(f"{FOLDER}/z", b"y")
    with pytest.raises(CorruptObjectError, match=rf"{FOLDER}/z is 1 bytes .*; use another copy") as raised:
        mirror(source, target, FOLDER)
    assert raised.value.expected == blake3(b"z").hexdigest() and raised.value.found == blake3(b"y").hexdigest()
    assert not target.exists(f"{FOLDER}/z") and not target.exists(f"{FOLDER}/manifest.json")
    source.delete(f"{FOLDER}/z")
    with pytest.raises(CorruptObjectError, match=r"z is missing"):
        mirror(source, target, FOLDER)


def test_a_target_that_holds_another_checkpoint_is_not_overwritten():
    source, target = memory(), memory()
    write(source)
    write(target, objects={"z": b"z"})
    before = target.get(f"{FOLDER}/manifest.json")
    with pytest.raises(ExistsError, match=r"manifest.json: already exists"):
        mirror(source, target, FOLDER)
    assert target.get(f"{FOLDER}/manifest.json") == before


def test_objects_of_no_manifest_follow_the_source(tmp_path: Path):
    source, target = Store.open(str(tmp_path / "a")), Store.open(str(tmp_path / "b"))
    source.put("m/part", b"1")
    mirror(source, target, "m")
    source.put("m/part", b"2")
    source.put("m/more", b"")
    assert mirror(source, target, "m") == Mirrored(2, 1, 0)
    assert contents(target) == {"m/part": b"2", "m/more": b""}
    target.put("m/own", b"")
    assert mirror(source, target, "m") == Mirrored(0, 0, 2)
    assert target.exists("m/own")
    assert mirror(source, target, "nothing") == Mirrored(0, 0, 0)
