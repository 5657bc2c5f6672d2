"""Guards of the product, each switched off in a copy of the tree; a test must notice. See docs/mutations.md.

    python -m tests.mutations [--list] [--page] [--json] [NAME ...]

Each mutation is one change of text. It is made in a copy of the tracked files in a temporary folder, where the tests
that it names are run by a forked child, so that torch is imported once. They must fail (pytest's exit code 1); a copy
that cannot be imported, a skip or a test that hangs does not count. The control runs all these tests in the copy as it
is, where they must pass.
"""

import argparse
import ast
import compileall
import json
import multiprocessing
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mutation_list import POLICY, Mutation
from tests.mutation_list_federation import FEDERATION
from tests.mutation_list_site import SITE

MUTATIONS: Final = (*POLICY, *SITE, *FEDERATION)
ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "mutations.md"
OURS: Final = ("client", "common", "server", "simulations", "tests")
TIMEOUT_S: Final = 300.0
CONTROL_TIMEOUT_S: Final = 3600.0
NOTICED: Final = 1  # pytest: tests were run and some failed
TAIL_CHARACTERS: Final = 400
LOADED_BEFORE: Final = "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
OPTIONS: Final = (
    *("-x", "-q", "-rfEs", "--tb=no", "-p", "no:cacheprovider", "-p", "no:randomly"),
    *("-W", LOADED_BEFORE),  # by plugins of pytest whose packages transformers uses too
)
HEAD: Final = """# Guards that are switched off one at a time

Made by `python -m tests.mutations --page` from the lists `tests/mutation_list*.py`. `tests/unit/test_mutations.py`
fails where this page, a text that is to be changed or the name of a test is out of date.

`make mutations` copies the tree, switches off one guard at a time, and runs the tests that are named for it: each time
they must fail. In the copy as it is all of them must pass. `python -m tests.mutations NAME ...` tries some of them. A
guard that has no line here may have its tests all the same.

| guard | in | without it | noticed by |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Trial:
    """What came of running some tests.

    Attributes:
        name: Of the mutation; `control` for the copy as it is.
        exit_code: Pytest's; None if it was ended for the time it took.
        seconds: Wall time.
        tail: The last of what pytest printed.
    """

    name: str
    exit_code: int | None
    seconds: float
    tail: str

    @property
    def is_right(self) -> bool:
        """Whether the tests noticed, or passed in the control."""
        return self.exit_code == (0 if self.name == "control" else NOTICED)


def chosen(names: Sequence[str]) -> list[Mutation]:
    """The mutations of these names, all of them for none.

    Raises:
        SystemExit: A name is unknown.
    """
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := sorted(set(names) - known.keys()):
        raise SystemExit(f"no mutation is called {unknown[0]}; see: python -m tests.mutations --list")
    return [known[name] for name in names] or list(MUTATIONS)


def page() -> str:
    """The table for people."""
    rows = []
    for one in MUTATIONS:
        tests = ", ".join(f"`{test.split('::')[1]}`" for test in one.tests)
        rows.append(f"| {one.name} | `{one.file}` | {one.loses} | {tests} |")
    return HEAD + "\n".join(rows) + "\n"


def trials(mutations: Sequence[Mutation]) -> Iterator[Trial]:
    """The control, and then each mutation."""
    with tempfile.TemporaryDirectory(prefix="mut-") as folder:
        copy = Path(folder) / "tree"
        _copy(copy)
        _preload()
        tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        yield _trial("control", copy, tests, timeout_s=CONTROL_TIMEOUT_S)
        for mutation in mutations:
            with _mutated(copy, mutation):
                yield _trial(mutation.name, copy, mutation.tests, timeout_s=TIMEOUT_S)


def _copy(target: Path) -> None:
    """The tracked files as they are in the working tree, with bytecode that is held against its source."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    for folder in OURS:
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(target / folder, quiet=2, invalidation_mode=mode)


def _preload() -> None:
    """What takes long to import and is not ours, once for all children."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from common import quiet

    quiet.hush()
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401


@contextmanager
def _mutated(copy: Path, mutation: Mutation) -> Iterator[None]:
    """The copy with one guard off."""
    path = copy / mutation.file
    whole = path.read_text(encoding="utf-8")
    changed = mutation.applied_to(whole)
    ast.parse(changed)  # a file that cannot be imported would fail a test that imports it late
    path.write_text(changed, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(whole, encoding="utf-8")


def _trial(name: str, copy: Path, tests: Sequence[str], *, timeout_s: float) -> Trial:
    """Run tests in the copy, in a forked child with a session of its own, which is ended with all that it started."""
    told, started = copy.with_name("told"), time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=_run, args=(copy, tests, told))
    child.start()
    child.join(timeout_s)
    is_over = child.exitcode is not None
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
    child.join()
    tail = told.read_text(errors="replace").strip()[-TAIL_CHARACTERS:]
    return Trial(name, child.exitcode if is_over else None, time.monotonic() - started, tail)


def _run(copy: Path, tests: Sequence[str], told: Path) -> None:
    """In the child: pytest, with our packages from the copy and from nowhere else."""
    os.setsid()
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, copy))]
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry) != ROOT]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), *others])
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import pytest

    os._exit(int(pytest.main([*OPTIONS, f"--basetemp={copy.with_name('t')}", *tests])))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 if all was noticed and the control passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; all of them for none")
    parser.add_argument("--list", action="store_true", help="print the names and try nothing")
    parser.add_argument("--page", action="store_true", help="write docs/mutations.md and try nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args(arguments)
    mutations = chosen(options.names)
    if options.list or options.page:
        if options.page:
            PAGE.write_text(page(), encoding="utf-8")
        else:
            print("\n".join(f"{one.name}  ({one.file})" for one in mutations))
        return 0
    found: list[Trial] = []
    for trial in trials(mutations):
        found.append(trial)
        if not options.json:
            word = "ok " if trial.is_right else f"NOT NOTICED (exit code {trial.exit_code})\n{trial.tail}\n"
            print(f"{trial.seconds:6.1f} s  {trial.name}  {word}", flush=True)
        if trial.name == "control" and not trial.is_right:
            break
    is_right = all(trial.is_right for trial in found)
    if options.json:
        print(json.dumps({"is_right": is_right, "trials": [{**vars(one), "is_right": one.is_right} for one in found]}))
    else:
        print(f"{sum(one.is_right for one in found[1:])} of {len(mutations)} noticed")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
