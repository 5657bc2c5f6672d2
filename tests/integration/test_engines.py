"""One run file, one seed, three engines: the same adapter, byte for byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import events
from common.errors import RemoteError
from common.privacy import cost as privacy_cost
from server.folder import run_files
from simulations.engines import engines
from simulations.world import run, world
from simulations.world.world import Source, World
from tests import tiny
from tests.samples import stage_data

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
        "data.same_text": '"count"',  # five answers to one question
        "model.quantization": '"nf4"',
        "training.local_epochs": "0.0",
        "training.local_steps": "2",
        "federation.num_rounds": "1",
        "federation.num_sites": "2",
    }


@pytest.fixture(scope="module")
def expected(tiny_base, changes, tmp_path_factory) -> str:
    return in_process(tiny_base, changes, tmp_path_factory.mktemp("expected") / "in-process")


def in_process(base: Path, changes: dict[str, str], folder: Path) -> str:
    settings = tiny.settings(base, changes)
    engine, log = world.load_engine(settings, num_threads=1), run_files.prepare(settings, folder)
    shared = World(settings, engine, Source.of(settings).sites(), folder)
    run.in_process(shared, log=log, is_noise_accepted=True)
    return digest(folder)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_control_the_adapter_depends_on_the_seed(tiny_base, changes, expected, tmp_path):
    assert in_process(tiny_base, changes, tmp_path / "again") == expected
    assert in_process(tiny_base, {**changes, "seed": "6"}, tmp_path / "other") != expected


def under_ray(base: Path, changes: dict[str, str], folder: Path) -> str:
    assert in_its_own_process("ray_run.py", base, folder, json.dumps(changes)).split() == SITES
    return digest(folder)


def in_its_own_process(script: str, *arguments: object) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    command = [sys.executable, Path(__file__).parent / "apps" / script, *map(str, arguments)]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    assert told.returncode == 0, told.stderr
    return told.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "num_gpus", "expected"), [(2, 0, {None}), (2, 2, {"0", "1"}), (3, 1, {"0"})])
def test_workers_of_ray_share_the_gpus_of_the_machine(num_workers, num_gpus, expected):
    """Ray takes the number for true, so that this needs no GPU; the first case is the control."""
    seen = json.loads(in_its_own_process("ray_gpus.py", num_workers, num_gpus))
    assert sorted(seen) == ["0", "1", "2", "3"]
    assert set(seen.values()) <= expected  # one worker may be so quick that it answers for all


def test_ray_gives_the_same_adapter(tiny_base, changes, expected, tmp_path):
    assert under_ray(tiny_base, changes, tmp_path / "ray") == expected


def test_deployment_gives_the_same_adapter(tiny_base, changes, expected, tmp_path):
    settings, heard = tiny.settings(tiny_base, changes), []
    log = run_files.prepare(settings, tmp_path / "far")
    log.listeners.append(lambda event: heard.append(event["kind"]))
    outcome = engines.deployed(settings, base_folder=tiny_base, log=log, num_threads=1)
    assert list(outcome.sites) == SITES
    assert digest(tmp_path / "far") == expected
    assert (heard[0], heard[-1]) == ("run_started", "run_finished")


def deployed(base: Path, changes: dict[str, str], folder: Path) -> str:
    settings = tiny.settings(base, changes)
    log = run_files.prepare(settings, folder)
    engines.deployed(settings, base_folder=base, log=log, num_threads=1)
    return digest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ffa", "fedex"])
def test_deployment_gives_the_same_adapter_by_other_methods(tiny_base, changes, tmp_path, method):
    """`ffa`: each process makes A from the seed. `fedex`: each site loads a side adapter, and is sent what is in it."""
    side = {"aggregation.residual_rank": "16"} if method == "fedex" else {}
    changes = {**changes, "federation.num_rounds": "2", "aggregation.method": method, **side}
    expected = in_process(tiny_base, changes, tmp_path / "in-process")
    assert deployed(tiny_base, changes, tmp_path / "far") == expected


@pytest.mark.slow
@pytest.mark.parametrize("play", [deployed, under_ray])
def test_sites_of_other_engines_score_the_polished_adapter(tiny_base, changes, tmp_path, play):
    data = stage_data.write(tmp_path / "own.jsonl", stage_data.instructions(10))
    stage = f'{{name = "teach", kind = "sft", data = "{data}", steps = 2, batch_size = 4, max_length_tokens = 64}}'
    changes = {**changes, "polish": f"[{stage}]", "evaluation.num_polish_stages": "1"}
    changes["gate.rules"] = "[{kind = 'sites', max_rise = 5.0}]"
    expected = in_process(tiny_base, changes, tmp_path / "in-process")
    assert play(tiny_base, changes, tmp_path / "far") == expected
    assert said_after_polish(tmp_path / "far") == said_after_polish(tmp_path / "in-process")


def said_after_polish(folder: Path) -> tuple:
    """What the sites told, and what the gate made of it."""
    log = events.read(folder / "events.jsonl")
    (asked,) = [event for event in log if event["kind"] == "polish_evaluated"]
    (gated,) = [event for event in log if event["kind"] == "gated"]
    assert (asked["stale"], gated["stage"], gated["is_passed"]) == ([], "polish-01-teach", True)
    return asked["adapter_sha256"], asked["sites"]


UNIT = {
    "privacy.mode": '"unit"',
    "privacy.sampling_prob": "0.5",
    "privacy.noise_multiplier": "1.0",
    "privacy.dp_delta": "1e-5",
    "federation.num_rounds": "2",
}
AT_SERVER = {
    **UNIT,
    "privacy.mode": '"site"',
    "privacy.noise_at": '"server"',
    "privacy.clip_norm": "0.1",
    "aggregation.weighting": '"uniform"',
}
AT_SITES = {**AT_SERVER, "privacy.noise_at": '"sites"', "privacy.sampling_prob": "1.0"}
PRIVATE = pytest.mark.parametrize("private", [UNIT, AT_SERVER, AT_SITES], ids=["unit", "server", "sites"])


@pytest.mark.slow
@PRIVATE
def test_private_runs_under_ray_draw_and_charge_as_in_process(tiny_base, changes, tmp_path, private):
    given = {**changes, **private}
    expected = in_process(tiny_base, given, tmp_path / "in-process")
    assert under_ray(tiny_base, given, tmp_path / "ray") == expected
    assert charged(tmp_path / "ray") == charged(tmp_path / "in-process")


@pytest.mark.slow
@PRIVATE
def test_private_runs_of_real_processes_charge_as_planned_and_have_noise_that_no_seed_gives(
    tiny_base, changes, tmp_path, private
):
    given = {**changes, **private}
    expected = in_process(tiny_base, given, tmp_path / "in-process")
    settings = tiny.settings(tiny_base, given)
    log = run_files.prepare(settings, tmp_path / "far")
    engines.deployed(settings, base_folder=tiny_base, log=log, num_threads=1, is_noise_accepted=True)
    assert digest(tmp_path / "far") != expected  # without noise they agree: see above
    plan, spent = charged(tmp_path / "far")
    assert plan == charged(tmp_path / "in-process")[0] == pytest.approx(privacy_cost.curve(settings), abs=1e-4)
    if settings.privacy.mode == "site":
        assert len(spent) == 2
        assert all(cost <= planned + 1e-4 for cost, planned in zip(spent, plan, strict=True))


@pytest.mark.slow
def test_real_processes_refuse_noise_that_drowns_few_sites_unless_told(tiny_base, changes, tmp_path):
    settings = tiny.settings(tiny_base, {**changes, **AT_SERVER})
    log = run_files.prepare(settings, tmp_path / "far")
    with pytest.raises(RemoteError, match="noise to signal"):
        engines.deployed(settings, base_folder=tiny_base, log=log, num_threads=1)


def charged(folder: Path) -> tuple[list[float], list[float]]:
    """Epsilon by round: planned, and of what was done (for whole sites only: units have their site's ledger)."""
    log = events.read(folder / events.FILE)
    (plan,) = [event["epsilon_planned"] for event in log if event["kind"] == "run_started"]
    return plan, [event["epsilon"] for event in log if event["kind"] == "round_finished" and "epsilon" in event]
