"""The command line: quick to help, exact about mistakes, and thin."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import anypool
from anypool import cli

EXPLAINED_BY_EXAMPLE = [
    ["up"], ["worker"], ["generate"], ["chips"], ["check"], ["train"],
    ["drill", "serve"], ["drill", "train"], ["bench", "serve"], ["data", "prepare"], ["runs", "export"],
    ["plan", "predict"],
]  # fmt: skip
COMMANDS = [
    [], ["drill"], ["bench"], ["runs"], ["runs", "list"], ["runs", "show"], ["runs", "plot"],
    ["data"], ["data", "inspect"], ["data", "example-chat"], ["plan"], ["plan", "validate"], ["plan", "calibrate"],
    *EXPLAINED_BY_EXAMPLE,
]  # fmt: skip


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    if command in EXPLAINED_BY_EXAMPLE:
        assert "Examples" in result.output


@pytest.mark.parametrize("command", [[], ["drill"], ["bench"], ["runs"], ["data"], ["plan"]], ids=" ".join)
def test_a_command_without_its_rest_shows_the_help(command):
    assert "Usage:" in run(*command).output


def test_version():
    assert run("--version").output == f"anypool {anypool.__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom anypool.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'jax', 'numpy', 'fastapi', 'uvicorn', 'aiohttp', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_worker_is_under_guard_before_anything_heavy_is_imported():
    code = "import sys\nimport anypool.pools.guard\nprint(sorted({'jax', 'numpy', 'aiohttp'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["upp"], "No such command 'upp'"),
        (["up", "--prt", "1"], "No such option: --prt"),
        (["up", "--port", "70000"], "Input should be less than or equal to 65535"),
        (["up", "--port", "http"], "Input should be a valid integer"),
        (["worker", "--dtype", "float23"], "'float23' is not one of"),
        (["worker", "--token-budget", "8"], "Input should be greater than or equal to 16"),
        (["generate"], "Missing argument 'model'"),
        (["generate", "m", "p", "--max-tokens", "0"], "Input should be greater than or equal to 1"),
        (["generate", "m", "p", "--temperature", "-1"], "Input should be greater than or equal to 0"),
        (["drill", "serve", "--kills", "0"], "Input should be greater than or equal to 1"),
        (["bench", "serve", "-n", "0"], "Input should be greater than or equal to 1"),
        (["drill", "serve", "--format", "xml"], "'xml' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_ends_with_two(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_the_workers_flags_are_its_options_with_the_same_defaults():
    from anypool.engine.server import WorkerOptions

    flags = inspect.signature(cli.serve.worker).parameters
    for field in dataclasses.fields(WorkerOptions):
        if field.name == "faster_kernels":
            assert flags["reference_kernels"].default is (not field.default)
        elif field.name != "model":
            assert flags[field.name].default == field.default, field.name


def test_what_the_fleet_file_tells_an_engine_are_the_workers_flags():
    from anypool.pools import EngineSettings

    assert {field.name for field in dataclasses.fields(EngineSettings)} <= set(
        inspect.signature(cli.serve.worker).parameters
    )


def test_our_own_errors_are_one_line_and_others_are_not_hidden(monkeypatch, capsys):
    from anypool.pools import FleetError

    def fails(error: Exception):
        def app() -> None:
            raise error

        return app

    monkeypatch.setattr(cli, "app", fails(FleetError("fleet.toml:1: mend this")))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: fleet.toml:1: mend this\n"
    monkeypatch.setattr(cli, "app", fails(ValueError("a fault of ours")))
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.main()
