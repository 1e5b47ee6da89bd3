"""A check from the question to the report: verdicts, isolation of compilers, bad input, the cache, what would fit."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anypool.check import CheckError, Options, Result, Running, check, predict, report
from anypool.check.child import out_of_memory
from anypool.check.options import parse_jobs, question, read_model, training_mesh
from anypool.check.report import as_html, as_json, seconds
from anypool.check.run import changes
from anypool.chips import Target, TargetError
from anypool.cli import app
from anypool.models import ConfigError, ModelConfig, ModelNotFoundError, UnsupportedModelError
from anypool.models.counts import parameters
from anypool.train import MeshError
from tests.check.conftest import SMALL

FITS = """
sizes = {"arguments": 2**30, "outputs": 2**20, "aliased": 2**20, "temporaries": 2**28, "code": 0}
write(stage="done", proof="compiler 1.0", kernels={"linear": "reference"}, flops=10**12, unknown_loops=0, programs=[
    {"name": "train_step", "compile_seconds": 1.0, "memory": sizes, "hbm_traffic_bytes": 10**9, "unknown_loops": 0,
     "custom_calls": {}, "collectives": [{"kind": "all-gather", "axes": ["fsdp"], "group_size": 4, "count": 2,
                                          "bytes": 10**6, "groups": [[0, 1, 2, 3]]}]}])
