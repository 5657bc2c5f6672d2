"""Canaries and membership on the tiny base: an overfitted run is caught, a private or untrained one is not."""

import math

import pytest
import torch

from common.errors import ConfigError, DataError
from common.privacy import cost, roc
from common.privacy.noise import SeededNoise
from server.folder import run_files
from simulations.audit import canaries, finding, inversion, mia
from simulations.world.world import World
from tests import tiny

OVERFIT = {"training.local_epochs": "20", "federation.num_rounds": "1", "training.learning_rate": "2e-2"}
PRIVATE = {
    "privacy.mode": "unit",
    "privacy.sampling_prob": "0.25",
    "privacy.noise_multiplier": "2.0",
    "privacy.dp_delta": "1e-5",
    "training.local_epochs": "0",
    "training.local_steps": "5",
    "training.learning_rate": "2e-2",
}
ONE_SITE = {"federation.num_sites": "1", "federation.min_sites": "1", "evaluation.every_rounds": "2"}


@pytest.fixture
def make_world(engine, tiny_base, tmp_path):
    def make(changes, *, count: int = 40) -> tuple[World, object]:
        settings = cost.resolve(tiny.settings(tiny_base, {**ONE_SITE, **changes}))
        shared = World(settings, engine, {"north": tiny.site_data("north", count)}, tmp_path / "run")
        return shared, run_files.prepare(settings, shared.folder)

    return make


def test_canaries_of_an_overfitted_run_are_told_apart(make_world):
    shared, log = make_world(OVERFIT)
    found = canaries.audit(shared, log, num_canaries=20, max_share=2.0)
    assert found.claimed_epsilon == math.inf
    assert found.figures["auc"] > 0.9
    assert found.figures["exposure_bits"] > 0.7 * found.figures["exposure_bits_at_most"]
    assert 0.5 < found.audited_epsilon <= found.ceiling == pytest.approx(1.8, abs=0.05)
    assert not found.is_refuted  # nothing was claimed


def test_the_same_canaries_refute_a_claim_that_is_not_kept(make_world):
    shared, log = make_world(OVERFIT)
    assert canaries.audit(shared, log, num_canaries=20, max_share=2.0, claimed_epsilon=0.4).is_refuted


def test_canaries_of_a_private_run_stay_within_the_claim(make_world):
    shared, log = make_world(PRIVATE)
    found = canaries.audit(shared, log, num_canaries=20, max_share=2.0)
    assert found.claimed_epsilon == pytest.approx(1.9, abs=0.5)
    assert found.audited_epsilon < 0.5
    assert found.figures["auc"] < 0.85


def test_members_of_an_overfitted_run_are_told_apart(make_world):
    found = mia.audit(*make_world(OVERFIT))
    assert found.figures["auc_low"] > 0.6
    assert found.num_canaries == 20


def test_members_of_a_private_run_are_not_told_apart(make_world):
    """Twenty units are few: about one seed in twenty passes the bound by chance, as 5 does of 5 to 11."""
    found = mia.audit(*make_world({**PRIVATE, "seed": "6"}))
    assert found.figures["auc_low"] < 0.6
    assert found.audited_epsilon <= found.claimed_epsilon


def test_canaries_must_be_few_unless_told_otherwise(make_world):
    shared, log = make_world(OVERFIT)
    with pytest.raises(ConfigError, match=r"1% of 15 units, of which 0"):
        canaries.audit(shared, log, num_canaries=20)


def test_canaries_are_units_of_their_own_and_train_only(make_world):
    shared, _ = make_world(OVERFIT)
    rows = canaries.make(shared.engine, 40, seed=3)
    sites = canaries.insert({"a": tiny.site_data("a", 8), "b": tiny.site_data("b", 8)}, rows, seed=3)
    assert len({row.unit for row in rows}) == len({row.messages[1].content for row in rows}) == 40
    assert sum(len(data.train) for data in sites.values()) == 2 * 6 + 40
    assert all(len(data.train) > 6 and len(data.held_out) == 2 for data in sites.values())
    assert canaries.make(shared.engine, 40, seed=3) == rows != canaries.make(shared.engine, 40, seed=4)


def test_units_are_dealt_whole_and_by_coins():
    sites = {name: tiny.site_data(name, 200) for name in ("a", "b")}
    units, is_in, dealt = mia.deal(sites, seed=1)
    assert (len(units), len(is_in)) == (200, 200)
    assert 70 < int(is_in.sum()) < 130
    for data in dealt.values():
        assert not {row.unit for row in data.train} & {row.unit for row in data.held_out}
    with pytest.raises(DataError, match="too few"):
        mia.deal({"a": tiny.site_data("a", 2)}, seed=1)


def test_rates_of_scores_that_say_all_and_of_scores_that_say_nothing():
    is_in = torch.arange(400) < 200
    perfect = roc.rates(is_in.double(), is_in)
    assert (perfect.auc, perfect.tpr, perfect.auc_interval) == (1.0, 1.0, (1.0, 1.0))
    scores = torch.randn(400, generator=torch.Generator().manual_seed(1))
    chance = roc.rates(scores, is_in)
    assert chance.auc_interval[0] < 0.5 < chance.auc_interval[1]
    assert chance.tpr < 0.05
    assert roc.exposure(scores, is_in) < 3


def test_a_finding_shows_claim_bound_ceiling_and_threat_together():
    found = finding.Finding("mia", math.inf, 0.7, 2.8, 50, 1e-5, {"auc": 0.9})
    told = found.as_dict()
    assert (told["claimed_epsilon"], told["audited_epsilon"], told["ceiling"]) == ("infinite", 0.7, 2.8)
    assert (told["num_canaries"], told["threat_model"]) == (50, finding.THREATS["mia"])
    assert not found.is_refuted
    assert finding.Finding("mia", 0.6, 0.7, 2.8, 50, 1e-5, {}).is_refuted
    assert finding.Finding("mia", math.nan, 0.7, 2.8, 50, 1e-5, {}).is_refuted


ONE_STEP = {
    "adapter.r": "32",
    "training.local_epochs": "0",
    "training.local_steps": "1",
    "training.optimizer.kind": "sgd",
    "federation.num_rounds": "1",
}
NOISED = {"privacy.mode": "unit", "privacy.sampling_prob": "1.0", "privacy.noise_multiplier": "1.0"}


@pytest.fixture
def invert(load_tiny, tiny_base, tmp_path):
    def run(changes) -> finding.Finding:
        settings = tiny.settings(tiny_base, {**ONE_STEP, **changes})
        rows = tiny.rows(6)
        sources = [SeededNoise(number) for number in range(6)]
        shared = World(settings, load_tiny({**ONE_STEP, **changes}), {}, tmp_path)
        return inversion.audit(shared, rows, sources=sources)

    return run


def test_an_unprotected_update_gives_its_words_away_and_a_private_one_does_not(invert):
    open_one, private_one = invert({}), invert(NOISED)
    assert open_one.figures["recall"] > 0.8
    assert private_one.figures["recall"] < private_one.figures["recall_of_a_guess"] + 0.15
    assert (open_one.audited_epsilon, open_one.claimed_epsilon) == (None, math.inf)
    assert 0 < private_one.claimed_epsilon < math.inf


def test_a_rank_below_the_number_of_words_hides_some_of_them(invert):
    """The control of the span: it cannot hold more directions than the rank."""
    assert invert({"adapter.r": "4"}).figures["recall"] < 0.6


def test_an_adapter_that_leaves_layer_0_alone_cannot_be_attacked(invert):
    with pytest.raises(ConfigError, match="query or value"):
        invert({"adapter.targets": '["down_proj"]'})
