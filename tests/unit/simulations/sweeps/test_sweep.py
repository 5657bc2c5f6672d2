"""Sweeps: what is combined, what is refused with its reason, and that finished runs are not run again."""

from pathlib import Path

import pytest

from common.errors import ConfigError, SilotuneError
from common.run import config
from simulations.sweeps import sweep
from tests import tiny

FOLDER = Path(sweep.__file__).parent
SWEEP = """
version = 1
run = "run.toml"
seeds = [1, 2]
[set]
"federation.num_rounds" = 1
"training.local_epochs" = 0.5
[axis.method]
ffa = { "aggregation.method" = "ffa" }
"fedsvd adam" = { "aggregation.method" = "fedsvd", "aggregation.server_optimizer.kind" = "fedadam" }
"""


@pytest.fixture
def sweep_file(tiny_base, tmp_path) -> Path:
    rows = tiny.write_table(tmp_path / "rows.jsonl")
    text = f'data.source = "{rows}"\ndata.unit_column = "patient_id"\n'
    (tmp_path / "run.toml").write_text(tiny.RUN_FILE.format(base=tiny_base) + text)
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


def test_a_sweep_runs_every_seed_once_and_says_what_is_refused(sweep_file, tmp_path):
    out = tmp_path / "out"
    result = sweep.play(sweep_file, output=out, jobs=2)
    (cell,) = result["cells"]
    assert cell["points"] == ["ffa"]
    assert {path.name for path in (out / "ffa").iterdir()} == {"seed-1", "seed-2"}
    figures = cell["figures"]
    assert 0 < figures["held-out loss"]["mean"] < figures["worst site"]["mean"] < 10
    assert figures["held-out loss"]["half_width"] > 0  # seeds differ
    (refused,) = result["refused"]
    assert refused["points"] == ["fedsvd adam"]
    assert "aggregation.server_optimizer.kind" in refused["reason"]
    assert result["privacy"] is None  # no run is private
    shown = list(sweep.render(result))
    assert "fedsvd adam" in shown[1]
    (out / "ffa" / "seed-1" / "run.json").unlink()  # would be in the way of a run that goes on
    assert sweep.play(sweep_file, output=out, jobs=1) == result


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log(sweep_file, tmp_path):
    sweep_file.write_text(SWEEP.replace("[1, 2]", "[1]").replace("[set]", '[set]\n"model.base" = "/nowhere"'))
    with pytest.raises(SilotuneError, match=r"1 of 1 runs failed; .*ffa/seed-1/output.log says why"):
        sweep.play(sweep_file, output=tmp_path / "out", jobs=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (SWEEP.replace("seeds", "seed"), "seeds: Field required"),
        (SWEEP.replace("version = 1", "version = true"), "version"),
        ("version = ", "not TOML"),
        (SWEEP.replace("fedadam", "fedsecret").replace('"ffa"', '"secret"'), "no combination is allowed"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(sweep_file, tmp_path, text, told):
    sweep_file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        sweep.play(sweep_file, output=tmp_path / "out", jobs=1)


PRIVATE = {
    "privacy.mode": '"unit"',
    "privacy.sampling_prob": "0.25",
    "privacy.noise_multiplier": "2.0",
    "privacy.dp_delta": "1e-5",
    "training.local_epochs": "0.0",
    "training.local_steps": "5",
    "federation.num_rounds": "5",
}


def test_a_search_costs_what_all_its_runs_cost_together():
    """A known answer of dp-accounting for 50 such steps: 4.4403."""
    one = tiny.settings("tiny", PRIVATE)
    found = sweep.search_cost([one], num_seeds=2)
    assert (found["num_runs"], found["epsilon"]) == (2, pytest.approx(4.4403, abs=1e-3))
    assert sweep.search_cost([one, one], num_seeds=1)["epsilon"] == found["epsilon"]
    assert "these 2 runs together cost a unit epsilon 4.44 at delta 1e-05" in sweep.cost_in_words(found)
    assert sweep.search_cost([one], num_seeds=1)["epsilon"] < 4.0
    open_one = tiny.settings("tiny")
    assert sweep.search_cost([open_one], num_seeds=2) is None
    mixed = sweep.cost_in_words(sweep.search_cost([one, open_one], num_seeds=1))
    assert "promise nothing: they are not all private in the same way (none, unit)" in mixed
    loud = tiny.settings("tiny", {**PRIVATE, "privacy.noise_multiplier": "0.1"})
    assert "promise nothing: epsilon is above 1000" in sweep.cost_in_words(sweep.search_cost([loud], num_seeds=20))


SWEEPS = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_combination_of_the_shipped_sweeps_is_allowed(path):
    found = sweep.load(path)
    refused, allowed = sweep.allowed_cells(path.parent / found.run, sweep.cells(found))
    assert refused == []
    assert len({cell.name for cell, _ in allowed}) == len(allowed)


def test_a_setting_may_be_an_array_or_a_table(sweep_file, tmp_path):
    text = SWEEP.replace("[axis.method]", '"adapter.targets" = ["q_proj", "v_proj"]\n[axis.method]')
    ranks = '{ "aggregation.method" = "flexlora", "adapter.site_ranks" = { north = 2, south = 1 } }'
    (tmp_path / "ranks.toml").write_text(f"{text}mixed = {ranks}\n")
    cell = next(cell for cell in sweep.cells(sweep.load(tmp_path / "ranks.toml")) if cell.name == "mixed")
    run = config.load(tmp_path / "run.toml", overrides=cell.overrides)
    assert run.adapter.targets == ("q_proj", "v_proj")
    assert run.adapter.site_ranks == {"north": 2, "south": 1}


def test_the_interval_is_students():
    # 2.0, 4.0, 9.0: mean 5, standard deviation 3.6056; t(0.975, 2) = 4.3027 in printed tables
    found = sweep.interval([2.0, 4.0, 9.0])
    assert found.mean == pytest.approx(5.0)
    assert found.half_width == pytest.approx(4.3027 * 3.6056 / 3**0.5, rel=1e-4)
    assert sweep.interval([2.0]).half_width is None
