"""`tools/layout.py` measures what it says, and `make check` fails for circles and full folders."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import layout

ROOT = Path(__file__).parents[2]
Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Make a product of these files, by their paths, in packages of their own."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            for folder in path.relative_to(tmp_path).parents[:-1]:
                init = tmp_path / folder / "__init__.py"
                init.touch()
        return tmp_path

    return make


SOUND = {
    "common/errors.py": '"""Errors."""\n\n# why\nLIMIT = 1  # and how much\n',
    "common/run/config.py": "from common import errors\n\n\nclass RunConfig:\n    limit = errors.LIMIT\n",
    "server/loop.py": """from common.run import config
from common.run.config import RunConfig


def play(run: config.RunConfig, *, others: "list[RunConfig] | None" = None) -> int:
    return _step(run.limit) + _often(1) + _often(2)


def _step(limit: int) -> int:
    return limit


def _often(limit: int) -> int:
    return limit
""",
}


def check(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = layout.main(["--check", "--root", str(root)])
    return code, capsys.readouterr().out


def test_a_sound_tree_passes_and_its_figures_are_right(tree, capsys):
    root = tree(SOUND)
    assert check(root, capsys)[0] == 0
    assert layout.main(["--json", "--root", str(root)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["files"], figures["functions"], figures["comment_lines"]) == (6, 3, 2)
    assert figures["folders"] == {"common": 2, "common/run": 2, "server": 2}
    assert figures["files_with_one_importer"] == 2  # errors and config; nobody imports loop
    assert figures["functions_that_take_all_settings"] == 1
    assert figures["private_functions_called_once"] == 1
    assert figures["largest_file"] == "server/loop.py"
    assert figures["circles_of_modules"] == figures["circles_of_folders"] == figures["problems"] == []


@pytest.mark.parametrize(
    "back",
    [
        "from server import loop\n",
        "import server.loop\n",
        "def late():\n    from server.loop import play\n    return play\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from server.loop import play\n",
    ],
    ids=["from", "import", "in a function", "for types"],
)
def test_control_a_circle_of_modules_fails_wherever_the_import_stands(tree, capsys, back):
    root = tree({**SOUND, "common/run/config.py": f"{back}class RunConfig: ...\n"})
    code, told = check(root, capsys)
    assert code == 1
    assert "modules import each other: common.run.config server.loop" in told


def test_control_a_circle_of_folders_alone_fails(tree, capsys):
    root = tree({**SOUND, "common/run/late.py": "from server import table\n", "server/table.py": ""})
    code, told = check(root, capsys)
    assert code == 1
    assert "modules import" not in told
    assert "folders import each other: common.run server" in told


@pytest.mark.parametrize(("num_files", "code"), [(layout.MAX_FILES, 0), (layout.MAX_FILES + 1, 1)])
@pytest.mark.parametrize("folder", ["server", "tests/unit/server"])
def test_control_a_folder_over_the_limit_fails(tree, capsys, num_files, code, folder):
    files = {f"{folder}/{'one' if number else '__init__'}{number or ''}.py": "" for number in range(num_files)}
    root = tree({"common/errors.py": "", **files})
    told = check(root, capsys)
    assert told[0] == code
    assert (f"{folder} holds {num_files} files" in told[1]) == bool(code)


def test_classes_that_hold_all_settings_are_those_of_this_tree():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "common").rglob("*.py")]
    assert [name for name in layout.WHOLE if not any(f"\nclass {name}(" in text for text in texts)] == []


@pytest.mark.slow
def test_a_command_is_followed_to_its_first_gradient():
    done = subprocess.run([sys.executable, "tools/layout.py", "--json", "--trace"], cwd=ROOT, capture_output=True)
    frames = json.loads(done.stdout.splitlines()[-1])["frames"]
    assert frames[0].endswith(":main")
    assert any("client/train/" in frame for frame in frames)
