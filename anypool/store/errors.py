"""What can go wrong with a store, and how it is told from the errors of obstore and of the operating system."""

from __future__ import annotations

import errno
import os
import re

from obstore import exceptions


class StoreUrlError(ValueError):
    """A store address that names no store. The message says which forms there are."""


class StoreKeyError(ValueError):
    """A key that not every back end could keep."""


class StoreError(RuntimeError):
    """Something a store did not do. The message names store, key and what to do; `store` and `key` hold both."""

    def __init__(self, message: str, *, store: str = "", key: str = "") -> None:
        super().__init__(message)
        self.store, self.key = store, key


class NotFoundError(StoreError):
    """There is no object under this key."""


class ExistsError(StoreError):
    """`create` found an object under the key. Nothing was written."""


class StoreFullError(StoreError):
    """No room: a full disk, a quota, or a file larger than the process may write. Nothing appeared under the key."""


class StoreReadOnlyError(StoreError):
    """The store is mounted read-only."""


class StoreGoneError(StoreError):
    """The store cannot be reached: its folder or bucket vanished, no connection, or no permission."""


# Not every kernel names every one of these.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS}
_CANNOT = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_GONE = {
    errno.EIO,
    errno.ENXIO,
    errno.ENODEV,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_FULL_CODES = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage"}
_GONE_CODES = {"NoSuchBucket", "ContainerNotFound", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


def os_error_number(error: BaseException) -> int | None:
    """The errno behind an error of obstore: it is given in the text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def first_line(error: BaseException) -> str:
    """What obstore says, without the dump of its internals that follows."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def translate(error: BaseException, *, store: str, key: str, writing: bool) -> StoreError:
    """The StoreError for what obstore or the operating system raised while `key` was read or written."""
    place = f"{store}: {key}" if key else store
    said = first_line(error)
    text = str(error)
    number = os_error_number(error)
    code = found.group(1) if (found := _CODE.search(text)) else ""
    status = int(found.group(1)) if (found := _STATUS.search(text)) else None

    def told(kind: type[StoreError], what: str) -> StoreError:
        return kind(f"{place}: {what} ({said})", store=store, key=key)

    if isinstance(error, exceptions.AlreadyExistsError):
        return ExistsError(
            f"{place}: already exists, and is written only once; read what is there, or choose another key",
            store=store,
            key=key,
        )
    if number in _FULL or status == 507 or code in _FULL_CODES:
        return told(StoreFullError, "no room left in the store; free space or raise the quota, then try again")
    if number in _READ_ONLY:
        return told(StoreReadOnlyError, "the store is read-only; mount it writable or name another store")
    if code in _GONE_CODES:
        return told(StoreGoneError, "the bucket does not exist or these credentials do not open it; check both")
    if isinstance(error, FileNotFoundError):
        if writing:
            return told(StoreGoneError, "the place to write to is not there; check that the store still exists")
        return NotFoundError(f"{place}: no such object; list the store to see what it holds", store=store, key=key)
    refused = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
    if refused or number in (errno.EACCES, errno.EPERM):
        return told(StoreGoneError, "permission denied; check the credentials or the folder's owner")
    if number in (errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY):
        return told(StoreError, "no object can stand below another, nor where others stand below; rename one")
    if number in _GONE:
        return told(StoreGoneError, f"the store cannot be reached: {os.strerror(number or 0)}; check folder and mount")
    if status is None and isinstance(error, exceptions.GenericError) and "HTTP error" in text:
        return told(StoreGoneError, "no connection to the store; check the address and the network")
    if status is not None and (status >= 500 or status in (408, 429)):
        return told(StoreGoneError, "the store answers with errors, also after retries; try again later")
    if isinstance(error, exceptions.PreconditionError):
        return told(StoreError, "the object was replaced while it was read; read it again")
    if number in _CANNOT or isinstance(error, (exceptions.NotSupportedError, NotImplementedError)):
        return told(StoreError, "the store cannot do that (create needs hard links on a disk); name another store")
    return told(StoreError, "the store did not do it")
