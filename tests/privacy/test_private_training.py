"""Private training as a whole: draws, noise, the divisor, and what does not leave."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from client.train import loop, private
from common.adapter import adapter
from common.errors import PrivacyError
from common.model import base
from common.privacy.clipping import ClipNorm
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.schema.privacy import UnitPrivacy
from tests import tiny

CPU = torch.device("cpu")


class Drawn:
    """A source whose draws are set, and which gives no noise: `uniform` hands out the given values in turn."""

    def __init__(self, *uniforms: float) -> None:
        self.uniforms = list(uniforms)

    def uniform(self, size: int) -> np.ndarray:
        return np.full(size, self.uniforms.pop(0))

    def discrete(self, size: int, *, std: float, device: torch.device) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.float64, device=device)

    def prepare(self, size: int, *, device: torch.device) -> None:
        """Nothing takes time here."""


def settings(**changes) -> UnitPrivacy:
    given = {"sampling_prob": 0.5, "noise_multiplier": 1.0, "clip_norm": 0.5, "max_rows_per_unit": 2}
    return UnitPrivacy(**{**given, **changes})


def encoded(engine, count: int):
    run = tiny.settings("tiny")
    return base.encode(engine, tiny.rows(count), run.data)[0]


def one_step(engine, rows, privacy, source) -> torch.Tensor:
    """The gradient of one step, flattened."""
    engine.model.train()
    tiny.private_step(engine, rows, privacy, source)
    found = {name: parameter.grad for name, parameter in adapter.parameters(engine.model).items()}
    return torch.cat([found[name].flatten() for name in sorted(found)])


def test_the_sum_is_divided_by_the_expected_number_of_units_not_by_the_drawn_one(engine):
    rows = encoded(engine, 12)
    privacy = settings(clip_norm=1e-3)  # every unit is clipped
    none, whole = one_step(engine, rows, privacy, Drawn(1.0)), one_step(engine, rows, privacy, Drawn(0.0))
    half = one_step(engine, rows[:6], privacy, Drawn(0.0))
    assert float(none.norm()) == 0
    assert float(whole.norm()) <= 6 * 1e-3 / (0.5 * 6) + 1e-9
    assert float(half.norm()) <= 3 * 1e-3 / (0.5 * 3) + 1e-9
    certain = one_step(engine, rows, settings(clip_norm=1e-3, sampling_prob=1.0), Drawn(0.0))
    assert torch.allclose(whole, 2 * certain, rtol=1e-6, atol=0.0)  # the same units, of which half as many are expected


def test_a_step_without_any_unit_is_noised_all_the_same(engine):
    class Empty(SeededNoise):
        def uniform(self, size: int) -> np.ndarray:
            return np.ones(size)

    rows = encoded(engine, 12)
    privacy = settings(noise_multiplier=2.0)
    found = one_step(engine, rows, privacy, Empty(3))
    expected_std = 2.0 * privacy.clip_norm / (0.5 * 6)
    assert float(found.std()) == pytest.approx(expected_std, rel=5 / math.sqrt(2 * found.numel()))
    assert abs(float(found.mean())) < 5 * expected_std / math.sqrt(found.numel())


def test_noise_is_drawn_once_for_all_units_of_a_step(engine):
    """With noise drawn for each unit its variance would grow with their number."""
    rows = encoded(engine, 24)
    privacy = settings(noise_multiplier=50.0, sampling_prob=1.0, clip_norm=1e-3)
    found = one_step(engine, rows, privacy, SeededNoise(4))
    expected_std = 50.0 * 1e-3 / 12
    assert float(found.std()) == pytest.approx(expected_std, rel=5 / math.sqrt(2 * found.numel()))


def test_units_are_drawn_each_with_the_probability_that_is_accounted():
    population = [[number] for number in range(2000)]
    counts = [
        len(private.poisson(population, sampling_prob=0.1, max_rows=1, source=SeededNoise(seed))) for seed in range(50)
    ]
    assert np.mean(counts) == pytest.approx(200, abs=5 * math.sqrt(180 / 50))
    assert np.var(counts) == pytest.approx(180, rel=1.0)  # a fixed batch size would have variance 0
    assert np.var(counts) > 60


def test_no_unit_has_more_rows_in_a_step_than_allowed_and_each_row_comes_up():
    unit = list(range(6))
    found = [private.poisson([unit], sampling_prob=1.0, max_rows=2, source=SeededNoise(seed))[0] for seed in range(60)]
    assert all(len(set(rows)) == 2 for rows in found)
    assert {row for rows in found for row in rows} == set(unit)


def test_what_a_round_tells_holds_no_figure_of_the_drawn_rows(engine):
    training = config.TrainingConfig(local_steps=2, batch_size=4)
    result = loop.train(
        engine,
        encoded(engine, 12),
        training=training,
        privacy=settings(),
        round_index=0,
        num_rounds=2,
        seed=1,
        source=SeededNoise(1),
    )
    assert (result.num_steps, result.protection) == (2, "unit")
    assert (result.train_loss, result.num_tokens, result.seconds) == (None, None, None)


def test_training_lowers_the_loss_when_the_noise_is_small_and_not_when_it_is_large(load_tiny):
    """The control: the same steps under noise that drowns every gradient."""
    losses = {}
    for noise in (0.05, 500.0):
        engine = load_tiny()
        rows = encoded(engine, 24)
        training = config.TrainingConfig(local_steps=30, batch_size=8, learning_rate=2e-2)
        before = held_out(engine, rows)
        loop.train(
            engine,
            rows,
            training=training,
            privacy=settings(noise_multiplier=noise, clip_norm=1.0),
            round_index=0,
            num_rounds=1,
            seed=1,
            source=SeededNoise(1),
        )
        losses[noise] = held_out(engine, rows) / before
    assert losses[0.05] < 0.8
    assert losses[500.0] > 0.95


def held_out(engine, rows) -> float:
    from common.loss import evaluation

    total, count = evaluation.held_out_nll(engine, rows, batch_size=8)
    return total / count


def test_the_clip_norm_follows_the_quantile_when_it_may():
    privacy = settings(adaptive_clipping=True, sampling_prob=1.0, clip_norm=100.0, noise_multiplier=0.1)
    clip = ClipNorm.of(privacy, expected=12.0)
    assert clip.noise_multiplier > privacy.noise_multiplier  # the count has its share of the whole
    norms = torch.linspace(0.5, 1.5, 101)
    for _ in range(100):
        clip.follow(norms, privacy=privacy, expected=101.0, source=SeededNoise(2))
    assert clip.value == pytest.approx(1.0, abs=0.2)


def test_a_step_whose_clip_norm_follows_gets_the_noise_of_both_releases(engine):
    """The control: without the split the noise would be 12 % less."""

    class Empty(SeededNoise):
        def uniform(self, size: int) -> np.ndarray:
            return np.ones(size)

    privacy = settings(adaptive_clipping=True, sampling_prob=1.0, noise_multiplier=0.29)
    found = one_step(engine, encoded(engine, 12), privacy, Empty(3))
    expected = 6.0
    whole = (0.29**-2 - (2 * expected / 20) ** -2) ** -0.5  # Andrew et al. 2021, theorem 1
    assert float(found.std()) * expected / privacy.clip_norm == pytest.approx(whole, rel=0.04)
    assert whole > 1.1 * 0.29


@pytest.mark.parametrize(("dp_delta", "is_refused"), [(1.01e-5, True), (1e-5, False)])
def test_a_delta_above_one_in_n_ln_n_is_refused_before_the_first_step(engine, dp_delta, is_refused):
    told = pytest.raises(PrivacyError, match=r"too large for the 6 units") if is_refused else nullcontext()
    with told:
        one_step(engine, encoded(engine, 12), settings(dp_delta=dp_delta), SeededNoise(1))
