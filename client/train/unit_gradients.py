"""The gradient of each privacy unit, three ways that must agree.

`stacked` reads it off the layers of LoRA in one backward pass; `microbatch` takes one unit at a time and is right for
every kind of adapter; `opacus` is the oracle of the tests, and slower. B rows, U units, T
tokens.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

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


class _Rows:
    """One factor whose weight every row of the batch has to itself, so that autograd tells the rows apart.

    The rows' weights are views of one tensor: nothing is copied, and torch's own operations do the rest, under
    gradient checkpointing of both kinds, too.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        self._name, self._weight = name, weight
        self._own_boi = weight.detach()[None]

    def start(self, *, num_rows: int) -> None:
        """Expect a batch of so many rows."""
        if len(self._own_boi) != num_rows or not self._own_boi.requires_grad:
            self._own_boi = self._weight.detach().expand(num_rows, -1, -1).requires_grad_()
        self._own_boi.grad = None

    def forward(self, x: Tensor) -> Tensor:
        """The linear layer, (B, T, in) to (B, T, out)."""
        if x.dim() != 3 or len(x) != len(self._own_boi):
            raise ModelError(
                f"{self._name}: an input of shape {tuple(x.shape)} does not have the {len(self._own_boi)} rows of the "
                "batch in its first dimension; set privacy.clipping = 'microbatch'"
            )
        return torch.matmul(x, self._own_boi.mT)

    def take(self) -> Tensor:
        """The gradient of each row, (B, out, in)."""
        found, self._own_boi.grad = self._own_boi.grad, None
        if found is None:
            raise ModelError(f"{self._name} got no gradient")
        return found.float()


@contextmanager
def _stacked(engine: Engine, factors: dict[str, nn.Linear]) -> Iterator[Take]:
    """One pass; all units of a physical batch at once."""
    rows = {name: _Rows(name, module.weight) for name, module in factors.items()}

    def take(units: Sequence[Unit]) -> UnitGradients:
        for own in rows.values():
            own.start(num_rows=sum(map(len, units)))
        _backward(engine, units)
        return _by_unit({name: own.take() for name, own in rows.items()}, units)

    for name, module in factors.items():
        module.forward = rows[name].forward  # type: ignore[method-assign,assignment]
    try:
        yield take
    finally:
        for module in factors.values():
            del module.forward


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
