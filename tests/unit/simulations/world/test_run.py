import dataclasses

import pytest
import torch

from client.agent.agent import SiteData
from common import events
from common.data.rows import Message, Row
from common.errors import DataError, TooFewSitesError
from server.folder import run_files
from simulations.world import run, world
from simulations.world.world import World
from tests import tiny


@pytest.fixture
def sites():
    return {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    def execute(sites, changes=None, *, name: str = "run", resume: bool = False):
        settings = tiny.settings(tiny_base, changes)
        folder = tmp_path / name
        log = run_files.prepare(settings, folder, resume=resume)
        return run.in_process(World(settings, engine, sites, folder), log=log, resume=resume)

    return execute


def test_three_sites_learn_together_and_their_rows_stay_as_they_are(play, sites, tmp_path):
    before = {site: dataclasses.replace(data, train=list(data.train)) for site, data in sites.items()}
    outcome = play(sites, {"training.local_epochs": "4"})
    losses = [e["loss"] for e in events.read(tmp_path / "run" / "events.jsonl") if e["kind"] == "evaluated"]
    assert losses[-1] < losses[0]
    assert outcome.sites == {"north": 12, "south": 9, "west": 6}
    assert sites == before


def test_the_order_in_which_sites_are_given_does_not_matter(play, sites):
    first = play(sites, name="first").tensors
    second = play(dict(reversed(sites.items())), name="second").tensors
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_virtual_site_could_not_do_is_told_in_full_if_it_ends_the_run(play, sites):
    long = Row((Message("user", "x " * 99), Message("assistant", "y")), unit="u", row_id="rows.jsonl line 7")
    broken = {**sites, "west": SiteData([long], sites["west"].held_out)}
    with pytest.raises(DataError, match=r"rows\.jsonl line 7: \d+ tokens") as caught:
        play(broken)
    assert isinstance(caught.value.__cause__, TooFewSitesError)


def test_a_failure_that_does_not_end_the_run_is_in_the_sites_log(play, sites, tmp_path):
    long = Row((Message("user", "x " * 99), Message("assistant", "y")), unit="u", row_id="rows.jsonl line 7")
    broken = {**sites, "west": SiteData([long], sites["west"].held_out)}
    outcome = play(broken, {"federation.num_sites": "0"})
    assert sorted(outcome.sites) == ["north", "south"]
    assert "rows.jsonl line 7" in (tmp_path / "run" / "sites" / "west.jsonl").read_text()
    refused = [event for event in events.read(tmp_path / "run" / "events.jsonl") if event["kind"] == "site_refused"]
    assert all("failed (DataError): site west: rows.jsonl line 7: 219 tokens" in one["reason"] for one in refused)


def test_too_few_sites_end_a_run_at_once_with_the_reason_of_one(play, sites):
    long = Row((Message("user", "x " * 99), Message("assistant", "y")), unit="u", row_id="rows.jsonl line 7")
    broken = {site: SiteData([long], data.held_out) for site, data in sites.items()} | {"north": sites["north"]}
    with pytest.raises(DataError, match=r"site west: rows\.jsonl line 7: 219 tokens"):
        play(broken, {"federation.num_sites": "0", "federation.join_timeout_s": "86400"})


def test_too_few_sites_stays_what_it_is_where_no_site_failed(play, sites):
    with pytest.raises(TooFewSitesError):
        play({"north": sites["north"]}, {"federation.num_sites": "0", "federation.join_timeout_s": "0.3"})


def test_nodes_are_numbered_in_the_order_of_names(engine, sites, tmp_path):
    agents = {site: world.make_agent(site, data, engine, world.Failures(tmp_path)) for site, data in sites.items()}
    assert run.fleet_of(dict(reversed(agents.items())), world.Failures(tmp_path)).node_ids() == [1, 2, 3]


def test_under_fedsa_every_site_ends_with_an_adapter_of_its_own_and_the_coordinator_with_none(play, sites, tmp_path):
    from safetensors.torch import load_file

    from common.errors import ConfigError
    from server.run import finish

    changes = {"aggregation.method": "fedsa", "training.local_epochs": "2"}
    outcome = play(sites, changes)
    files = {site: outcome.folder / "sites" / site / "adapter" / "adapter_model.safetensors" for site in sites}
    taken = {site: load_file(path) for site, path in files.items()}
    for name, tensor in outcome.tensors.items():
        is_own = ".lora_B." in name
        assert is_own == (not tensor.any())
        assert all(torch.equal(taken[site][name], tensor) != is_own for site in sites)
    assert not (outcome.folder / "adapter").exists()
    log = events.read(outcome.folder / "events.jsonl")
    assert log[-1]["adapter"] == ""
    with pytest.raises(ConfigError, match="export-adapter"):
        finish.stored(outcome.folder, num_rounds=0)
    last = [event for event in log if event["kind"] == "evaluated"][-1]
    first = next(event for event in log if event["kind"] == "evaluated")
    assert all(last["sites"][site]["loss"] < first["sites"][site]["loss"] for site in sites)


def test_a_study_that_scores_a_global_adapter_is_refused_where_there_is_none(tiny_base):
    from common.errors import ConfigError

    settings = tiny.settings(tiny_base, {"aggregation.method": "fedsa"})
    with pytest.raises(ConfigError, match="each site has its own; the nearest method with one is 'fedavg'"):
        world.require_global(settings.aggregation.method, what="a comparison")
    world.require_global(tiny.settings(tiny_base).aggregation.method, what="a comparison")  # the control
