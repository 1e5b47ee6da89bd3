"""How a launcher learns of a worker's death before the kernel has taken the worker's memory back.

A killed process first gives its memory back, some 50 ms a GiB, and only then closes its connections and pipes. But the
kernel frees a robust mutex, and says that its owner died, before all that. So the worker's main thread holds such a
mutex, in memory that both share, for as long as it lives, and a thread of the launcher waits for it.

Linux with glibc only; elsewhere the worker's pipes tell, a little later.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable

ENVIRONMENT_VARIABLE = "ANYPOOL_LIFELINE_FD"
_PAGE_BYTES = 4096
_ATTRIBUTES_BYTES = 64  # more than any glibc's pthread_mutexattr_t
_PROCESS_SHARED = 1
_ROBUST = 1


class Lifeline:
    """The launcher's half. Make one before starting the worker and hand it `fd`; then `watch`."""

    def __init__(self, libc: ctypes.CDLL, fd: int) -> None:
        self.fd = fd
        self._libc = libc
        self._memory = mmap.mmap(fd, _PAGE_BYTES)

    @classmethod
    def create(cls) -> Lifeline | None:
        """None where the system has no such thing."""
        if sys.platform != "linux":
            return None
        libc = ctypes.CDLL(None)
        attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
        try:
            fd = os.memfd_create("anypool-lifeline")
            os.ftruncate(fd, _PAGE_BYTES)
            line = cls(libc, fd)
            failed = (
                libc.pthread_mutexattr_init(attributes)
                or libc.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
                or libc.pthread_mutexattr_setrobust(attributes, _ROBUST)
                or libc.pthread_mutex_init(_address(line._memory), attributes)
            )
        except (OSError, AttributeError):  # no memfd, or another C library
            return None
        return None if failed else line

    def watch(self, died: Callable[[], None]) -> None:
        """Calls `died` in a thread of its own when the worker, which holds the lifeline by now, is gone."""
        threading.Thread(target=self._wait, args=(died,), name="lifeline", daemon=True).start()

    def close(self) -> None:
        """Once the worker has been started: the launcher needs the memory only."""
        os.close(self.fd)

    def _wait(self, died: Callable[[], None]) -> None:
        if self._libc.pthread_mutex_lock(_address(self._memory)) == errno.EOWNERDEAD:
            died()


def hold() -> None:
    """The worker's half: takes the lifeline, if there is one, for the life of the calling thread, the main one."""
    descriptor = os.environ.pop(ENVIRONMENT_VARIABLE, "")
    if descriptor:
        memory = mmap.mmap(int(descriptor), _PAGE_BYTES)
        ctypes.CDLL(None).pthread_mutex_lock(_address(memory))
        _held.append(memory)


_held: list[mmap.mmap] = []
"""Keeps the memory mapped, in which the kernel looks for the mutex."""


def _address(memory: mmap.mmap) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
