"""Figures of the layout: how many files a folder has, who imports whom, what is called once, how deep a run goes.

    python tools/layout.py [--json] [--check] [--trace]

Needs the standard library alone; `--trace` plays a tiny run of this tree, and so needs its environment. `--check` fails
where modules or folders import each other in a circle, or a folder holds more than 15 Python files.
"""

import argparse
import ast
import io
import json
import os
import statistics
import sys
import tempfile
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
PRODUCT: Final = ("common", "server", "client", "simulations")
OTHERS: Final = ("tests", "tools")  # their folders are held to the limit too
MAX_FILES: Final = 15
GENERATED: Final = ("_pb2.py", "_pb2_grpc.py")
WHOLE: Final = frozenset({"RunConfig", "RunTables", "NodeConfig", "NodeTables"})  # a whole file of settings
COMMAND: Final = "silotune-sim"
TINY: Final = (
    *("federation.num_rounds=1", "training.local_epochs=0.0", "training.local_steps=1", "training.batch_size=2"),
    *("training.max_grad_norm=1.0", "evaluation.exact_match_rows=0"),
)

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Module:
    """One file of the product.

    Attributes:
        name: Dotted; a package's `__init__` has the package's name.
        path: Below the root.
        text: All of it.
        tree: Its syntax tree.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether it is a folder's `__init__`."""
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """The dotted name of its folder."""
        return self.name if self.is_package else self.name.rpartition(".")[0]


class Reached(BaseException):
    """The first training step; no `except Exception` holds it up."""


def modules(root: Path) -> list[Module]:
    """The product's files, without generated ones.

    Raises:
        SyntaxError: A file is not Python.
    """
    found = []
    for path in (path for package in PRODUCT for path in sorted((root / package).rglob("*.py"))):
        if not path.name.endswith(GENERATED):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            found.append(Module(name, path.relative_to(root), text, ast.parse(text)))
    return found


def imports(found: Sequence[Module], *, at_top_only: bool = False) -> dict[str, frozenset[str]]:
    """Who imports whom.

    Args:
        found: The product.
        at_top_only: Leave out imports within functions and under `if TYPE_CHECKING`.
    """
    names = {module.name for module in found}
    graph = {}
    for module in found:
        targets = set()
        for node in _imports(module.tree, at_top_only=at_top_only):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            else:
                options = ((f"{node.module}.{alias.name}", str(node.module)) for alias in node.names)
                targets |= {full if full in names else whole for full, whole in options}
        graph[module.name] = frozenset(targets & names - {module.name})
    return graph


