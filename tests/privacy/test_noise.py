"""The noise is normal, of variance one and independent; and every check here catches noise that is not.

A check gives a p-value. Right noise must stay above `RIGHT`, so a run fails by chance once in a hundred million; wrong
noise must fall below `WRONG`.
"""

import copy
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from common import noise
from common.noise import SeededNoise, SystemNoise

CPU = torch.device("cpu")
RIGHT, WRONG = 1e-8, 1e-12
SIZE = 400_000
ROOT = Path(__file__).parents[2]


def draw(size: int = SIZE) -> np.ndarray:
    """What the product uses."""
    return SystemNoise().normal(size, device=CPU).numpy()


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
    """Values that occur twice; with 53 bits there is hardly ever one."""
    return float(stats.poisson(1e-4).sf(len(x) - len(np.unique(x)) - 1))


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
    first, second, other = one.normal(SIZE, device=CPU), one.normal(SIZE, device=CPU), draw()
    assert relation(first.numpy(), second.numpy()) > RIGHT
    assert relation(first.numpy(), other) > RIGHT
    twins = [SeededNoise(5).normal(SIZE, device=CPU).numpy() for _ in range(2)]
    assert relation(*twins) < WRONG
    assert relation(twins[0], SeededNoise(6).normal(SIZE, device=CPU).numpy()) > RIGHT


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
        assert relation(source.normal(SIZE, device=CPU).numpy(), duplicate.normal(SIZE, device=CPU).numpy()) > RIGHT
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
        assert torch.equal(prepared.normal(size, device=CPU), plain.normal(size, device=CPU))
        assert np.array_equal(prepared.uniform(5), plain.uniform(5))


def test_another_size_than_was_prepared_is_refused():
    source = SystemNoise()
    source.prepare(100, device=CPU)
    with pytest.raises(ValueError, match="prepared"):
        source.uniform(3)


def test_where_a_draw_is_cut_changes_nothing():
    long = SeededNoise(3).normal(2 * noise.CHUNK_PAIRS["cpu"] + 9, device=CPU)
    words = SeededNoise(3)._read(8 * (len(long) + 1)).numpy().view("<u8") & noise._MASK_53
    radius = np.sqrt(-2 * np.log((words[0::2] + 1) / 2**53))
    expected = np.stack(
        [radius * np.cos(2 * np.pi * words[1::2] / 2**53), radius * np.sin(2 * np.pi * words[1::2] / 2**53)], 1
    )
    assert np.allclose(long.numpy(), expected.ravel()[: len(long)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_sizes(size):
    assert SystemNoise().normal(size, device=CPU).shape == (size,)
    assert SystemNoise().normal(size, device=CPU).dtype == torch.float64
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


def test_the_largest_and_the_smallest_word_give_finite_values():
    for byte in (0, 255):
        assert (
            noise._normal(lambda size, byte=byte: torch.full((size,), byte, dtype=torch.uint8), 2, CPU).isfinite().all()
        )


@pytest.mark.parametrize("clip_norm", [1.0, 0.3, 2.5e-3])
def test_the_grid_keeps_no_bit_below_its_step(clip_norm):
    values = torch.from_numpy(draw(10_000)).float() * clip_norm
    rounded = noise.to_grid(values, clip_norm=clip_norm)
    multiples = rounded.double() * 2**10 / clip_norm
    half_step, half_ulp = 0.5 * clip_norm / 2**10, rounded.double().abs() * 2**-24
    assert ((rounded.double() - values.double()).abs() <= half_step * (1 + 1e-9) + half_ulp).all()
    assert (multiples - multiples.round()).abs().max() < 1e-3
    assert rounded.dtype == values.dtype
    loose = values.double() * 2**10 / clip_norm
    assert (loose - loose.round()).abs().max() > 0.4  # values before rounding lie anywhere
    with pytest.raises(ValueError, match="clip_norm"):
        noise.to_grid(values, clip_norm=0.0)


def test_seeded_noise_is_nowhere_near_a_site_or_a_server():
    found = subprocess.run(["git", "grep", "-l", "SeededNoise"], cwd=ROOT, capture_output=True, text=True, check=False)
    places = {name for name in found.stdout.split() if re.match(r"(client|server)/", name)}
    assert not places


@pytest.mark.gpu
def test_a_gpu_gives_the_same_normal_noise():
    size = 2 * noise.CHUNK_PAIRS["cuda"] + 5
    there, here = (SeededNoise(4).normal(size, device=torch.device(name)).cpu() for name in ("cuda", "cpu"))
    assert torch.allclose(there, here, rtol=0, atol=1e-12)
    assert normality(SystemNoise().normal(SIZE, device=torch.device("cuda")).cpu().numpy()) > RIGHT
