"""Logs: one short line an event on standard error, `time level room message key=value ...`."""

from __future__ import annotations

import logging
import sys


class _StandardError(logging.Handler):
    """Writes to whatever `sys.stderr` is at the moment, so that a progress bar can make room for the line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


class _Short(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # "anypool.pools.local" -> "pools": the room says enough, and the words of the message are searchable.
        parts = record.name.split(".")
        record.room = parts[1] if parts[0] == "anypool" and len(parts) > 1 else record.name
        return super().format(record)


def setup(level: int = logging.INFO) -> None:
    """Sets this process's logging; libraries are heard from WARNING on."""
    handler = _StandardError()
    handler.setFormatter(_Short("%(asctime)s.%(msecs)03d %(levelname)s %(room)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("anypool").setLevel(level)
