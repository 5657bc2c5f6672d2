"""Every command that a command prints as the next one works as it is printed, also with blanks in its paths."""

import itertools
import json
import os
import pty
import re
import shlex
import threading
from pathlib import Path

import pytest

import client.cli.app
import server.cli.app
import simulations.cli.app
from common import cli
from tests import tiny
from tests.samples import vault

ROOT = Path(__file__).parents[2]
APPS = {
    "silotune-sim": simulations.cli.app.app,
    "silotune-server": server.cli.app.app,
    "silotune-client": client.cli.app.app,
}


@pytest.fixture
def give(capsys):
    """Run a command line; what it printed and the commands that it names next."""

    def run(line: str, *, exit_code: int = 0) -> list[str]:
        program, *words = shlex.split(line)
        code = 0
        try:
            cli.run(APPS[program], words)
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        assert code == exit_code, told.err
        return re.findall(r"^(?:next|or): (silotune-.*)$", told.out, re.MULTILINE)

    return run


@pytest.fixture
def typing(monkeypatch):
    """A terminal at which somebody presses 2 for a while, then q."""
    keyboard, terminal = pty.openpty()
    is_over = threading.Event()

    def press() -> None:
        for key in itertools.chain(b"2" * 30, itertools.cycle(b"q")):
            if is_over.wait(0.02):
                return
            os.write(keyboard, bytes([key]))

    monkeypatch.setenv("FORCE_COLOR", "1")
    presser = threading.Thread(target=press)
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        presser.start()
        yield
        is_over.set()
        presser.join()
    os.close(keyboard)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands are given; its name has a blank."""
    found = tmp_path / "my work"
    found.mkdir()
    monkeypatch.chdir(found)
    return found


def test_from_rows_to_a_sealed_adapter_by_hints_alone(give, folder, tiny_base):
    base = (folder / "my base").symlink_to(tiny_base) or folder / "my base"
    table = tiny.write_table(folder / "my rows.jsonl")
    Path("my run.toml").write_text(tiny.RUN_FILE.format(base="elsewhere"))
    changes = f"--model '{base}' --data '{table}' --set federation.num_rounds=1"
    (run,) = give(f"silotune-sim check 'my run.toml' {changes}")
    (export,) = give(f"{run} --output 'my run' --threads 1")
    assert give("silotune-server watch 'my run'") == [export.replace(str(base), str(base.absolute()))]
    give(export)
    assert (Path("my run") / "merged" / "model.safetensors").exists()
    (verify,) = give("silotune-server export 'my run' --to 'my export'")
    give(verify)
    (verify,) = give(
        "silotune-server merge 'my export' 'my export' --how linear --weights 0.5,0.5 --to 'my merge' --name m"
    )
    give(verify)
    (rank,) = give(
        f"silotune-server compare 'my run' --rows '{table}' --max-rows 4 --base '{base}' --out 'my pairs/pairs.jsonl'"
    )
    assert rank.startswith("silotune-server preferences rank 'my pairs/pairs.jsonl' ")


@pytest.mark.usefixtures("typing")
def test_of_preferences(give, folder):
    rows = [{"prompt": f"Why {k}?", "base": f"base {k}", "tuned": f"tuned {k}"} for k in range(3)]
    Path("my answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = "--between base,tuned --tasks 'to rate/my tasks.jsonl' --key 'my key.json'"
    (rank,) = give(f"silotune-server preferences blind 'my answers.jsonl' {made}")
    give(rank)
    answers = shlex.split(rank)[5]
    given = f"'to rate/my tasks.jsonl' '{answers}' --key 'my key.json'"
    assert give(f"silotune-server preferences unblind {given}") == []
    (check,) = give(f"silotune-server preferences unblind {given} --out 'my pairs.jsonl'")
    give(check)


def test_at_a_site(give, folder, tiny_base):
    table = tiny.write_table(folder / "my rows.jsonl")
    Path("my node.toml").write_text(f'[site]\nname = "north"\n[data]\npath = "{table}"\n')
    assert give("silotune-client check 'my node.toml'") == [], "without a base there is nothing to preview with"
    (preview,) = give(f"silotune-client check 'my node.toml' --base '{tiny_base}' --max-length-tokens 64")
    assert "--max-length-tokens 64" in preview
    give(preview)


def test_of_a_run_that_waits_for_approval(give, folder, engine):
    site = vault.make(folder / "my site", engine)
    site.ask(site.offer(site.manifest()).to_frame())
    path = vault.write_node(site)
    (review,) = give(f"silotune-client runs '{path}'")
    approve, deny = give(review)
    give(approve)
    give(deny)


def test_no_command_prints_the_next_one_in_another_way():
    sources = [path for name in ("server", "client", "common", "simulations") for path in (ROOT / name).rglob("*.py")]
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in sources}
    assert [name for name, text in texts.items() if re.search(r"(?<!`)next: silotune-", text)] == []
    assert sum(text.count("cli.next_step(") for text in texts.values()) > 8  # the control
