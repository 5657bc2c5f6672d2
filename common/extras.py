"""Which extra of silotune brings a module that is not installed, and the command that adds it to this environment."""

import importlib.metadata
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlparse

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE: Final = "silotune"
PINS: Final = "constraints.txt"
OWN: Final = ("client", "common", "server", "simulations")
EXTRAS: Final = ("client", "server", "harness", "onnx", "sim")  # a module of several is said to be of the first
OF_COMMAND: Final = {"silotune-client": "client", "silotune-server": "server", "silotune-sim": "sim"}
_DISTRIBUTIONS: Final = {
    "google": "protobuf",
    "grpc": "grpcio",
    "phonenumbers": "phonenumberslite",
    "ray": "flwr[simulation]",
}


def remedy(module: str, *, command: str = "") -> str:
    """What to say where a module of a library is not installed.

    Args:
        module: As Python's error names it, such as `google.protobuf`.
        command: Who needs it, such as `silotune-server status`; its own extra is named first.

    Returns:
        What is missing, of which extra it is, and the command that installs that; empty for a module of ours, whose
        absence no extra mends.
    """
    root = module.partition(".")[0]
    if not root or root in OWN:
        return ""
    name = _DISTRIBUTIONS.get(root) or canonicalize_name(root)
    first = OF_COMMAND.get(command.partition(" ")[0], "")
    extra = next((one for one in (first, *EXTRAS) if one and name in _distributions(one)), "")
    needs = f"{command or PACKAGE} needs {name}, which is not installed in this environment"
    if name in _distributions(""):
        return f"{needs}, though silotune cannot do without it; install silotune anew: {install(first)}"
    if extra:
        return f"{needs}; it comes with the extra '{extra}': {install(extra)}"
    return f"{needs}; some requirement of silotune needs it, so install silotune anew: {install(first)}"


def install(extra: str, *, python: str = sys.executable) -> str:
    """The command that installs silotune with an extra into this environment, from where it was installed.

    Args:
        extra: Of pyproject.toml; empty: none.
        python: This environment's interpreter.

    Returns:
        A line for a shell. Where it is not known what silotune was installed from, the wheel is named without a folder.
    """
    folder, source, options = _origin()
    pins = folder / PINS if folder is not None and (folder / PINS).is_file() else Path(PINS)
    wanted = f"{source}[{extra}]" if extra else source
    return shlex.join([python, "-m", "pip", "install", *options, wanted, "-c", str(pins)])


def _origin() -> tuple[Path | None, str, Sequence[str]]:
    """The folder of what silotune was installed from, the thing itself, and pip's options for it (PEP 610)."""
    try:
        found = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # run from its source: the root of the tree
        root = Path(__file__).parents[1]
        return root, str(root), ()
    told = json.loads(found.read_text("direct_url.json") or "{}")
    address = urlparse(told.get("url", ""))
    path = Path(unquote(address.path))
    if address.scheme != "file" or not path.exists():
        return None, f"{PACKAGE}-{found.version}-py3-none-any.whl", ()
    is_editable = told.get("dir_info", {}).get("editable", False)
    return path if path.is_dir() else path.parent, str(path), ("--editable",) if is_editable else ()


def _distributions(extra: str) -> set[str]:
    """Names of what an extra brings beyond silotune's own requirements; of no extra, those."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return set()
    names: set[str] = set()
    for one in map(Requirement, lines):
        if one.name == PACKAGE:  # an extra that is made of others
            names |= set().union(*map(_distributions, one.extras)) if _is_of(one, extra) else set()
        elif _is_of(one, extra):
            names |= {canonicalize_name(one.name), *(f"{one.name}[{inner}]" for inner in one.extras)}
    return names


def _is_of(wanted: Requirement, extra: str) -> bool:
    """Whether an extra, or silotune without any, names this requirement."""
    if wanted.marker is None:
        return not extra
    return bool(extra) and wanted.marker.evaluate({"extra": extra})
