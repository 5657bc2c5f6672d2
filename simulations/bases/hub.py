"""One base model from a model hub: safetensors and text files only, never code."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from common import storage
from common.errors import ModelError, TransportError

TIMEOUT_S: Final = 5.0
WANTED: Final = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")
UNWANTED: Final = ("*/*", "consolidated*")  # other formats of the same weights

README = """# {name}

Fetched from the model hub: `{name}` at revision `{revision}`.
Its licence and its own description are on its page there.
"""


def download(
    name: str, folder: Path, *, revision: str = "main", weights_sha256: str = "", say: Callable[[str], None]
) -> str:
    """Fill a folder with a base model's files.

    Args:
        folder: Exists and is empty.
        weights_sha256: Expected SHA-256 of `model.safetensors`; empty: any.

    Raises:
        TransportError: The hub does not answer, or refuses for now.
        ModelError: No such model, not open to this user, without safetensors, or other weights than expected.
    """
    import httpx2
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
        files = [file.rfilename for file in info.siblings or ()]
        if not any(file.endswith(".safetensors") and "/" not in file for file in files):
            raise ModelError(f"{name}: has no safetensors weights, and pickled ones are never loaded; choose another")
        say(f"downloading {name} at {info.sha} from the model hub")
        snapshot_download(
            name, revision=info.sha, local_dir=folder, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"{name}: not on the hub at revision {revision}, or not open to you: check the name; for a gated model "
            "accept its licence on its page and log in with `hf auth login`"
        ) from error
    except (httpx2.HTTPError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        raise TransportError(
            f"{name}: the model hub does not answer ({type(error).__name__}); check the connection, proxy and "
            "HF_HUB_OFFLINE, or copy the model's folder here by other means and name that folder as model.base"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    check_sha256(folder / "model.safetensors", weights_sha256)
    (folder / "README.md").write_text(README.format(name=name, revision=info.sha), encoding="utf-8")
    return f"model hub, {name} at {info.sha}"


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the expected one; an empty hash accepts all."""
    if not expected:
        return
    sha256 = storage.sha256(path)
    if sha256 != expected:
        raise ModelError(f"{path.name}: SHA-256 is {sha256}, expected {expected}: not the pinned file, not used")
