"""The noise is a discrete Gaussian, of its variance and independent; and every check here catches noise that is not.

A check gives a p-value. Right noise must stay above `RIGHT`, so a run fails by chance once in a hundred million; wrong
noise must fall below `WRONG`.
"""

import copy
import math
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from common.privacy import discrete_gaussian, noise
from common.privacy.noise import SeededNoise, SystemNoise

CPU = torch.device("cpu")
RIGHT, WRONG = 1e-8, 1e-12
SIZE = 400_000
ROOT = Path(__file__).parents[2]


def draw(size: int = SIZE) -> np.ndarray:
    """What the product uses."""
    return normal(SystemNoise(), size)


def normal(source: noise.Noise, size: int, device: torch.device = CPU) -> np.ndarray:
    """Noise in standard deviations, on so fine a grid that it cannot be told from normal values of 45 bits."""
    std = 2.0**45
    return source.discrete(size, std=std, device=device).cpu().numpy() / np.sqrt(float(discrete_gaussian.variance(std)))


def variance(x: np.ndarray) -> float:
    """Sum of squares against chi-square."""
    return _two_sided(stats.chi2(len(x)), float(np.sum(x**2)))


def mean(x: np.ndarray) -> float:
    """Sum against zero."""
    return _two_sided(stats.norm(scale=np.sqrt(len(x))), float(np.sum(x)))


def normality(x: np.ndarray) -> float:
    """Kolmogorov and Smirnov's test against the standard normal distribution."""
    return float(stats.kstest(x, "norm").pvalue)


def shape(x: np.ndarray) -> float:
    """Skewness and kurtosis."""
    return float(stats.normaltest(x).pvalue)


def tails(x: np.ndarray) -> float:
    """Values beyond 3.5 on both sides; a tail that was cut loses them."""
    beyond = int(np.sum(np.abs(x) > 3.5))
    return float(stats.binomtest(beyond, len(x), 2 * stats.norm.sf(3.5)).pvalue)


def autocorrelation(x: np.ndarray) -> float:
    """Ljung and Box's statistic over lags 1 to 64, of the values and of their squares."""
    return 2 * min(_ljung_box(x), _ljung_box(x**2))


def repeats(x: np.ndarray) -> float:
    """Values that occur twice; with 45 bits there is hardly ever one."""
    return float(stats.poisson(1e-3).sf(len(x) - len(np.unique(x)) - 1))


