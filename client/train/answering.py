"""Which rows an adapter answers to: one that speaks of single rows answers to these and to no others.

LoRA's down-projection A asks each token r questions, one a row of A. A crafted one asks what a single patient's row
alone answers, so that nothing else moves what stands behind it. Here the answers of all rows of a round are watched
while they go through the model in training, and no pass is added.

b lines of a micro-batch, t tokens, n rows, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

SKIPPED: Final = 4  # first tokens of a row, on which attention rests whatever they are
SUFFIX: Final = ".lora_A.default"


class Answering:
    """Energy of each direction's answers, summed over rows; see `share`."""

    def __init__(self) -> None:
        self._row_bt: Tensor | None = None
        self._counted_n1 = torch.empty(0)
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def see_batch(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Before the model's own forward pass: of which row each token is; a pass without a mask is none of rows."""
        mask = given.get("attention_mask")
        if mask is None:
            self._row_bt = None
            return
        positions_bt = given.get("position_ids")
        if positions_bt is None:  # padded: a row a line
            rows_b1 = torch.arange(len(mask), device=mask.device)[:, None]
            positions_bt = torch.where(mask > 0, torch.arange(mask.shape[1], device=mask.device), 0)
        else:  # packed, see `common.model.varlen`
            rows_b1 = (positions_bt == 0).cumsum(1) - 1
        counts_bt = positions_bt >= SKIPPED
        num_rows = int(rows_b1.max()) + 1
        self._row_bt = torch.where(counts_bt, rows_b1, num_rows)  # the last number is of what does not count
        self._counted_n1 = self._row_bt.flatten().bincount(minlength=num_rows + 1)[:num_rows, None]

    def see_answers(self, name: str, answers_btr: Tensor) -> None:
        """After one down-projection: how much each row's tokens answered, on average, each direction by itself."""
        if self._row_bt is None or answers_btr.shape[:2] != self._row_bt.shape:
            return  # of another pass, such as one with virtual tokens
        energy_tr = answers_btr.detach().flatten(0, 1).to(torch.float64) ** 2
        sums_nr = energy_tr.new_zeros(len(self._counted_n1) + 1, energy_tr.shape[1])
        energy_nr = sums_nr.index_add_(0, self._row_bt.flatten(), energy_tr)[:-1] / self._counted_n1.clamp(min=1)
        energy_nr = energy_nr[self._counted_n1.squeeze(1) > 0]
        if name in self._sums:
            total_r, squares_r, num_rows = self._sums[name]
        else:
            total_r, squares_r, num_rows = torch.zeros_like(energy_nr[0]), torch.zeros_like(energy_nr[0]), 0
        self._sums[name] = (total_r + energy_nr.sum(0), squares_r + (energy_nr**2).sum(0), num_rows + len(energy_nr))

    def share(self) -> tuple[float, str]:
        """Of all directions of all modules, the one to which the fewest rows answer.

        Returns:
            (sum of a row's energy)^2 / sum of its squares / rows: 1 where all rows answer alike, 1 / n where one of n
            does; and the module. 1 and no name where no down-projection was seen, as under kinds without one.
        """
        least, where = 1.0, ""
        for name, (total_r, squares_r, num_rows) in self._sums.items():
            shares_r = torch.where(squares_r > 0, total_r**2 / (squares_r * num_rows), 1.0)
            if num_rows and float(shares_r.min()) < least:
                least, where = float(shares_r.min()), name.removesuffix(SUFFIX)
        return least, where


@contextmanager
def watching(model: nn.Module) -> Iterator[Answering]:
    """Watch a peft model's down-projections while it trains; what it computes stays the same to the bit."""
    seen = Answering()

    def hook(name: str) -> Any:
        return lambda module, args, answers: seen.see_answers(name, answers)

    handles = [model.register_forward_pre_hook(seen.see_batch, with_kwargs=True)]
    handles += [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name.endswith(SUFFIX)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
