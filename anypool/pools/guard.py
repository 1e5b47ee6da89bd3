"""The worker's half of "no orphan processes, ever": a worker does not outlive the process that started it.

Two ways, each enough alone. The launcher holds the only writing end of the worker's standard input and never
writes to it: when the launcher ends, however it ends, the kernel closes the pipe and the worker reads end of
file. On Linux the kernel is also asked to kill the worker when its parent dies, which works even while the
worker holds the interpreter lock in a long call.
"""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ends this process at once when its parent ends. Call it first, before anything slow is imported."""
    if sys.platform == "linux":
        # Best effort: a sandbox may refuse the call, and the pipe does the work then.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_exit_at_end_of_input, name="die-with-parent", daemon=True).start()


def _exit_at_end_of_input() -> None:
    while True:
        try:
            if not os.read(0, 4096):
                break
        except OSError:
            break
    # Nobody is left to drain for: no handlers, no flushing, nothing that could block.
    os._exit(1)
