"""Old checkpoints go, and a second store gets the new ones."""

import os
import shutil
import threading

import jax
import pytest

from anypool.store import Leases, Store, verify
from anypool.store.leases import Holder
from anypool.store.manifest import load
from anypool.train.checkpoint import second as module
from tests.train.checkpoint.states import checkpoints, equal, numbers, placed, step_on

STEP = step_on("")
SPECS = STEP.config.specs


def save(saver, *steps, epoch=1):
    for step in steps:
        saver.save(placed(STEP, numbers(STEP.config, step)), SPECS, step=step, epoch=epoch)
        saver.wait()


def folders(root):
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def take(root):
    leases = Leases(Store.open(str(root)))
    lease = leases.take(Holder("pool", "host", 1, "id"), fence=True)
    return leases, lease


def test_the_last_ones_and_every_fourth_stay(tmp_path):
    saver = checkpoints(tmp_path, keep_last=2, keep_every=4)
    save(saver, *range(1, 8))
    assert folders(tmp_path) == [f"step-{step:08d}-e1" for step in (4, 6, 7)]


def test_what_an_epoch_started_from_stays_until_it_has_its_own(tmp_path):
    leases, lease = take(tmp_path)
    leases.set_base(lease, None)
    save(checkpoints(tmp_path, keep_last=1), 1, 2)
    leases, lease = take(tmp_path)
    saver = checkpoints(tmp_path, keep_last=2)
    base = saver.latest()
    leases.set_base(lease, base.folder)
    # Of the fenced trainer: one that was never committed, and one that was, too late.
    save(checkpoints(tmp_path, keep_last=None), 3)
    Store.open(str(tmp_path)).put("checkpoints/step-00000004-e1/run.json", b"{}")
    assert equal(saver.restore(saver.latest(), STEP.abstract_state(), SPECS), numbers(STEP.config, 2))
    save(saver, 3, epoch=2)
    assert folders(tmp_path) == ["step-00000002-e1", "step-00000003-e2"]
    save(saver, 4, epoch=2)
    assert folders(tmp_path) == ["step-00000003-e2", "step-00000004-e2"]


def test_what_killed_writers_left_is_swept(tmp_path):
    saver = checkpoints(tmp_path)
    save(saver, 1)
    left = tmp_path / "checkpoints/step-00000001-e1/model-00001-of-00001.safetensors#3"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    save(saver, 2)
    assert not left.exists() and len(saver.committed()) == 2


def test_a_folder_is_deleted_manifest_first(tmp_path, monkeypatch):
    deleted, delete = [], Store.delete
    saver = checkpoints(tmp_path, keep_last=1)
    save(saver, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", lambda store, *keys: (deleted.append(keys), delete(store, *keys))[1])
        save(saver, 2)
    (first, *others) = [keys for keys in deleted if not keys[0].startswith("part-")]
    assert first == ("manifest.json",) and others


def test_trouble_with_deleting_is_told_and_does_not_stop_anything(tmp_path, monkeypatch):
    told = []

    def refuses(store, place):
        raise RuntimeError("not today")

    monkeypatch.setattr("anypool.train.checkpoint.saver.delete_folder", refuses)
    saver = checkpoints(tmp_path, keep_last=1, report=told.append)
    save(saver, 1, 2)
    assert saver.latest().step == 2 and len(told) == 1 and "were not deleted: not today" in told[0]


@pytest.fixture
def two(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    return first, second


def test_the_run_goes_on_from_the_second_store(two):
    first, second = two
    leases, lease = take(first)
    leases.set_base(lease, None)
    Store.open(str(first)).put("run.toml", b"[run]\n")
    saver = checkpoints(first, keep_last=1, copy_to=Store.open(str(second)))
    save(saver, 1, 2)
    saver.close()
    assert folders(second) == ["step-00000002-e1"] and (second / "run.toml").read_bytes() == b"[run]\n"
    shutil.rmtree(first)

    leases, lease = take(second)
    assert lease.number == 2
    saver = checkpoints(second)
    info = saver.latest()
    leases.set_base(lease, info.folder)
    verify(leases.store, info.folder, load(leases.store, info.folder))
    assert equal(saver.restore(info, STEP.abstract_state(), SPECS), numbers(STEP.config, 2))


def test_a_second_store_that_fails_is_told_and_the_next_copy_is_whole(two):
    first, second = two
    told = []
    saver = checkpoints(first, keep_last=None, copy_to=Store.open(str(second)), report=told.append)
    shutil.rmtree(second)
    save(saver, 1)
    saver._second.wait()
    assert saver.latest().step == 1 and len(told) == 1
    assert told[0].startswith("checkpoints/step-00000001-e1 was not copied to file://") and "vanished" in told[0]
    second.mkdir()
    save(saver, 2)
    saver.close()
    assert folders(second) == ["step-00000002-e1"] and len(told) == 1


def test_nothing_is_copied_to_where_the_run_was_taken_over(two):
    first, second = two
    leases, lease = take(first)
    leases.set_base(lease, None)
    told = []
    saver = checkpoints(first, keep_last=1, copy_to=Store.open(str(second)), report=told.append)
    save(saver, 1)
    saver._second.wait()
    take(second)
    save(saver, 2)
    saver.close()
    assert folders(second) == ["step-00000001-e1"] and folders(first) == ["step-00000002-e1"]
    assert "holds leases that this run's store has not: the run goes on from there" in told[0]


def test_what_is_being_copied_is_not_deleted(two, monkeypatch):
    first, second = two
    started, going, mirror = threading.Event(), threading.Event(), module.mirror

    def slow(*arguments):
        started.set()
        assert going.wait(60)
        return mirror(*arguments)

    monkeypatch.setattr(module, "mirror", slow)
    saver = checkpoints(first, keep_last=1, copy_to=Store.open(str(second)))
    save(saver, 1)
    assert started.wait(60)
    save(saver, 2, 3)  # 2 is not copied: 3 comes before its turn
    assert folders(first) == ["step-00000001-e1", "step-00000003-e1"]
    going.set()
    saver.close()
    assert folders(second) == ["step-00000003-e1"]
    restored = checkpoints(second).restore(saver.latest(), STEP.abstract_state(), SPECS)
    assert jax.tree.leaves(restored) and equal(restored, numbers(STEP.config, 3))
