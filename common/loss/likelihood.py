"""How likely a model finds the answers of a batch. B rows, T tokens, V words of the vocabulary."""

import torch
from torch import nn

from common.model import peft_kinds
from common.text import prompts


def answer_nll(model: nn.Module, batch: prompts.Batch) -> tuple[torch.Tensor, int]:
    """Sum of the negative log-likelihood over the answer tokens of a batch.

    Never the model's own `.loss`, whose normalisation couples the rows of a batch.

    Returns:
        The sum in nats, a float32 scalar that carries gradients, and the number of tokens in it.

    Shape: `batch` holds (B, T) tensors; the logits of only those positions are formed that some row needs.
    """
    logits_nv, targets_n, _ = answer_logits(model, batch)
    return nn.functional.cross_entropy(logits_nv, targets_n, reduction="sum"), targets_n.numel()


def answer_logits(model: nn.Module, batch: prompts.Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the answer tokens, row after row, what they should be, and where they are.

    Shape: (N, V) float32, (N,), and (B, P) for the P positions at which some row has an answer token; N of them True.
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
    return logits_bpv[is_target_bp].float(), targets_n, is_target_bp
