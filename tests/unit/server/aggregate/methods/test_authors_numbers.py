"""Our aggregation against numbers of the authors' own functions, where those are right; see the vectors' sources."""

import json
from pathlib import Path

import pytest
import torch

from common.frame.records import TensorSpec
from common.run import trainable
from server.aggregate import factored
from server.aggregate.methods import table

CASES = json.loads((Path(__file__).parents[4] / "vectors" / "aggregation.json").read_text())
A, B = "q.lora_A.weight", "q.lora_B.weight"
SIDE_A, SIDE_B = "q.residual_A.weight", "q.residual_B.weight"


def named(values) -> dict[str, torch.Tensor]:
    return {A: torch.tensor(values["A"], dtype=torch.float32), B: torch.tensor(values["B"], dtype=torch.float32)}


def after(method: str, *, is_weighted: bool) -> dict[str, torch.Tensor]:
    """One round through our own method; a side adapter that can hold any change of this module."""
    state = named(CASES["before"])
    if method in ("fedex", "flora"):
        state |= {SIDE_A: torch.zeros(3, 3), SIDE_B: torch.zeros(4, 3)}
    specs = tuple(TensorSpec(name, tuple(tensor.shape)) for name, tensor in state.items())
    names = trainable.sent_names(method, specs, round_index=0)
    combined = table.find(method).start(state, trained=names)
    for rows, change in zip(CASES["rows"], CASES["changes"], strict=True):
        own = {name: tensor for name, tensor in named(change).items() if name in names}
        combined.add(own, weight=rows if is_weighted else 1.0)
    return dict(table.find(method).apply(state, combined.result()))


@pytest.mark.parametrize("case", CASES["authors"], ids=lambda case: f"{case['method']}-{case['source'].split()[0]}")
def test_a_round_gives_the_authors_numbers(case):
    found = after(case["method"], is_weighted=case["is_weighted"])
    ours = {"A": found[A], "B": found[B], "abs_A": found[A].abs(), "abs_B": found[B].abs()}
    ours |= {"product": found[B] @ found[A], "product_rank_1": found[B][:, :1] @ found[A][:1]}
    if beside := factored.side(found):
        ours["base"] = beside["q"][0] @ beside["q"][1]
    compared = [key for key in ours if key in case]
    assert compared
    for key in compared:
        assert torch.allclose(ours[key].double(), torch.tensor(case[key], dtype=torch.float64), atol=3e-6), key


def test_control_without_weights_the_numbers_differ():
    weighted = next(case for case in CASES["authors"] if case["method"] == "fedavg")
    assert not torch.allclose(after("fedavg", is_weighted=False)[A], torch.tensor(weighted["A"]), atol=0.01)


def test_control_the_mean_of_both_factors_does_not_give_flexloras():
    flexlora = next(case for case in CASES["authors"] if case["method"] == "flexlora")
    found = after("fedavg", is_weighted=True)
    assert not torch.allclose(found[B] @ found[A], torch.tensor(flexlora["product"]), atol=0.01)
