"""Laws of the aggregation methods, against dense matrices that no method forms."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import ranks, start
from common.frame.records import TensorSpec
from common.run import trainable
from common.run.catalogue.methods import FACTS
from server.aggregate import factored, gap, products
from server.aggregate.methods import table

EXACT = sorted(name for name, facts in FACTS.items() if facts.is_exact)
MIXED = sorted(name for name in EXACT if FACTS[name].mixed_ranks == "yes")
MODULES = {"q_proj": (13, 9), "down_proj": (8, 21)}  # d x k


@st.composite
def rounds(draw) -> dict:
    """A federation in the middle of a run: rank, weights of the sites, which of them take part in each round."""
    num_sites = draw(st.integers(1, 6))
    everyone = list(range(num_sites))
    return {
        "rank": draw(st.integers(1, 6)),
        "weights": draw(st.lists(st.integers(1, 5000), min_size=num_sites, max_size=num_sites)),
        "cohorts": draw(st.lists(st.lists(st.sampled_from(everyone), min_size=1, unique=True), min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 2**31)),
    }


def specs_of(method: str, rank: int, *, residual_rank: int = 9) -> tuple[TensorSpec, ...]:
    """The adapter of a method; a side adapter of rank 9 can hold any change of these modules."""
    ranks = {"lora": rank, **({"residual": residual_rank} if FACTS[method].base_delta == "residual" else {})}
    shapes = {
        f"{module}.{kind}_{factor}.weight": (r, k) if factor == "A" else (d, r)
        for module, (d, k) in MODULES.items()
        for kind, r in ranks.items()
        for factor in "AB"
    }
    if FACTS[method].has_cores:  # of two heads where the rank is even, else of one
        shapes |= {f"{module}.lora_H.weight": (rank, rank // (2 - rank % 2)) for module in MODULES}
    return tuple(TensorSpec(name, shapes[name]) for name in sorted(shapes))


def begin(method: str, specs, generator) -> dict[str, torch.Tensor]:
    """The middle of a run: both factors at work; A as the method starts it."""
    state = {spec.name: torch.randn(spec.shape, generator=generator) for spec in specs}
    which = FACTS[method].fixed or "A"
    made = start.factors(specs, seed=3, which=which) if FACTS[method].has_orthonormal_start else {}
    return {**state, **made}


def weight_of(state, module: str) -> torch.Tensor:
    """The effective change of a module's weight, dense."""
    b_dr, a_rk = factored.effective(state)[module]
    return b_dr.double() @ a_rk.double()


def play(method: str, state, specs, *, round_index: int, weights, generator, site_ranks=()):
    """One round of sites that move at random; the new state, and the mean of the sites' effective weights."""
    names = trainable.sent_names(method, specs, round_index=round_index)
    combined = table.find(method).start(state, trained=names)
    ideal = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in MODULES.items()}
    for weight, rank in itertools.zip_longest(weights, site_ranks):
        received = ranks.cut(state, trainable.at_rank(specs, rank) if rank else specs)
        change = {name: torch.randn(received[name].shape, generator=generator) for name in names}
        local = {name: tensor + change.get(name, 0.0) for name, tensor in received.items()}
        for module, total in ideal.items():
            total += weight / sum(weights) * weight_of(local, module)
        combined.add(change, weight=weight)
    return table.find(method).apply(state, combined.result()), ideal


def errors(method: str, case: dict) -> list[float]:
    """|| W_new - ideal || / || ideal - W_old || of every round and module."""
    generator = torch.Generator().manual_seed(case["seed"])
    specs = specs_of(method, case["rank"])
    state = begin(method, specs, generator)
    found = []
    for round_index, cohort in enumerate(case["cohorts"]):
        weights = [case["weights"][site] for site in cohort]
        held = {"site_ranks": [case["ranks"][site] for site in cohort]} if "ranks" in case else {}
        after, ideal = play(method, state, specs, round_index=round_index, weights=weights, generator=generator, **held)
        assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in state.items()}
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        for module, wanted in ideal.items():
            step = (wanted - weight_of(state, module)).norm()
            found.append(float((weight_of(after, module) - wanted).norm() / step))
        state = after
    return found


