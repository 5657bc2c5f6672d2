"""What the table of kinds says of the mean, held on effective weights that peft itself merges, or virtual tokens."""

import copy

import pytest
import torch
from torch import Tensor

from common.adapter import adapter
from common.run.catalogue.kinds import KINDS
from server.aggregate.methods import table
from tests import tiny

WEIGHTS = (3.0, 1.0, 5.0)
TOKENS = ("prompt_tuning", "prefix_tuning", "p_tuning")
OTHERS = sorted(kind for kind in KINDS if kind != "lora")


@torch.no_grad()
def effective(model, tensors) -> Tensor:
    """All that the model computes with: its merged weights, or what stands before the row; one long vector."""
    adapter.write(model, tensors)
    if hasattr(model, "prompt_encoder"):
        return model.prompt_encoder["default"](model.prompt_tokens["default"]).double().flatten()
    merged = copy.deepcopy(model).merge_and_unload()
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(merged.named_parameters())])


def error(kind: str, load_tiny) -> float:
    """|| new - mean of the sites' || / || mean of the sites' - old || after one round of sites that move at random."""
    engine = load_tiny(tiny.of_kind(kind))
    generator = torch.Generator().manual_seed(7)

    def moved(state, by: float) -> dict[str, Tensor]:
        return {name: value + by * torch.randn(value.shape, generator=generator) for name, value in state.items()}

    before = moved(engine.initial, 0.3)
    combined = table.find("fedavg").start(before, trained=list(before))
    ideal = torch.zeros(())
    for weight in WEIGHTS:
        local = moved(before, 0.3)
        combined.add({name: local[name] - before[name] for name in before}, weight=weight)
        ideal = ideal + weight / sum(WEIGHTS) * effective(engine.model, local)
    after = table.find("fedavg").apply(before, combined.result())
    old, new = effective(engine.model, before), effective(engine.model, after)
    return float((new - ideal).norm() / (ideal - old).norm())


@pytest.mark.parametrize("kind", OTHERS)
def test_the_mean_is_exact_for_the_kinds_that_say_so_and_for_no_other(load_tiny, kind):
    found = error(kind, load_tiny)
    assert found < 1e-5 if not KINDS[kind].inexact else found > 1e-3, found
