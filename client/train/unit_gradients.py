"""The gradient of each privacy unit, three ways that must agree.

`stacked` reads it off the layers of LoRA in one backward pass; `microbatch` takes one unit at a time and is right for
every kind of adapter; `opacus` is the oracle of the tests, and slower. B rows, U units, T tokens, P trained parameters
in the order of their names.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from client.train.units import Unit
from common import adapter, objectives, trainable
from common.errors import ModelError, PrivacyError
from common.model import Engine
from common.objectives import SFT, Objective

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
    would let one unit move the gradients of all others.

    Args:
        engine: In training mode.
        method: `auto` is `stacked` where it is possible, else `microbatch`.
        objective: What is lowered.

    Yields:
        A function from units to their gradients, (U, P), and whether it takes several units at once.

    Raises:
        ModelError: The method cannot serve this adapter.
        PrivacyError: The objective couples units.
    """
    if objective.couples_examples:
        raise PrivacyError("KTO's reference point over a batch couples units; set training.reference_point = 'zero'")
    factors = _factors(engine.model)
    chosen = method if method != "auto" else ("stacked" if factors else "microbatch")
    if chosen == "stacked" and not factors:
        raise ModelError(f"privacy.clipping = 'stacked': {WHOLE}; use 'auto'")
    if chosen == "microbatch":
        yield lambda units: _one(engine, units, objective), False
        return
    with _stacked(engine, factors, objective) if chosen == "stacked" else _opacus(engine, objective) as take:
        yield take, True


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
