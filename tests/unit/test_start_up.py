"""How commands start: what loads no model library, what is said before one is loaded, and what a missing one says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.run import config
from common.trust import identity
from server.folder import run_files
from tests import tiny
from tests.samples import events, vault

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "opacus", "trl", "grpc", "ray"]
MAX_CPU_S = 2.0  # until the first line; 0.8 on a slow core, and 5 to 7 with torch before it
CONTRACT = "what answers at once loads no model library"
DRIVER = '''
import contextlib, importlib, io, json, os, sys, time

refused, asked = set(), []

class Refuse:
    """As if the libraries were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            asked.append(name.partition(".")[0])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def play(module, *arguments):
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code or 0
    told = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "asked": sorted(set(asked))}
    return {**told, "cpu_s": time.process_time()}

sys.meta_path.insert(0, Refuse())
job = json.load(sys.stdin)
refused |= set(job.get("refused", []))
for case in job["cases"]:
    if job["is_apart"]:  # each as a process of its own
        sys.stdout.flush()
        if child := os.fork():
            os.waitpid(child, 0)
            continue
    refused |= set(case.get("refused", []))
    print(json.dumps(play(*case["line"])), flush=True)
    if job["is_apart"]:
        os._exit(0)
refused -= {"grpc"}  # which Flower loads
for name in job.get("modules", []):
    importlib.import_module(name)
