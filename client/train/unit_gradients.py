"""The gradient of each privacy unit, three ways that must agree.

`stacked` reads it off the layers of LoRA in one backward pass; `microbatch` takes one unit at a time and is right for
every kind of adapter; `opacus` is the oracle of the tests, and slower. B rows, U units, T tokens.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from client.train.units import Unit
from common import adapter, prompts
from common.errors import ModelError
from common.model import Engine, answer_nll

Method = Literal["auto", "stacked", "microbatch", "opacus"]
UnitGradients = dict[str, Tensor]  # by parameter, each (U, *shape of the parameter), float32
Take = Callable[[Sequence[Unit]], UnitGradients]
WHOLE: Final = "stacked clipping needs every trained tensor to be the weight of a linear layer without bias"


@contextmanager
def prepared(engine: Engine, *, method: Method) -> Iterator[tuple[Take, bool]]:
    """Make the model's layers tell the gradients of units, until left.

    The loss of a unit is the sum of the negative log-likelihood, in nats, over the answer tokens of its rows. No
    unit's loss depends on another's: a divisor that counts the tokens of the batch, as that of a model's own `.loss`,
    would let one unit move the gradients of all others.

    Args:
        engine: In training mode.
        method: `auto` is `stacked` where it is possible, else `microbatch`.

    Yields:
        A function from units to their gradients, and whether it takes several units at once.

    Raises:
        ModelError: The method cannot serve this adapter.
    """
    factors = _factors(engine.model)
    chosen = method if method != "auto" else ("stacked" if factors else "microbatch")
    if chosen == "stacked" and not factors:
        raise ModelError(f"privacy.clipping = 'stacked': {WHOLE}; use 'auto'")
    ways = {"stacked": lambda: _stacked(engine, factors), "opacus": lambda: _opacus(engine)}
    if chosen == "microbatch":
        yield lambda units: _one(engine, units), False
        return
    with ways[chosen]() as take:
        yield take, True


def _factors(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose weights are what is trained; empty if anything else is trained, too."""
    trained = {id(parameter): name for name, parameter in adapter.parameters(model).items()}
    found: dict[str, nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is None and id(module.weight) in trained:
            found[trained[id(module.weight)]] = module
    return found if len(found) == len(trained) else {}


class _Sink:
    """Takes what the backward pass of one physical batch tells, and fails unless every factor told exactly once."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.start(num_rows=0)

    def start(self, *, num_rows: int) -> None:
        """Forget the batch before."""
        self._num_rows = num_rows
        self._hits: Counter[str] = Counter()
        self._rows: UnitGradients = {}

    def take(self, name: str, x: Tensor, grad_y: Tensor) -> None:
        """One factor's input and output gradient: each row's gradient is their product over the row's tokens.

        Shape: x (B, ..., in), grad_y (B, ..., out).
        """
        if x.dim() < 3 or x.shape[0] != self._num_rows:
            raise ModelError(f"{name}: input of shape {tuple(x.shape)} has not the {self._num_rows} rows of the batch")
        self._hits[name] += 1
        self._rows[name] = torch.bmm(grad_y.flatten(1, -2).transpose(1, 2), x.flatten(1, -2)).float()

    def per_row(self) -> UnitGradients:
        """The gradients of rows, once all are there."""
        wrong = sorted(name for name in self._names if self._hits[name] != 1)
        if wrong:
            raise ModelError(
                f"{wrong[0]} was used {self._hits[wrong[0]]} times in one pass, and must be once for its clipping to "
                f"be right ({len(wrong)} such tensors); set privacy.clipping = 'microbatch'"
            )
        return self._rows


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
def _stacked(engine: Engine, factors: dict[str, nn.Linear]) -> Iterator[Take]:
    """One pass; all units of a physical batch at once."""
    sink = _Sink(list(factors))

    def take(units: Sequence[Unit]) -> UnitGradients:
        sink.start(num_rows=sum(map(len, units)))
        _backward(engine, units)
        return _by_unit(sink.per_row(), units)

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


def _one(engine: Engine, units: Sequence[Unit]) -> UnitGradients:
    """One unit by plain autograd."""
    if len(units) != 1:
        raise ValueError(f"{len(units)} units; this way takes one at a time")
    trained = adapter.parameters(engine.model)
    engine.model.zero_grad(set_to_none=True)
    _backward(engine, units)
    missed = sorted(name for name, parameter in trained.items() if parameter.grad is None)
    if missed:
        raise ModelError(f"{missed[0]} got no gradient ({len(missed)} such tensors)")
    found = {name: parameter.grad.float()[None] for name, parameter in trained.items() if parameter.grad is not None}
    engine.model.zero_grad(set_to_none=True)
    return found


@contextmanager
def _opacus(engine: Engine) -> Iterator[Take]:
    """Opacus' hooks; they fail under gradient checkpointing without reentry, which then is an error."""
    from opacus.grad_sample import GradSampleHooks

    trained = adapter.parameters(engine.model)
    hooks = GradSampleHooks(engine.model, loss_reduction="sum", strict=False)

    def take(units: Sequence[Unit]) -> UnitGradients:
        with warnings.catch_warnings():  # of the first layer, whose input needs no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            _backward(engine, units)
        found = {name: getattr(parameter, "grad_sample", None) for name, parameter in trained.items()}
        missed = sorted(name for name, gradient in found.items() if not isinstance(gradient, Tensor))
        if missed:
            raise ModelError(f"Opacus gives no gradient of rows for {missed[0]}; set privacy.clipping = 'auto'")
        rows = {name: gradient.float() for name, gradient in found.items() if isinstance(gradient, Tensor)}
        for parameter in trained.values():
            parameter.grad, parameter.grad_sample = None, None  # type: ignore[attr-defined]
        return _by_unit(rows, units)

    try:
        yield take
    except (AttributeError, ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(f"Opacus cannot serve this model ({type(error).__name__}); set privacy.clipping") from error
    finally:
        hooks.cleanup()


def _backward(engine: Engine, units: Sequence[Unit]) -> None:
    """One pass over the rows of some units."""
    rows = [row for unit in units for row in unit]
    batch = prompts.collate(rows, pad_id=engine.pad_id).to(engine.device)
    nll, _ = answer_nll(engine.model, batch)
    nll.backward()  # type: ignore[no-untyped-call]


def _by_unit(rows: UnitGradients, units: Sequence[Unit]) -> UnitGradients:
    """Add up the rows of each unit."""
    if all(len(unit) == 1 for unit in units):
        return rows
    owners = torch.tensor([number for number, unit in enumerate(units) for _ in unit])
    return {name: _added(gradient, owners.to(gradient.device), len(units)) for name, gradient in rows.items()}


def _added(rows: Tensor, owners: Tensor, num_units: int) -> Tensor:
    """Sum of the rows that share an owner."""
    return rows.new_zeros((num_units, *rows.shape[1:])).index_add_(0, owners, rows)
