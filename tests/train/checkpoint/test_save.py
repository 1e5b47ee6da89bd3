"""Saving beside the training: what waits, what fails, what is sent again."""

import re
import resource
import shutil
import threading
from contextlib import contextmanager

import jax
import pytest

from anypool.store import LeaseLostError, Leases, Manifest, Store, StoreError, StoreFullError, StoreGoneError, load
from anypool.store.leases import Holder
from anypool.train.checkpoint import CheckpointError, HostsMissingError
from anypool.train.checkpoint.write import Hosts, Object, Report, write
from tests.train.checkpoint.states import checkpoints, equal, numbers, placed, step_on

STEP = step_on("")
SPECS = STEP.config.specs


def state_at(step):
    return placed(STEP, numbers(STEP.config, step))


@contextmanager
def held_uploads(monkeypatch):
    """Uploads wait until the event is set."""
    going, upload = threading.Event(), Store.upload
    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", lambda *arguments: going.wait(60) and upload(*arguments))
        try:
            yield going
        finally:
            going.set()


@pytest.fixture
def uploads(monkeypatch):
    """The keys that are uploaded; after `uploads.limit` of them the store is full."""

    class Uploads(list):
        limit = None

    seen, upload, lock = Uploads(), Store.upload, threading.Lock()

    def counted(store, key, chunks):
        with lock:
            if seen.limit is not None and len(seen) >= seen.limit:
                raise StoreFullError("no room")
            seen.append(key)
        return upload(store, key, chunks)

    monkeypatch.setattr(Store, "upload", counted)
    return seen


def test_the_next_step_may_take_the_states_memory(tmp_path, monkeypatch):
    saver, state = checkpoints(tmp_path), state_at(1)
    with held_uploads(monkeypatch) as going:
        pending = saver.save(state, SPECS, step=1, epoch=1)
        spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        jax.block_until_ready(spoil(state))
        assert state.params.embed.is_deleted() and not pending.done and saver.latest() is None
        going.set()
        saver.wait()
    assert pending.done and pending.stall_seconds > 0
    assert equal(saver.restore(saver.latest(), STEP.abstract_state(), SPECS), numbers(STEP.config, 1))


def test_one_save_at_a_time(tmp_path, monkeypatch):
    saver, second = checkpoints(tmp_path), state_at(2)
    with held_uploads(monkeypatch) as going:
        first = saver.save(state_at(1), SPECS, step=1, epoch=1)
        threading.Timer(0.05, going.set).start()
        pending = saver.save(second, SPECS, step=2, epoch=1)
        assert first.done and pending.waited_seconds > 0
    saver.close()
    assert [info.step for info in saver.committed()] == [2, 1]


def test_the_manifest_is_written_last_and_names_everything(tmp_path, uploads):
    saver = checkpoints(tmp_path, max_shard_bytes=30_000)
    folder = saver.save(state_at(1), SPECS, step=1, epoch=1).folder
    saver.close()
    objects = load(Store.open(str(tmp_path)), folder).objects
    assert set(objects) == set(uploads) == {path.name for path in (tmp_path / folder).iterdir()} - {"manifest.json"}


def test_a_full_store_is_told_and_the_last_commit_stays(tmp_path):
    saver = checkpoints(tmp_path)
    saver.save(state_at(1), SPECS, step=1, epoch=1)
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # less than the weights
    try:
        pending = saver.save(state_at(2), SPECS, step=2, epoch=1)
        with pytest.raises(StoreFullError, match="step-00000002-e1"):
            pending.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(StoreFullError):
        saver.save(state_at(3), SPECS, step=3, epoch=1)
    assert saver.latest().step == 1
    assert equal(saver.restore(saver.latest(), STEP.abstract_state(), SPECS), numbers(STEP.config, 1))
    # Told once; then it goes on, and what the broken save left is cleaned up.
    saver.save(state_at(3), SPECS, step=3, epoch=1)
    saver.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000001-e1", "step-00000003-e1"}


def test_a_store_that_vanished(tmp_path):
    store = tmp_path / "store"
    saver = checkpoints(store)
    saver.save(state_at(1), SPECS, step=1, epoch=1)
    saver.wait()
    shutil.rmtree(store)
    saver.save(state_at(2), SPECS, step=2, epoch=1)
    with pytest.raises(StoreGoneError, match="vanished"):
        saver.close()
    saver.close()


def test_a_fenced_trainer_cannot_commit(tmp_path):
    store = Store.open(str(tmp_path))
    leases = Leases(store)
    lease = leases.take(Holder("a", "here", 1, "1"))
    leases.set_base(lease, None)
    saver = checkpoints(store, guard=lambda: leases.check(lease))
    saver.save(state_at(1), SPECS, step=1, epoch=lease.number)
    saver.wait()
    newer = leases.take(Holder("b", "there", 2, "2"), fence=True)
    pending = saver.save(state_at(2), SPECS, step=2, epoch=lease.number)
    with pytest.raises(LeaseLostError):
        saver.wait()
    assert not store.exists(f"{pending.folder}/manifest.json")
    assert saver.latest().step == saver.latest(newer.number).step == 1


def test_what_is_known_late_is_asked_for_just_before_the_commit(tmp_path):
    store, order = Store.open(str(tmp_path)), []

    def late(step):
        order.append(("late", step, store.exists("checkpoints/step-00000001-e1/run.json")))
        return {"loss": 2.5}

    saver = checkpoints(store, late=late, guard=lambda: order.append("guard"))
    saver.save(state_at(1), SPECS, step=1, epoch=1, known={"seed": 3})
    saver.close()
    assert order[:2] == [("late", 1, True), "guard"]
    assert saver.latest().known == {"seed": 3, "loss": 2.5}


