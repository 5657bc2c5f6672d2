"""The demo as a new user runs it: federated must visibly beat every site alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SITES = ("alder", "birch", "cedar", "dogwood")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The demo's last line."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "simulations.cli.app", "demo", "--output", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_demo_compares_all_arms(demo: dict) -> None:
    assert set(demo["comparison"]) == {"base", "federated", "centralised", *(f"site-{site}" for site in SITES)}
    assert all(set(figures) == {"held_out_loss", "exact_match", "rows_used"} for figures in demo["comparison"].values())
    assert demo["overlap"]["num_held_out"] > 0
    assert demo["overlap"]["num_exact"] == demo["overlap"]["num_near"] == 0


def test_federated_beats_every_site_alone(demo: dict) -> None:
    arms = demo["comparison"]
    alone = [arms[f"site-{site}"] for site in SITES]
    assert arms["federated"]["held_out_loss"] < 0.5 * min(arm["held_out_loss"] for arm in alone)
    assert arms["federated"]["exact_match"] > 0.1 + max(arm["exact_match"] for arm in alone)
    assert arms["centralised"]["held_out_loss"] <= arms["federated"]["held_out_loss"] < arms["base"]["held_out_loss"]


def test_the_demo_leaves_events_report_and_adapter(demo: dict) -> None:
    folder = Path(demo["folder"])
    kinds = [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert kinds.count("round_finished") == 6
    assert {"run_started", "overlap", "site_joined", "evaluated", "run_finished", "compared"} <= set(kinds)
    assert "Is it worth it?" in Path(demo["report"]).read_text()
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
