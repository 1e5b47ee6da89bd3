"""The tiny model's runners, compiled once for the whole room; what an earlier run compiled is read from disk."""

from pathlib import Path

import pytest

from anypool.engine.runner import Runner, persistent_compilation_cache
from anypool.ops import cpu
from tests.engine.tiny_engine import MODEL, load_runner, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", **MODEL)


@pytest.fixture(scope="session")
def cpu_runner(tiny_model: Path) -> Runner:
    """On the CPU kernels, whose results have the same bits whatever else is in the batch."""
    if reason := cpu.unavailable():
        pytest.skip(reason)
    persistent_compilation_cache()
    runner = load_runner(tiny_model, faster=True)
    report = runner.kernels.report()
    assert {report[op] for op in ("linear", "rms_norm", "silu_mul", "paged_attention")} == {"cpu"}
    return runner


@pytest.fixture(scope="session")
def reference_runner(tiny_model: Path) -> Runner:
    """On the portable references."""
    persistent_compilation_cache()
    return load_runner(tiny_model, faster=False)
