"""AdaLoRA's ranks, agreed once a round: the coordinator alone zeroes, so all sites begin a round with the same.

A site trains all of P diag(e) Q, zeroed e too, as in AdaLoRA a triplet may come back; after the mean the budget of the
round is kept and the other e are zeroed. Importance and budget are peft's own (`RankAllocator`), with two differences
that follow from federation: the mean change of a round stands in the place of minus the gradient, in |w dw|, and
nothing is smoothed over rounds, so that a resumed run needs no memory of it.

Source: Zhang et al. 2023, arXiv:2303.10512, equations 8 to 12, and section 3.3 for the cubic budget.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from common.run.config import RunConfig
from server.aggregate.method import State

_NAME: Final = "default"  # of the adapter, as peft's allocator looks for it
_E: Final = ".lora_E"


class _Named:
    """Tensors as the allocator asks a model for them."""

    def __init__(self, tensors: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> None:
        self._own = {f"{name}.{_NAME}": nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
        for name, tensor in change.items():
            self._own[f"{name}.{_NAME}"].grad = -tensor

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names with the adapter's, as in a model."""
        yield from self._own.items()

    def tensors(self) -> dict[str, Tensor]:
        """What is left, under the run's names."""
        return {name.removesuffix(f".{_NAME}"): parameter.detach() for name, parameter in self._own.items()}


def agree(after: State, change: State, *, run: RunConfig, num_done: int) -> State:
    """The global adapter with no more rank than the round's budget.

    Args:
        after: The global adapter after the mean; of any kind, and only AdaLoRA's is touched.
        change: The round's mean change.
        run: The run file.
        num_done: Rounds that are done with this one.
    """
    settings = run.adapter
    if settings.kind != "adalora":
        return after
    schedule = AdaLoraConfig(init_r=settings.r, target_r=settings.final_r, total_step=run.federation.num_rounds)
    named = _Named(after, change)
    allocator = RankAllocator(named, schedule, _NAME)  # type: ignore[no-untyped-call]
    budget, _ = allocator.budget_schedule(num_done)
    if budget >= allocator.init_bgt:
        return after
    allocator.update_ipt(named)  # type: ignore[no-untyped-call]
    allocator.mask_to_budget(named, budget)  # type: ignore[no-untyped-call]
    return named.tensors()


def left(state: State) -> int | None:
    """Rank over all modules, zeroed triplets aside; None for a kind whose ranks do not change."""
    found = [int(torch.count_nonzero(tensor)) for name, tensor in state.items() if name.endswith(_E)]
    return sum(found) if found else None
