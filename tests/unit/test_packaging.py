"""What is installed from a wheel or a source archive is whole, and each extra holds what its commands import."""

import ast
import functools
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common import events, extras
from server.folder import run_files
from tests import tiny

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "common", "server", "simulations")
SCRIPTS = {"silotune-client": "client", "silotune-server": "server", "silotune-sim": "sim"}
OPTIONAL = {"liger_kernel", "lm_eval", "onnx", "onnxruntime", "onnxscript"}  # not needed where they are not installed
BROUGHT = {  # by a requirement that is the reason for using them
    "click": "typer",
    "httpx2": "huggingface-hub",
    "huggingface_hub": "transformers",
    "pyarrow": "datasets",
    "ray": "flwr",
    "tokenizers": "transformers",
    "yaml": "transformers",
}


def tracked(*folders: str) -> set[str]:
    """Files that git knows in folders of the repository."""
    told = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(told.stdout.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source archive of the tracked files."""
    pytest.importorskip("setuptools", minversion="77")  # as [build-system] asks
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    return out


def test_a_wheel_holds_every_file_of_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
        scripts = wheel.read(entries).decode()
    assert names == tracked(*PACKAGES)
    assert all(f"{name} = " in scripts for name in SCRIPTS)
    for kind in (".toml", ".safetensors", ".j2", ".proto", ".html", ".service", ".pyi", ".jinja"):
        assert any(name.endswith(kind) for name in names), kind


def test_a_source_archive_holds_what_it_takes_to_install_test_and_read_it(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not name.endswith("/")}
    left_out = tracked() - names
    assert left_out <= {".gitignore"}, left_out


@functools.cache
def imports(path: Path) -> tuple[str, ...]:
    """Modules that a file imports anywhere, but for types only."""
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{name.name}" for name in node.names]
        waiting += ast.iter_child_nodes(node)
    return tuple(found)


def reached(start: str) -> set[str]:
    """Roots of the libraries that a module of ours imports, itself or through others of ours."""
    waiting, seen, roots = [start], set(), set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in PACKAGES:
            roots |= set() if name in seen else {name.partition(".")[0]}
            continue
        seen.add(name)
        path = ROOT / (name.replace(".", "/") + ".py")
        if path.is_file():
            waiting += imports(path)
        elif not (ROOT / name.replace(".", "/")).is_dir():
            waiting.append(name.rpartition(".")[0])  # a name out of a module
    return roots - set(sys.stdlib_module_names)


def brought(extra: str) -> set[str]:
    """What pyproject.toml, and not an older installation, says of an extra; silotune's own requirements too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    marked = [f"{one}; extra == '{name}'" for name, group in project["optional-dependencies"].items() for one in group]
    requires = [*project["dependencies"], *marked]
    return extras.brought("", requires) | extras.brought(extra, requires)


@pytest.mark.parametrize(("script", "extra"), SCRIPTS.items())
def test_an_extra_holds_all_that_its_commands_import(script, extra):
    module = {"client": "client.cli.app", "server": "server.cli.app", "sim": "simulations.cli.app"}[extra]
    roots = reached(module) - OPTIONAL
    assert {"torch", "typer", "pydantic"} < roots
    there = brought(extra)
    owners = importlib.metadata.packages_distributions()
    missing = {
        root
        for root in roots
        if BROUGHT.get(root) not in {*there, "huggingface-hub"}
        and not {canonicalize_name(owner) for owner in owners.get(root, ())} & there
    }
    assert missing == set()


def test_control_an_extra_alone_lacks_what_another_is_for():
    assert "starlette" in reached("server.cli.app")
    assert "starlette" not in brought("client")
    assert {"starlette", "opacus", "scipy"} <= brought("sim")


def test_no_page_installs_silotune_from_an_index_which_has_none():
    """A name on an index could be anybody's; a wheel, a folder or a wheelhouse is ours."""
    pages = [path for name in tracked() if (path := ROOT / name).suffix == ".md" and name != "CHANGELOG.md"]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines() if "pip install" in line]
    assert len(lines) > 5
    assert not [line for line in lines if re.search(r"""install ["']?silotune(\[|$|["' ])""", line)]


