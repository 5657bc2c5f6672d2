"""AdaLoRA's ranks fall by the cubic budget of the paper, and the most important directions stay."""

import torch

from server.aggregate import adalora
from tests import tiny

ADALORA = {
    "adapter.kind": "adalora",
    "adapter.r": "4",
    "adapter.alpha": "8",
    "adapter.target_r": "1",
    "federation.num_rounds": "3",
}


def run(**more: str):
    return tiny.settings("tiny", {**ADALORA, **more})


def state() -> dict[str, torch.Tensor]:
    """Two modules of rank 4; direction i of the first matters i + 1, of the second a tenth of that."""
    size = torch.arange(1.0, 5.0)
    made = {}
    for module, scale in (("m.a", 1.0), ("m.b", 0.1)):
        made[f"{module}.lora_A"] = torch.ones(4, 3)
        made[f"{module}.lora_B"] = torch.ones(5, 4)
        made[f"{module}.lora_E"] = scale * size[:, None]
    return made


def test_the_budget_falls_as_in_the_paper():
    """b(t) = b_T + (b_0 - b_T) (1 - t / T)^3 with b_0 = 8, b_T = 2, T = 3: 3.78, 2.22, 2, whole numbers below."""
    change = {name: 0.1 * tensor for name, tensor in state().items()}
    found = [adalora.left(adalora.agree(state(), change, run=run(), num_done=done)) for done in (1, 2, 3)]
    assert found == [3, 2, 2]


def test_the_most_important_directions_of_all_modules_stay():
    change = {name: 0.1 * tensor for name, tensor in state().items()}
    after = adalora.agree(state(), change, run=run(), num_done=3)
    assert after["m.a.lora_E"].flatten().tolist() == [0.0, 0.0, 3.0, 4.0]
    assert after["m.b.lora_E"].count_nonzero() == 0
    assert torch.equal(after["m.a.lora_A"], torch.ones(4, 3))


def test_control_a_change_elsewhere_keeps_other_directions():
    change = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    change["m.b.lora_E"] = torch.ones(4, 1)
    after = adalora.agree(state(), change, run=run(), num_done=3)
    assert after["m.a.lora_E"].count_nonzero() == 0
    assert after["m.b.lora_E"].flatten()[2:].count_nonzero() == 2


def test_other_kinds_are_left_alone():
    assert adalora.left({"q.lora_A.weight": torch.ones(2, 2)}) is None
    before = state()
    assert adalora.agree(before, before, run=tiny.settings("tiny"), num_done=1) is before
