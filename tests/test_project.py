"""What every clone relies on: the locks, the version, no addresses of package indexes."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import anypool

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted(ROOT.glob("requirements*.lock"))


def names(requirements: list[str]) -> set[str]:
    """The normalised project names of a list of requirement strings."""
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {match.group().lower().replace("_", "-").replace(".", "-") for match in found if match}


def test_there_is_a_lock_for_the_project_every_extra_and_the_model():
    extras = {f"requirements-{extra}.lock" for extra in PROJECT["optional-dependencies"]}
    assert {lock.name for lock in LOCKS} == extras | {"requirements.lock", "requirements-model.lock"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_requirement_has_a_version_and_a_hash_and_no_address(lock):
    text = lock.read_text()
    assert "://" not in text
    assert "index-url" not in text
    entries = re.split(r"\n(?=[a-z0-9])", re.sub(r"(?m)^\s*#.*\n", "", text))
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_locks_hold_what_pyproject_asks_for(extra):
    """`make lock` was run after the last change to the dependencies."""
    lock = ROOT / (f"requirements-{extra}.lock" if extra else "requirements.lock")
    wanted = names(PROJECT["dependencies"] + PROJECT["optional-dependencies"].get(extra, []))
    locked = names(re.findall(r"(?m)^[a-z0-9._-]+(?===)", lock.read_text()))
    assert wanted <= locked


def test_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", anypool.__version__)


def install(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "install.sh")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_install_without_a_python_that_fits_says_which_ones_do():
    result = install(PYTHON="/nonexistent/python")
    assert result.returncode == 2
    assert "anypool needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert "make install PYTHON=/path/to/python3.12" in result.stderr


def test_install_with_an_unknown_extra_names_the_known_ones():
    result = install(EXTRA="cuba")
    assert result.returncode == 2
    assert "EXTRA=cuba is unknown; there are: tpu, cuda, rocm, ray, wandb, peers" in result.stderr
