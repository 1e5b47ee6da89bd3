"""The benchmark on a real fleet, beside an engine that stands for transformers, and what it says when it cannot run."""

import json
import subprocess
import sys

import pytest

from anypool.bench.peer import PeerError, default_python, peer

FLEET = """
[model]
id = "smollm2-135m-instruct"
[[pool]]
name = "only"
chip = "cpu"
[pool.engine]
max_num_seqs = 2
token_budget = 32
max_model_len = 256
"""
# Takes the place of a Python with PyTorch: answers each request with one token a second, and what it was asked.
ENGINE = """#!{python}
import json, sys
print(json.dumps({{"versions": {{"torch": "0", "transformers": "0"}}}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    sys.stderr.write(f"{{len(request['prompts'])}}x{{len(request['prompts'][0])}}\\n")
    print(json.dumps({{"token_times": [1.0 + step for step in range(request["max_tokens"])]}}), flush=True)
"""


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "python"
    path.write_text(ENGINE.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.mark.timeout(900)  # the first time, the model is converted and compiled
def test_a_fleet_is_measured_beside_another_engine(tmp_path, engine):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    command = [sys.executable, "-m", "anypool", "bench", "serve", str(fleet), "-n", "1", "-n", "2", "--rounds", "1"]
    command += ["--max-tokens", "4", "--peer-python", engine, "--format", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["model"], seen["prompt_tokens"], seen["max_tokens"]) == ("smollm2-135m-instruct", 128, 4)
    assert seen["versions"]["torch"] == "0"
    rows = seen["rows"]
    assert [(row["engine"], row["pools"], row["streams"], row["cache"]) for row in rows] == [
        (engine, 1, streams, cache)
        for streams in (1, 2)
        for engine, cache in (("anypool", "cold"), ("anypool", "warm"), ("transformers", "none"))
    ]
    for row in rows:
        assert row["output_tokens_per_second"] > 0
        assert row["time_to_first_token_ms"]["p50"] > 0
        if row["engine"] == "transformers":
            assert row["decode_tokens_per_second"] == row["streams"]
            assert row["time_between_tokens_ms"] == {"p50": 1000.0, "p95": 1000.0}
    cold = rows[0]
    ratio = cold["ratio_to_transformers"]["output_tokens_per_second"]
    assert ratio == pytest.approx(cold["output_tokens_per_second"] / rows[2]["output_tokens_per_second"], rel=0.05)
    # Each number of streams twice: once not counted, once for the round.
    asked = [line for line in done.stderr.splitlines() if line in ("1x128", "2x128")]
    assert sorted(asked) == ["1x128", "1x128", "2x128", "2x128"]


async def test_a_python_that_does_not_exist(tmp_path):
    with pytest.raises(PeerError, match="--peer-python /nowhere/python: cannot be run: No such file"):
        async with peer("/nowhere/python", tmp_path, "float32"):
            pass


@pytest.mark.skipif(default_python() is not None, reason="this Python has PyTorch")
async def test_a_python_without_the_other_engine(tmp_path):
    with pytest.raises(PeerError, match="No module named 'torch': name a Python that has PyTorch and transformers"):
        async with peer(sys.executable, tmp_path, "float32"):
            pass


async def test_an_engine_that_dies(tmp_path, engine):
    async with peer(engine, tmp_path, "float32") as other:
        assert await other.generate([[1, 2]], 2) == [1.0, 2.0]
        other._process.kill()
        with pytest.raises(PeerError, match="ended with exit code -9"):
            await other.generate([[1, 2]], 2)
