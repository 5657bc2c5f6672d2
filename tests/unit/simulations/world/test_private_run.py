"""A private run from file to report: its noise from its epsilon, its curve, and what its sites do not tell."""

import pytest
import torch

from common import accounting, events
from common.errors import FloorRefused
from common.privacy import cost
from common.run import trainable
from common.run.catalogue.methods import FACTS
from server.folder import run_files
from server.report import report
from simulations.world import run
from simulations.world.world import World
from tests import tiny

PRIVATE = {
    "privacy.mode": '"unit"',
    "privacy.sampling_prob": "0.5",
    "privacy.epsilon": "8.0",
    "training.local_steps": "3",
    "training.local_epochs": "0.0",
}


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    def execute(changes, *, name: str = "run", resume: bool = False):
        settings = cost.resolve(tiny.settings(tiny_base, {**PRIVATE, **changes}))
        sites = {site: tiny.site_data(site, count) for site, count in tiny.SITES.items()}
        log = run_files.prepare(settings, tmp_path / name, resume=resume)
        outcome = run.in_process(World(settings, engine, sites, tmp_path / name), log=log, resume=resume)
        return settings, outcome, events.read(log.path)

    return execute


def test_a_private_run_tells_its_curve_and_no_figure_of_drawn_rows(play):
    settings, outcome, log = play({})
    assert settings.aggregation.method == "fedsvd"
    started = next(event for event in log if event["kind"] == "run_started")
    assert len(started["epsilon_planned"]) == 2
    assert started["epsilon_planned"][0] > started["epsilon_planned"][1] / 2  # steep at first
    assert 7.9 < started["epsilon_planned"][1] <= 8.0
    trained = [event for event in log if event["kind"] == "site_trained"]
    assert {(event["train_loss"], event["seconds"]) for event in trained} == {(None, None)}
    page = report.write(outcome.folder).read_text()
    assert "Differentially private: epsilon" in page
    card = (outcome.folder / run_files.EXPORT_FOLDER / "README.md").read_text()
    assert "Trained with differential privacy: epsilon" in card
    assert "A patient of two sites loses the sum" in card


METHODS = [
    pytest.param(name, marks=pytest.mark.slow if facts.is_experimental else ())
    for name, facts in FACTS.items()
    if facts.base_delta == "none"
]


@pytest.fixture
def engine(request, engine, load_tiny):
    """The tiny base, with cores where the test's method trains them."""
    method = request.node.callspec.params.get("method", "") if hasattr(request.node, "callspec") else ""
    return load_tiny({"aggregation.method": method}) if method and FACTS[method].has_cores else engine


@pytest.mark.parametrize("method", METHODS)
def test_every_method_without_a_side_adapter_has_private_runs(play, engine, method):
    _, outcome, log = play({"aggregation.method": f'"{method}"'})
    assert all(bool(tensor.isfinite().all()) for tensor in outcome.tensors.values())
    assert not [event for event in log if event["kind"] == "site_failed"]
    sent = trainable.leaving_specs(method, engine.tensor_specs)
    assert all(not torch.equal(outcome.tensors[spec.name], engine.initial[spec.name]) for spec in sent)


def test_sites_of_different_ranks_have_private_runs(play):
    _, outcome, log = play(
        {"aggregation.method": '"flexlora"', "adapter.site_ranks.west": "1", "adapter.site_ranks.south": "2"}
    )
    assert sorted(outcome.sites) == ["north", "south", "west"]
    assert not [event for event in log if event["kind"] == "site_failed"]


def test_a_study_with_a_seed_can_be_repeated_and_gone_on_with(play):
    _, straight, _ = play({}, name="straight")
    _, again, _ = play({}, name="again")
    assert all(torch.equal(straight.tensors[name], again.tensors[name]) for name in straight.tensors)
    _, other, _ = play({"seed": "6"}, name="other")
    assert not all(torch.equal(straight.tensors[name], other.tensors[name]) for name in straight.tensors)


def test_noise_that_a_file_names_is_held_to_its_epsilon(tiny_base):
    given = {**PRIVATE, "privacy.noise_multiplier": "0.7"}
    with pytest.raises(FloorRefused, match=r"costs epsilon \d+\.\d+ over 2 rounds, above privacy\.epsilon = 8"):
        cost.resolve(tiny.settings(tiny_base, given))
    kept = cost.resolve(tiny.settings(tiny_base, {**given, "privacy.noise_multiplier": "3.0"}))
    assert kept.privacy.noise_multiplier == 3.0


def test_the_noise_that_is_chosen_is_the_least_that_keeps_the_epsilon(tiny_base):
    privacy = cost.resolve(tiny.settings(tiny_base, PRIVATE)).privacy
    epsilons = {
        factor: accounting.epsilon(
            sampling_prob=0.5, noise_multiplier=factor * privacy.noise_multiplier, num_steps=6, dp_delta=1e-6
        )
        for factor in (0.99, 1.0)
    }
    assert epsilons[1.0] <= 8.0 < epsilons[0.99]


def test_a_run_that_is_not_private_is_left_as_it_is(tiny_base):
    settings = tiny.settings(tiny_base)
    assert cost.resolve(settings) is settings
