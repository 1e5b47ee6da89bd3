"""Other processes, full and read-only disks, kills: what a store promises when things go wrong for real."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from anypool.store import ExistsError, NotFoundError, Store, StoreError, StoreGoneError
from tests.store.faulty import unfinished_uploads

CHILD = [sys.executable, str(Path(__file__).with_name("child.py"))]
ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024


def start(*arguments: str) -> subprocess.Popen[str]:
    """A child process that waits for lines on its standard input."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@cache
def can_mount() -> bool:
    """Whether a process may have mounts of its own: as root, or in a user namespace."""
    if not (shutil.which("unshare") and shutil.which("mount")):
        return False
    return subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip


needs_mounts = pytest.mark.skipif(not can_mount(), reason="this machine allows no mounts, also not in a namespace")


def on_a_disk_of_its_own(mount: str, *arguments: str) -> Any:
    """What the child prints, after the shell command `mount` in a mount namespace that ends with it."""
    command = f"{mount} && exec {shlex.join([*CHILD, *arguments])}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_of_many_processes_that_create_one_key_one_succeeds(kind, tmp_path, request):
    url = str(tmp_path) if kind == "file" else request.getfixturevalue("s3_url")
    keys = 40
    children = [start("create", url, f"child-{number}", str(keys)) for number in range(6)]
    try:
        for child in children:
            assert line_of(child) == "ready"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        won = {f"child-{number}": json.loads(line_of(child)) for number, child in enumerate(children)}
    finally:
        for child in children:
            child.kill()
            child.communicate()
    store = Store.open(url)
    owners = {number: name for name, numbers in won.items() for number in numbers}
    assert sum(len(numbers) for numbers in won.values()) == len(owners) == keys
    assert {number: store.get(f"folder/{number}").decode() for number in range(keys)} == owners
    assert len(store.list()) == keys and store.sweep(0.0) == []


def begun_and_killed(url: str) -> None:
    child = start("upload", url)
    assert line_of(child) == "halfway"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_killed_upload_leaves_no_object_in_a_folder(tmp_path):
    begun_and_killed(str(tmp_path))
    begun_and_killed(str(tmp_path))
    staged = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert staged == ["runs/a/big#1", "runs/a/big#2"], "the children were not in the middle of an upload"

    store = Store.open(str(tmp_path))
    assert not store.exists("runs/a/big") and store.list() == [] and store.list("runs/a") == []
    with pytest.raises(NotFoundError):
        store.get("runs/a/big")

    store.upload("runs/a/big", [b"whole"])
    store.create("runs/a/other", b"")
    assert store.get("runs/a/big") == b"whole"
    assert [entry.key for entry in store.list()] == ["runs/a/big", "runs/a/other"]

    os.utime(tmp_path / "runs/a/big#1", (0, 0))
    assert store.sweep() == ["runs/a/big#1"], "only what nobody wrote to for a day"
    assert store.at("runs/b").sweep(0.0) == []
    assert store.at("runs").sweep(0.0) == ["runs/a/big#2"]
    assert store.sweep(0.0) == []
    assert store.get("runs/a/big") == b"whole"


def test_a_killed_upload_leaves_no_object_in_a_bucket(s3_url, s3_address):
    before = unfinished_uploads(*s3_address)
    begun_and_killed(s3_url)
    assert unfinished_uploads(*s3_address) == before + 1, "the child was not in the middle of an upload"
    store = Store.open(s3_url)
    assert not store.exists("runs/a/big") and store.list() == [] and store.folders() == []
    store.upload("runs/a/big", [b"whole"])
    assert store.get("runs/a/big") == b"whole"


def check_full(said: Any, reason: str) -> None:
    for action, (kind, message) in said["errors"].items():
        assert kind == "StoreFullError", (action, kind, message)
        assert "no room left in the store; free space or raise the quota" in message
        assert reason in message
    assert said["left"] == ["old"], "nothing half written, also no staging file"
    assert said["old"] == "old"


@needs_mounts
def test_a_full_disk(tmp_path):
    disk = shlex.quote(str(tmp_path))
    check_full(on_a_disk_of_its_own(f"mount -t tmpfs -o size=2m tmpfs {disk}", "fill", str(tmp_path)), "os error 28")


def test_a_file_larger_than_the_process_may_write(tmp_path):
    child = start("fill_under_limit", str(tmp_path))
    check_full(json.loads(line_of(child)), "os error 27")
    child.communicate()


@needs_mounts
def test_a_disk_mounted_read_only(tmp_path):
    Store.open(str(tmp_path)).put("old", b"old")
    disk = shlex.quote(str(tmp_path))
    mount = f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}"
    said = on_a_disk_of_its_own(mount, "write_read_only", str(tmp_path))
    for action, (kind, message) in said["errors"].items():
        assert kind == "StoreReadOnlyError", (action, kind, message)
        assert "the store is read-only; mount it writable or name another store" in message
    assert said["old"] == "old"


@needs_mounts
def test_a_disk_that_is_unmounted(tmp_path):
    disk = shlex.quote(str(tmp_path))
    said = on_a_disk_of_its_own(f"mount -t tmpfs tmpfs {disk}", "lose_the_mount", str(tmp_path), "umount")
    for kind, message in said.values():
        assert kind == "StoreGoneError"
        assert "store: the folder vanished; is its disk still mounted?" in message
    assert list(tmp_path.iterdir()) == [], "nothing was written to the disk below"


def test_a_folder_of_somebody_else():
    # Not below pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Store.open(name).put("secret", b"")
        (folder / "secret").chmod(0)
        folder.chmod(0o555)
        child = start("write_without_permission", name)
        said = json.loads(line_of(child))
        child.communicate()
        folder.chmod(0o755)
    for action, (kind, message) in said.items():
        assert kind == "StoreGoneError", (action, kind, message)
        assert "permission denied; check the credentials or the folder's owner" in message
        assert "os error 13" in message


def test_a_folder_that_vanished(tmp_path):
    store = Store.open(str(tmp_path / "store"))
    store.put("k", b"1")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    calls = (
        lambda: store.get("k"),
        lambda: store.exists("k"),
        store.list,
        store.folders,
        lambda: store.put("k", b"2"),
        lambda: store.create("n", b"2"),
        lambda: store.upload("n", [b"2"]),
        lambda: store.delete("k"),
        store.sweep,
    )
    for call in calls:
        with pytest.raises(StoreGoneError, match=r"store: the folder vanished; is its disk still mounted?"):
            call()
    assert not (tmp_path / "store").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    assert store.get("k") == b"1"


def test_an_object_is_no_folder(tmp_path):
    store = Store.open(str(tmp_path))
    store.put("a/b", b"")
    with pytest.raises(StoreError, match=r"a/b/c: no object can stand below another, nor where others stand below"):
        store.put("a/b/c", b"")
    with pytest.raises(ExistsError):
        store.create("a", b"")
    with pytest.raises(StoreError, match=r": a: no object can stand below another"):
        store.put("a", b"")