'''


def play(cases: list[dict], *, is_apart: bool, **job) -> list[dict]:
    """Commands in a fresh interpreter, one after another or each by itself; what each said."""
    given = json.dumps({"cases": cases, "is_apart": is_apart, **job})
    done = subprocess.run([sys.executable, "-c", DRIVER], input=given, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def run_folder(tmp_path):
    """A run that has ended, by its events."""
    folder = tmp_path / "run"
    log = run_files.prepare(tiny.settings("tiny"), folder)
    end = {"kind": "run_finished", "adapter": "adapter", "num_rounds": 1, "stage": "final"}
    for event in (events.PLAN, events.joined("north"), events.evaluated(0, 3.0, north=3.0), end):
        log.append(events.whole(event))
    return folder


@pytest.fixture
def node_file(tmp_path, engine):
    """A site with a policy that was offered one run, and rows."""
    site = vault.make(tmp_path / "site", engine)
    site.ask(site.offer(site.manifest()).to_frame())
    for name, key in (("site.pem", vault.SITE), ("admin.pem", vault.ADMIN)):
        vault.write_key(site.folder / name, key)
    rows = [{"instruction": f"q {number}", "input": "", "output": "a"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "node.toml"
    path.write_text(
        f'[site]\nname = "north"\n[data]\npath = "{tmp_path}/rows.jsonl"\nunit_column = ""\n'
        f'[agent]\nlog_folder = "{site.folder}"\n'
        f'policy = "{site.folder}/policy.toml"\npolicy_signer = "{identity.public_hex(vault.ADMIN)}"\n'
        f'identity_key = "{site.folder}/site.pem"\n'
    )
    config.load_node(path)
    return path


def test_what_only_looks_loads_no_model_library(run_folder, node_file, tmp_path):
    (tmp_path / "run.yaml").write_text("name: a\n")
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"}) + "\n" for n in range(9))
    )
    server, client, sim = "server.cli.app", "client.cli.app", "simulations.cli.app"
    lines = {
        (server, "--help"): 0,
        (server, "--version"): 0,
        (server, "methods"): 0,
        (server, "status", run_folder): 0,
        (server, "watch", run_folder): 0,
        (server, "preferences", "check", tmp_path / "pairs.jsonl"): 0,
        (server, "run", tmp_path / "run.yaml", "--superlink", "127.0.0.1:1", "--ca", "ca.pem"): 2,
        (server, "export", run_folder): 3,  # it has no manifest
        (server, "polish", run_folder): 3,
        (server, "gate", run_folder): 3,
        (client, "--help"): 0,
        (client, "runs", node_file): 0,
        (client, "review", node_file, "tiny"): 0,
        (client, "approve", node_file, "tiny"): 0,
        (client, "audit", "verify", node_file): 0,
        (client, "check", node_file): 0,
        (client, "new-key", tmp_path / "key.pem"): 0,
        (client, "enroll", "--federation", "onco-eu", "--name", "alder", "--out", tmp_path / "keys"): 0,
        (client, "serve", tmp_path / "nowhere.toml"): 2,
        (sim, "--help"): 0,
        (sim, "bench", "list"): 0,
        (sim, "run", tmp_path / "run.yaml"): 2,
        (sim, "demo", "--set", "training.no_such_key=1"): 2,
        (sim, "audit", "canaries", tmp_path / "run.yaml"): 2,
    }
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = next(one["source_modules"] for one in contracts if one["name"] == CONTRACT)
    cases = [{"line": [str(word) for word in line]} for line in lines]
    found = play(cases, is_apart=False, refused=HEAVY, modules=modules)
    codes = {line: one["code"] for line, one in zip(lines, found, strict=True)}
    assert codes == lines, [one["err"] for one in found if one["code"] not in (0, 2, 3)]
    assert {line: one["asked"] for line, one in zip(lines, found, strict=True) if one["asked"]} == {}


def test_tokens_are_counted_without_what_trains(node_file):
    code = (
        "import sys; from client.cli import app\n"
        "try: app.main()\n"
        "except SystemExit as end: print(end.code, sorted({'peft', 'bitsandbytes', 'transformers'} & set(sys.modules)))"
    )
    line = ["check", str(node_file), "--base", str(ROOT / "simulations" / "embedded" / "base"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[0])["tokens"]["num_answer_tokens"] == 80
    assert done.stdout.splitlines()[1] == "0 ['transformers']"


def test_long_commands_say_at_once_that_they_load_something(node_file, tmp_path):
    """Control: these do ask for torch, so the test above can see that."""
    (tmp_path / "run.toml").write_text(tiny.RUN_FILE.format(base="embedded") + 'data.source = "embedded"\n')
    lines = [
        ["simulations.cli.app", "run", str(tmp_path / "run.toml"), "--output", str(tmp_path / "out")],
        ["client.cli.app", "serve", str(node_file)],
        ["client.cli.app", "doctor", str(node_file)],
        ["server.cli.app", "doctor", "--run", str(tmp_path / "run.toml")],
        ["server.cli.app", "serve", str(tmp_path), "--base", str(tmp_path), "--engine", "transformers"],
    ]
    found = play([{"line": line, "refused": ["torch"]} for line in lines], is_apart=True)
    for line, one in zip(lines, found, strict=True):
        assert one["err"].splitlines()[0] == "loading torch and transformers, which takes some seconds ...", line
        assert one["asked"] == ["torch"], line
        assert one["cpu_s"] < MAX_CPU_S, line
    away = ["server.cli.app", "run", str(tmp_path / "run.toml"), "--superlink", "127.0.0.1:1", "--ca", "no.pem"]
    (started,) = play([{"line": [*away, "--output", str(tmp_path / "far")], "refused": ["torch"]}], is_apart=True)
    assert started["out"].splitlines()[0] == f"starting tiny in {tmp_path / 'far'} at the SuperLink 127.0.0.1:1"
    assert (started["asked"], started["code"]) == ([], 2), started["err"]
    demo = ["simulations.cli.app", "demo", "--output", str(tmp_path / "out"), "-q"]
    (quiet,) = play([{"line": demo, "refused": ["torch"]}], is_apart=True)
    assert quiet["err"].startswith("error: silotune-sim demo needs")


def test_a_library_that_is_not_installed_is_told_with_the_command_that_installs_it(run_folder, node_file, tmp_path):
    register = ["register", "k.pub", "--name", "a", "--superlink", "127.0.0.1:1", "--ca", "ca.pem"]
    link = ["link", "--gateway", "a:1", "--ca", "c", "--certificate", "c", "--key", "k", "--state", "s"]
    cases = {
        ("server.cli.app", "status", str(run_folder), "--json"): ("cryptography", "silotune-server status", "server"),
        ("server.cli.app", *register): ("httpx", "silotune-server register", "server"),
        ("client.cli.app", "runs", str(node_file)): ("cryptography", "silotune-client runs", "client"),
        ("client.cli.app", *link): ("h11", "silotune-client link", "client"),
        ("simulations.cli.app", "sweep", "x.toml", "--output", str(tmp_path)): ("scipy", "silotune-sim sweep", "sim"),
    }
    found = play([{"line": line, "refused": [missing]} for line, (missing, *_) in cases.items()], is_apart=True)
    for (missing, command, extra), one in zip(cases.values(), found, strict=True):
        assert one["code"] == 2
        assert one["err"].startswith(f"error: {command} needs {missing}, which is not installed in this environment; ")
        assert f"it comes with the extra '{extra}': {sys.executable} -m pip install " in one["err"]
        assert f"[{extra}]" in one["err"]
        assert "internal error" not in one["err"]
    told = json.loads(found[0]["out"])["error"]
    assert (told["code"], told["exit_code"]) == ("ConfigError", 2)
