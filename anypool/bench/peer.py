"""transformers' `generate` in a process of its own, to be measured beside a fleet."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "transformers_generate.py"


class PeerError(ValueError):
    """The Python that was named cannot run the other engine."""


class Peer:
    """A loaded model, ready to generate. `versions` are those of the engine and what it runs on."""

    def __init__(self, process: asyncio.subprocess.Process, versions: dict[str, str]) -> None:
        self.versions = versions
        self._process = process

    async def generate(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
        """Greedily continues all prompts as one batch; when each token was there, in seconds from the start."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode() + b"\n")
        await self._process.stdin.drain()
        times: list[float] = (await _read(self._process))["token_times"]
        return times


def default_python() -> str | None:
    """This Python, if it has what the other engine needs."""
    found = all(importlib.util.find_spec(package) for package in ("torch", "transformers"))
    return sys.executable if found else None


@contextlib.asynccontextmanager
async def peer(python: str, directory: Path, dtype: str) -> AsyncIterator[Peer]:
    """Starts the engine under the interpreter `python`, and ends it. Raises PeerError if that one cannot run it."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, str(SCRIPT), str(directory), dtype),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1 << 20,
        )
    except OSError as error:
        raise PeerError(f"--peer-python {python}: cannot be run: {error.strerror}") from None
    try:
        told = await _read(process)
        if "error" in told:
            raise PeerError(
                f"--peer-python {python}: {told['error']}: name a Python that has PyTorch and transformers "
                "(pip install torch transformers)"
            )
        yield Peer(process, told["versions"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise PeerError(f"the other engine ended with exit code {await process.wait()}; see what it wrote above")
    message: dict[str, Any] = json.loads(line)
    return message
