"""Methods that are marked experimental: cases worked by hand, the authors' code where there is some, dense matrices."""

import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from common import events
from common.run.catalogue.methods import FACTS
from server.aggregate import factored, gap
from server.aggregate.methods import fedrot, hetlora, lora_fair
from server.folder import run_files
from server.run import run
from tests import tiny

A, B = "m.lora_A.weight", "m.lora_B.weight"


def after(method, state, changes, weights, **round_index) -> dict[str, torch.Tensor]:
    combined = method.start(state, trained=list(state), **round_index)
    for change, weight in zip(changes, weights, strict=True):
        combined.add(change, weight=weight)
    return dict(method.apply(state, combined.result()))


def scalars(*pairs) -> list[dict[str, torch.Tensor]]:
    return [{B: torch.tensor([[float(b)]]), A: torch.tensor([[float(a)]])} for b, a in pairs]


ZERO = scalars((0, 0))[0]


def test_lora_fair_adds_to_b_what_the_mean_of_the_factors_leaves_out():
    """B' = A' = 2, the mean of the products is 5, so 1 is missing: dB = 1 * 2 / (2 * 2 + 0.01)."""
    found = after(lora_fair, ZERO, scalars((1, 1), (3, 3)), [1.0, 1.0])
    assert found[A].item() == 2.0
    assert found[B].item() == pytest.approx(2 + 2 / 4.01)


def test_lora_fair_solves_its_problem_on_dense_matrices():
    """Where the derivative is zero: (M - B A') A'^T = lambda (B - B')."""
    generator = torch.Generator().manual_seed(4)
    state = {A: torch.randn(3, 9, generator=generator), B: torch.randn(7, 3, generator=generator)}
    changes = [{name: torch.randn(t.shape, generator=generator) for name, t in state.items()} for _ in range(4)]
    weights = [1.0, 2.0, 3.0, 4.0]
    found = after(lora_fair, state, changes, weights)
    local = [{name: (state[name] + change[name]).double() for name in state} for change in changes]
    shares = [weight / 10 for weight in weights]
    mean = {name: sum(p * site[name] for p, site in zip(shares, local, strict=True)) for name in state}
    wanted = sum(p * site[B] @ site[A] for p, site in zip(shares, local, strict=True))
    assert torch.allclose(found[A].double(), mean[A], atol=1e-6)
    left = (wanted - found[B].double() @ mean[A]) @ mean[A].T
    assert torch.allclose(left, 0.01 * (found[B].double() - mean[B]), atol=1e-4)
    plain, corrected = (float((wanted - b @ mean[A]).norm()) for b in (mean[B], found[B].double()))
    assert corrected < 0.99 * plain


def test_hetlora_weighs_a_site_by_its_product_and_not_by_its_rows():
    """|| B A || is 1 and 3: B = (1 * 1 + 3 * 3) / 4, A = 1; rows would have said otherwise."""
    found = after(hetlora, ZERO, scalars((1, 1), (3, 1)), [100.0, 1.0])
    assert (found[B].item(), found[A].item()) == (2.5, 1.0)


def test_hetlora_pads_a_smaller_site_with_zeros():
    """Sizes 2 and 2 (from 1 * 2 and 2 * 1): the second component is half of what the larger site holds."""
    state = {A: torch.zeros(2, 1), B: torch.zeros(1, 2)}
    small = {A: torch.tensor([[2.0]]), B: torch.tensor([[1.0]])}
    large = {A: torch.tensor([[0.0], [1.0]]), B: torch.tensor([[0.0, 2.0]])}
    found = after(hetlora, state, [small, large], [1.0, 1.0])
    assert found[A].tolist() == [[1.0], [0.5]]
    assert found[B].tolist() == [[0.5, 1.0]]


def test_hetlora_takes_the_size_over_all_modules():
    generator = torch.Generator().manual_seed(4)
    shapes = {A: (2, 5), B: (4, 2), "n.lora_A.weight": (2, 3), "n.lora_B.weight": (6, 2)}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    sites = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)]
    sizes = [sum(float((b @ a).norm()) for b, a in factored.modules(site).values()) for site in sites]
    found = after(hetlora, state, sites, [1.0, 1.0, 1.0])
    for name in shapes:
        wanted = sum(size / sum(sizes) * site[name] for size, site in zip(sizes, sites, strict=True))
        assert torch.allclose(found[name], wanted, atol=1e-6)


def test_hetlora_leaves_the_adapter_where_no_site_has_a_product():
    state = {A: torch.ones(1, 1), B: torch.zeros(1, 1)}
    assert after(hetlora, state, scalars((0, 5), (0, 7)), [1.0, 1.0]) == state


OWN = (
    torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0], [1.0, 1.0]]),
    torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]]),
)
GLOBAL = (
    torch.tensor([[0.0, 1.0], [-1.0, 2.0], [-3.0, 0.0], [-1.0, 1.0]]),
    torch.tensor([[0.0, 1.0, 1.0], [-2.0, 0.0, 1.0]]),
)
# A of this case by the steps of rotation_align_optimization_soft, github.com/haoran-zh/FedRot-LoRA, commit 185c8de.
AUTHORS = [
    (False, 1.0, [[0.447214, 1.788854, -0.894427], [-0.894427, -1.341641, -0.447214]]),
    (False, 0.4, [[0.908719, 2.234847, -0.417408], [-0.417408, 0.073903, -0.908719]]),
    (True, 1.0, [[0.0, -1.0, 1.0], [1.0, 2.0, 0.0]]),
    (True, 0.4, [[0.832050, 1.109400, 0.554700], [0.554700, 1.941451, -0.832050]]),
]


