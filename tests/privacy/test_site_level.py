"""Noise for whole sites: how far one site can move the sum, what the noise is, and what epsilon it comes to."""

import math

import pytest
import torch

from client.agent import protect
from client.agent.protect import RawDelta
from common import accounting
from common.adapter import adapter, compact
from common.errors import FloorRefused, PrivacyError
from common.privacy import clipping, site_level
from common.privacy.noise import SeededNoise, SystemNoise
from common.run.schema.privacy import SitePrivacy
from common.run.schema.wire import WireConfig
from server.aggregate import mean, noised
from server.fleet import sampling
from tests import tiny
from tests.samples.events import view

SHAPES = {"m.lora_A.weight": (4, 50), "m.lora_B.weight": (50, 4)}
CLIP = 0.5
EXPECTED = 10.0


def privacy(**changes) -> SitePrivacy:
    return SitePrivacy(sampling_prob=0.1, noise_multiplier=1.0, clip_norm=CLIP).model_copy(update=changes)


def updates(count: int, *, seed: int = 0, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)
    ]


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def step(some, *, source=None, memory=None, **changes):
    """What a round adds to the adapter, and its combination."""
    rules = privacy(**changes)
    made = noised.start(
        zeros(), list(SHAPES), privacy=rules, expected=EXPECTED, source=source or SeededNoise(3), memory=memory or {}
    )
    for update in some:
        made.add(update, weight=1.0)
    return made.result(), made


def distance(one, other) -> float:
    return clipping.norm({name: one[name].double() - other[name].double() for name in one})


def sent_by_site(update, *, source=None, num_shares: int = 1, dtype="float32", **changes):
    """An update as it leaves a site, and as the coordinator reads it."""
    outgoing = protect.protect(
        RawDelta(update),
        privacy=privacy(**changes),
        trained_with="none",
        settings=WireConfig(dtype=dtype),
        draws=compact.dice("run"),
        num_shares=num_shares,
        source=source or SeededNoise(1),
    )
    assert outgoing.protection == "site"
    return adapter.decode(outgoing.body, adapter.specs(update), dtype=dtype)


def neighbours():
    """Random updates, and ones that all point one way and are much too long."""
    one_way = [{name: torch.full(shape, 1e3) for name, shape in SHAPES.items()}] * 6
    return [updates(6, scale=scale) for scale in (1e-4, 0.02, 1.0, 1e4)] + [one_way]


@pytest.mark.parametrize("some", neighbours())
def test_one_site_moves_the_sum_by_no_more_than_the_clip_norm(some):
    quiet = {"noise_multiplier": 1e-12}  # what noise would hide is looked at without it
    whole, _ = step(some, **quiet)
    without, _ = step(some[1:], **quiet)
    other, _ = step([{name: -value for name, value in some[0].items()}, *some[1:]], **quiet)
    grid = CLIP * 2.0**-10 * math.sqrt(400)  # to_grid moves each of the 400 values by half a step in each sum
    assert EXPECTED * distance(whole, without) <= CLIP * (1 + 1e-6) + grid
    assert EXPECTED * distance(whole, other) <= 2 * CLIP * (1 + 1e-6) + grid  # replaced: once out, once in


def test_control_without_clipping_one_site_moves_the_sum_as_far_as_it_likes():
    some = updates(6, scale=1.0)
    sums = [mean.start(zeros(), trained=list(SHAPES)) for _ in range(2)]
    for update in some:
        sums[0].add(update, weight=1.0)
    for update in some[1:]:
        sums[1].add(update, weight=1.0)
    assert distance(sums[0].sums(), sums[1].sums()) > 10 * CLIP


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_site_clips_over_all_its_tensors_together(dtype):
    sent = sent_by_site(updates(1)[0], dtype=dtype)
    assert clipping.norm(sent) == pytest.approx(CLIP, rel=1e-6 if dtype == "float32" else 1e-2)
    short = {name: value * 1e-4 for name, value in updates(1)[0].items()}
    assert torch.equal(sent_by_site(short)["m.lora_A.weight"], short["m.lora_A.weight"])


def spread(values) -> float:
    """Standard deviation over all values of all tensors, mean zero."""
    return float(torch.cat([value.flatten() for value in values]).double().square().mean().sqrt())


