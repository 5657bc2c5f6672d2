"""Where base models lie on this machine; nothing here ever asks a hub."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from common.errors import ModelError

DEFAULT = Path.home() / ".local" / "share" / "silotune" / "models"


def folder_name(base: str) -> str:
    """A base's folder in the store: a hub id's slash becomes two dashes."""
    return base.replace("/", "--")


def resolve(base: str, *, store: Path = DEFAULT, shipped: Mapping[str, Path] | None = None) -> Path:
    """The folder of a base.

    Args:
        base: `model.base`: a folder, a name in the store, or a hub id that was fetched into the store.
        shipped: Bases that come with the calling package, by name.

    Raises:
        ModelError: It is nowhere on this machine.
    """
    if shipped and base in shipped:
        return shipped[base]
    for folder in (Path(base).expanduser(), store / folder_name(base)):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(
        f"base model '{base}' is neither a folder nor in the store {store}; "
        f"fetch it with: silotune-sim base {base} --store {store}"
    )


def find_by_hash(wanted_sha256: str, folders: list[Path]) -> Path:
    """The first folder whose files have the hash that a run wants.

    Raises:
        ModelError: None has.
    """
    from common.model.base import hash_base

    for folder in folders:
        with suppress(ModelError):  # such as a download that was cut off
            if hash_base(folder) == wanted_sha256:
                return folder
    looked = ", ".join(str(folder) for folder in folders) or "nothing"
    raise ModelError(f"no base with hash {wanted_sha256} here (looked at {looked}); fetch the base that the run names")
