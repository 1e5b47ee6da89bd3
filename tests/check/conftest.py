"""What the tests of this room share: a small model, a cache of their own, and stand-ins for compilers."""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from anypool.check import Running, compilers, processes

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYPOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path: Path) -> str:
    file = tmp_path / "small" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(SMALL))
    return str(file)


@pytest.fixture
def running() -> Running:
    return Running(parallel=2, seconds=120, memory_bytes=8 * 2**30)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Replaces the compiling process by a script of the test's, and says that every compiler is installed.

    The script sees `asked` (what was asked) and `write(**known)`.
    """

    def replace(script: str) -> None:
        file = tmp_path / "child.py"
        file.write_text(
            "import json, os, sys, time\nasked = json.loads(sys.stdin.readline())\n"
            "def write(**known):\n    open(sys.argv[1], 'w').write(json.dumps(known))\n" + textwrap.dedent(script)
        )
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-S", str(file)))
        monkeypatch.setattr(
            compilers, "find", lambda platform: compilers.CompilerHome(platform, None, f"a compiler for {platform}")
        )
        monkeypatch.setattr(compilers, "_has_rocm", lambda: True)

    return replace