def _imports(tree: ast.AST, *, at_top_only: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        is_inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (at_top_only and (is_inner or is_for_types)):
            yield from _imports(node, at_top_only=at_top_only)


def of_folders(graph: Graph, found: Sequence[Module]) -> dict[str, frozenset[str]]:
    """The same between folders; a folder inside another is one of its own."""
    folders = {module.name: module.folder for module in found}
    between: dict[str, set[str]] = {folder: set() for folder in folders.values()}
    for name, targets in graph.items():
        between[folders[name]] |= {folders[target] for target in targets} - {folders[name]}
    return {folder: frozenset(targets) for folder, targets in between.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups whose members all reach each other (Tarjan 1972), the largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(found, key=lambda group: (-len(group), group))


def files_of_folders(root: Path) -> dict[str, int]:
    """Python files in each folder of product, tests and tools, `__init__` and generated ones included."""
    paths = (path for package in (*PRODUCT, *OTHERS) for path in (root / package).rglob("*.py"))
    return dict(Counter(path.parent.relative_to(root).as_posix() for path in paths))


def num_whole(found: Sequence[Module]) -> int:
    """Functions that take a whole file of settings, by their annotations."""
    return sum(_takes_whole(node) for module in found for node in _functions(module.tree))


def _takes_whole(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    given = node.args
    taken = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    words = (ast.unparse(one.annotation) for one in taken if one.annotation)
    return any(WHOLE & set(word.replace("'", " ").replace(".", " ").replace("|", " ").split()) for word in words)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def called_once(found: Sequence[Module]) -> tuple[int, int]:
    """Private functions that their file names once, and all functions."""
    once = total = 0
    for module in found:
        uses = Counter(node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name))
        uses += Counter(node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute))
        for node in _functions(module.tree):
            total += 1
            once += node.name.startswith("_") and not node.name.startswith("__") and uses[node.name] == 1
    return once, total


def num_comments(text: str) -> int:
    """Lines with a comment."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def measure(root: Path) -> dict[str, Any]:
    """All figures that need no run.

    Args:
        root: Holds the folders of the product.
    """
    found = modules(root)
    everything, at_top = imports(found), imports(found, at_top_only=True)
    importers = Counter(target for targets in everything.values() for target in targets)
    lines = {module.path.as_posix(): len(module.text.splitlines()) for module in found}
    rooms = {module.path.as_posix(): lines[module.path.as_posix()] for module in found if not module.is_package}
    folders = files_of_folders(root)
    once, functions = called_once(found)
    largest = max(rooms, key=lambda name: rooms[name])
    return {
        "files": len(found),
        "lines": sum(lines.values()),
        "comment_lines": sum(num_comments(module.text) for module in found),
        "median_file_lines": round(statistics.median(rooms.values())),
        "largest_file_lines": rooms[largest],
        "largest_file": largest,
        "folders": dict(sorted(folders.items())),
        "most_files_in_a_folder": max(folders.values()),
        "circles_of_modules": circles(everything),
        "circles_of_modules_at_import": circles(at_top),
        "circles_of_folders": circles(of_folders(everything, found)),
        "files_with_one_importer": sum(importers[m.name] == 1 for m in found if not m.is_package),
        "functions": functions,
        "functions_that_take_all_settings": num_whole(found),
        "private_functions_called_once": once,
        "private_functions_called_once_percent": round(100 * once / functions, 1) if functions else 0.0,
    }


def trace(root: Path) -> list[str]:
    """Our own frames from a command to the first gradient of a tiny run, the outermost first, as `path:function`.

    Raises:
        RuntimeError: The run ended before.
    """
    sys.path.insert(0, str(root))
    command = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"][COMMAND]
    module, _, name = command.partition(":")
    ours = tuple(f"{root / package}{os.sep}" for package in PRODUCT)
    reached: list[str] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code.co_name != "backward" or "torch" not in frame.f_code.co_filename:
            return
        sys.setprofile(None)
        at: FrameType | None = frame
        while at is not None:
            file = at.f_code.co_filename
            if file.startswith(ours):
                reached.append(f"{Path(file).relative_to(root).as_posix()}:{at.f_code.co_name}")
            at = at.f_back
        raise Reached

    with tempfile.TemporaryDirectory(prefix="layout-") as folder:
        settings = [word for setting in TINY for word in ("--set", setting)]
        run_file = root / "simulations" / "configs" / "demo.toml"
        sys.argv = [COMMAND, "run", str(run_file), "--output", f"{folder}/run", "--threads", "1", *settings]
        sys.setprofile(watch)
        try:
            getattr(import_module(module), name)()
        except (Reached, SystemExit):
            pass
        finally:
            sys.setprofile(None)
    if not reached:
        raise RuntimeError("the run ended before its first gradient")
    return reached[::-1]


def problems(figures: Mapping[str, Any]) -> list[str]:
    """What `--check` fails for."""
    found = [f"modules import each other: {' '.join(group)}" for group in figures["circles_of_modules"]]
    found += [f"folders import each other: {' '.join(group)}" for group in figures["circles_of_folders"]]
    return found + [
        f"{folder} holds {number} files, and {MAX_FILES} is the limit; make a folder of those that belong together"
        for folder, number in figures["folders"].items()
        if number > MAX_FILES
    ]


def table(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    rows = []
    for name, value in figures.items():
        shown = value
        if name == "folders":
            shown = f"{len(value)}, of which over {MAX_FILES} files: {sum(n > MAX_FILES for n in value.values())}"
        elif name.startswith("circles"):
            shown = f"{len(value)}" + (f" (of {', '.join(str(len(group)) for group in value)})" if value else "")
        elif name == "frames":
            shown = f"{len(value)}\n" + "\n".join(f"    {frame}" for frame in value)
        rows.append(f"{name.replace('_', ' '):40} {shown}")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where `--check` finds something."""
    parser = argparse.ArgumentParser(prog="python tools/layout.py", description="Figures of the layout.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="print what is against the rules; fail if there is any")
    parser.add_argument("--trace", action="store_true", help="also play a tiny run up to its first gradient")
    parser.add_argument("--root", type=Path, default=ROOT, help="a tree other than this one")
    options = parser.parse_args(arguments)
    figures = measure(options.root)
    if options.trace:
        frames = trace(options.root)
        files = len({frame.partition(":")[0] for frame in frames})
        figures |= {"frames_to_a_training_step": len(frames), "files_to_a_training_step": files, "frames": frames}
    found = problems(figures)
    if options.json:
        print(json.dumps({**figures, "problems": found}))
    elif options.check:
        print("\n".join(found) or "layout: no circle, and no folder over the limit")
    else:
        print(table(figures))
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
