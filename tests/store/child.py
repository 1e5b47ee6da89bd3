"""What the tests let other processes do to a store: `python child.py ACTION URL [...]`.

A child says on its standard output how far it is, and goes on when its standard input says so or ends.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from anypool.store import ExistsError, Store, StoreError

MIB = 1024 * 1024


def create(url: str, name: str, keys: str) -> None:
    """Create `keys` keys as `name` and print which of them it won."""
    store = Store.open(url)
    print("ready", flush=True)
    sys.stdin.readline()
    won = []
    for number in range(int(keys)):
        try:
            store.create(f"folder/{number}", name.encode())
            won.append(number)
        except ExistsError:
            pass
    print(json.dumps(won))


def upload(url: str) -> None:
    """Begin an upload and stop in the middle of it."""

    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(8 * MIB)
        print("halfway", flush=True)
        sys.stdin.readline()

    Store.open(url).upload("runs/a/big", chunks())


def fill(url: str) -> None:
    """Write more than there is room for, in every way, then something small; print what happened."""
    store = Store.open(url)
    store.put("old", b"old")
    errors = {
        "put": _error(lambda: store.put("put", bytes(3 * MIB))),
        "put large": _error(lambda: store.put("large", bytes(20 * MIB))),
        "over": _error(lambda: store.put("old", bytes(3 * MIB))),
        "create": _error(lambda: store.create("create", bytes(3 * MIB))),
        "upload": _error(lambda: store.upload("upload", (bytes(MIB) for _ in range(40)))),
    }
    left = sorted(path.name for path in Path(url).iterdir())
    store.put("new", b"new")
    print(json.dumps({"errors": errors, "left": left, "old": store.get("old").decode()}))


def fill_under_limit(url: str) -> None:
    """`fill`, where the process may write no file of more than 1 MiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    fill(url)


def write_read_only(url: str) -> None:
    """Read and write where only reading is allowed; print what happened."""
    store = Store.open(url)
    errors = {
        "put": _error(lambda: store.put("old", b"")),
        "create": _error(lambda: store.create("x/new", b"")),
        "upload": _error(lambda: store.upload("new", [b"1"])),
        "delete": _error(lambda: store.delete("old")),
        "root": _error(lambda: Store.open(f"{url}/not/yet").put("k", b"")),
    }
    print(json.dumps({"errors": errors, "old": store.get("old").decode()}))


def write_without_permission(url: str) -> None:
    """As nobody: write into a folder of somebody else."""
    store = Store.open(url)
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    errors = {
        "put": _error(lambda: store.put("new", b"")),
        "create": _error(lambda: store.create("x/new", b"")),
        "upload": _error(lambda: store.upload("new", [b"1"])),
        "get": _error(lambda: store.get("secret")),
    }
    print(json.dumps(errors))


def lose_the_mount(url: str, command: str) -> None:
    """Use a store on a mounted disk, then without the disk."""
    store = Store.open(f"{url}/store")
    store.put("k", b"1")
    assert shutil.which(command)
    os.spawnlp(os.P_WAIT, command, command, "-l", url)
    print(json.dumps({"put": _error(lambda: store.put("k", b"2")), "get": _error(lambda: store.get("k"))}))


def _error(call: Callable[[], object]) -> list[str]:
    try:
        call()
    except StoreError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


if __name__ == "__main__":
    {
        action.__name__: action
        for action in (
            create,
            upload,
            fill,
            fill_under_limit,
            write_read_only,
            write_without_permission,
            lose_the_mount,
        )
    }[sys.argv[1]](*sys.argv[2:])