@pytest.mark.parametrize("method", EXACT)
@given(case=rounds())
def test_a_method_that_says_so_applies_the_mean_of_the_sites_effective_weights(method, case):
    assert max(errors(method, case)) < 1e-5


@st.composite
def mixed_rounds(draw) -> dict:
    """Sites of ranks up to that of the global adapter."""
    case = draw(rounds())
    held = st.integers(1, case["rank"])
    return {**case, "ranks": draw(st.lists(held, min_size=len(case["weights"]), max_size=len(case["weights"])))}


@pytest.mark.parametrize("method", MIXED)
@given(case=mixed_rounds())
def test_a_method_that_says_so_is_exact_over_sites_of_different_ranks(method, case):
    assert max(errors(method, case)) < 1e-5


def test_control_one_that_cuts_for_smaller_sites_is_not():
    case = {"rank": 4, "ranks": [1, 4, 2], "weights": [3, 1, 5], "cohorts": [[0, 1, 2]], "seed": 1}
    assert MIXED == ["flora"]
    assert max(errors("flora", case)) < 1e-5
    assert min(errors("fedsvd", case)) > 0.1
    assert max(errors("fedsvd", {**case, "ranks": [4, 4, 4]})) < 1e-5


@given(case=mixed_rounds())
def test_under_fedsvd_a_smaller_site_moves_what_it_holds_and_nothing_else(case):
    """By numpy's padding: B A grows by the mean of the sites' changes, zero where a site holds nothing, times A."""
    generator = torch.Generator().manual_seed(case["seed"])
    specs = specs_of("fedsvd", case["rank"])
    state = begin("fedsvd", specs, generator)
    combined = table.find("fedsvd").start(state, trained=[n for n in state if ".lora_B." in n])
    moved = {module: torch.zeros(shape[0], case["rank"], dtype=torch.float64) for module, shape in MODULES.items()}
    for weight, rank in zip(case["weights"], case["ranks"], strict=True):
        change = {f"{m}.lora_B.weight": torch.randn(d, rank, generator=generator) for m, (d, _) in MODULES.items()}
        combined.add(change, weight=weight)
        for module, total in moved.items():
            total[:, :rank] += weight / sum(case["weights"]) * change[f"{module}.lora_B.weight"].double()
    after = table.find("fedsvd").apply(state, combined.result())
    for module, (b_dr, a_rk) in factored.modules(state).items():
        wanted = (b_dr.double() + moved[module]) @ a_rk.double()
        assert float((weight_of(after, module) - wanted).norm()) < 1e-5 * float(wanted.norm())


@given(case=mixed_rounds())
def test_flexlora_weighs_each_component_among_the_sites_that_hold_it(case):
    """raFLoRA's mean, component by component, on dense matrices; then cut as ever."""
    generator = torch.Generator().manual_seed(case["seed"])
    specs, rank = specs_of("flexlora", case["rank"]), case["rank"]
    state = begin("flexlora", specs, generator)
    combined = table.find("flexlora").start(state, trained=list(state))
    ideal = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in MODULES.items()}
    for weight, held in zip(case["weights"], case["ranks"], strict=True):
        received = ranks.cut(state, trainable.at_rank(specs, held))
        change = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in received.items()}
        combined.add(change, weight=weight)
        for module in MODULES:
            b_dq, a_qk = (received[n] + change[n] for n in (f"{module}.lora_B.weight", f"{module}.lora_A.weight"))
            for j in range(held):
                among = sum(w for w, q in zip(case["weights"], case["ranks"], strict=True) if q > j)
                ideal[module] += weight / among * torch.outer(b_dq[:, j].double(), a_qk[j].double())
    for module, (b_dr, a_rk) in factored.modules(state).items():  # what no site holds stays
        ideal[module] += b_dr[:, max(case["ranks"]) :].double() @ a_rk[max(case["ranks"]) :].double()
    after = table.find("flexlora").apply(state, combined.result())
    for module, wanted in ideal.items():
        values = torch.linalg.svdvals(wanted)
        lost = float((weight_of(after, module) - wanted).norm())
        assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-5 * float(values[0]))