def test_whatever_a_requirement_requires_is_pinned_too():
    pins = {canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().split()}
    waiting, seen, loose = [(name, "") for name in brought("dev") if "[" not in name], set(), set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name == "silotune":
            continue
        seen.add((name, extra))
        loose |= {name} - pins
        for one in map(Requirement, importlib.metadata.requires(name) or []):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(one.name), inner) for inner in ("", *one.extras)]
    assert len(seen) > 100
    assert loose == set()


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("jsonschema", "silotune-server status", "server"),
        ("jsonschema", "silotune-sim run", "sim"),
        ("google.protobuf", "silotune-client serve", "client"),
        ("dp_accounting.pld", "silotune-server run", "server"),
        ("phonenumbers", "silotune-client check", "server"),
        ("onnxscript", "silotune-server export", "onnx"),
        ("lm_eval", "", "harness"),
        ("ray", "silotune-sim run", "sim"),
    ],
)
def test_a_missing_module_is_told_with_its_extra(module, command, extra):
    told = extras.remedy(module, command=command)
    assert told.startswith(f"{command or 'silotune'} needs ")
    assert f"the extra '{extra}': {extras.install(extra)}" in told


@pytest.mark.parametrize("module", ["torch", "pyarrow"])
def test_what_silotune_itself_needs_is_mended_by_installing_it_anew(module):
    told = extras.remedy(module, command="silotune-client serve")
    assert f"install silotune anew: {extras.install('client')}" in told


def test_a_run_that_ends_for_want_of_a_library_says_how_to_install_it(tmp_path):
    log = run_files.prepare(tiny.settings("tiny"), tmp_path / "run")
    assert run_files.report_failure(log, ModuleNotFoundError("a row's text", name="jsonschema")) == "InternalError"
    assert events.read(log.path)[-1]["reason"] == extras.remedy("jsonschema")
    run_files.report_failure(log, ModuleNotFoundError("a row's text", name="server.gone"))
    assert events.read(log.path)[-1]["reason"] == "internal error ModuleNotFoundError"


@pytest.mark.parametrize("module", ["", "server.no_such_module", "common"])
def test_a_module_of_ours_is_no_matter_of_extras(module):
    assert extras.remedy(module, command="silotune-server run") == ""


@pytest.mark.parametrize(
    ("told", "source", "options"),
    [
        ({"url": "file://{folder}/a%20wheel.whl", "archive_info": {}}, "{folder}/a wheel.whl", []),
        ({"url": "file://{folder}", "dir_info": {"editable": True}}, "{folder}", ["--editable"]),
        ({"url": "file://{folder}", "dir_info": {}}, "{folder}", []),
        ({"url": "file://{folder}/gone.whl", "archive_info": {}}, "silotune-9.whl", []),
        ({"url": "https://example.org/silotune.whl", "archive_info": {}}, "silotune-9.whl", []),
        (None, "silotune-9.whl", []),
    ],
)
def test_the_command_installs_from_where_silotune_came(tmp_path, told, source, options):
    (tmp_path / "a wheel.whl").touch()
    (tmp_path / "constraints.txt").touch()
    text = None if told is None else json.dumps(told).replace("{folder}", str(tmp_path))
    words = shlex.split(extras.install("server", python="/venv/bin/python", origin=(text, "9")))
    wanted = source.replace("{folder}", str(tmp_path)).replace("silotune-9.whl", "silotune-9-py3-none-any.whl")
    pins = str(tmp_path / "constraints.txt") if str(tmp_path) in wanted else "constraints.txt"
    assert words == ["/venv/bin/python", "-m", "pip", "install", *options, f"{wanted}[server]", "-c", pins]
