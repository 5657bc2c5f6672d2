"""Does one unit change the gradient of another? Asked of every engine before it trains privately."""

import dataclasses
import weakref
from typing import Final

import torch
from torch import Tensor, nn

from client.train import private
from client.train.private import Method
from common.errors import PrivacyError
from common.loss.objectives import SFT, Example, Pair, Rated
from common.model.base import Engine
from common.run.schema.training import Objective
from common.text.prompts import Encoded

LENGTHS: Final = ((7,), (12, 5), (23,), (31,))  # of the rows of four units, in tokens
GPU_TOLERANCE: Final = 1e-2  # of its norm: kernels of a GPU add up in an order of their own; 0.4 % seen in bfloat16

_passed: weakref.WeakKeyDictionary[nn.Module, set[tuple[Method, Objective]]] = weakref.WeakKeyDictionary()


def check_once(engine: Engine, *, method: Method = "auto", objective: Objective = SFT) -> None:
    """`check`, unless this very model has passed it: a simulation has hundreds of sites on one engine."""
    passed = _passed.setdefault(engine.model, set())
    if (method, objective) not in passed:
        check(engine, method=method, objective=objective)
        passed.add((method, objective))


def check(engine: Engine, *, method: Method = "auto", objective: Objective = SFT) -> None:
    """Take one unit out: the gradients of all others must stay what they were.

    The units are made up, so that nothing is learnt of a site's rows. They go through the same function as in
    training, with and without the first of them, and once more after all. On a CPU the gradients must be equal to the
    bit, in every precision of the base; on a GPU to `GPU_TOLERANCE`, as its kernels may add up in an order that
    differs from call to call and depends on no unit.

    Args:
        engine: Ready to train; its adapter, generators and mode stay as they are.
        method: `privacy.clipping` of the run.

    Raises:
        PrivacyError: A gradient changed, so that no clip norm bounds what a unit does to the sum.
        ModelError: The method cannot serve this adapter.
    """
    num_tokens = len(engine.tokenizer)
    units = [[_example(length, num_tokens, objective) for length in lengths] for lengths in LENGTHS]
    with private.prepared(engine, method=method, objective=objective) as (take, _):
        whole = [take([unit]) for unit in units]
        without = [take([unit]) for unit in units[1:]]
    apart = max(_distance(one, other) for one, other in zip(whole[1:], without, strict=True))
    allowed = GPU_TOLERANCE if engine.device.type == "cuda" else 0.0
    if apart > allowed:
        raise PrivacyError(
            f"coupling probe: taking one unit out changes the gradient of another by {apart:.1e} of its length, above "
            f"{allowed:g}, so no clip norm bounds what one unit does; this base cannot be trained with "
            "privacy.mode = 'unit', take another"
        )


def _distance(one: Tensor, other: Tensor) -> float:
    """How far two gradients are apart, over the length of the first; 0 if no bit differs."""
    if torch.equal(one.nan_to_num(), other.nan_to_num()):
        return 0.0
    return float((one - other).norm() / one.norm())


def _example(length: int, num_tokens: int, objective: Objective) -> Example:
    """A made-up example of so many tokens, the later half of them its answer."""
    ids = tuple((length + 31 * place) % num_tokens for place in range(length))
    row = Encoded(ids, tuple(place >= length // 2 for place in range(length)), f"unit of {length}")
    if objective.kind == "sft":
        return row
    if objective.kind == "dpo":
        return Pair(row, dataclasses.replace(row, input_ids=ids[::-1]), reference=(-3.0 * length, -2.0 * length))
    return Rated(row, length % 2 == 0, None, reference=(-3.0 * length,))