def noise_at_server(noise_multiplier: float = 2.0, count: int = 60):
    made = [step([], source=SystemNoise(), noise_multiplier=noise_multiplier)[0] for _ in range(count)]
    return spread([value * EXPECTED for one in made for value in one.values()])


def noise_at_sites(noise_multiplier: float = 2.0, *, num_shares: int = 4, num_sites: int = 4, count: int = 60):
    totals = []
    for _ in range(count):
        some = [
            sent_by_site(
                zeros(),
                source=SystemNoise(),
                num_shares=num_shares,
                noise_at="sites",
                noise_multiplier=noise_multiplier,
            )
            for _ in range(num_sites)
        ]
        totals.append(step(some, noise_at="sites", sampling_prob=1.0)[0])
    return spread([value * EXPECTED for one in totals for value in one.values()])


# 60 sums of 400 values: the standard deviation has a relative error of 1 / sqrt(2 * 24,000) = 0.5 %; five of them
@pytest.mark.parametrize("noise", [noise_at_server, noise_at_sites])
def test_the_noise_on_the_sum_is_what_the_accountant_was_told(noise):
    assert noise() == pytest.approx(2.0 * CLIP, rel=0.025)


@pytest.mark.parametrize("noise", [noise_at_server, noise_at_sites])
def test_control_half_of_the_noise_is_caught(noise):
    assert noise(1.0) != pytest.approx(2.0 * CLIP, rel=0.025)


def test_more_sites_than_the_quorum_add_noise_and_that_is_what_is_accounted():
    found = noise_at_sites(num_shares=4, num_sites=9, count=30)
    assert found == pytest.approx(2.0 * CLIP * math.sqrt(9 / 4), rel=0.04)
    run = settings(**{"privacy.noise_at": '"sites"', "privacy.sampling_prob": "1.0", "privacy.noise_multiplier": "8.0"})
    least = run.federation.min_sites
    at_quorum = site_level.spent(run, [least] * 20)
    assert at_quorum == pytest.approx(2.2581, abs=2e-4)  # the reference's q = 1, sigma = 8, T = 20
    assert site_level.spent(run, [None] * 20) == at_quorum
    assert site_level.spent(run, [4 * least] * 80) == pytest.approx(2.2581, abs=1e-3)  # twice the noise, four times T


def settings(**changes):
    site = {
        "privacy.mode": '"site"',
        "privacy.sampling_prob": "0.25",
        "privacy.noise_multiplier": "2.0",
        "privacy.dp_delta": "1e-5",
        "aggregation.weighting": '"uniform"',
        "federation.num_sites": "1000",
        "federation.num_rounds": "50",
    }
    return tiny.settings("tiny", {**site, **changes})


def test_epsilon_is_the_published_one():
    run = settings()
    assert site_level.spent(run, [7] * 50) == pytest.approx(4.4403, abs=1e-4)  # q = 0.25, sigma = 2, T = 50
    assert site_level.spent(run, [0] * 50) == site_level.spent(run, [900] * 50)  # who came changes nothing
    all_of_them = settings(**{"privacy.sampling_prob": "1.0", "privacy.noise_multiplier": "20"})
    assert site_level.spent(all_of_them, [1000] * 100) == pytest.approx(1.9931, abs=1e-4)


def test_whoever_knows_who_was_drawn_gets_no_sampling_for_free():
    run = settings()
    log = [{"kind": "site_trained", "round": number, "site": "a"} for number in range(20)]
    log += [{"kind": "round_finished", "round": number, "num_updates": 1} for number in range(50)]
    seen = view(log)
    num_updates, num_taken = [event.num_updates for event in seen.rounds.values()], max(seen.num_trainings.values())
    told = site_level.spent_by(run, num_updates, num_taken=num_taken)
    assert told["epsilon_insider"] == pytest.approx(
        accounting.epsilon(sampling_prob=1.0, noise_multiplier=2.0, num_steps=20, dp_delta=1e-5)
    )
    assert told["epsilon_insider"] > told["epsilon"]
    weak = settings(**{"privacy.noise_at": '"sites"', "privacy.sampling_prob": "1.0", "federation.min_sites": "900"})
    assert site_level.spent_by(weak, num_updates, num_taken=num_taken)["epsilon_insider"] is None


