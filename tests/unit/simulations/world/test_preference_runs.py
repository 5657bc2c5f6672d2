"""Federations that learn preferences: what they should prefer they do, and what was turned round they do not."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from client.agent.agent import SiteData
from common import events
from common.privacy import cost
from common.run import config
from server.folder import run_files
from server.report import status
from simulations.world import run
from simulations.world.world import Source, World
from tests import tiny

LEARN = {
    "training.local_epochs": "0.0",
    "training.local_steps": "15",
    "training.batch_size": "8",
    "federation.num_rounds": "2",
}
PRIVATE = {"privacy.mode": '"unit"', "privacy.sampling_prob": "0.5", "privacy.epsilon": "8.0"}
MAKE = {"dpo": tiny.pair, "kto": tiny.rated}


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """Run, and give what each evaluation said; held-out preferences are never swapped."""

    def execute(name: str, changes=None, *, is_swapped: bool = False):
        given = {**LEARN, "training.objective.kind": f'"{name}"', **(changes or {})}
        settings = cost.resolve(tiny.settings(tiny_base, given))
        sites = {site: site_data(name, site, is_swapped=is_swapped) for site in tiny.SITES}
        log = run_files.prepare(settings, tmp_path / "run")
        run.in_process(World(settings, engine, sites, tmp_path / "run"), log=log)
        return [event for event in events.read(log.path) if event["kind"] == "evaluated"]

    return execute


def site_data(name: str, site: str, *, is_swapped: bool) -> SiteData:
    train = [MAKE[name](number, site=site, is_swapped=is_swapped) for number in range(24)]
    return SiteData(train, [MAKE[name](number, site=site) for number in range(24, 36)])


@pytest.mark.parametrize(("name", "loss_of_start"), [("dpo", 0.6931), ("kto", 0.5)])
def test_a_federation_learns_what_its_sites_prefer(play, tmp_path, name, loss_of_start):
    told = play(name)
    card = (tmp_path / "run" / run_files.EXPORT_FOLDER / "README.md").read_text()
    assert f"| objective | {name}, beta = 0.1, held against the base |" in card
    assert "Preferences among answers of the sites" in card
    assert f"| mean {name} loss of a preference |" in card
    assert "agrees with" in status_of(tmp_path / "run")
    assert (told[0]["accuracy"], told[0]["loss"]) == (0.0, pytest.approx(loss_of_start, abs=1e-3))
    assert told[-1]["accuracy"] > 0.8
    assert told[-1]["loss"] < 0.9 * loss_of_start
    assert {figures["num_rows"] for figures in told[-1]["sites"].values()} == {12}
    assert all(figures["accuracy"] > 0.6 for figures in told[-1]["sites"].values())


def status_of(folder: Path) -> str:
    """What `status` says for people."""
    screen = io.StringIO()
    Console(file=screen, width=200).print(status.render(status.read(folder)))
    return screen.getvalue()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_control_where_preferences_are_turned_round_it_learns_the_contrary(play, name):
    told = play(name, is_swapped=True)
    assert told[-1]["accuracy"] < 0.3
    assert told[-1]["loss"] > told[0]["loss"]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_private_run_of_preferences_goes_through(play, name):
    changes = PRIVATE | ({"training.objective.reference_point": '"zero"'} if name == "kto" else {})
    told = play(name, changes)
    assert len(told) == 3
    assert told[-1]["accuracy"] is not None


def test_a_run_of_answers_tells_nothing_of_preferences(engine, tiny_base, tmp_path):
    settings = tiny.settings(tiny_base, {"federation.num_rounds": "1"})
    sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
    log = run_files.prepare(settings, tmp_path / "run")
    run.in_process(World(settings, engine, sites, tmp_path / "run"), log=log)
    assert {event["accuracy"] for event in events.read(log.path) if event["kind"] == "evaluated"} == {None}


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_embedded_records_come_as_preferences_too(name):
    path = Path(__file__).parents[4] / "simulations" / "configs" / "federated-dpo.toml"
    settings = config.load(path, overrides={"training.objective.kind": name})
    sites = Source.of(settings).sites()
    rows = [row for site in sites.values() for row in (*site.train, *site.held_out)]
    assert len(sites) == 4
    if name == "dpo":
        assert all(row.rejected[0] == row.messages[0] and row.rejected != row.messages for row in rows)
    else:
        assert 0.4 < sum(row.is_desirable is True for row in rows) / len(rows) < 0.6
    for site in sites.values():
        assert not {row.unit for row in site.train} & {row.unit for row in site.held_out}
