"""Attention over rows that lie one behind the other in one line; none sees another.

A packed pass hands the cumulative lengths of its rows to the model as its attention mask, which transformers hands to
every layer as it is: layers that are computed again in the backward pass get it again, and no mask of tokens by tokens
is ever formed. On a card torch's flash kernel takes the lengths. Elsewhere a row goes through SDPA by itself, which is
the same function and its oracle. transformers calls it by the name `NAME`.

n tokens of all rows, q and g heads of queries and of keys, e width of a head, b rows.
"""

import inspect
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME: Final = "silotune_varlen"
PROBE_LENGTHS: Final = (5, 7)
PROBE_TOLERANCE: Final = 0.1  # of the norm: another order of sums in bfloat16 is far below, other positions far above


def mask_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """What stands in for the attention mask of one line of rows of these lengths: 0 and the sums of the lengths.

    Shape: (1, 1, the longest row, b + 1), int32, in the memory of b + 1 numbers; so the longest row is known without
    asking the device.
    """
    ends_b1 = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return ends_b1.to(device, non_blocking=True).expand(1, 1, max(lengths), len(ends_b1))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within each row where the mask is one of `mask_of`, and transformers' SDPA elsewhere.

    Shape: query (1, q, n, e), key and value (1, g, n, e) to (1, n, q, e).

    Raises:
        ValueError: The layer wants something that packed rows do not know.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    dropout, window = options.get("dropout", 0.0), options.get("sliding_window")
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise ValueError("packed rows know no bias of positions, cap or sink of scores")
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        query_nqe, key_nge, value_nge = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return _flash(query_nqe, key_nge, value_nge, attention_mask, options.get("scaling"), window)[None], None
    lengths = attention_mask[0, 0, 0].diff().tolist()
    parts = []
    for q, k, v in zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = _window(q.shape[2], window, query.device) if window and window < q.shape[2] else None
        is_shared = q.shape[1] != k.shape[1]
        parts.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=options.get("scaling"), enable_gqa=is_shared
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, window: int | None) -> Tensor:
    """By torch's kernel for rows of different lengths, whose signature has grown with its versions."""
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    elif window:
        raise RuntimeError("this torch has no sliding window for packed rows; use torch 2.11 or newer")
    else:
        options["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    ends_b1, longest = mask[0, 0, 0], mask.shape[2]
    out = varlen_attn(q, k, v, ends_b1, ends_b1, longest, longest, **options)
    return out if isinstance(out, Tensor) else out[0]


@cache
def _parameters() -> frozenset[str]:
    """What the kernel of the installed torch can be told."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """Causal, and no further back than the window; True where a token sees another."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return (back >= 0) & (back < window)


@dataclass(frozen=True)
class Traits:
    """What a model allows, found by asking it.

    Attributes:
        can_pack: Rows of one line stay apart, so that they need no padding.
        head: The linear layer whose output is the logits, with nothing done to them, and which is frozen; else None.
    """

    can_pack: bool
    head: nn.Linear | None


_traits: weakref.WeakKeyDictionary[nn.Module, Traits] = weakref.WeakKeyDictionary()


@torch.no_grad()
def traits_of(model: nn.Module) -> Traits:
    """Whether rows can be packed in this model, and whether its head is a plain one; asked once.

    Of two made-up rows in one line, another first one must leave the second's hidden states as they were, to the bit,
    and these must be those of the row alone. Virtual tokens, a state that runs along the line, and attention that is
    not transformers' SDPA fail. The head's product with hidden states must be the logits, to the bit.
    """
    if model in _traits:
        return _traits[model]
    base = base_of(model)
    modes = {module: module.training for module in base.modules()}
    base.eval()
    words = base.config.get_text_config().vocab_size
    device = base.get_input_embeddings().weight.device
    ids_1t = torch.tensor([[(7 * place + 3) % words for place in range(PROBE_LENGTHS[1])]], device=device)
    try:
        seen: list[Tensor] = []
        head = base.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits_1tv = base(input_ids=ids_1t).logits
        handle.remove()
        is_plain = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
        is_plain = is_plain and torch.equal(nn.functional.linear(seen[-1], head.weight, head.bias), logits_1tv)
        is_virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        _traits[model] = Traits(not is_virtual and _keeps_rows_apart(base, ids_1t), head if is_plain else None)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return _traits[model]


def _keeps_rows_apart(base: Any, ids_1t: Tensor) -> bool:
    """Set the attention to `attention` and look whether rows stay apart; else leave it as it was."""
    if base.config._attn_implementation not in ("sdpa", NAME) or not base._can_set_attn_implementation():
        return False
    before, device = base.config._attn_implementation, ids_1t.device
    alone_th = base.base_model(input_ids=ids_1t).last_hidden_state[0]
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS])[None]
    mask = mask_of(PROBE_LENGTHS, device)
    others = (torch.cat([torch.arange(PROBE_LENGTHS[0], device=device)[None] + start, ids_1t], 1) for start in (0, 11))
    words = base.config.get_text_config().vocab_size
    base.set_attn_implementation(NAME)
    try:
        first_th, second_th = (
            base.base_model(input_ids=ids % words, attention_mask=mask, position_ids=positions).last_hidden_state[
                0, PROBE_LENGTHS[0] :
            ]
            for ids in others
        )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # it knows no positions or no such mask
        base.set_attn_implementation(before)
        return False
    is_same = float((first_th - alone_th).float().norm()) < PROBE_TOLERANCE * float(alone_th.float().norm())
    if not (is_same and torch.equal(first_th, second_th)):
        base.set_attn_implementation(before)
        return False
    return True


def base_of(model: nn.Module) -> Any:
    """The causal language model itself, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
