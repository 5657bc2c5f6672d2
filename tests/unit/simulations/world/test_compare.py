import json
import re

import pytest
import torch

from common import events
from common.adapter import adapter
from common.errors import DataError
from server.folder import run_files
from server.report import report
from simulations.world import compare, run
from simulations.world.world import World
from tests import tiny
from tests.samples.events import event

ARMS = ["base", "federated", "site-north", "site-south", "site-west", "centralised"]


@pytest.fixture(scope="module")
def compared(shared_engine, tiny_base, tmp_path_factory):
    """A comparison on the tiny base: its results and its folder."""
    changes = {"evaluation.exact_match_rows": "2", "evaluation.max_new_tokens": "2", "training.local_epochs": "3"}
    settings = tiny.settings(tiny_base, changes)
    sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
    folder = tmp_path_factory.mktemp("compared") / "run"
    log = run_files.prepare(settings, folder)
    return compare.compare(World(settings, shared_engine, sites, folder), log), folder


def test_the_arms_are_base_every_site_federated_and_centralised(compared):
    results, _ = compared
    assert sorted(results) == sorted(ARMS)
    assert all(sorted(arm) == ["exact_match", "held_out_loss", "rows_used", "sites"] for arm in results.values())
    assert all(sorted(arm["sites"]) == ["north", "south", "west"] for arm in results.values())


def test_figures_are_numbers_that_make_sense(compared):
    results, _ = compared
    assert all(arm["held_out_loss"] > 0 for arm in results.values())
    assert all(0 <= arm["exact_match"] <= 1 for arm in results.values())
    trained = [results[name]["held_out_loss"] for name in ARMS if name != "base"]
    assert max(trained) < results["base"]["held_out_loss"]
    assert len(set(trained)) == len(trained)


def test_the_comparison_is_a_file_and_an_event(compared):
    results, folder = compared
    assert json.loads((folder / "comparison.json").read_text()) == results
    log = events.read(folder / "events.jsonl")
    assert [event["arm"] for event in log if event["kind"] == "arm_finished"] == ARMS
    assert [event["comparison"] for event in log if event["kind"] == "compared"] == [results]


def test_the_base_is_scored_as_it_is(compared):
    """Its loss is that of the run's own evaluation before the first round."""
    results, folder = compared
    before = next(event for event in events.read(folder / "events.jsonl") if event["kind"] == "evaluated")
    assert results["base"]["held_out_loss"] == pytest.approx(before["loss"], rel=1e-6)


def test_the_federated_arm_is_the_run_of_the_folder(compared):
    results, folder = compared
    last = [event for event in events.read(folder / "events.jsonl") if event["kind"] == "evaluated"][-1]
    assert results["federated"]["held_out_loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_rows_are_counted_as_often_as_they_are_used(compared):
    """12, 9 and 6 rows to train, three times in each of two rounds, in batches of four."""
    results, _ = compared
    used = {name: arm["rows_used"] for name, arm in results.items()}
    assert used["base"] == 0
    assert used["federated"] == used["site-north"] + used["site-south"] + used["site-west"]
    assert used["centralised"] == used["federated"]


def test_pooled_training_uses_the_rows_of_all_sites_where_steps_are_given(shared_engine, tiny_base, tmp_path):
    """With the same number of steps it would use those of one site: no upper line for a federation of three."""
    settings = tiny.settings(tiny_base, {"training.local_epochs": "0.0", "training.local_steps": "2"})
    sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
    log = run_files.prepare(settings, tmp_path / "run")
    results = compare.compare(World(settings, shared_engine, sites, tmp_path / "run"), log)
    one_site = settings.federation.num_rounds * 2 * settings.training.batch_size
    used = {name: arm["rows_used"] for name, arm in results.items()}
    assert used == {"base": 0, "federated": 3 * one_site, "centralised": 3 * one_site} | {
        f"site-{site}": one_site for site in sites
    }


def test_rows_of_a_private_step_are_the_mean_of_its_sample(tiny_base):
    """A unit gives at most so many rows as it may."""
    changes = {"privacy.mode": '"unit"', "privacy.sampling_prob": "0.5", "privacy.noise_multiplier": "1.0"}
    changes |= {"training.local_epochs": "0.0", "training.local_steps": "2", "privacy.max_rows_per_unit": "1"}
    settings = tiny.settings(tiny_base, {**changes, "privacy.dp_delta": "1e-5"})
    data = tiny.site_data("north", 16)
    num_units = len({row.unit for row in data.train})
    assert num_units < len(data.train)
    assert compare.rows_a_step(settings.training, settings.privacy, data) == 0.5 * num_units
    trainings = [event("site_trained", site="north", num_steps=7)] * 2
    assert compare.rows_used(trainings, settings.training, settings.privacy, {"north": data}) == 7 * num_units
    assert compare.alone(settings, num_steps=7).training.local_steps == 7


def test_every_arm_has_a_folder_of_its_own(compared):
    _, folder = compared
    assert sorted(path.name for path in (folder / "arms").iterdir()) == sorted(
        ["judge", "centralised", "site-north", "site-south", "site-west"]
    )


def test_the_report_shows_every_arm(compared):
    _, folder = compared
    _, _, after = report.write(folder).read_text().partition("Is it worth it?")
    table, _, _ = after.partition("</table>")
    assert re.findall(r"<td>([a-z-]+)</td><td>\d", table) == ARMS


def test_a_site_alone_trains_as_it_does_in_the_federation(engine, tiny_base, tmp_path):
    """The same rows in the same order: only the company differs."""
    settings = tiny.settings(tiny_base)
    sites = {"north": tiny.site_data("north", 16)}
    alone = compare.alone(settings)
    log = run_files.prepare(alone, tmp_path / "run")
    outcome = run.in_process(World(alone, engine, sites, tmp_path / "run"), log=log)
    assert outcome.sites == {"north": 12}
    assert not torch.equal(outcome.tensors[engine.tensor_specs[0].name], engine.initial[engine.tensor_specs[0].name])
    assert adapter.specs(outcome.tensors) == engine.tensor_specs


def test_alone_changes_nothing_but_company_and_evaluation(tiny_base):
    settings = tiny.settings(tiny_base, {"federation.sites_per_round": "2", "evaluation.exact_match_rows": "5"})
    found = compare.alone(settings)
    assert found.training == settings.training
    assert found.federation.num_rounds == settings.federation.num_rounds
    assert (found.federation.min_sites, found.federation.num_sites, found.federation.sites_per_round) == (1, 1, 0)
    assert found.evaluation.exact_match_rows == 0


def test_rows_that_cannot_be_used_are_found_before_anything_is_trained(engine, tiny_base, tmp_path):
    settings = tiny.settings(tiny_base, {"data.max_length_tokens": "8"})
    sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
    log = run_files.prepare(settings, tmp_path / "run")
    with pytest.raises(DataError, match="over the limit of 8"):
        compare.compare(World(settings, engine, sites, tmp_path / "run"), log)
    assert not (tmp_path / "run" / "rounds").exists()
