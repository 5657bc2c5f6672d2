"""One run file, one seed, three engines: the same adapter, byte for byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import events
from server import run as server_run
from simulations import engines, run, world
from tests import stage_data, tiny

ROOT = Path(__file__).parents[2]
SITES = ["alder", "birch"]


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict[str, str]:
    """Two sites, one round of two QLoRA steps."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    table = [
        {"site": site, "patient_id": f"{site}-{number // 2}", "instruction": "Code it.", "output": f"{number * 7 % 5}"}
        for site in SITES
        for number in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    choices = tmp_path_factory.mktemp("tasks") / "choices.jsonl"  # its hash must get to every site
    choices.write_text('{"question": "north sees ache?", "choices": ["ACHE", "KNEE"], "answer": 0}\n')
    task = f'{{name = "know", kind = "choice", data = "{choices}"}}'
    return {
        "evaluation.tasks": f"[{task}]",
        "data.source": f'"{path}"',
        "model.quantization": '"nf4"',
        "training.local_epochs": "0.0",
        "training.local_steps": "2",
        "federation.num_rounds": "1",
        "federation.num_sites": "2",
    }


@pytest.fixture
def expected(tiny_base, changes, tmp_path) -> str:
    return in_process(tiny_base, changes, tmp_path / "in-process")


def in_process(base: Path, changes: dict[str, str], folder: Path) -> str:
    settings = tiny.settings(base, changes)
    engine, log = world.load_engine(settings, num_threads=1), server_run.prepare(settings, folder)
    run.in_process(settings, sites=world.load_sites(settings), engine=engine, folder=folder, log=log)
    return digest(folder)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_control_the_adapter_depends_on_the_seed(tiny_base, changes, expected, tmp_path):
    assert in_process(tiny_base, changes, tmp_path / "again") == expected
    assert in_process(tiny_base, {**changes, "seed": "6"}, tmp_path / "other") != expected


def test_ray_gives_the_same_adapter(tiny_base, changes, expected, tmp_path):
    script = Path(__file__).parent / "apps" / "ray_run.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    command = [sys.executable, script, tiny_base, tmp_path / "ray", json.dumps(changes)]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == SITES
    assert digest(tmp_path / "ray") == expected


def test_deployment_gives_the_same_adapter(tiny_base, changes, expected, tmp_path):
    settings, heard = tiny.settings(tiny_base, changes), []
    engine, log = world.load_engine(settings, num_threads=1), server_run.prepare(settings, tmp_path / "far")
    log.listeners.append(lambda event: heard.append(event["kind"]))
    outcome = engines.deployed(settings, engine=engine, base_folder=tiny_base, log=log, num_threads=1)
    assert list(outcome.sites) == SITES
    assert digest(tmp_path / "far") == expected
    assert (heard[0], heard[-1]) == ("run_started", "run_finished")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ffa", "fedex"])
def test_deployment_gives_the_same_adapter_by_other_methods(tiny_base, changes, tmp_path, method):
    """`ffa`: each process makes A from the seed. `fedex`: each site loads a side adapter, and is sent what is in it."""
    side = {"aggregation.residual_rank": "16"} if method == "fedex" else {}
    changes = {**changes, "federation.num_rounds": "2", "aggregation.method": method, **side}
    expected = in_process(tiny_base, changes, tmp_path / "in-process")
    settings = tiny.settings(tiny_base, changes)
    engine, log = world.load_engine(settings, num_threads=1), server_run.prepare(settings, tmp_path / "far")
    engines.deployed(settings, engine=engine, base_folder=tiny_base, log=log, num_threads=1)
    assert digest(tmp_path / "far") == expected


@pytest.mark.slow
def test_sites_of_a_deployment_score_the_polished_adapter(tiny_base, changes, tmp_path):
    data = stage_data.write(tmp_path / "own.jsonl", stage_data.instructions(10))
    stage = f'{{name = "teach", kind = "sft", data = "{data}", steps = 2, batch_size = 4, max_length_tokens = 64}}'
    changes = {**changes, "polish": f"[{stage}]", "evaluation.num_polish_stages": "1", "gate.rules": "sites"}
    changes |= {"gate.max_site_rise": "5.0"}
    expected = in_process(tiny_base, changes, tmp_path / "in-process")
    settings = tiny.settings(tiny_base, changes)
    engine, log = world.load_engine(settings, num_threads=1), server_run.prepare(settings, tmp_path / "far")
    engines.deployed(settings, engine=engine, base_folder=tiny_base, log=log, num_threads=1)
    found = {name: said_after_polish(tmp_path / name) for name in ("in-process", "far")}
    assert found["far"] == found["in-process"]
    assert [digest(tmp_path / name) for name in found] == [expected] * 2


def said_after_polish(folder: Path) -> tuple:
    """What the sites told, and what the gate made of it."""
    log = events.read(folder / "events.jsonl")
    (asked,) = [event for event in log if event["kind"] == "polish_evaluated"]
    (gated,) = [event for event in log if event["kind"] == "gated"]
    assert (asked["stale"], gated["stage"], gated["is_passed"]) == ([], "polish-01-teach", True)
    return asked["adapter_sha256"], asked["sites"]
