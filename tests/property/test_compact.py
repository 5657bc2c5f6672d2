"""Laws of compressed updates: what comes back, what its mean is, and that no malformed body gets in."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.agent import protect, residual
from client.agent.protect import RawDelta
from common.adapter import adapter, compact
from common.errors import DataError, ModelError, WireError
from common.privacy.noise import SeededNoise
from common.run import packing
from common.run.schema.privacy import NoPrivacy
from common.run.schema.wire import WireConfig

INTEGERS = sorted(packing.BITS)
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
NONE = NoPrivacy()


def tensors_of(shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}


def back(tensors, *, dtype: str, density: float = 1.0, draws=None):
    data = compact.encode(tensors, dtype=dtype, density=density, draws=draws)
    specs = adapter.specs(tensors)
    assert len(data) == packing.body_bytes(specs, dtype=dtype, density=density)
    return compact.decode(data, specs, dtype=dtype, density=density)


def scales_of(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Step of each value: its rank direction's largest over the largest integer, and bfloat16's rounding."""
    axis = 1 if tensor.shape[0] <= tensor.shape[1] else 0
    return tensor.abs().amax(dim=axis, keepdim=True) / packing.largest(dtype) * (1 + 2**-7)


def test_a_body_is_the_bytes_that_were_worked_by_hand():
    # max |x| = 7 = L, so the scale is 1.0 = 0x3F80; integers plus 7 are 14, 0, 8, 7
    data = compact.encode({"a": torch.tensor([[7.0, -7.0, 1.0, 0.0]])}, dtype="int4", draws=None)
    assert data == bytes.fromhex("803f e087")
    # the largest half: mask 1100 0000; no others travel, and padding is zero
    sparse = compact.encode({"a": torch.tensor([[7.0, -7.0, 1.0, 0.0]])}, dtype="int4", density=0.5, draws=None)
    assert sparse == bytes.fromhex("c0 803f e0")
    floats = compact.encode({"a": torch.tensor([[1.0, -7.0, 1.5, 0.0]])}, dtype="bfloat16", density=0.25, draws=None)
    assert floats == bytes.fromhex("40 e0c0")


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from(INTEGERS), st.booleans())
def test_a_value_comes_back_within_a_step_and_shapes_as_they_were(shapes, dtype, is_random):
    tensors = tensors_of(shapes)
    found = back(tensors, dtype=dtype, draws=compact.dice("x") if is_random else None)
    for name, tensor in tensors.items():
        limit = scales_of(tensor, dtype) * (1 if is_random else 0.5) + 1e-7
        assert found[name].shape == tensor.shape
        assert bool(((found[name] - tensor).abs() <= limit).all())


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.floats(0.01, 0.99), st.sampled_from(["float32", "bfloat16"]))
def test_a_sparse_update_is_its_largest_values_and_zeros(shapes, density, dtype):
    tensors = tensors_of(shapes)
    found = back(tensors, dtype=dtype, density=density)
    values = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
    sent = torch.cat([found[name].flatten() for name in sorted(tensors)])
    assert int((sent != 0).sum()) == packing.num_sent(values.numel(), density)
    assert values[sent != 0].abs().min() >= (values[sent == 0].abs().max() if bool((sent == 0).any()) else 0)
    assert torch.equal(sent[sent != 0], values[sent != 0].to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dtype", INTEGERS)
def test_large_tensors_of_many_chunks_come_back(dtype):
    tensor = torch.randn(3, compact.CHUNK // 2 + 5, generator=torch.Generator().manual_seed(3))
    found = back({"a": tensor}, dtype=dtype)["a"]
    assert bool(((found - tensor).abs() <= scales_of(tensor, dtype) * 0.5 + 1e-6).all())


def test_bytes_are_a_function_of_run_site_and_round():
    tensors = tensors_of([(8, 40)])

    def encoded(*parts):
        return compact.encode(tensors, dtype="int4", draws=compact.dice(*parts))

    assert encoded("run", "north", 3) == encoded("run", "north", 3)
    others = {encoded("run", "north", 4), encoded("run", "south", 3), encoded("other", "north", 3)}
    assert len(others | {encoded("run", "north", 3)}) == 4


def mean_error(dtype: str, *, is_random: bool, num_draws: int = 1000) -> float:
    """Largest error of a mean, in standard errors of the bound scale^2 / 4, on values at 0.3 of a step."""
    limit = packing.largest(dtype)
    skewed = torch.full((1, 64), 0.3)
    skewed[0, 0] = float(limit)  # the scale is 1
    draws = compact.dice("mean") if is_random else None
    total = sum(back({"a": skewed}, dtype=dtype, draws=draws)["a"].double() for _ in range(num_draws))
    return float((total / num_draws - skewed).abs().max()) / (0.5 / math.sqrt(num_draws))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_stochastic_rounding_is_unbiased(dtype):
    assert mean_error(dtype, is_random=True) < 5


def test_control_rounding_to_nearest_is_not():
    assert mean_error("int4", is_random=False) > 12


def sent_and_left(tmp_path, *, error_feedback: bool):
    """Five rounds of one site: the sum of its changes, of what was sent, and what is left."""
    wire = WireConfig(dtype="int4", density=0.2, error_feedback=error_feedback)
    changes = [tensors_of([(4, 30), (30, 4)], seed) for seed in range(5)]
    specs = adapter.specs(changes[0])
    sums = [{name: torch.zeros_like(t) for name, t in changes[0].items()} for _ in range(2)]
    left = None
    for number, change in enumerate(changes):
        left = residual.load(tmp_path, "r", number, specs) if error_feedback else None
        outgoing = protect.protect(
            RawDelta(change),
            privacy=NONE,
            trained_with="none",
            num_shares=1,
            source=SeededNoise(1),
            settings=wire,
            draws=compact.dice("r", number),
            left_out=left,
        )
        if error_feedback:
            residual.save(tmp_path, "r", number, outgoing.left_out)
        sent = compact.decode_update(outgoing.body, specs, wire)
        for name in change:
            sums[0][name] += change[name]
            sums[1][name] += sent[name]
    left = residual.load(tmp_path, "r", 5, specs) or {name: torch.zeros_like(t) for name, t in changes[0].items()}
    return sums[0], sums[1], left


def gap(whole, sent, left) -> float:
    return max(float((whole[name] - sent[name] - left[name]).abs().max()) for name in whole)


def test_what_was_sent_and_what_is_left_add_up_to_all_changes(tmp_path):
    assert gap(*sent_and_left(tmp_path, error_feedback=True)) < 1e-5


def test_control_without_error_feedback_they_do_not(tmp_path):
    assert gap(*sent_and_left(tmp_path, error_feedback=False)) > 0.5


def test_a_round_asked_again_begins_with_what_it_began_with(tmp_path):
    specs = adapter.specs(tensors_of([(2, 3)]))
    for number in range(4):
        residual.save(tmp_path, "r", number, tensors_of([(2, 3)], number))
    assert torch.equal(residual.load(tmp_path, "r", 3, specs)["t0"], tensors_of([(2, 3)], 2)["t0"])
    assert torch.equal(residual.load(tmp_path, "r", 9, specs)["t0"], tensors_of([(2, 3)], 3)["t0"])
    assert len(list(tmp_path.iterdir())) == 2
    assert residual.load(tmp_path, "other", 3, specs) == {}


def test_a_broken_residual_is_an_error_with_its_remedy(tmp_path):
    residual.save(tmp_path, "r", 0, tensors_of([(2, 3)]))
    next(tmp_path.iterdir()).write_bytes(b"half")
    with pytest.raises(DataError, match="remove the file"):
        residual.load(tmp_path, "r", 1, adapter.specs(tensors_of([(2, 3)])))


ROW = torch.tensor([[7.0, -7.0, 1.0]])
SPECS = adapter.specs({"a": ROW})


@pytest.mark.parametrize(
    ("body", "density", "told"),
    [
        ("803f e08000", 1.0, "5 bytes"),
        ("803f e0", 1.0, "3 bytes"),
        ("803f e081", 1.0, "behind its last value"),
        ("803f f080", 1.0, "no rounding gives"),
        ("807f e080", 1.0, "scale that is negative, NaN or too large"),
        ("c17f e080", 1.0, "scale that is negative, NaN or too large"),
        ("80bf e080", 1.0, "scale that is negative, NaN or too large"),
        ("0080 7770", 1.0, "scale that is negative, NaN or too large"),
        ("0000 e080", 1.0, "values under a scale of zero"),
        ("e0 803f e0", 0.5, "marks 3 values"),
        ("80 803f e0", 0.5, "marks 1 values"),
        ("90 803f e0", 0.5, "beyond the last"),
    ],
)
def test_a_malformed_body_is_refused(body, density, told):
    with pytest.raises(WireError, match=told):
        compact.decode(bytes.fromhex(body), SPECS, dtype="int4", density=density)


def test_values_that_no_training_gives_are_refused():
    with pytest.raises(ModelError):
        compact.decode(bytes.fromhex("0049 e080"), SPECS, dtype="int4")
    with pytest.raises(ModelError):
        compact.decode(bytes.fromhex("80 c07f"), SPECS, dtype="bfloat16", density=0.1)


def test_control_well_formed_bodies_are_taken():
    assert compact.decode(bytes.fromhex("803f e080"), SPECS, dtype="int4")["a"].tolist() == [[7.0, -7.0, 1.0]]
    found = compact.decode(bytes.fromhex("c0 803f e0"), SPECS, dtype="int4", density=0.5)
    assert found["a"].tolist() == [[7.0, -7.0, 0.0]]


@pytest.mark.parametrize(("dtype", "density"), [("int8", 1.0), ("int3", 0.5), ("bfloat16", 0.3)])
def test_whatever_bytes_come_nothing_else_is_raised_and_nothing_wild_gets_in(dtype, density):
    tensors = tensors_of([(4, 9), (7, 3)])
    specs, dice = adapter.specs(tensors), np.random.default_rng(5)
    good = compact.encode(tensors, dtype=dtype, density=density, draws=None)
    num_taken = 0
    for _ in range(400):
        spoilt = bytearray(good if dice.random() < 0.7 else dice.bytes(len(good)))
        spoilt[dice.integers(len(spoilt))] ^= 1 << dice.integers(8)
        try:
            cut = bytes(spoilt[: len(good) - int(dice.random() < 0.1)])
            found = compact.decode(cut, specs, dtype=dtype, density=density)
        except (WireError, ModelError):
            continue
        num_taken += 1
        assert all(bool((tensor.abs() <= adapter.MAX_VALUE).all()) for tensor in found.values())
    assert num_taken  # a changed value is a value
