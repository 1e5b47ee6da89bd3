"""AWS's compiler, played by a script: what it is handed, and what becomes of its answer. The real one was never run."""

import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from anypool.check import CheckError, Options, Result, Running, check, compilers, neuronx
from anypool.check.neuronx import renumbered

VERSION = "2.28.7631.0+abcdef"
ACCEPTS = "open(value('--output'), 'wb').write(b'NEFF' * 100)"
Play = Callable[..., Path]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Puts a neuronx-cc into PATH; returns the folder where it keeps what it was called with."""

    def make(compile: str = ACCEPTS, version: str = f"print('NeuronX Compiler version {VERSION}')") -> Path:
        kept, bin = tmp_path / "kept", tmp_path / "bin"
        kept.mkdir()
        bin.mkdir()
        script = bin / "neuronx-cc"
        script.write_text(
            f"#!{sys.executable} -S\n"
            + textwrap.dedent(
                f"""
                import json, os, pathlib, sys, time
                if sys.argv[1:] == ["--version"]:
                    {version}
                    sys.exit()
                kept = pathlib.Path({str(kept)!r})
                number = len(list(kept.glob("*.json")))
                (kept / f"{{number}}.json").write_text(json.dumps(sys.argv[1:]))
                (kept / f"{{number}}.pb").write_bytes(pathlib.Path(sys.argv[2]).read_bytes())
                def value(option):
                    return sys.argv[sys.argv.index(option) + 1]
                {compile}
                """
            )
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
        return kept

    return make


def parsed(module: bytes) -> Any:
    """A serialized module as XLA itself reads it."""
    some = jax.jit(lambda x: x).lower(jnp.float32(0)).compiler_ir("hlo")
    assert some is not None
    return type(some)(module).get_hlo_module()


def ids(module: bytes) -> list[int]:
    """Of all instructions, computation by computation."""
    return [
        value
        for field, _, computation in neuronx._fields(module)
        if field == 3
        for inner, _, instruction in neuronx._fields(computation)
        if inner == 2
        for name, _, value in neuronx._fields(instruction)
        if name == 35
    ]


def asked(small: str, running: Running, target: str = "trn2:1", **options: Any) -> Result:
    (result,) = check(small, target, Options(**{"jobs": ("decode",), "seq": 32, "batch": 4, **options}), running)[1]
    return result


def test_a_module_keeps_its_meaning_when_its_instructions_are_numbered_anew() -> None:
    def loop(x: Any) -> Any:
        return jax.lax.scan(lambda c, row: (jnp.tanh(c + row), c.sum()), x[0], x)

    lowered: Any = jax.jit(loop).lower(jax.ShapeDtypeStruct((5, 3), jnp.float32)).compiler_ir("hlo")
    module = lowered.as_serialized_hlo_module_proto()
    assert max(ids(module)) >= 2**32
    small = renumbered(module)
    assert ids(small) == list(range(1, len(ids(module)) + 1))
    assert parsed(small).to_string() == parsed(module).to_string()


def test_what_is_no_module_is_said_to_be_none() -> None:
    for data in (b"\x0f\x00", b"\x0a\x01a", b""):
        with pytest.raises(ValueError, match="no serialized HloModuleProto"):
            renumbered(data)


def test_it_compiles_what_was_linted(small: str, running: Running, play: Play) -> None:
    kept = play()
    result = asked(small, running, mesh="tensor=2")
    assert result.verdict == "fits", result.reason
    assert result.proof == f"compiled with neuronx-cc {VERSION}; memory predicted"
    assert result.hbm_source == "predicted"
    assert result.compile_seconds is not None and result.compile_seconds > 0
    calls = [json.loads((kept / f"{number}.json").read_text()) for number in range(2)]  # the step and the sampler
    for call in calls:
        assert call[0] == "compile"
        assert call[2:8] == ["--framework", "XLA", "--target", "trn2", "--model-type", "transformer"]
        assert call[8] == "--output" and len(call) == 10
    step = (kept / "0.pb").read_bytes()
    assert 0 < max(ids(step)) < 2**31
    # One core's part: of two key-value heads it keeps one.
    text = parsed(step).to_string()
    assert "bf16[9,16,2,1,16]" in text
    assert "bf16[9,16,2,2,16]" not in text
    assert " all-reduce(" in text
    assert not list(kept.glob("2.*"))


def test_a_program_of_one_core_goes_as_jax_lowers_it() -> None:
    traced = jax.jit(lambda x: x @ x.T).trace(jax.ShapeDtypeStruct((4, 8), jnp.bfloat16))
    assert "bf16[4,8]" in parsed(renumbered(neuronx.one_core(traced, 1))).to_string()


def test_one_that_it_refuses_is_rejected_with_the_code(small: str, running: Running, play: Play) -> None:
    play("sys.stderr.write('x.py:1: info\\n[NCC_EVRF001] Operation top-k is not supported\\n'); sys.exit(70)")
    result = asked(small, running)
    assert result.verdict == "rejected"
    assert result.reason == "the compiler refuses it: NCC_EVRF001: Operation top-k is not supported"
    assert result.proof == f"refused by neuronx-cc {VERSION}; memory predicted"


@pytest.mark.parametrize(
    ("compile", "said"),
    [
        (
            "sys.stderr.write('Segmentation fault'); sys.exit(1)",
            "neuronx-cc ended with exit code 1: Segmentation fault",
        ),
        ("print('done')", "neuronx-cc made no program: done"),
    ],
)
def test_one_that_crashes_proves_nothing(compile: str, said: str, small: str, running: Running, play: Play) -> None:
    play(compile)
    result = asked(small, running)
    assert result.verdict == "failed"
    assert result.proof == "nothing was proven"
    assert said in result.reason


@pytest.mark.parametrize("version", ["sys.exit(3)", "print('hello')"])
def test_one_that_names_no_version_is_a_broken_installation(
    version: str, small: str, running: Running, play: Play
) -> None:
    play(version=version)
    with pytest.raises(CheckError, match=r"--version ended with \d and named no version.*take it out of PATH"):
        neuronx.find()
    result = asked(small, running)
    assert result.verdict == "failed"
    assert "mend the installation" in result.reason


def test_without_it_programs_are_linted_and_never_said_to_be_compiled(
    small: str, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert neuronx.find() is None
    result = asked(small, running)
    assert result.verdict == "fits"
    assert result.proof.startswith("lowered by jax")
    assert result.proof.endswith("and linted; memory predicted, not compiled")


def test_answers_with_and_without_it_are_kept_apart(play: Play) -> None:
    without = compilers.find("neuron").name
    play()
    assert compilers.find("neuron").name == f"{without}, neuronx-cc {VERSION}"
