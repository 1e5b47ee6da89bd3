"""What the tests of this room share."""

from pathlib import Path

import pytest

from anypool.models import resolve
from tests.goldens import tiny

GOLDENS = Path(tiny.__file__).parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled model's directory. It stays in the user's cache: converting it takes ten seconds."""
    return resolve("smollm2-135m-instruct")


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "tiny", "llama3")