@pytest.mark.parametrize("held", [[2, 1], [4, 1]])
def test_under_flexlora_a_round_keeps_what_its_sites_do_not_hold(held):
    """Sites that change nothing leave the adapter as it was, whether a larger one is among them or away."""
    generator = torch.Generator().manual_seed(3)
    specs = specs_of("flexlora", 4)
    state = begin("flexlora", specs, generator)
    combined = table.find("flexlora").start(state, trained=list(state))
    for rank in held:
        combined.add({spec.name: torch.zeros(spec.shape) for spec in trainable.at_rank(specs, rank)}, weight=1.0)
    after = table.find("flexlora").apply(state, combined.result())
    for module in MODULES:
        assert torch.allclose(weight_of(after, module), weight_of(state, module), atol=1e-5)
    narrow = ranks.cut(state, trainable.at_rank(specs, 2))  # the control: without it much would be missing
    assert not torch.allclose(weight_of(narrow, "q_proj"), weight_of(state, "q_proj"), atol=0.1)


def test_control_the_mean_of_both_factors_does_not():
    case = {"rank": 4, "weights": [3, 1, 5], "cohorts": [[0, 1, 2]], "seed": 1}
    assert min(errors("fedavg", case)) > 0.1


def test_control_averaging_both_factors_in_turn_is_exact_only_because_one_stays(monkeypatch):
    """The same file under facts that let both move is inexact: the law rests on what a site trains."""
    from dataclasses import replace

    case = {"rank": 4, "weights": [3, 1, 5], "cohorts": [[0, 1, 2]], "seed": 1}
    assert max(errors("rolora", case)) < 1e-5
    monkeypatch.setattr(trainable, "FACTS", {**FACTS, "rolora": replace(FACTS["rolora"], trains=("AB",))})
    assert min(errors("rolora", case)) > 0.1


@given(case=rounds())
def test_flexlora_is_the_best_adapter_of_its_rank(case):
    """Eckart and Young: what is lost is the tail of the singular values, by numpy on the dense mean."""
    generator = torch.Generator().manual_seed(case["seed"])
    specs, rank = specs_of("flexlora", case["rank"]), case["rank"]
    state = begin("flexlora", specs, generator)
    after, ideal = play("flexlora", state, specs, round_index=0, weights=case["weights"], generator=generator)
    for module, wanted in ideal.items():
        values = torch.linalg.svdvals(wanted)
        lost = float((weight_of(after, module) - wanted).norm())
        assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-5 * float(values[0]))


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_a_side_adapter_that_is_too_narrow_loses_what_it_must_and_the_loss_is_told(method):
    generator = torch.Generator().manual_seed(2)
    specs = specs_of(method, 3, residual_rank=4)
    state = begin(method, specs, generator)
    names = trainable.sent_names(method, specs, round_index=0)
    combined = table.find(method).start(state, trained=names)
    ideal = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in MODULES.items()}
    for _ in range(3):
        change = {name: torch.randn(state[name].shape, generator=generator) for name in names}
        local = {name: tensor + change.get(name, 0.0) for name, tensor in state.items()}
        combined.add(change, weight=1.0)
        for module, total in ideal.items():
            total += weight_of(local, module) / 3
    result = combined.result()
    after = table.find(method).apply(state, result)
    told = gap.of_products(state, products.pairs(result), after)
    for module, wanted in ideal.items():
        lost, step = (float((wanted - weight_of(other, module)).norm()) for other in (after, state))
        assert told[module] == pytest.approx((lost, step, 0.0, 0.0), rel=1e-5)
        beside = wanted - (factored.modules(after)[module][0].double() @ factored.modules(after)[module][1].double())
        assert lost == pytest.approx(float(torch.linalg.svdvals(beside)[4:].norm()), rel=1e-4)


