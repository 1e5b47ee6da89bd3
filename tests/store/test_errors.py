"""Errors that no test can bring about for real, as obstore words them: the number in the text decides."""

import errno
import os

import pytest
from obstore import exceptions

from anypool.store import StoreError, StoreFullError, StoreGoneError, StoreReadOnlyError
from anypool.store.errors import translate


def obstore_error(number: int) -> exceptions.GenericError:
    return exceptions.GenericError(
        f"Generic LocalFileSystem error: Unable to copy data to file: {os.strerror(number)} (os error {number})\n\n"
        f"Debug source:\nGeneric {{\n    source: Os {{\n        code: {number},\n    }},\n}}"
    )


@pytest.mark.parametrize(
    ("number", "kind", "fix"),
    [
        (errno.EDQUOT, StoreFullError, "no room left in the store; free space or raise the quota"),
        (errno.ENOSPC, StoreFullError, "no room left in the store; free space or raise the quota"),
        (errno.EROFS, StoreReadOnlyError, "mount it writable"),
        (errno.EIO, StoreGoneError, "the store cannot be reached: Input/output error; check folder and mount"),
        (errno.ESTALE, StoreGoneError, "the store cannot be reached: Stale file handle"),
        (errno.ENOTCONN, StoreGoneError, "the store cannot be reached: Transport endpoint is not connected"),
        (errno.EPERM, StoreGoneError, "permission denied; check the credentials or the folder's owner"),
        (errno.EOPNOTSUPP, StoreError, "create needs hard links on a disk"),
        (errno.ENOTEMPTY, StoreError, "no object can stand below another"),
        (errno.EMFILE, StoreError, "the store did not do it"),
    ],
)
def test_numbers_decide(number, kind, fix):
    for error in (obstore_error(number), OSError(number, os.strerror(number))):
        told = translate(error, store="file:///s", key="a/b", writing=True)
        assert type(told) is kind
        assert str(told).startswith("file:///s: a/b: ") and fix in str(told)
        assert os.strerror(number) in str(told) and "Debug source" not in str(told)
        assert (told.store, told.key) == ("file:///s", "a/b")


def test_a_word_of_the_key_is_no_answer_of_the_server():
    error = exceptions.GenericError(
        "Generic S3 error: Error performing PUT http://x/StorageFull in 1ms - HTTP error: builder error"
    )
    assert isinstance(translate(error, store="s3://b", key="StorageFull", writing=True), StoreGoneError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [("NoSuchBucket", StoreGoneError), ("InvalidAccessKeyId", StoreGoneError), ("XMinioStorageFull", StoreFullError)],
)
def test_codes_of_servers(code, kind):
    error = exceptions.GenericError(
        "Generic S3 error: Error performing PUT http://x/b/k in 1ms - Server returned non-2xx status code: 400 Bad "
        f'Request: <?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>…</Message></Error>'
    )
    assert type(translate(error, store="s3://b", key="k", writing=True)) is kind
