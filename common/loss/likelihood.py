"""How likely a model finds the answers of a batch. B lines, T tokens, H hidden values, V words, N targets, R rows."""

from typing import Any

import torch
from torch import Tensor, nn

from common.loss.linear_nll import linear_nll
from common.model import peft_kinds, varlen
from common.text.prompts import Batch


def answer_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the negative log-likelihood over the answer tokens of a batch.

    Never the model's own `.loss`, whose normalisation couples the rows of a batch.

    Returns:
        The sum in nats, a float32 scalar that carries gradients, and the number of tokens in it.
    """
    return token_nll(model, batch).sum(), sum(batch.num_targets)


def row_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The same sum for each row by itself. Shape: (R,), float32, with gradients."""
    nll_n, width = token_nll(model, batch), max(batch.num_targets)
    cells = [row * width + place for row, number in enumerate(batch.num_targets) for place in range(number)]
    cells_n = torch.tensor(cells, dtype=torch.int64).to(nll_n.device, non_blocking=True)
    return nll_n.new_zeros(len(batch.lengths) * width).scatter(0, cells_n, nll_n).view(-1, width).sum(1)


def token_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of each answer token, row after row. Shape: (N,), float32, nats, with gradients.

    Logits are formed of the tokens that predict an answer's token and of no others, and of a few at a time
    (`linear_nll`); all at once where the model does something to them or trains its head. On a card a base in bfloat16
    computes under autocast, so that the float32 adapter's products are bfloat16 too.
    """
    base, traits = varlen.base_of(model), varlen.traits_of(model)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_bt, "attention_mask": batch.attention_mask_bt}
    if batch.is_packed:
        mask = varlen.mask_of(batch.lengths, batch.device)
        inputs |= {"attention_mask": mask, "position_ids": batch.positions_bt}
    skipped = peft_kinds.num_prepended(model)
    is_half = batch.device.type == "cuda" and base.dtype == torch.bfloat16
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=is_half):
        if traits.head is None:
            line_n, place_n = batch.predicting_n // batch.row_bt.shape[1], batch.predicting_n % batch.row_bt.shape[1]
            places_p, column_n = torch.unique(place_n, return_inverse=True)
            logits_bpv = model(**inputs, logits_to_keep=places_p + skipped).logits
            logits_nv = logits_bpv[line_n, column_n].float()
            return nn.functional.cross_entropy(logits_nv, batch.targets_n, reduction="none")
        head, hidden = traits.head, []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            hidden.append(args[0])
            return args[0][:, -1:]  # one token's logits a line, which nobody reads

        handle = head.register_forward_pre_hook(take)
        try:
            model(**inputs)
        finally:
            handle.remove()
        hidden_nh = hidden[-1][:, skipped:].flatten(0, 1).index_select(0, batch.predicting_n)
        return linear_nll(hidden_nh.to(head.weight.dtype), head.weight, batch.targets_n, bias_v=head.bias)
