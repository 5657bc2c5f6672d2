"""Small cases of the methods, worked by hand."""

import pytest
import torch

from common.run.catalogue.methods import FACTS
from server.aggregate import factored, gap, products
from server.aggregate.method import Method
from server.aggregate.methods import fedex, fedsvd, ffa, flexlora, flora, rolora, table

A, B = "m.lora_A.weight", "m.lora_B.weight"


def after(method: Method, state, changes, weights) -> dict[str, torch.Tensor]:
    combined = method.start(state, trained=list(changes[0]))
    for change, weight in zip(changes, weights, strict=True):
        combined.add(change, weight=weight)
    return dict(method.apply(state, combined.result()))


def test_ffa_moves_b_by_the_mean_and_leaves_a():
    """B = (0, 0) + (1 * (4, 0) + 3 * (0, 4)) / 4 = (1, 3)."""
    state = {A: torch.tensor([[0.6, 0.8]]), B: torch.zeros(2, 1)}
    found = after(ffa, state, [{B: torch.tensor([[4.0], [0.0]])}, {B: torch.tensor([[0.0], [4.0]])}], [1.0, 3.0])
    assert found[B].tolist() == [[1.0], [3.0]]
    assert torch.equal(found[A], state[A])


def test_rolora_moves_the_one_factor_that_came():
    state = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0]])}
    found = after(rolora, state, [{A: torch.tensor([[0.0, 4.0]])}, {A: torch.tensor([[2.0, 0.0]])}], [1.0, 1.0])
    assert found[A].tolist() == [[2.0, 2.0]]
    assert found[B].tolist() == [[2.0]]


def test_fedsvd_puts_all_of_the_length_into_b():
    """B A = (3, 4)^T (0, 2): its one singular value is 5 * 2 = 10, its right vector (0, 1)."""
    state = {A: torch.tensor([[0.0, 2.0]]), B: torch.zeros(2, 1)}
    found = after(fedsvd, state, [{B: torch.tensor([[3.0], [4.0]])}], [7.0])
    assert found[A].abs().tolist() == [[0.0, pytest.approx(1.0)]]
    assert float(found[B].norm()) == pytest.approx(10.0)
    assert (found[B] @ found[A]).tolist() == [[0.0, pytest.approx(6.0)], [0.0, pytest.approx(8.0)]]


def test_flexlora_keeps_the_larger_of_two_directions():
    """M = (diag(8, 0) + diag(0, 2)) / 2 = diag(4, 1): at rank 1 diag(4, 0) stays, 2 in either factor, 1 is lost."""
    state = {A: torch.zeros(1, 2), B: torch.zeros(2, 1)}
    changes = [
        {A: torch.tensor([[8.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])},
        {A: torch.tensor([[0.0, 1.0]]), B: torch.tensor([[0.0], [2.0]])},
    ]
    found = after(flexlora, state, changes, [1.0, 1.0])
    assert (found[B] @ found[A]).tolist() == [[pytest.approx(4.0), 0.0], [0.0, 0.0]]
    assert float(found[A].norm()) == pytest.approx(2.0)
    assert float(found[B].norm()) == pytest.approx(2.0)
    mean = flexlora.start(state, trained=[A, B])
    for change in changes:
        mean.add(change, weight=1.0)
    lost = gap.of_products(state, products.pairs(mean.result()), found)
    assert gap.whole(lost.values()) == pytest.approx(1 / 17**0.5)


TWO_SITES = [
    {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])},
    {A: torch.tensor([[0.0, 1.0]]), B: torch.tensor([[0.0], [2.0]])},
]
WITH_SIDE = {
    A: torch.zeros(1, 2),
    B: torch.zeros(2, 1),
    "m.residual_A.weight": torch.zeros(1, 2),
    "m.residual_B.weight": torch.zeros(2, 1),
}


def test_fedex_keeps_beside_the_factors_what_their_mean_leaves_out():
    """M = diag(1, 1); B A = (1, 1)^T (1/2, 1/2): the rest is 1/2 (1, -1)^T (1, -1), of rank K - 1 = 1."""
    found = after(fedex, WITH_SIDE, TWO_SITES, [1.0, 1.0])
    assert found[B].tolist() == [[1.0], [1.0]]
    assert found[A].tolist() == [[0.5, 0.5]]
    beside = found["m.residual_B.weight"] @ found["m.residual_A.weight"]
    assert torch.allclose(beside, torch.tensor([[0.5, -0.5], [-0.5, 0.5]]))


def test_flora_moves_all_of_the_products_beside_the_factors():
    """diag(1, 1) needs rank 2; of a side adapter of rank 1 it keeps one of the two equal directions."""
    wide = {**WITH_SIDE, "m.residual_A.weight": torch.zeros(2, 2), "m.residual_B.weight": torch.zeros(2, 2)}
    found = after(flora, wide, TWO_SITES, [1.0, 1.0])
    assert torch.allclose(found["m.residual_B.weight"] @ found["m.residual_A.weight"], torch.eye(2), atol=1e-6)
    assert not found[B].any()
    narrow = after(flora, WITH_SIDE, TWO_SITES, [1.0, 1.0])
    assert float((narrow["m.residual_B.weight"] @ narrow["m.residual_A.weight"]).norm()) == pytest.approx(1.0)


def test_a_direction_that_no_site_used_can_still_be_trained():
    """One site and rank 2, but a change of rank 1: the other row of A must not be zero, or it would stay so."""
    state = {A: torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), B: torch.zeros(2, 2)}
    found = after(flexlora, state, [{A: torch.zeros(2, 3), B: torch.tensor([[3.0, 0.0], [0.0, 0.0]])}], [1.0])
    assert (found[B] @ found[A]).tolist() == [[pytest.approx(3.0), 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert float(found[A].norm(dim=1).min()) > 0.9
    assert found[B][:, 1].tolist() == [0.0, 0.0]


def test_a_factored_svd_is_that_of_the_product():
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(30, 7, generator=generator).double(), torch.randn(7, 20, generator=generator).double()
    u, s, vh = factored.svd(left, right, rank=7)
    assert torch.allclose(s, torch.linalg.svdvals(left @ right)[:7])
    assert torch.allclose((u * s) @ vh, left @ right)
    assert torch.allclose(vh @ vh.T, torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize(("d", "k", "columns", "rank"), [(2, 9, 6, 4), (9, 2, 6, 4), (2, 2, 1, 3), (5, 5, 3, 4)])
def test_a_product_of_less_than_the_rank_gets_zeros_and_whole_rows(d, k, columns, rank):
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(d, columns, generator=generator), torch.randn(columns, k, generator=generator)
    u, s, vh = factored.svd(left, right, rank=rank)
    assert (u.shape, s.shape, vh.shape) == ((d, rank), (rank,), (rank, k))
    assert torch.allclose(vh.norm(dim=1), torch.ones(rank), atol=1e-5)
    assert torch.allclose((u * s) @ vh, left @ right, atol=1e-4)


def test_every_method_says_what_it_does():
    for name, method in table.METHODS.items():
        facts = FACTS[name]
        assert method.__doc__
        assert facts.source.removeprefix("arXiv:") in method.__doc__
        assert facts.title in method.__doc__