"""
Stand = Callable[[str], None]


def one(model: str, targets: str, running: Running, **options: Any) -> Result:
    (result,) = check(model, targets, Options(**options), running)[1]
    return result


# Real processes: what needs no compiler but JAX's own.


def test_the_cpu_compiles_and_runs_a_step_of_each_job(small: str, running: Running) -> None:
    name, results = check(small, "cpu:2", Options(seq=32, batch=2), running)
    assert name == "small"
    assert [r.job for r in results] == ["train", "prefill", "decode"]
    for result in results:
        assert result.verdict == "fits", result.reason
        assert "XLA for CPU" in result.proof
        assert "one step run" in result.proof
        assert result.measured_seconds is not None and result.measured_seconds > 0
        assert result.hbm_parts["arguments"] > 0
        assert result.flops is not None and result.model_flops is not None
        assert result.flops >= 0.9 * result.model_flops
    train = results[0]
    assert {c["axes"][0] for c in train.collectives if c["axes"]} == {"fsdp"}


def test_trainium_is_lowered_and_linted_and_says_so(small: str, running: Running) -> None:
    _, results = check(small, "trn2:1", Options(seq=64, batch=4), running)
    for result in results:
        assert result.verdict == "fits", result.reason
        assert "linted" in result.proof
        assert "not compiled" in result.proof
        assert not result.errors
        assert result.hbm_source == "predicted"


def test_asked_again_it_is_answered_from_the_cache(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(FITS)
    assert not one(small, "h100:4", running, jobs=("train",)).cached
    stand_in("sys.exit('asked twice')")
    again = one(small, "h100:4", running, jobs=("train",))
    assert again.cached
    assert again.verdict == "fits"
    changed = one(small, "h100:4", running, jobs=("train",), seq=256)
    assert changed.verdict == "failed"


# Stand-ins for compilers.


def test_what_a_compiler_says_becomes_the_report(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(FITS)
    result = one(small, "v5e:2x2", running, jobs=("train",))
    assert result.verdict == "fits"
    assert result.proof == "compiled with compiler 1.0"
    assert result.hbm_bytes_per_device == 2**30 + 2**28
    assert result.hbm_capacity_bytes == int(15.75 * 2**30)
    assert result.collectives[0]["tier"] == "scale-up"
    assert "groups" not in result.collectives[0]
    # 1 TFLOP over 4 chips of 197 TFLOP/s, 1 GB at 819 GB/s, 1 MB at 200 GB/s.
    assert result.bounds["compute"] == pytest.approx(1 / 4 / 197, rel=1e-3)
    assert result.bounds["memory"] == pytest.approx(1 / 819, rel=1e-3)
    assert result.bounds["network"] == pytest.approx(5e-6, rel=1e-3)
    assert (result.bound_by, result.seconds_per_step) == ("compute", result.bounds["compute"])


def test_amd_without_rocm_is_code_generation_only(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(FITS)
    assert one(small, "mi300x:4", running, jobs=("train",)).proof.startswith("code generation only")


CRASHES = [
    ("os.abort()", "was killed by SIGABRT while starting"),
    (
        "write(stage='compiling train_step'); os.kill(os.getpid(), 11)",
        "was killed by SIGSEGV while compiling train_step",
    ),
    ("write(stage='lowering'); raise RuntimeError('INTERNAL: a check failed')", "a check failed"),
    ("sys.stderr.write('no such thing'); sys.exit(3)", "ended with exit code 3 while starting: no such thing"),
    ("write(stage='compiling'); time.sleep(60)", "not done after 2 s (--timeout)"),
    ("held = bytearray(600 * 2**20); write(stage='compiling'); time.sleep(60)", "more than --memory-gib allows"),
]


@pytest.mark.parametrize(("script", "said"), CRASHES, ids=[said[:24] for _, said in CRASHES])
def test_a_compiler_that_fails_is_reported_with_its_log(
    script: str, said: str, small: str, running: Running, stand_in: Stand
) -> None:
    stand_in(script)
    limited = replace(
        running, seconds=2 if "sleep" in script and "held" not in script else 60, memory_bytes=400 * 2**20
    )
    result = one(small, "v5e:2x2", limited, jobs=("train",))
    assert result.verdict == "failed"
    assert said in result.reason
    assert result.log is not None and Path(result.log).is_file()


def test_one_that_fails_stops_no_other(small: str, running: Running, stand_in: Stand) -> None:
    stand_in("if asked['platform'] == 'tpu': os.abort()\n" + FITS)
    _, results = check(small, "v5e:2x2,h100:4", Options(jobs=("train",)), running)
    assert [r.verdict for r in results] == ["failed", "fits"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are looked at in /proc")
def test_a_compiler_does_not_outlive_the_check(small: str, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle: the compiling process ends by itself."""
    command = [sys.executable, "-m", "anypool", "check", small, "--on", "trn2:1", "--job", "train", "--no-cache"]
    checking = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "cache" / "check"
    deadline = time.monotonic() + 60
    while not (started := [*folder.glob("*.answer")]) and checking.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started, "the compiling process did not start"
    children = [int(pid) for pid in Path(f"/proc/{checking.pid}/task/{checking.pid}/children").read_text().split()]
    for task in Path(f"/proc/{checking.pid}/task").iterdir():
        children += [int(pid) for pid in (task / "children").read_text().split()]
    assert children
    checking.kill()
    checking.wait()
    while any(Path(f"/proc/{pid}").exists() and not _ended(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(not Path(f"/proc/{pid}").exists() or _ended(pid) for pid in children)


def _ended(pid: int) -> bool:
    """Whether a process is dead, though perhaps not yet taken note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_failure_is_asked_again(small: str, running: Running, stand_in: Stand) -> None:
    stand_in("os.abort()")
    assert one(small, "v5e:2x2", running, jobs=("train",)).verdict == "failed"
    stand_in(FITS)
    assert one(small, "v5e:2x2", running, jobs=("train",)).verdict == "fits"


def test_findings_reject_with_the_first_one_named(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(
        """
        finding = {"rule": "sort", "severity": "error", "operation": "stablehlo.sort", "where": "model.py:7",
                   "what": "rejects sort on trn2", "fix": "bisect", "source": "", "called_from": [], "count": 1}
        write(stage="done", programs=[], findings=[finding], flops=1)
        """
    )
    result = one(small, "trn2:1", running, jobs=("train",))
    assert result.verdict == "rejected"
    assert "sort at model.py:7" in result.reason
    assert any("write instead: bisect" in line for line in report.notes(result))


SHORT = """
wanted = 40 * 2**30 if asked["question"]["mesh"]["fsdp"] < 8 else 2**30
write(stage="done", flops=1, programs=[{"name": "train_step", "compile_seconds": 1.0, "hbm_traffic_bytes": 1,
    "memory": {"arguments": wanted, "outputs": 0, "aliased": 0, "temporaries": 0, "code": 0}, "collectives": []}])
"""


def test_what_does_not_fit_comes_with_a_change_that_was_tried(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(SHORT)
    result = one(small, "v5e:2x2", running, jobs=("train",))
    assert result.verdict == "does_not_fit"
    assert result.missing_bytes == 40 * 2**30 - int(15.75 * 2**30)
    assert result.change is not None
    assert result.change["target"] == "v5e:2x4"
    assert result.change["what"] == "--on v5e:2x4"
    assert result.change["hbm_bytes_per_device"] == 2**30
    assert any(line.startswith("fits with --on v5e:2x4") for line in report.notes(result))


def test_suggestions_can_be_left_out(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(SHORT)
    assert one(small, "v5e:2x2", replace(running, suggest=False), jobs=("train",)).change is None


def test_a_compiler_that_runs_out_of_device_memory_says_how_much(small: str, running: Running, stand_in: Stand) -> None:
    said = out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 29.50G of 15.75G hbm. Exceeded"
    )
    assert said is not None
    assert said["out_of_memory"] == {"wanted": int(29.5 * 2**30), "there": int(15.75 * 2**30), "whole": True}
    early = out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (137.73G) "
        "exceeds available HBM (15.75G)."
    )
    assert early is not None
    assert early["out_of_memory"] == {"wanted": int(137.73 * 2**30), "there": int(15.75 * 2**30), "whole": False}
    assert out_of_memory("INTERNAL: something else") is None
    stand_in(f"write(stage='out of memory', flops=1, programs=[{{'name': 'train_step', **{said!r}}}])")
    result = one(small, "v5e:2x2", replace(running, suggest=False), jobs=("train",))
    assert result.verdict == "does_not_fit"
    assert result.missing_bytes == int(29.5 * 2**30) - int(15.75 * 2**30)


def test_ascend_is_estimated_and_says_that_no_jax_path_exists(small: str, running: Running) -> None:
    _, (train, decode) = check(small, "ascend-910c:8", Options(jobs=("train", "decode"), seq=128), running)
    assert train.verdict == "unsupported"
    assert "no JAX compiler exists" in train.reason
    assert decode.verdict == "fits"
    assert decode.proof.startswith("estimated")
    assert "vLLM-Ascend" in decode.reason
    assert decode.seconds_per_step is not None


def test_a_missing_compiler_names_what_installs_it_and_the_others_go_on(small: str, running: Running) -> None:
    pytest.importorskip("jax")
    _, results = check(small, "v5e:2x2,trn2:1", Options(jobs=("decode",), seq=64), running)
    assert results[0].verdict in ("failed", "fits")  # fits where libtpu is in this environment
    if results[0].verdict == "failed":
        assert "anypool check --install tpu" in results[0].reason
        assert "anypool[tpu]" in results[0].reason
    assert results[1].verdict == "fits"


# Bad input.

BAD = [
    ({"targets": "v5x:2x4"}, TargetError, "v5x"),
    ({"targets": "h10O:8"}, TargetError, "did you mean"),
    ({"targets": "v5e:3x5"}, TargetError, "2x4"),
    ({"targets": "v5e"}, TargetError, "names no topology"),
    ({"targets": ""}, TargetError, "nothing"),
    ({"targets": "v5e:2x2", "mesh": "fsdp=3"}, MeshError, "3 devices; v5e:2x2 has 4"),
    ({"targets": "v5e:2x2", "mesh": "fdsp=4"}, MeshError, "did you mean 'fsdp'"),
    ({"targets": "v5e:2x2", "mesh": "fsdp=x"}, MeshError, "whole number"),
    ({"targets": "v5e:2x2", "jobs": ("decode",), "mesh": "fsdp=4"}, MeshError, "along tensor only"),
    ({"targets": "v5e:2x2", "jobs": ("decode",), "mesh": "tensor=4"}, MeshError, "num_key_value_heads 2"),
    ({"targets": "v5e:2x2", "seq": 4096}, CheckError, "max_position_embeddings is 512"),
    ({"targets": "v5e:2x2", "optimizer": "sgd"}, CheckError, "adamw, muon"),
    ({"targets": "v5e:2x2", "remat": "some"}, ValueError, "projections"),
    ({"targets": "v5e:2x2", "batch": 0}, CheckError, "at least 1"),
]


@pytest.mark.parametrize(("asked", "kind", "said"), BAD, ids=[said for _, _, said in BAD])
def test_a_question_that_makes_no_sense_is_refused_before_anything_runs(
    asked: dict[str, Any], kind: type[Exception], said: str, small: str, running: Running, stand_in: Stand
) -> None:
    stand_in("sys.exit('nothing should run')")
    targets = asked.pop("targets")
    with pytest.raises(kind, match=said) as raised:
        check(small, targets, Options(**{"jobs": ("train",), **asked}), running)
    assert type(raised.value).__module__.startswith("anypool.")


def test_a_mesh_that_does_not_divide_names_the_axis_and_the_dimension(small: str, running: Running) -> None:
    result = one(small, "cpu:3", running, jobs=("train",), mesh="tensor=3", seq=48)
    assert result.verdict == "rejected"
    assert "tensor" in result.reason and "num_attention_heads 4" in result.reason


def test_a_mesh_for_one_target_leaves_the_others(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(FITS)
    _, results = check(small, "v5e:2x2,v5e:2x4", Options(jobs=("train",), mesh="fsdp=4"), running)
    assert [r.verdict for r in results] == ["fits", "rejected"]
    assert "v5e:2x4 has 8" in results[1].reason


MODELS = [
    ("{", ConfigError, "cannot be read as JSON"),
    ("[]", ConfigError, "a JSON object is expected"),
    ("{}", ConfigError, "model_type"),
    (json.dumps({"model_type": "bert", "architectures": ["BertModel"]}), UnsupportedModelError, "BertModel"),
    (json.dumps(SMALL | {"num_attention_heads": 0}), ConfigError, "num_attention_heads"),
]


@pytest.mark.parametrize(("text", "kind", "said"), MODELS, ids=[said for _, _, said in MODELS])
def test_a_config_that_is_no_supported_model(
    text: str, kind: type[Exception], said: str, tmp_path: Path, running: Running
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind, match=said):
        check(str(tmp_path), "cpu:1", Options(), running)


def test_an_unknown_model_names_those_that_are_known(running: Running) -> None:
    with pytest.raises(ModelNotFoundError, match=r"llama-3\.1-8b"):
        read_model("lama")


def test_jobs() -> None:
    assert parse_jobs("all") == ("train", "prefill", "decode")
    assert parse_jobs("decode, train") == ("decode", "train")
    with pytest.raises(CheckError, match="there are train, prefill, decode and all"):
        parse_jobs("decoding")


# Defaults.


@pytest.mark.parametrize(
    ("name", "devices", "mesh"),
    [
        ("llama-3.1-8b", 16, {"fsdp": 16}),
        ("llama-3.1-70b", 512, {"fsdp": 128, "tensor": 4}),
        ("smollm2-135m", 256, {"fsdp": 64, "data": 4}),
        ("qwen3-32b", 8, {"fsdp": 8}),
    ],
)
def test_default_training_meshes(name: str, devices: int, mesh: dict[str, int]) -> None:
    made = training_mesh(ModelConfig.from_hf(read_model(name)[1]), devices, 4096)
    assert made.devices == devices
    assert {axis: getattr(made, axis) for axis in ("data", "fsdp", "tensor") if getattr(made, axis) > 1} == mesh


@pytest.mark.parametrize(
    ("name", "target", "tensor", "worker"),
    [
        ("smollm2-135m", "v5e:2x4", 1, "v5e:1x1"),
        ("llama-3.1-8b", "h100:8", 1, "h100:1"),
        ("llama-3.1-8b", "v5e:4x4", 4, "v5e:2x2"),
        ("llama-3.1-70b", "h100:8", 4, "h100:4"),
        ("llama-3.1-8b", "trn2:16", 2, "trn2:1"),
    ],
)
def test_default_workers_are_the_smallest_that_hold_the_model(name: str, target: str, tensor: int, worker: str) -> None:
    asked = Target.parse(target)
    made = question(read_model(name)[1], asked, "decode", Options(dtype="bfloat16"))
    assert made.mesh["tensor"] == tensor
    assert made.target == worker
    assert made.workers * tensor == asked.devices
    assert made.devices == Target.parse(worker).devices


def test_changes_come_nearest_first() -> None:
    config = read_model("llama-3.1-8b")[1]
    target = Target.parse("v5e:4x4")
    made = question(config, target, "train", Options(remat="projections", batch=32))
    said = [what for what, _, _ in changes(made, target)]
    assert said[:2] == ["--remat attention", "--remat full"]
    assert said[-1].startswith("--on v5e:16x16")
    decode = question(config, target, "decode", Options())
    said = [what for what, _, _ in changes(decode, target)]
    assert said[:2] == ["--mesh tensor=8", "--batch 16"]


def test_known_configurations_have_the_published_sizes() -> None:
    sizes = {"llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.6e9, "qwen3-8b": 8.19e9, "qwen3-32b": 32.8e9}
    sizes |= {"mistral-7b": 7.25e9, "smollm2-135m": 134.5e6}
    for name, count in sizes.items():
        assert parameters(ModelConfig.from_hf(read_model(name)[1])).total == pytest.approx(count, rel=0.005)


TRAIN_GIB = [("v5e:4x4", 12.22), ("v5p:4x4x4", 6.27), ("v6e:4x4", 13.08), ("tpu7x:2x2x4", 8.84)]
TRAIN_GIB += [("h100:8", 19.43), ("mi300x:8", 17.61)]
DECODE_GIB = [("v5e:4x4", 7.76), ("v5p:4x4x4", 31.04), ("v6e:4x4", 15.50), ("h100:8", 31.49), ("mi300x:8", 31.49)]


@pytest.mark.parametrize(
    ("job", "target", "compiled"),
    [("train", *pair) for pair in TRAIN_GIB] + [("decode", *pair) for pair in DECODE_GIB],
)
def test_predicted_memory_is_near_what_compilers_said(job: str, target: str, compiled: float) -> None:
    """Llama 3.1 8B; GiB a device by libtpu 0.0.42.1 and the CUDA and ROCm plug-ins 0.10.2, 2026-11-24."""
    made = question(read_model("llama-3.1-8b")[1], Target.parse(target), job, Options())
    assert sum(predict(made).values()) / 2**30 == pytest.approx(compiled, rel=0.1)


# Reports and the command.


def test_reports(small: str, running: Running, stand_in: Stand) -> None:
    stand_in(FITS)
    name, results = check(small, "v5e:2x2", Options(jobs=("train",)), running)
    document = json.loads(as_json(name, results))
    wanted = {
        "target", "job", "verdict", "proof", "hbm_bytes_per_device", "hbm_capacity_bytes", "findings", "kernels",
        "flops", "collectives", "seconds_per_step", "bound_by",
    }  # fmt: skip
    assert wanted <= document["results"][0].keys()
    page = as_html("a <model>", results)
    assert "a &lt;model&gt;" in page
    assert "v5e:2x2" in page and "compiler 1.0" in page


@pytest.mark.parametrize(("value", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us"), (3e-9, "3 ns")])
def test_times_have_a_fitting_unit(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_exit_code_says_whether_every_target_fits(small: str, stand_in: Stand) -> None:
    stand_in(FITS)
    asked = ["check", small, "--job", "train", "--format", "json"]
    fits = CliRunner().invoke(app, [*asked, "--on", "v5e:2x2"])
    assert fits.exit_code == 0
    assert json.loads(fits.stdout)["results"][0]["verdict"] == "fits"
    stand_in("os.abort()")
    fails = CliRunner().invoke(app, [*asked, "--on", "v5e:2x2,v5e:2x4"])
    assert fails.exit_code == 1
    assert [r["verdict"] for r in json.loads(fails.stdout)["results"]] == ["fits", "failed"]


def test_the_command_wants_a_model_and_targets() -> None:
    raised = CliRunner().invoke(app, ["check", "llama-3.1-8b"])
    assert isinstance(raised.exception, CheckError)
    raised = CliRunner().invoke(app, ["check", "--install", "neuron"])
    assert isinstance(raised.exception, CheckError)
    assert "tpu, cuda, rocm" in str(raised.exception)
