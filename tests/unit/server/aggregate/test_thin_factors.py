"""No method, and not the gap, ever makes a matrix of a module's own size: everything is done on thin factors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.frame.records import TensorSpec
from common.run import trainable
from common.run.catalogue.methods import FACTS
from server.aggregate import factored, gap, products
from server.aggregate.methods import table

D, K, R = 211, 197, 4  # no other size of a round is one of the first two
SHAPES = {"A": (R, K), "B": (D, R), "H": (R, R // 2)}


class Watch(TorchDispatchMode):
    """Notes the shape of whatever torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)}
        return found

    @property
    def has_large(self) -> bool:
        """Whether both of a module's own sizes, or one of them twice, are in one shape."""
        return any(sum(size in (D, K) for size in shape) > 1 or D * K in shape for shape in self.shapes)


def state_of(method: str) -> dict[str, torch.Tensor]:
    """One module as the method has it."""
    shapes = {f"m.lora_{factor}.weight": SHAPES[factor] for factor in ("ABH" if FACTS[method].has_cores else "AB")}
    if FACTS[method].base_delta == "residual":
        shapes |= {"m.residual_A.weight": (8, K), "m.residual_B.weight": (D, 8)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("method", sorted(FACTS))
def test_a_round_and_its_gap_stay_thin(method):
    state = state_of(method)
    names = trainable.sent_names(method, [TensorSpec(n, tuple(t.shape)) for n, t in state.items()], round_index=0)
    changes = [{name: torch.randn(state[name].shape) for name in names} for _ in range(3)]
    with Watch() as watch:
        combined, meter = table.find(method).start(state, trained=names), gap.GapMeter(state, seed=1)
        for change in changes:
            combined.add(change, weight=2.0)
            if FACTS[method].has_bias:
                meter.add(change, weight=2.0)
        result = combined.result()
        after = table.find(method).apply(state, result)
        meter.per_module(after)
        gap.of_products(state, products.pairs(result), after)
        factored.effective(after)
    assert watch.shapes
    assert not watch.has_large


def test_control_a_product_that_is_written_out_is_noticed():
    state = state_of("fedavg")
    with Watch() as watch:
        _ = state["m.lora_B.weight"] @ state["m.lora_A.weight"]
    assert watch.has_large
