"""Writing a snapshot into a store, beside the training that goes on.

Each host writes its files and reports them in `part-NNNNN.json`, object by object, so that a save that was broken off
does not send again what is there. Host 0 waits for every host's report and then writes the manifest, which is the
moment from which the checkpoint exists. Hosts speak to each other through the store only: the devices are the
training's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from blake3 import blake3

from anypool.store import ExistsError, Manifest, NotFoundError, ObjectRecord, Store, StoreError, commit, load
from anypool.train.checkpoint import names
from anypool.train.checkpoint.errors import CheckpointError, HostsMissingError

FILES_AT_ONCE = 2
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Object:
    """Something to be written. chunks: its bytes; may be asked for again until `done` was called."""

    name: str
    size: int
    chunks: Callable[[], Iterable[bytes | memoryview]]
    done: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, name: str, data: bytes) -> Object:
        return cls(name, len(data), lambda: [data])


@dataclass
class Report:
    """What a host has written. attempt: which save it is of, as all hosts know it."""

    attempt: str
    objects: dict[str, ObjectRecord] = field(default_factory=dict)
    complete: bool = False
    failed: str | None = None

    @classmethod
    def load(cls, store: Store, host: int) -> Report | None:
        """None if there is none, or none that makes sense."""
        try:
            found = json.loads(store.get(names.part_name(host)))
            objects = {name: ObjectRecord(**record) for name, record in found.pop("objects").items()}
            return cls(objects=objects, **found)
        except (NotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, store: Store, host: int) -> None:
        store.put(names.part_name(host), json.dumps(asdict(self)).encode())


@dataclass(frozen=True)
class Hosts:
    """This host's number, how many there are, and how long one may be silent before the others give up."""

    host: int = 0
    count: int = 1
    patience_seconds: float = 600.0


def write(
    store: Store,
    folder: str,
    objects: Iterable[Object],
    known: Callable[[], dict[str, Any]],
    hosts: Hosts,
    attempt: str,
) -> int:
    """Write this host's objects and, on host 0, commit the checkpoint; on others wait for that. Returns bytes sent.

    known: called just before the manifest is written, whose facts it gives; raises if this run is another's by now.

    Raises what the store or `known` raises, CheckpointError if the folder holds another committed checkpoint,
    HostsMissingError if another host failed or fell silent.
    """
    below = store.at(folder)
    report = Report(attempt)
    objects = list(objects)
    if below.exists(names.MANIFEST):
        _check_same(store, folder, objects)
        return 0
    try:
        sent = _send(below, objects, report, hosts.host)
        report.complete = True
        if hosts.count > 1:
            report.save(below, hosts.host)
        if hosts.host:
            _wait_for_commit(below, hosts, attempt)
            return sent
        everything = _gather(below, report, hosts)
        _commit(store, folder, Manifest(everything, known()))
    except BaseException as error:
        _tell(below, report, hosts.host, error)
        raise
    below.delete(*(names.part_name(host) for host in range(hosts.count)))
    return sent


def _send(store: Store, objects: list[Object], report: Report, host: int) -> int:
    before = Report.load(store, host)
    there = {entry.key: entry.size for entry in store.list()} if before else {}
    lock = Lock()

    def one(item: Object) -> int:
        record = before.objects.get(item.name) if before else None
        sent = 0
        if record is None or there.get(item.name) != record.size or not _same(item, record):
            uploaded = store.upload(item.name, item.chunks())
            record, sent = ObjectRecord(uploaded.size, uploaded.blake3), uploaded.size
        item.done()
        with lock:
            report.objects[item.name] = record
            if sent > PART_WORTH_BYTES:
                report.save(store, host)
        return sent

    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="checkpoint") as pool:
        futures = [pool.submit(one, item) for item in objects]
        try:
            return sum(future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


PART_WORTH_BYTES = 1024 * 1024
"""Objects smaller than this are sent again sooner than reported."""


def _same(item: Object, record: ObjectRecord) -> bool:
    if item.size != record.size:
        return False
    hasher = blake3(max_threads=blake3.AUTO)
    for chunk in item.chunks():
        hasher.update(chunk)
    return hasher.hexdigest() == record.blake3


def _gather(store: Store, own: Report, hosts: Hosts) -> dict[str, ObjectRecord]:
    """Every host's objects, once all have written theirs."""
    everything = dict(own.objects)
    waiting = Waiting(hosts.patience_seconds)
    missing = list(range(1, hosts.count))
    while missing:
        reports = {host: Report.load(store, host) for host in missing}
        for host, report in reports.items():
            if report is None or report.attempt != own.attempt:
                continue
            if report.failed is not None:
                raise HostsMissingError(f"{store.url}: host {host} could not write its part: {report.failed}")
            if report.complete:
                everything |= report.objects
                missing.remove(host)
        if missing:
            waiting.pause(
                [len(report.objects) if report else 0 for report in reports.values()],
                f"{store.url}: no more is heard of {_some(missing)} of {hosts.count} hosts, whose parts are missing",
            )
    return everything


def _wait_for_commit(store: Store, hosts: Hosts, attempt: str) -> None:
    waiting = Waiting(hosts.patience_seconds)
    while not store.exists(names.MANIFEST):
        first = Report.load(store, 0)
        own_attempt = first is not None and first.attempt == attempt
        if first is not None and own_attempt and first.failed is not None:
            raise HostsMissingError(f"{store.url}: host 0 could not commit the checkpoint: {first.failed}")
        parts = [entry.modified for entry in store.list() if entry.key.startswith("part-")]
        waiting.pause(parts, f"{store.url}: host 0 does not commit the checkpoint; see what it says")


class Waiting:
    """Looking again and again, until nothing has changed for too long."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience, self._seen, self._since = patience_seconds, None, time.monotonic()

    def pause(self, seen: Any, otherwise: str) -> None:
        """Sleeps a moment. seen: changes as long as there is progress. Raises HostsMissingError."""
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        elif time.monotonic() - self._since > self._patience:
            raise HostsMissingError(f"{otherwise}; waited for {self._patience:.0f} s")
        time.sleep(LOOK_SECONDS)


def _commit(store: Store, folder: str, manifest: Manifest) -> None:
    try:
        commit(store, folder, manifest)
    except ExistsError as error:
        if load(store, folder).objects != manifest.objects:
            raise _committed_before(store, folder) from error


def _check_same(store: Store, folder: str, objects: list[Object]) -> None:
    """What is committed is never written over. Raises CheckpointError if these objects are others."""
    there = load(store, folder).objects
    for item in objects:
        if item.name not in there or not _same(item, there[item.name]):
            raise _committed_before(store, folder)
        item.done()


def _committed_before(store: Store, folder: str) -> CheckpointError:
    return CheckpointError(
        f"{store.at(folder).url} is committed already, with another content; a run that goes back to an earlier step "
        "takes a new lease, so that its checkpoints have folders of their own"
    )


def _tell(store: Store, report: Report, host: int, error: BaseException) -> None:
    """Keep what was sent for the next try, and say to the other hosts that they need not wait."""
    report.failed = f"{type(error).__name__}: {error}"
    try:
        report.save(store, host)
    except StoreError:  # the store that failed may well fail here too
        return


def _some(hosts: list[int]) -> str:
    return ", ".join(map(str, hosts[:8])) + (" and more" if len(hosts) > 8 else "")
