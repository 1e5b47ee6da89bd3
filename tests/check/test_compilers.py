"""The vendors' compilers, where they are installed; and how they are found and installed."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from anypool.check import CheckError, CompilerMissingError, Options, Running, check, compilers, rocm_stubs
from anypool.check.compilers import INSTALLABLE, LOCKS
from anypool.check.gpu import target_description
from anypool.chips import chips, load_chip
from tests.check.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = compilers.home()  # the user's own; the tests' cache is empty


@pytest.fixture
def compiler(request: pytest.FixtureRequest, own_cache: Path) -> str:
    """A platform whose compiler is here."""
    platform: str = request.param
    if not (INSTALLED / platform).is_dir():
        pytest.skip(f"the compiler for {platform} is not installed: anypool check --install {platform}")
    own_cache.mkdir(parents=True, exist_ok=True)
    (own_cache / "compilers").symlink_to(INSTALLED)
    return platform


TARGETS = {"tpu": "v5e:2x2", "cuda": "h100:2", "rocm": "mi300x:2"}


@pytest.mark.parametrize("compiler", TARGETS, indirect=True)
def test_a_decode_step_compiles_for_a_chip_that_is_not_here(compiler: str, small: str, running: Running) -> None:
    _, (result,) = check(small, TARGETS[compiler], Options(("decode",), batch=4, seq=64, mesh="tensor=2"), running)
    assert result.verdict == "fits", result.reason
    assert result.hbm_source == "compiler"
    assert result.hbm_parts["arguments"] > 0
    assert result.compile_seconds is not None and result.compile_seconds > 0
    assert {axis for collective in result.collectives for axis in collective["axes"]} == {"tensor"}
    words = {"tpu": "compiled with libtpu", "cuda": "compiled with jax-cuda12", "rocm": "code generation only"}
    assert result.proof.startswith(words[compiler])


@pytest.mark.parametrize(
    ("compiler", "job", "kernel", "call"),
    [
        ("tpu", "decode", "pallas ragged paged", "tpu_custom_call"),
        ("tpu", "train", "pallas splash", "tpu_custom_call"),
        ("cuda", "train", "pallas triton", "__gpu$xla.gpu.triton"),
        ("rocm", "train", "pallas triton", "__gpu$xla.gpu.triton"),
    ],
    indirect=["compiler"],
)
def test_a_faster_attention_is_compiled_and_reported(
    compiler: str, job: str, kernel: str, call: str, tmp_path: Path, running: Running
) -> None:
    """One layer with heads of 128, over a mesh; the compiled program has the kernel in it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL | {"num_hidden_layers": 1, "head_dim": 128}))
    options = Options((job,), batch=4, seq=128, mesh="tensor=2" if job == "decode" else None)
    _, (result,) = check(str(file), TARGETS[compiler], options, running)
    assert result.verdict == "fits", result.reason
    assert kernel in result.kernels.values()
    answer = json.loads(next((tmp_path / "cache" / "check").glob("*.json")).read_text())
    assert answer["programs"][0]["custom_calls"].get(call, 0) > 0, answer["programs"][0]["custom_calls"]


@pytest.mark.parametrize("platform", INSTALLABLE)
def test_the_locks_pin_the_versions_of_the_extras_with_hashes(platform: str) -> None:
    text = (LOCKS / f"{platform}.lock").read_text()
    assert "://" not in text
    entries = re.split(r"\n(?=[a-z0-9])", re.sub(r"(?m)^\s*#.*\n", "", text))
    extra = (ROOT / f"requirements-{platform}.lock").read_text()
    for entry in entries:
        assert "--hash=sha256:" in entry
        assert entry.partition(" \\")[0] in extra


@pytest.mark.parametrize("platform", INSTALLABLE)
def test_a_missing_compiler_says_what_installs_it(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "_importable", lambda module: False)
    with pytest.raises(CompilerMissingError, match=rf"anypool check --install {platform}.*anypool\[{platform}\]"):
        compilers.find(platform)


def test_only_what_there_is_can_be_installed() -> None:
    with pytest.raises(CheckError, match="there are tpu, cuda, rocm"):
        compilers.install("ascend")


def test_an_installer_that_fails_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(CompilerMissingError, match="failed with exit code 1"):
        compilers.install("tpu")


def test_a_gpu_plugin_of_another_jax_is_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = own_cache / "compilers" / "cuda" / "jax_cuda12_pjrt-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda12-pjrt\nVersion: 0.0.1\n")
    with pytest.raises(CompilerMissingError, match=r"0\.0\.1 does not go with jaxlib"):
        compilers.find("cuda")


@pytest.mark.parametrize("chip", [c.name for c in chips() if c.jax_platform in ("cuda", "rocm")])
def test_every_gpu_has_a_description(chip: str) -> None:
    text = target_description(load_chip(chip))
    assert text.count("{") == text.count("}")
    assert re.search(r"core_count: \d+", text)
    assert re.search(r"(cuda|rocm)_compute_capability \{ \w+: ", text)
    assert "matrix_ops" not in text


def test_stubs_have_the_names_and_versions_that_the_plugin_wants(tmp_path: Path) -> None:
    """With a plug-in of two functions in place of AMD's."""
    real, built = tmp_path / "real", tmp_path / "built"
    real.mkdir()
    built.mkdir()
    (real / "a.c").write_text("int hipInit(void) { return 7; } int hipMalloc(void) { return 7; }")
    (real / "a.map").write_text("hip_4.2 { global: hipInit; hipMalloc; };")
    library = real / "libamdhip64.so.7"
    versions = f"-Wl,--version-script={real / 'a.map'}"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, real / "a.c", "-Wl,-soname,libamdhip64.so.7", versions], check=True
    )
    (built / "p.c").write_text(
        "#include <stdio.h>\nint hipInit(void); int hipMalloc(void);\n"
        'int main(void) { printf("%d %d", hipInit(), hipMalloc()); return 0; }'
    )
    plugin = built / "plugin"
    subprocess.run(["cc", "-o", plugin, built / "p.c", library], check=True)
    stubs = rocm_stubs.make(plugin, tmp_path / "cache")
    assert rocm_stubs.make(plugin, tmp_path / "cache") == stubs
    said = subprocess.run([plugin], env={"LD_LIBRARY_PATH": str(stubs)}, capture_output=True, text=True, check=True)
    assert said.stdout == "0 100"
    assert "no version information" not in said.stderr
