"""The gradient of each privacy unit, three ways that must agree; and what keeps it from depending on other units.

`microbatch` takes one unit at a time by plain autograd and is right for every kind of adapter; `stacked` reads it off
the layers of LoRA; `opacus` is the oracle of the tests, and slower. The last two can take several units in one pass,
which private training never asks for: who else is in a pass changes its shapes, and so how sums are rounded.
B rows, U units, T tokens, P trained parameters in the order of their names.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from client.train.units import Unit
from common.adapter import adapter
from common.errors import ModelError, PrivacyError
from common.loss import objectives
from common.loss.objectives import SFT, Objective
from common.model.base import Engine
from common.run import trainable

Method = Literal["auto", "stacked", "microbatch", "opacus"]
Take = Callable[[Sequence[Unit]], Tensor]  # to (U, P), float32
WHOLE: Final = "stacked clipping needs every trained tensor to be the weight of a linear layer without bias"
ONE_BY_ONE: Final = "set privacy.clipping = 'microbatch'"


@contextmanager
def prepared(engine: Engine, *, method: Method, objective: Objective = SFT) -> Iterator[tuple[Take, bool]]:
    """Make the model's layers tell the gradients of units, until left.

    The loss of a unit is the sum of the negative log-likelihood, in nats, over the answer tokens of its rows, or the
    sum of the losses of its preferences: both answers of a pair are in the one gradient that is clipped. No
    unit's loss depends on another's: a divisor that counts the tokens of the batch, as that of a model's own `.loss`,
    would let one unit move the gradients of all others. The model is held as `uncoupled` says.

    Args:
        engine: In whatever mode; it is the same again afterwards.
        method: `auto` is `microbatch`.
        objective: What is lowered.

    Yields:
        A function from units to their gradients, (U, P), and whether it takes several units at once.

    Raises:
        ModelError: The method cannot serve this adapter.
        PrivacyError: The objective couples units. Also from the function, if a pass draws random numbers or leaves
            something behind in the model.
    """
    if objective.couples_examples:
        raise PrivacyError("KTO's reference point over a batch couples units; set training.reference_point = 'zero'")
    with uncoupled(engine.model):
        if method in ("auto", "microbatch"):
            yield lambda units: _one(engine, units, objective), False
            return
        factors = _factors(engine.model)
        if method == "stacked" and not factors:
            raise ModelError(f"privacy.clipping = 'stacked': {WHOLE}; use 'auto'")
        with _stacked(engine, factors, objective) if method == "stacked" else _opacus(engine, objective) as take:
            yield take, True


@contextmanager
def uncoupled(model: nn.Module) -> Iterator[None]:
    """Hold a model so that a pass is a function of its rows and of the weights alone.

    In evaluation mode there is no dropout of base or adapter, no noise on routers or embeddings, and statistics of
    batches are those of the base's files. In training mode the masks come from a seed that the coordinator knows, and
    depend on how many rows went before: taking one unit out gives all others new masks. Gradient checkpointing, which
    transformers ties to training mode, stays on.
    """
    was_training = {module: module.training for module in model.modules()}
    for module in was_training:
        module.training = isinstance(module, Linear8bitLt)  # whose mode says how precisely it multiplies, and no more
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in checkpointed:
        layer.forward = _recomputing(layer)
    try:
        yield
    finally:
        for layer in checkpointed:
            del layer.forward
        for module, mode in was_training.items():
            module.training = mode


def _recomputing(layer: Any) -> Callable[..., Any]:
    """A layer's forward under its own way of checkpointing, as in training mode."""
    whole = partial(type(layer).forward, layer)
    return lambda *args, **kwargs: layer._gradient_checkpointing_func(partial(whole, **kwargs), *args)


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Fail a pass after which other units would go through another model than before it.

    Raises:
        PrivacyError: A generator of random numbers has moved, or a buffer has changed.
    """
    before, state = _generators(), _state(model)
    yield
    if any(not np.array_equal(old, new) for old, new in zip(before, _generators(), strict=True)):
        raise PrivacyError(
            "this base draws random numbers in evaluation mode, which would let one unit change the gradients of "
            "others; train it without privacy, or take another base"
        )
    after = _state(model)
    changed = sorted(name for name in state.keys() | after.keys() if state.get(name) != after.get(name))
    if changed and not _sets_rope_anew(model):
        raise PrivacyError(
            f"a pass changed {changed[0]} of the base, which would let one unit change the gradients of others; "
            "lower data.max_length_tokens if these are its positions, or take another base"
        )


def _generators() -> list[np.ndarray]:
    """Where the generators of torch, numpy and Python stand."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    own = [np.random.get_state()[1], np.array(random.getstate()[1])]  # type: ignore[index]
    return [state.numpy() for state in (torch.get_rng_state(), *cuda)] + own


def _state(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which buffers the model has, and how often each was written to."""
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}


def _sets_rope_anew(model: Any) -> bool:
    """Whether positions are scaled by each pass's own length, forgetting the one before (transformers' `longrope`)."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "longrope"