def test_what_is_there_is_not_sent_again(tmp_path, uploads):
    saver = checkpoints(tmp_path, max_shard_bytes=30_000)
    uploads.limit = 6
    saver.save(state_at(1), SPECS, step=1, epoch=1)
    with pytest.raises(StoreFullError):
        saver.wait()
    before, uploads.limit = set(uploads), None
    uploads.clear()
    pending = saver.save(state_at(1), SPECS, step=1, epoch=1)
    sent = pending.wait()
    objects = load(Store.open(str(tmp_path)), pending.folder).objects
    assert len(before) == 6 and set(uploads) == set(objects) - before
    assert sent == sum(objects[name].size for name in uploads)
    assert equal(saver.restore(saver.latest(), STEP.abstract_state(), SPECS), numbers(STEP.config, 1))


def test_what_is_there_with_other_content_is_sent_again(tmp_path, uploads):
    saver = checkpoints(tmp_path, max_shard_bytes=30_000)
    uploads.limit = 6
    saver.save(state_at(1), SPECS, step=1, epoch=1)
    with pytest.raises(StoreFullError):
        saver.wait()
    uploads.limit = None
    other = jax.tree.map(lambda x: x if x.ndim == 0 else x + 1, state_at(1))
    saver.save(other, SPECS, step=1, epoch=1)
    saver.wait()
    assert equal(saver.restore(saver.latest(), STEP.abstract_state(), SPECS), jax.device_get(other))


def test_what_is_committed_is_never_written_over(tmp_path, uploads):
    saver = checkpoints(tmp_path)
    saver.save(state_at(1), SPECS, step=1, epoch=1)
    saver.wait()
    uploads.clear()
    assert saver.save(state_at(1), SPECS, step=1, epoch=1).wait() == 0  # the same once more is no mistake
    other = jax.tree.map(lambda x: x if x.ndim == 0 else x + 1, state_at(1))
    saver.save(other, SPECS, step=1, epoch=1)
    with pytest.raises(CheckpointError, match="step-00000001-e1 is committed already, with another content"):
        saver.wait()
    assert not uploads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_last": 0}, "keep_last is 0; a whole number of at least 1 is expected"),
        ({"keep_every": -1}, "keep_every is -1"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"dtype": "float16"}, "dtype of checkpoints is 'float16'; there are float32, bfloat16"),
        ({"files": {"model.safetensors": b""}}, "files has neither config.json nor adapter_config.json"),
    ],
)
def test_settings_that_make_no_sense(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoints(tmp_path, **changes)


def test_saves_that_make_no_sense(tmp_path):
    with pytest.raises(CheckpointError, match="step is 2, and the state has done 1 steps"):
        checkpoints(tmp_path).save(state_at(1), SPECS, step=2, epoch=1)
    with pytest.raises(CheckpointError, match="opened without files"):
        checkpoints(tmp_path, files=None).save(state_at(1), SPECS, step=1, epoch=1)


# Several hosts, here as threads of one process: what they write has nothing to do with devices.


def on_threads(*calls):
    """What each call returned or raised."""
    found = [None] * len(calls)

    def run(i, call):
        try:
            found[i] = call()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def host(store, number, objects, attempt="one", guard=lambda: None, patience=30.0):
    named = [Object.of(name, data) for name, data in objects.items()]

    def known():
        guard()
        return {"seed": 5}

    return lambda: write(store, "folder", named, known, Hosts(number, 2, patience), attempt)


def test_all_hosts_objects_are_in_the_manifest():
    store = Store.open("memory://two-hosts-write")
    assert on_threads(host(store, 0, {"a": b"1"}), host(store, 1, {"b": b"22"})) == [1, 2]
    manifest = load(store, "folder")
    assert {name: record.size for name, record in manifest.objects.items()} == {"a": 1, "b": 2}
    assert manifest.known == {"seed": 5}
    assert [entry.key for entry in store.list()] == ["folder/a", "folder/b", "folder/manifest.json"]


def test_a_report_of_an_earlier_attempt_does_not_count():
    store = Store.open("memory://stale-report")
    stale = on_threads(host(store, 1, {"b": b"old"}, attempt="zero", patience=0.3))
    assert isinstance(stale[0], HostsMissingError)
    Report("zero", {}, complete=True).save(store.at("folder"), 1)
    alone = on_threads(host(store, 0, {"a": b"1"}, patience=0.3))
    assert isinstance(alone[0], HostsMissingError) and not store.exists("folder/manifest.json")
    assert on_threads(host(store, 0, {"a": b"1"}), host(store, 1, {"b": b"new"})) == [0, 3]
    assert store.get("folder/b") == b"new" and isinstance(load(store, "folder"), Manifest)


def test_a_host_that_fails_is_named_to_the_others():
    store = Store.open("memory://failing-host")

    def lost():
        raise StoreError("the run is another's")

    zero, one = on_threads(host(store, 0, {"a": b"1"}, guard=lost), host(store, 1, {"b": b"2"}))
    assert isinstance(zero, StoreError) and "another's" in str(zero)
    assert isinstance(one, HostsMissingError) and "host 0 could not commit the checkpoint: StoreError" in str(one)
    assert not store.exists("folder/manifest.json")


def test_a_host_that_falls_silent_is_not_waited_for_forever():
    (found,) = on_threads(host(Store.open("memory://silent-host"), 0, {"a": b"1"}, patience=0.3))
    assert isinstance(found, HostsMissingError) and "no more is heard of 1 of 2 hosts" in str(found)
