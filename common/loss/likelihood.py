"""How likely a model finds the answers of a batch. B lines, T tokens, V words, N answer tokens, R rows."""

import torch
from torch import Tensor, nn

from common.model import peft_kinds
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
    nll_n = token_nll(model, batch)
    num_targets_r = torch.tensor(batch.num_targets, device=nll_n.device)
    is_target_rp = torch.arange(max(batch.num_targets), device=nll_n.device) < num_targets_r[:, None]
    return nll_n.new_zeros(is_target_rp.shape).masked_scatter(is_target_rp, nll_n).sum(1)


def token_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of each answer token, row after row. Shape: (N,), float32, nats, with gradients.

    The logits of only those positions are formed that some row needs.
    """
    is_target_bt = batch.is_answer_bt[:, 1:]
    positions_p = is_target_bt.any(dim=0).nonzero().squeeze(1)
    logits_bpv = model(
        input_ids=batch.input_ids_bt,
        attention_mask=batch.attention_mask_bt,
        logits_to_keep=positions_p + peft_kinds.num_prepended(model),
    ).logits
    is_target_bp = is_target_bt[:, positions_p]
    targets_n = batch.input_ids_bt[:, 1:][:, positions_p][is_target_bp]
    return nn.functional.cross_entropy(logits_bpv[is_target_bp].float(), targets_n, reduction="none")
