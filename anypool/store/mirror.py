"""Copying a folder into a second store, so that a broken-off copy goes on where it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from anypool.store.claim import claim
from anypool.store.errors import NotFoundError
from anypool.store.manifest import NAME, Counter, ObjectRecord, Progress, corrupt, hash_of, parse
from anypool.store.store import Entry, Store


@dataclass(frozen=True)
class Mirrored:
    """What a mirror run did: objects and bytes it copied, and objects that were there already."""

    copied: int
    copied_bytes: int
    kept: int


@dataclass(frozen=True)
class _Task:
    entry: Entry
    record: ObjectRecord | None  # what a manifest says of it
    there: Entry | None
    trusted: bool  # the target's copy is committed: its size is enough


def mirror(
    source: Store, target: Store, prefix: str = "", *, workers: int = 4, progress: Progress | None = None
) -> Mirrored:
    """Copy what is below `prefix` of `source` to the same keys of `target`; `workers` objects at once.

    Objects that a manifest names are copied where they are missing, of another size, or, while the target has no such
    manifest, of another hash; what is copied is hashed on the way, and a manifest follows only when everything it names
    is there. Other objects are copied where they are missing, of another size, or older than the source's. Nothing is
    deleted in `target`.

    Raises CorruptObjectError if the source is not what its manifest says: the copy is deleted and not committed.
    Raises ExistsError if the target holds another manifest, NotFoundError if the source lost an object meanwhile.
    """
    entries = {entry.key: entry for entry in source.list(prefix)}
    there = {entry.key: entry for entry in target.list(prefix)}
    manifests = {key: source.get(key) for key in entries if key.rpartition("/")[2] == NAME}
    tasks = {key: _Task(entry, None, there.get(key), False) for key, entry in entries.items() if key not in manifests}
    for key, data in manifests.items():
        folder = key.rpartition("/")[0]
        trusted = key in there and target.get(key) == data
        for name, record in parse(data, source.at(folder)).objects.items():
            named = f"{folder}/{name}" if folder else name
            if named in manifests:
                continue
            if named not in entries:
                raise corrupt(source.at(folder), name, record, None)
            tasks[named] = _Task(entries[named], record, there.get(named), trusted)
    done = Counter(sum(task.entry.size for task in tasks.values()), progress)
    copied = copied_bytes = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="mirror") as pool:
        running = [pool.submit(_bring, source, target, task, done) for task in tasks.values()]
        try:
            for each in as_completed(running):
                size = each.result()
                if size is not None:
                    copied, copied_bytes = copied + 1, copied_bytes + size
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    # The deepest first: one above may name one below.
    for key in sorted(manifests, key=lambda key: -key.count("/")):
        if key not in there or target.get(key) != manifests[key]:
            claim(target, key, manifests[key])
            copied, copied_bytes = copied + 1, copied_bytes + len(manifests[key])
    return Mirrored(copied, copied_bytes, len(entries) - copied)


def _bring(source: Store, target: Store, task: _Task, done: Counter) -> int | None:
    """Bytes copied, or None if the target's copy is good."""
    key = task.entry.key
    if _is_good(target, task):
        done.add(task.entry.size)
        return None
    uploaded = target.copy_from(source, key)
    found = ObjectRecord(uploaded.size, uploaded.blake3)
    if task.record is not None and found != task.record:
        target.delete(key)
        raise corrupt(source, key, task.record, found)
    done.add(task.entry.size)
    return uploaded.size


def _is_good(target: Store, task: _Task) -> bool:
    if task.there is None:
        return False
    if task.record is None:
        return task.there.size == task.entry.size and task.there.modified >= task.entry.modified
    if task.there.size != task.record.size:
        return False
    try:
        return task.trusted or hash_of(target, task.entry.key) == task.record
    except NotFoundError:  # deleted since it was listed
        return False