def test_few_sites_are_refused_with_the_figure_unless_accepted():
    few = settings(**{"federation.num_sites": "5", "privacy.sampling_prob": "1.0", "privacy.noise_multiplier": "2.684"})
    with pytest.raises(FloorRefused, match=r"noise to signal is 1,80\d: with 5 sites.*--i-accept"):  # the reference's
        site_level.require_signal(few, 11_300_000, is_accepted=False)
    site_level.require_signal(few, 11_300_000, is_accepted=True)
    many = settings(**{"privacy.sampling_prob": "1.0", "privacy.noise_multiplier": "2.684"})
    site_level.require_signal(many, 11_300_000, is_accepted=False)
    assert site_level.noise_ratio(many, 11_300_000) == pytest.approx(9.0, abs=0.05)


def test_sites_are_drawn_each_for_itself():
    names = [f"s{number}" for number in range(400)]
    source = SystemNoise()
    counts = [len(sampling.poisson(names, sampling_prob=0.25, source=source)) for _ in range(200)]
    mean_count = sum(counts) / 200
    variance = sum((count - mean_count) ** 2 for count in counts) / 199
    assert mean_count == pytest.approx(100, abs=3)  # standard error 0.61
    assert 40 < variance < 120  # binomial: 75, standard error 7.5; a fixed number would have none
    assert sampling.poisson(names, sampling_prob=1.0, source=source) == sorted(names)
    assert sampling.poisson([], sampling_prob=0.25, source=source) == []


def test_the_divisor_does_not_tell_how_many_came():
    one, _ = step(updates(1), noise_multiplier=1e-12)
    assert EXPECTED * clipping.norm(one) == pytest.approx(CLIP, rel=2e-2)


def test_an_adaptive_clip_norm_falls_to_the_quantile_and_never_rises_above_its_start():
    short = updates(10, scale=0.1 / math.sqrt(400))  # norms near 0.1, C from 0.5
    memory: dict[str, torch.Tensor] = {}
    found = []
    for number in range(40):
        source = SeededNoise(number)
        _, made = step(short, source=source, memory=memory, adaptive_clipping=True, noise_multiplier=0.5)
        memory = dict(made.remembered(memory))
        found.append(made.clip_norm)
    assert found[-1] == pytest.approx(0.1, rel=0.2)
    long, memory = updates(40, scale=1.0), {}
    for _ in range(3):
        _, made = step(long, memory=memory, adaptive_clipping=True, noise_multiplier=0.5)
        memory = dict(made.remembered(memory))
        assert made.clip_norm == CLIP


def test_adaptive_clipping_leaves_the_sum_more_noise_so_that_both_cost_what_is_told():
    made = [step([], source=SystemNoise(), adaptive_clipping=True, noise_multiplier=0.9)[0] for _ in range(60)]
    std = EXPECTED / clipping.COUNT_NOISE_SHARE
    wanted = accounting.gradient_noise_multiplier(0.9, count_noise_std=std)
    assert wanted > 1.9
    assert spread([value * EXPECTED for one in made for value in one.values()]) == pytest.approx(
        wanted * CLIP, rel=0.025
    )
    with pytest.raises(PrivacyError, match="10 sites at a time are too few"):
        step([], adaptive_clipping=True, noise_multiplier=1.0)


def test_a_weight_is_refused():
    with pytest.raises(ValueError, match="weight 1"):
        noised.start(zeros(), list(SHAPES), privacy=privacy(), expected=EXPECTED, source=SeededNoise(1), memory={}).add(
            updates(1)[0], weight=3.0
        )


def test_a_round_that_was_released_is_not_played_again():
    log = [{"kind": "round_finished", "round": number} for number in range(3)]
    site_level.check_resume(num_released=view(log).num_released, num_rounds=3)
    site_level.check_resume(
        num_released=view(log[:2]).num_released, num_rounds=3
    )  # stopped between checkpoint and event
    with pytest.raises(PrivacyError, match="round 3 was released, and the newest whole checkpoint is of round 2"):
        site_level.check_resume(num_released=view(log).num_released, num_rounds=2)
