import hashlib

import pytest
import torch

from common.adapter import start
from common.errors import ModelError
from common.frame.records import TensorSpec


def factor(rank: int, width: int, *, seed: int = 5, name: str = "m.lora_A.weight") -> torch.Tensor:
    return start.factors([TensorSpec(name, (rank, width))], seed=seed)[name]


@pytest.mark.parametrize(("rank", "width"), [(1, 1), (3, 3), (4, 64), (16, 1000), (64, 96)])
def test_rows_are_orthonormal_to_the_last_digit_of_float32(rank, width):
    rows = factor(rank, width).double()
    assert float((rows @ rows.T - torch.eye(rank)).abs().max()) < 1e-6


def test_control_rows_as_peft_draws_them_are_not():
    drawn = torch.nn.init.kaiming_uniform_(torch.empty(4, 64), a=5**0.5)
    assert float((drawn @ drawn.T - torch.eye(4)).abs().max()) > 0.1


def plain_sum(values: list[float]) -> float:
    """The order of additions as the module's page says it, in Python's own doubles."""
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[half + i] for i in range(half)] + values[2 * half :]
    return values[0]


def test_every_bit_is_what_ieee_754_says():
    """Python's floats, one operation at a time, give the same bytes as torch's kernels."""
    rank, width = 5, 37
    digest = hashlib.sha256(b"5\x1fm.lora_A.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    draws = (2 * torch.rand(rank, width, dtype=torch.float64, generator=generator) - 1).tolist()
    rows: list[list[float]] = []
    for row in draws:
        for _ in range(2 if rows else 0):
            shares = [plain_sum([a * b for a, b in zip(other, row, strict=True)]) for other in rows]
            parts = [plain_sum([s * other[k] for s, other in zip(shares, rows, strict=True)]) for k in range(width)]
            row = [value - part for value, part in zip(row, parts, strict=True)]
        norm = plain_sum([value * value for value in row]) ** 0.5
        rows.append([value / norm for value in row])
    assert torch.equal(factor(rank, width), torch.tensor(rows, dtype=torch.float64).float())


def test_the_bytes_of_one_factor_are_these():
    """A golden value: a site with another version of this code would train against another A."""
    found = hashlib.sha256(factor(4, 64).numpy().tobytes()).hexdigest()
    assert found.startswith("34f10718f0f9b7e3")


def test_seed_and_name_decide():
    assert torch.equal(factor(4, 64), factor(4, 64))
    assert not torch.equal(factor(4, 64), factor(4, 64, seed=6))
    assert not torch.equal(factor(4, 64), factor(4, 64, name="n.lora_A.weight"))


def test_only_down_projections_are_made():
    specs = [TensorSpec("m.lora_A.weight", (2, 8)), TensorSpec("m.lora_B.weight", (8, 2))]
    assert list(start.factors(specs, seed=1)) == ["m.lora_A.weight"]


def test_a_module_that_is_narrower_than_the_rank_is_refused():
    with pytest.raises(ModelError, match=r"lower adapter\.r"):
        factor(9, 8)