def _factors(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of LoRA whose weights are what is trained; empty if anything else is trained, too."""
    trained = {id(parameter): name for name, parameter in adapter.parameters(model).items()}
    found: dict[str, nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is None and id(module.weight) in trained:
            found[trained[id(module.weight)]] = module
    is_whole = len(found) == len(trained) and all(trainable.factor_of(name) in ("A", "B") for name in found)
    return found if is_whole else {}


class _Sink:
    """Takes what the backward pass of one physical batch tells, and fails unless every factor tells exactly once."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._rows: dict[str, Tensor] = {}

    def start(self, *, num_rows: int) -> None:
        """Forget the batch before."""
        self._num_rows, self._rows = num_rows, {}

    def take(self, name: str, x: Tensor, grad_y: Tensor) -> None:
        """One factor's input and output gradient: each row's gradient is their product over the row's tokens.

        Shape: x (B, T, in), grad_y (B, T, out).
        """
        if x.dim() != 3 or len(x) != self._num_rows:
            raise ModelError(
                f"{name}: an input of shape {tuple(x.shape)} does not have the {self._num_rows} rows of the batch in "
                f"its first dimension; {ONE_BY_ONE}"
            )
        if name in self._rows:
            raise ModelError(f"{name} is used twice in one pass, which this way of clipping cannot tell; {ONE_BY_ONE}")
        self._rows[name] = torch.bmm(grad_y.mT, x)

    def rows(self) -> dict[str, Tensor]:
        """The gradients of rows, (B, out, in) by factor."""
        found, self._rows = self._rows, {}
        return found


class _Linear(torch.autograd.Function):
    """y = x w^T whose backward gives the sink what it needs instead of summing over rows.

    Input and weight are saved tensors, never attributes, so that both variants of gradient checkpointing hold.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: _Sink, name: str) -> Tensor:
        """The linear layer itself."""
        ctx.save_for_backward(x, weight)
        ctx.sink, ctx.name = sink, name
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Tell the sink; pass on the input's gradient."""
        x, weight = ctx.saved_tensors
        ctx.sink.take(ctx.name, x, grad_y)
        return (grad_y @ weight if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def _stacked(engine: Engine, factors: dict[str, nn.Linear], objective: Objective) -> Iterator[Take]:
    """One pass; all units of a physical batch at once."""
    sink = _Sink()

    def take(units: Sequence[Unit]) -> Tensor:
        sink.start(num_rows=sum(map(_num_rows, units)))
        _backward(engine, units, objective)
        return _by_unit(_flat(sink.rows(), sorted(factors)), units)

    for name, module in factors.items():
        module.forward = _telling(module, sink, name)  # type: ignore[method-assign,assignment]
    try:
        yield take
    finally:
        for module in factors.values():
            del module.forward


def _telling(module: nn.Linear, sink: _Sink, name: str) -> Callable[[Tensor], Tensor]:
    """The forward of one factor while units are told apart."""
    return lambda x: _Linear.apply(x, module.weight, sink, name)  # type: ignore[no-untyped-call]


def _one(engine: Engine, units: Sequence[Unit], objective: Objective) -> Tensor:
    """One unit by plain autograd."""
    if len(units) != 1:
        raise ValueError(f"{len(units)} units; this way takes one at a time")
    trained = adapter.parameters(engine.model)
    engine.model.zero_grad(set_to_none=True)
    _backward(engine, units, objective)
    found = {name: parameter.grad[None] for name, parameter in trained.items() if parameter.grad is not None}
    engine.model.zero_grad(set_to_none=True)
    return _flat(found, sorted(trained))


@contextmanager
def _opacus(engine: Engine, objective: Objective) -> Iterator[Take]:
    """Opacus' hooks; they fail under gradient checkpointing without reentry, which then is an error."""
    from opacus.grad_sample import GradSampleHooks

    trained = adapter.parameters(engine.model)
    for module in engine.model.modules():
        if any(id(parameter) in map(id, trained.values()) for parameter in module.parameters(recurse=False)):
            module.training = True  # its hooks pass over a module in evaluation mode
    hooks = GradSampleHooks(engine.model, loss_reduction="sum", strict=False)

    def take(units: Sequence[Unit]) -> Tensor:
        with warnings.catch_warnings():  # of the first layer, whose input needs no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            _backward(engine, units, objective)
        told = {name: getattr(parameter, "grad_sample", None) for name, parameter in trained.items()}
        for parameter in trained.values():
            parameter.grad, parameter.grad_sample = None, None  # type: ignore[attr-defined]
        rows = {name: gradient for name, gradient in told.items() if isinstance(gradient, Tensor)}
        return _by_unit(_flat(rows, sorted(trained)), units)

    try:
        yield take
    except (AttributeError, ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(f"Opacus cannot serve this model ({type(error).__name__}); set privacy.clipping") from error
    finally:
        hooks.cleanup()


def _backward(engine: Engine, units: Sequence[Unit], objective: Objective) -> None:
    """One pass over the rows of some units."""
    with _watched(engine.model):
        loss = objectives.loss_sum(engine, [example for unit in units for example in unit], objective)
        loss.backward()  # type: ignore[no-untyped-call]


def _num_rows(unit: Unit) -> int:
    """Rows that go through the model; a pair has two."""
    return sum(len(example.rows) for example in unit)


def _flat(found: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Gradients of all parameters side by side, one row for each first index.

    Raises:
        ModelError: A parameter has none: it was trained without being clipped.
    """
    missed = sorted(set(names) - found.keys())
    if missed:
        raise ModelError(f"no gradient of rows for {missed[0]} ({len(missed)} such tensors); set privacy.clipping")
    return torch.cat([found[name].flatten(1) for name in names], dim=1).float()


def _by_unit(rows_bp: Tensor, units: Sequence[Unit]) -> Tensor:
    """Add up the rows of each unit."""
    if all(_num_rows(unit) == 1 for unit in units):
        return rows_bp
    owners_b = torch.tensor(
        [number for number, unit in enumerate(units) for _ in range(_num_rows(unit))], device=rows_bp.device
    )
    return rows_bp.new_zeros((len(units), rows_bp.shape[1])).index_add_(0, owners_b, rows_bp)
