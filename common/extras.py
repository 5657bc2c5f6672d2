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
    extra = next((extra for extra in (first, *EXTRAS) if extra and name in brought(extra)), "")
    needs = f"{command or PACKAGE} needs {name}, which is not installed in this environment"
    if name in brought(""):
        return f"{needs}, though silotune cannot do without it; install silotune anew: {install(first)}"
    if extra:
        return f"{needs}; it comes with the extra '{extra}': {install(extra)}"
    return f"{needs}; some requirement of silotune needs it, so install silotune anew: {install(first)}"


def install(extra: str, *, python: str = sys.executable, origin: tuple[str | None, str] | None = None) -> str:
    """The command that installs silotune with an extra into this environment, from where it was installed.

    Args:
        extra: Of pyproject.toml; empty: none.
        origin: Text of the installed distribution's direct_url.json (PEP 610), which pip leaves out for an index, and
            its version; None: as installed here.

    Returns:
        A line for a shell. Where it is not known what silotune was installed from, the wheel is named without a folder.
    """
    if origin is None:
        try:
            distribution = importlib.metadata.distribution(PACKAGE)
            origin = distribution.read_text("direct_url.json"), distribution.version
        except importlib.metadata.PackageNotFoundError:  # run from its source: the root of the tree
            origin = json.dumps({"url": Path(__file__).parents[1].as_uri()}), ""
    text, version = origin
    direct_url = json.loads(text or "{}")
    address = urlparse(direct_url.get("url", ""))
    path, pins, options = Path(unquote(address.path)), Path(PINS), list[str]()
    if address.scheme == "file" and path.exists():
        source = str(path)
        options += ["--editable"] if direct_url.get("dir_info", {}).get("editable") else []
        pins_there = (path if path.is_dir() else path.parent) / PINS
        pins = pins_there if pins_there.is_file() else pins
    else:
        source = f"{PACKAGE}-{version}-py3-none-any.whl"
    wanted = f"{source}[{extra}]" if extra else source
    return shlex.join([python, "-m", "pip", "install", *options, wanted, "-c", str(pins)])


def brought(extra: str, requires: Sequence[str] | None = None) -> set[str]:
    """Names of what an extra brings beyond silotune's own requirements; of the extra "", those.

    Args:
        requires: Requirements with their extras as markers; None: of the installed silotune.
    """
    if requires is None:
        try:
            requires = importlib.metadata.requires(PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            return set()
    names: set[str] = set()
    for wanted in map(Requirement, requires):
        is_named = bool(extra) and wanted.marker.evaluate({"extra": extra}) if wanted.marker else not extra
        if is_named and wanted.name == PACKAGE:  # an extra that is made of others
            names |= set().union(*(brought(inner, requires) for inner in wanted.extras))
        elif is_named:
            names |= {canonicalize_name(wanted.name), *(f"{wanted.name}[{inner}]" for inner in wanted.extras)}
    return names