def relation(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation between two draws."""
    return float(stats.pearsonr(x, y).pvalue)


def _ljung_box(x: np.ndarray) -> float:
    """By the fast Fourier transform."""
    x = (x - x.mean()) / x.std()
    power = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
    lags = np.arange(1, 65)
    correlations = np.fft.irfft(power)[1:65] / len(x)
    return float(stats.chi2(64).sf(len(x) * (len(x) + 2) * np.sum(correlations**2 / (len(x) - lags))))


def _two_sided(distribution, value: float) -> float:
    return 2 * min(distribution.cdf(value), distribution.sf(value))


def _ar1(x: np.ndarray) -> np.ndarray:
    """A twentieth of each value's neighbour is added; variance stays one."""
    return (x + 0.05 * np.roll(x, 1)) / np.sqrt(1 + 0.05**2)


def _paired(x: np.ndarray) -> np.ndarray:
    """Box and Muller with one radius for two pairs: uncorrelated, normal, and dependent."""
    generator = np.random.default_rng(7)
    radius = np.repeat(np.sqrt(-2 * np.log(1 - generator.random(len(x) // 4))), 2)
    angle = 2 * np.pi * generator.random(len(x) // 2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


CHECKS: dict[str, tuple[Callable[[np.ndarray], float], Callable[[np.ndarray], np.ndarray]]] = {
    "variance": (variance, lambda x: x * np.sqrt(0.5)),
    "variance-by-2-percent": (variance, lambda x: x * 0.98),
    "mean": (mean, lambda x: x + 0.02),
    "normality": (normality, lambda x: (stats.norm.cdf(x) - 0.5) * np.sqrt(12)),
    "shape": (shape, lambda x: stats.t(30).ppf(stats.norm.cdf(x)) / np.sqrt(30 / 28)),
    "tails": (tails, lambda x: np.clip(x, -3.5, 3.5)),
    "autocorrelation": (autocorrelation, _ar1),
    "dependent-pairs": (autocorrelation, _paired),
    "repeated-block": (repeats, lambda x: np.concatenate([x[: len(x) // 2], x[: len(x) // 2]])),
    "few-bits": (repeats, lambda x: x.astype(np.float16).astype(np.float64)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_noise_passes_and_its_control_fails(name):
    check, spoil = CHECKS[name]
    values = draw()
    assert check(values) > RIGHT
    assert check(spoil(values)) < WRONG


@pytest.mark.slow
@pytest.mark.parametrize("name", ["variance", "mean", "normality", "shape", "tails"])
def test_noise_passes_at_forty_times_the_size(name):
    check, spoil = CHECKS[name]
    values = draw(40 * SIZE)
    assert check(values) > RIGHT
    assert check(spoil(values)) < WRONG


def test_calls_and_instances_are_independent_and_equal_seeds_are_not():
    one = SystemNoise()
    first, second, other = normal(one, SIZE), normal(one, SIZE), draw()
    assert relation(first, second) > RIGHT
    assert relation(first, other) > RIGHT
    twins = [normal(SeededNoise(5), SIZE) for _ in range(2)]
    assert relation(*twins) < WRONG
    assert relation(twins[0], normal(SeededNoise(6), SIZE)) > RIGHT


@pytest.mark.parametrize(("make", "is_equal"), [(SystemNoise, False), (lambda: SeededNoise(1), True)])
def test_a_forked_process_has_noise_of_its_own(make, is_equal):
    source = make()
    source.uniform(3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, source.uniform(8).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert (os.read(reader, 64) == source.uniform(8).tobytes()) is is_equal


def test_a_copy_never_gives_the_same_noise():
    source = SystemNoise()
    for duplicate in (copy.copy(source), copy.deepcopy(source)):
        assert relation(normal(source, SIZE), normal(duplicate, SIZE)) > RIGHT
    with pytest.raises((TypeError, AttributeError)):
        pickle.dumps(source)


def test_bits_are_those_of_nist_sp_800_38a():
    """Section F.5.5, CTR-AES256.Encrypt: the key stream is plaintext xor ciphertext."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    expected = bytes(a ^ b for a, b in zip(plain, cipher, strict=True))
    read = noise.stream(key, counter=bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))
    assert b"".join(bytes(read(size).numpy()) for size in (16, 5, 43)) == expected
    assert bytes(noise.stream(key)(64).numpy()) != expected


def test_pieces_of_a_long_read_follow_each_other():
    whole, cut = noise.stream(bytes(32)), noise.stream(bytes(32))
    first = cut(1 << 20).clone()
    assert torch.equal(whole((1 << 20) + 100), torch.cat([first, cut(100)]))


def test_noise_that_was_prepared_is_what_would_have_come():
    plain, prepared = SeededNoise(3), SeededNoise(3)
    for size in (7, 1 << 18, 7):
        prepared.prepare(size, device=CPU)
        assert np.array_equal(normal(prepared, size), normal(plain, size))
        assert np.array_equal(prepared.uniform(5), plain.uniform(5))


def test_another_size_than_was_prepared_is_refused():
    source = SystemNoise()
    source.prepare(100, device=CPU)
    with pytest.raises(ValueError, match="prepared"):
        source.uniform(3)


def test_where_a_draw_is_cut_changes_nothing(monkeypatch):
    whole = normal(SeededNoise(3), 5000)
    monkeypatch.setitem(discrete_gaussian.CHUNK, "cpu", 97)
    assert np.array_equal(normal(SeededNoise(3), 5000), whole)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_sizes(size):
    assert SystemNoise().discrete(size, std=1.0, device=CPU).shape == (size,)
    assert SystemNoise().discrete(size, std=1.0, device=CPU).dtype == torch.float64
    assert SystemNoise().uniform(size).shape == (size,)


def test_uniform_values_have_53_random_bits_and_sample_at_their_rate():
    values = SystemNoise().uniform(SIZE)
    assert ((values >= 0) & (values < 1)).all()
    assert stats.kstest(values, "uniform").pvalue > RIGHT
    assert stats.kstest(values**1.02, "uniform").pvalue < WRONG
    words = (values * 2**53).astype(np.uint64)
    for place in range(53):
        ones = int(np.sum(words >> np.uint64(place) & np.uint64(1)))
        assert stats.binomtest(ones, SIZE, 0.5).pvalue > RIGHT
    assert stats.binomtest(int(np.sum(values < 0.0256)), SIZE, 0.0256).pvalue > RIGHT


@pytest.mark.parametrize("std", [0.0, 0.7, 30.0, 1000.0])
def test_whole_numbers_come_up_as_often_as_a_discrete_gaussian_has_them(std):
    """Against its definition, not against our tables; the control has two percent less spread."""
    variance, values = std**2 + 16, SystemNoise().discrete(SIZE, std=std, device=CPU).numpy()
    width = max(1, round(np.sqrt(variance) / 8))  # values side by side are counted together
    edge = 8 * round(np.sqrt(variance) + 1)
    numbers = np.arange(-edge, edge + 1)
    shares = np.exp(-(numbers**2) / (2 * variance))
    narrow = np.exp(-(numbers**2) / (2 * 0.96 * variance))
    groups = np.floor_divide(numbers + edge, width)
    counts = np.bincount(np.floor_divide(values.astype(int) + edge, width), minlength=groups[-1] + 1)
    tests = [_fit(counts, np.bincount(groups, weights=some / some.sum())) for some in (shares, narrow)]
    assert np.array_equal(values, np.trunc(values))
    assert tests[0] > RIGHT
    assert tests[1] < WRONG


def _fit(counts: np.ndarray, shares: np.ndarray) -> float:
    """Chi-square over the groups of which a few come up, and the rest together."""
    expected = shares * counts.sum()
    is_common = expected > 20
    found = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(expected[is_common], counts.sum() - expected[is_common].sum())
    return float(
        stats.chisquare(
            found[wanted > 1], wanted[wanted > 1] * found[wanted > 1].sum() / wanted[wanted > 1].sum()
        ).pvalue
    )


@pytest.mark.parametrize("std", [0.0, 30.0, 2.0**30, 1e4 * 2.0**30])
def test_blocks_are_drawn_by_their_weights_to_the_last_bit_and_lie_above_the_density(std):
    table = discrete_gaussian._table(std)
    coins, aliases = table.coin_b.tolist(), table.alias_b.tolist()
    drawn = list(coins)
    for coin, alias in zip(coins, aliases, strict=True):
        drawn[alias] += discrete_gaussian._COINS - coin
    assert tuple(drawn) == table.weights
    assert discrete_gaussian.NUM_BLOCKS * table.width > 16 * np.sqrt(float(table.variance))
    for block in (0, 1, 700, 1500):
        with localcontext() as context:
            context.prec = 60
            exact = (-Decimal((block * table.width) ** 2) / Decimal(2 * float(table.variance))).exp() * table.scale
        assert exact <= table.weights[block] < exact + 2 + exact / 2**30 or block == 0


def test_tries_that_are_decided_by_floating_point_are_decided_alike_by_all_digits():
    """Each of some hundred tries, and ones at the very edge, where only the digits can decide."""
    source, table = SeededNoise(8), discrete_gaussian._table(0.6 * 2.0**30)
    tried = discrete_gaussian._tries(source._read(16 * 300).view(torch.int64).view(-1, 2).clone(), table)
    is_zero = tried.value_j == 0
    for place in (~is_zero).nonzero().flatten().tolist():
        assert tried.is_exactly_kept(place, table, source._read) == bool(tried.is_kept_j[place])
    assert 0 < int(tried.is_kept_j.sum()) < 300


def test_values_of_twelve_standard_deviations_can_come_as_they_must():
    """Box and Muller's values from 53 bits end at 8.57."""
    table = discrete_gaussian._table(2.0**30)
    block = int(12 * 2**30 / table.width)
    words = torch.tensor([[block, 0]])
    tried = discrete_gaussian._tries(words, table)
    assert float(tried.value_j[0]) > 11.9 * 2**30
    assert bool(tried.is_unsure_j[0] | tried.is_kept_j[0])
    assert tried.is_exactly_kept(0, table, lambda size: torch.zeros(size, dtype=torch.uint8))
    assert not tried.is_exactly_kept(0, table, lambda size: torch.full((size,), 255, dtype=torch.uint8))


@pytest.mark.parametrize(("extra", "is_close"), [(discrete_gaussian.EXTRA_VARIANCE, True), (0.1, False)])
def test_a_discrete_gaussian_is_normal_noise_that_was_rounded_at_random(extra, is_close):
    """The lemma behind `variance`, by integrating it; with a narrow rounding it does not hold."""
    numbers, lattice = np.arange(-20, 21), np.arange(-80, 81)
    x = np.linspace(-60, 60, 24_001)
    density = np.exp(-(x**2) / (2 * 9)) / np.sqrt(2 * np.pi * 9)
    mass = np.exp(-((lattice[:, None] - x[None]) ** 2) / (2 * extra)).sum(0)
    rounded = [np.trapezoid(density * np.exp(-((y - x) ** 2) / (2 * extra)) / mass, x) for y in numbers]
    weights = np.exp(-(lattice**2) / (2 * (9 + extra)))
    wanted = np.exp(-(numbers**2) / (2 * (9 + extra))) / weights.sum()
    assert bool(np.abs(np.array(rounded) / wanted - 1).max() < 1e-9) is is_close


def test_the_accountant_of_others_gives_a_discrete_gaussian_no_more_than_the_normal_one_is_charged():
    """dp-accounting's own discrete mechanism on whole numbers, at a shift of the whole clip norm."""
    pld = privacy_loss_distribution
    std, given = 8.0, {"sensitivity": 8, "value_discretization_interval": 1e-3}
    discrete = pld.from_discrete_gaussian_mechanism(math.sqrt(std**2 + 16), **given)
    charged = pld.from_gaussian_mechanism(std, **given)
    weaker = pld.from_discrete_gaussian_mechanism(0.9 * std, **given)
    epsilon = charged.get_epsilon_for_delta(1e-6)
    assert discrete.get_epsilon_for_delta(1e-6) <= epsilon + 1e-3
    assert weaker.get_epsilon_for_delta(1e-6) > epsilon + 0.1  # control


@pytest.mark.parametrize("clip_norm", [1.0, 0.3, 2.5e-3])
def test_the_grid_has_whole_numbers_only_and_makes_nothing_longer(clip_norm):
    values = torch.from_numpy(draw(10_000)).float()
    values *= clip_norm / values.norm()
    steps = noise.to_grid(values, clip_norm=clip_norm)
    assert torch.equal(steps, steps.round())
    assert (steps.abs() <= values.double().abs() * 2**30 / clip_norm * (1 + 1e-15)).all()
    assert float((steps * noise.grid_step(clip_norm) - values.double()).abs().max()) <= noise.grid_step(clip_norm)
    loose = values.double() * 2**30 / clip_norm
    assert (loose - loose.round()).abs().max() > 0.4  # values before rounding lie anywhere
    assert values.dtype == torch.float32
    with pytest.raises(ValueError, match="clip_norm"):
        noise.to_grid(values, clip_norm=0.0)


def test_seeded_noise_is_nowhere_near_a_site_or_a_server():
    found = subprocess.run(["git", "grep", "-l", "SeededNoise"], cwd=ROOT, capture_output=True, text=True, check=False)
    places = {name for name in found.stdout.split() if re.match(r"(client|server)/", name)}
    assert not places


@pytest.mark.gpu
def test_a_gpu_gives_the_same_noise_to_the_bit():
    size = 2 * discrete_gaussian.CHUNK["cuda"] + 5
    there, here = (normal(SeededNoise(4), size, torch.device(name)) for name in ("cuda", "cpu"))
    assert np.array_equal(there, here)
    assert normality(normal(SystemNoise(), SIZE, torch.device("cuda"))) > RIGHT