@pytest.mark.parametrize(("is_odd", "strength", "wanted"), AUTHORS)
def test_fedrot_turns_as_the_authors_do_and_keeps_the_product(is_odd, strength, wanted):
    b_dr, a_rk = fedrot.turn(OWN, like=GLOBAL, is_odd=is_odd, strength=strength)
    assert torch.allclose(a_rk, torch.tensor(wanted, dtype=torch.float64), atol=2e-6)
    assert torch.allclose(b_dr @ a_rk, (OWN[0] @ OWN[1]).double(), atol=1e-6)


def test_fedrot_all_the_way_is_the_procrustes_rotation():
    found, _ = fedrot.turn(OWN, like=GLOBAL, is_odd=True, strength=1.0)
    rotation, _ = orthogonal_procrustes(OWN[0].double().numpy(), GLOBAL[0].double().numpy())
    assert torch.allclose(found, OWN[0].double() @ torch.from_numpy(rotation), atol=1e-6)


def test_fedrot_makes_a_rotation_of_a_reflection():
    """Of diag(1, -1) the nearest rotation along the stronger direction is I."""
    own = (torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    _, a_rk = fedrot.turn(own, like=(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])), is_odd=False, strength=1.0)
    assert torch.allclose(a_rk, own[1].double(), atol=1e-6)


def test_fedrot_lessens_the_gap_of_sites_that_hold_one_product_in_different_coordinates():
    """Two sites of the same product, the second in coordinates that are turned by 1.2 rad."""
    generator = torch.Generator().manual_seed(4)
    state = {A: torch.randn(2, 6, generator=generator), B: torch.randn(5, 2, generator=generator)}
    cos, sin = torch.tensor(1.2).cos(), torch.tensor(1.2).sin()
    turn = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    changes = [{name: torch.zeros_like(t) for name, t in state.items()}]
    changes.append({A: turn.T @ state[A] - state[A], B: state[B] @ turn - state[B]})
    plain = {name: state[name] + changes[1][name] / 2 for name in state}
    turned = [after(fedrot, state, changes, [1.0, 1.0], round_index=number) for number in (0, 1)]
    gaps = [float((found[B] @ found[A] - state[B] @ state[A]).norm()) for found in (plain, *turned)]
    assert max(gaps[1:]) < 0.6 * gaps[0]


def test_fedrot_looks_at_a_while_b_is_zero():
    state = {A: GLOBAL[1], B: torch.zeros(4, 2)}
    change = {A: OWN[1] - GLOBAL[1], B: OWN[0]}
    even, odd = (after(fedrot, state, [change], [1.0], round_index=number) for number in (0, 1))
    assert all(torch.equal(even[name], odd[name]) for name in state)
    begun = {**state, B: GLOBAL[0]}
    moved = {**change, B: OWN[0] - GLOBAL[0]}
    even, odd = (after(fedrot, begun, [moved], [1.0], round_index=number) for number in (0, 1))
    assert not torch.allclose(even[A], odd[A])  # the control


def test_the_gap_of_sites_of_different_ranks_is_that_of_what_they_hold():
    generator = torch.Generator().manual_seed(4)
    state = {A: torch.randn(3, 6, generator=generator), B: torch.randn(5, 3, generator=generator)}
    meter, wanted = gap.GapMeter(state, seed=1), torch.zeros(5, 6, dtype=torch.float64)
    changes = []
    for rank in (3, 1):
        changes.append({A: torch.randn(rank, 6, generator=generator), B: torch.randn(5, rank, generator=generator)})
        b_dq, a_qk = state[B][:, :rank] + changes[-1][B], state[A][:rank] + changes[-1][A]
        wanted += 0.5 * b_dq.double() @ a_qk.double()
        meter.add(changes[-1], weight=1.0)
    found = after(hetlora, state, changes, [1.0, 1.0])
    norms = [float((wanted - one[B].double() @ one[A].double()).norm()) for one in (found, state)]
    assert meter.per_module(found)["m"] == pytest.approx([*norms, 0.0, 0.0], rel=1e-5)


@pytest.mark.parametrize("method", ["lora_fair", "fedavg"])
def test_a_run_says_at_its_start_that_its_method_is_experimental(engine, tiny_base, tmp_path, method):
    settings = tiny.settings(tiny_base, {"aggregation.method": method, "federation.num_rounds": "1"})
    log = run_files.prepare(settings, tmp_path)
    run.execute(settings, fleet=tiny.fleet(tiny.make_nodes(engine)), engine=engine, folder=tmp_path, log=log)
    told = [event["kind"] for event in events.read(log.path)]
    assert ("warned" in told) == FACTS[method].is_experimental
    assert told.index("run_started") == 0
