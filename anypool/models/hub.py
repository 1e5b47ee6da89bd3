"""Models from the Hugging Face hub, kept in the hub's own cache."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm  # type: ignore[import-untyped]  # comes with huggingface_hub

from anypool.models.errors import ModelNotFoundError

_FILES = ["*.json", "*.safetensors", "*.jinja"]
# Some repositories hold the same weights twice, for their vendor's own code.
_IGNORED = ["original/*", "consolidated*"]


def fetch(model: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """The directory of `org/name`: fetched, or found in the hub's cache when the hub cannot be reached.

    progress(done_bytes, total_bytes) is called as bytes arrive; the total grows as files are begun.
    Raises ModelNotFoundError.
    """
    try:
        directory = snapshot_download(
            model, allow_patterns=_FILES, ignore_patterns=_IGNORED, tqdm_class=_reporting_bar(progress)
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"access to {model} must be granted on the hub: accept its terms there, then run `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"the hub has no model {model} (or it is private and HF_TOKEN is not set), and there is no such directory"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(
            f"{model} is not in the local cache and cannot be fetched from the hub ({reason}); run "
            f"`hf download {model}` where there is a network, or name a local directory or .gguf file"
        ) from error
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{model} on the hub has no config.json, so it is no Hugging Face model")
    return path


def _reporting_bar(progress: Callable[[int, int], None] | None) -> Any:
    """The library shows progress only by the bars of this class; ours draw nothing and call `progress`."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "disable": False}))

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if progress is not None and self.unit == "B" and self.total:
                progress(int(self.n), int(self.total))
            return shown

        def display(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Bar