def test_flora_draws_a_anew_every_round():
    generator = torch.Generator().manual_seed(2)
    specs = specs_of("flora", 3)
    first = begin("flora", specs, generator)
    second, _ = play("flora", first, specs, round_index=0, weights=[1], generator=generator)
    third, _ = play("flora", second, specs, round_index=1, weights=[1], generator=generator)
    for name in (name for name in first if ".lora_A." in name):
        assert not torch.equal(second[name], third[name])
        assert float(second[name].abs().max()) <= second[name].shape[1] ** -0.5
        assert not second[name.replace("lora_A", "lora_B")].any()


@given(case=rounds())
def test_fedsvd_keeps_the_rows_of_a_orthonormal(case):
    generator = torch.Generator().manual_seed(case["seed"])
    specs = specs_of("fedsvd", case["rank"])
    state = begin("fedsvd", specs, generator)
    after, _ = play("fedsvd", state, specs, round_index=0, weights=case["weights"], generator=generator)
    for _, a_rk in factored.modules(after).values():
        assert float((a_rk @ a_rk.T - torch.eye(case["rank"])).abs().max()) < 1e-5


@pytest.mark.parametrize("method", sorted(FACTS))
def test_the_order_of_arrival_does_not_change_a_bit(method):
    specs = specs_of(method, 4)
    state = begin(method, specs, torch.Generator().manual_seed(1))
    names = trainable.sent_names(method, specs, round_index=0)
    changes = [
        {name: torch.randn(state[name].shape, generator=torch.Generator().manual_seed(site)) for name in names}
        for site in range(4)
    ]
    results = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        combined = table.find(method).start(state, trained=names)
        for site in order:
            combined.add(changes[site], weight=site + 1)
        results.append(table.find(method).apply(state, combined.result()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in state)


@pytest.mark.parametrize("method", sorted(FACTS))
def test_a_weight_that_is_not_positive_and_a_round_of_nobody_are_refused(method):
    specs = specs_of(method, 2)
    state = begin(method, specs, torch.Generator().manual_seed(1))
    names = trainable.sent_names(method, specs, round_index=0)
    combined = table.find(method).start(state, trained=names)
    with pytest.raises(ValueError, match="weight"):
        combined.add({name: state[name] for name in names}, weight=0.0)
    with pytest.raises(ValueError, match="no upload"):
        combined.result()


@pytest.mark.parametrize("method", sorted(table.METHODS))
def test_an_update_that_stays_in_bfloat16_counts_as_the_same_in_float32(method):
    """Uploads are not widened on arrival; every value of bfloat16 is one of float32, so no bit may differ."""
    specs, generator = specs_of(method, 4), torch.Generator().manual_seed(1)
    state = begin(method, specs, generator)
    names = trainable.sent_names(method, specs, round_index=1)
    sent = [{name: torch.randn(state[name].shape, generator=generator).bfloat16() for name in names} for _ in range(5)]
    narrow, wide = (
        combined(method, state, [{name: widen(t) for name, t in one.items()} for one in sent])
        for widen in (torch.Tensor.bfloat16, torch.Tensor.float)
    )
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)
    assert {tensor.dtype for tensor in narrow.values()} == {torch.float32}
    others = combined(method, state, sent[1:])
    assert not all(torch.equal(others[name], wide[name]) for name in wide)  # control


def combined(method: str, state, uploads) -> dict[str, torch.Tensor]:
    """The adapter after a round of these uploads, of growing weight."""
    round_ = table.find(method).start(state, trained=list(uploads[0]))
    for number, upload in enumerate(uploads, start=1):
        round_.add(upload, weight=float(number))
    return dict(table.find(method).apply(state, round_.result()))
