"""The trainer: one process (or one of several hosts) that holds a run on its pool, until it is done, told or lost.

    python -m anypool.train.run.trainer  < assignment

It is told what to do by a line of JSON on standard input (`launch.Assignment`) and says what it does in lines of JSON
on standard output. SIGTERM makes it commit and end; a second one ends it at once. launch.py has its exit codes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import IO, Any

from anypool.pools.guard import die_with_parent

log = logging.getLogger(__name__)


class Voice:
    """Events for whoever started this trainer, a line each. Libraries that print are sent to standard error."""

    def __init__(self) -> None:
        self._out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def say(self, event: str, **facts: Any) -> None:
        with self._lock:
            self._out.write(json.dumps({"event": event, **facts}) + "\n")
            self._out.flush()


class Wishes:
    """How often this process was asked to end."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            os._exit(128 + number)


def main() -> None:
    """Reads the assignment and carries it out; never returns."""
    voice = Voice()
    told = json.loads(sys.stdin.buffer.readline())
    die_with_parent()
    wishes = Wishes()
    signal.signal(signal.SIGTERM, wishes)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's
    from anypool import logs

    logs.setup()
    code = _carry_out(told, voice, wishes)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries may still be at work on what nobody needs any more.
    os._exit(code)


def _carry_out(told: dict[str, Any], voice: Voice, wishes: Wishes) -> int:
    from anypool.train.run.launch import FAILED, USER_ERROR, Assignment

    try:
        from anypool.train.run.epoch import Epoch

        return Epoch(Assignment(**told), voice.say, lambda: min(1, wishes.count)).run()
    except Exception as error:
        ours = isinstance(error, ValueError) and type(error).__module__.startswith("anypool.")
        if not ours:
            traceback.print_exc()
        voice.say("error", reason=str(error) or type(error).__name__)
        return USER_ERROR if ours else FAILED


if __name__ == "__main__":
    main()
