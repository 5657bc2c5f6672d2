"""Attention over rows that lie one behind the other in one sequence; none sees another.

On a card torch's flash kernel takes the rows' cumulative lengths. Elsewhere a row goes through SDPA by itself, which is
the same function and its oracle. transformers calls it by the name `NAME`.

n tokens of all rows, q and g heads of queries and of keys, e width of a head, b rows.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME: Final = "silotune_varlen"


@dataclass(frozen=True)
class Rows:
    """Where the rows of a packed sequence begin and end.

    Attributes:
        lengths: Of each row, tokens.
        ends_b1: 0 and the sums of the lengths, (b + 1,), int32, on the device.
        longest: Tokens of the longest row.
    """

    lengths: tuple[int, ...]
    ends_b1: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "Rows":
        """Rows of these lengths, one behind the other."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(lengths, ends.to(device, non_blocking=True), max(lengths))


_ROWS: ContextVar[Rows | None] = ContextVar("rows", default=None)


@contextmanager
def packed(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Let the model attend within these rows only, until left; it is given one sequence and its position ids."""
    config: Any = model.config
    before, token = config._attn_implementation, _ROWS.set(rows)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _ROWS.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, as transformers' attention functions are called.

    Shape: query (1, q, n, e), key and value (1, g, n, e) to (1, n, q, e).

    Raises:
        RuntimeError: Outside `packed`.
    """
    rows = _ROWS.get()
    if rows is None:
        raise RuntimeError("packed attention needs the rows' lengths; see varlen.packed")
    query_nqe, key_nge, value_nge = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        out_nqe = _flash(query_nqe, key_nge, value_nge, rows, scaling, sliding_window)
        return out_nqe[None], None
    parts = []
    for start, end in pairwise([0, *torch.tensor(rows.lengths).cumsum(0).tolist()]):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        mask = _window(end - start, sliding_window, query.device) if sliding_window else None
        parts.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _flash(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float | None, window: int | None) -> Tensor:
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
    out = varlen_attn(q, k, v, rows.ends_b1, rows.ends_b1, rows.longest, rows.longest, **options)
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


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
