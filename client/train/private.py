"""DP-SGD over privacy units: draw, take each unit's gradient, clip, add up, noise once, divide by the expected number.

From clipping to noise all is whole numbers of steps of a grid (`noise.to_grid`), so that sums are exact and what one
unit adds does not depend on the others. The gradient of a unit is taken in one of three ways that must agree:
`microbatch` takes one unit at a time by plain autograd and is right for every kind of adapter; `stacked` reads it off
the layers of LoRA; `opacus` is the oracle of the tests, and slower. The last two can take several units in one pass,
which private training never asks for: who else is in a pass changes its shapes, and so how sums are rounded.
B lines of a pass, T tokens, R rows, U units, P trained parameters in the order of their names.

Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with the unit of a patient in the place of an example.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from common import accounting
from common.adapter import adapter
from common.errors import ModelError, PrivacyError
from common.loss import objectives
from common.loss.objectives import SFT, Example
from common.model.base import Engine
from common.privacy import noise
from common.privacy.clipping import ClipNorm
from common.privacy.noise import Noise
from common.run import trainable
from common.run.schema.privacy import UnitPrivacy
from common.run.schema.training import Objective
from common.text.prompts import Batch

Unit = Sequence[Example]
Method = Literal["auto", "stacked", "microbatch", "opacus"]
Take = Callable[[Sequence[Unit]], Tensor]  # to (U, P), float32
TINY: Final = 1e-6  # added to norms, so that a zero gradient has a scale
ROUNDING: Final = 2.0**-22  # of a norm: more than adding up 2^30 squares in float64 and scaling can be wrong by
WHOLE: Final = "stacked clipping needs every trained tensor to be the weight of a linear layer without bias"
ONE_BY_ONE: Final = "set privacy.clipping = 'microbatch'"


def group(rows: Sequence[Example]) -> list[list[Example]]:
    """The rows of each unit, units in the order of their first rows; a pair of answers counts as one row."""
    units: dict[str, list[Example]] = {}
    for row in rows:
        units.setdefault(row.unit, []).append(row)
    return list(units.values())


def population(rows: Sequence[Example], *, dp_delta: float) -> list[list[Example]]:
    """The site's units, whose number counts as public.

    Raises:
        PrivacyError: A delta near one in the number of units would allow a mechanism that tells a whole unit's rows.
    """
    units = group(rows)
    if not dp_delta <= accounting.largest_delta(len(units)):
        raise PrivacyError(
            f"privacy.dp_delta = {dp_delta:g} is too large for the {len(units)} units of this site; "
            f"set {accounting.delta_rule(len(units))}"
        )
    return units


def poisson(units: Sequence[Unit], *, sampling_prob: float, max_rows: int, source: Noise) -> list[Unit]:
    """Draw each unit on its own with the same probability, and of each at most `max_rows` rows.

    The draw must be secret: the amplification by sampling that the accountant counts holds against those only who do
    not know it.

    Args:
        units: All of the site's.
        sampling_prob: q, in (0, 1].
        max_rows: Most rows of a unit; which ones is drawn anew each time.
        source: Where the draws come from.

    Returns:
        The drawn units; may be empty.

    Source: Poisson sampling as in Abadi et al. 2016, arXiv:1607.00133, section 3, over units.
    """
    is_drawn = source.uniform(len(units)) < sampling_prob
    drawn = [unit for unit, taken in zip(units, is_drawn, strict=True) if taken]
    return [  # each subset of a larger unit is as likely as any other
        unit if len(unit) <= max_rows else [unit[index] for index in source.uniform(len(unit)).argsort()[:max_rows]]
        for unit in drawn
    ]


class Mechanism:
    """The private steps of a round, whatever a unit's gradient is.

    Each step is a Poisson-sampled Gaussian mechanism with `privacy.sampling_prob` and `privacy.noise_multiplier` under
    adding or removing one unit; the number of units counts as public. A step without any unit is noised like every
    other: whether one was drawn is nobody's to know.

    Args:
        units: All of the site's.
        parameters: What is trained, by name; gets the private gradients.
        privacy: Section `[privacy]`, resolved.
        source: Of noise and draws.

    Raises:
        PrivacyError: The units are too few for a clip norm that follows them.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        parameters: Mapping[str, nn.Parameter],
        privacy: UnitPrivacy,
        source: Noise,
    ) -> None:
        self._units, self._privacy, self._source = units, privacy, source
        self._parameters = [parameter for _, parameter in sorted(parameters.items())]
        self._expected = privacy.sampling_prob * len(units)
        self.limit = ClipNorm.of(privacy, self._expected)

    def draw(self) -> list[Unit]:
        """The units of the next step."""
        return poisson(
            self._units,
            sampling_prob=self._privacy.sampling_prob,
            max_rows=self._privacy.max_rows_per_unit,
            source=self._source,
        )

    def set_gradients(self, batches: Iterable[Sequence[Unit]], *, take: Take) -> None:
        """Noise the clipped sum once, both in whole steps of the grid, and divide by the expected number of units.

        Args:
            batches: The drawn units, as many at a time as `take` is to have.
            take: From some units to their gradients.
        """
        device = self._parameters[0].device
        num_parameters = sum(parameter.numel() for parameter in self._parameters)
        self._source.prepare(num_parameters, device=device)
        sum_p, norms_u = clipped_sum(
            batches, take=take, clip_norm=self.limit.value, num_parameters=num_parameters, device=device
        )
        noise_std = self.limit.noise_multiplier / noise.grid_step(1.0)
        noised_p = self._source.discrete(num_parameters, std=noise_std, device=device).add_(sum_p)
        released_p = noised_p.mul_(noise.grid_step(self.limit.value) / self._expected).float()
        start = 0
        for parameter in self._parameters:
            end = start + parameter.numel()
            parameter.grad, start = released_p[start:end].view_as(parameter), end
        self.limit.follow(norms_u, privacy=self._privacy, expected=self._expected, source=self._source)


def clipped_sum(
    batches: Iterable[Sequence[Unit]],
    *,
    take: Take,
    clip_norm: float,
    num_parameters: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Sum of the units' gradients, each scaled down to `clip_norm` at most.

    Returns:
        The sum, (P,) whole steps of the grid in float64, and every unit's norm before clipping. Neither is private.

    Privacy: L2 sensitivity `clip_norm`, that is 2^30 steps, under adding or removing one unit; exact, as whole numbers
    below 2^53 are added without rounding: 2^23 units at least.
    """
    sum_p: Tensor | None = None  # made after the first batch, whose activations have left the memory by then
    norms: list[Tensor] = []
    for batch in batches:
        part_p, norms_u = clip(take(batch), clip_norm=clip_norm)
        sum_p = part_p if sum_p is None else sum_p.add_(part_p)
        norms.append(norms_u)
    if sum_p is None:
        return torch.zeros(num_parameters, dtype=torch.float64, device=device), torch.zeros(0, device=device)
    return sum_p, torch.cat(norms)


def clip(gradients_up: Tensor, *, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Add up units' gradients, each scaled by min(1, C / norm) over all parameters and rounded to the grid.

    A unit whose gradient is not finite adds nothing, as if it were zero: a step that failed for it would tell that it
    was drawn. The norm is taken in float64 and counted as longer by more than its rounding, and values are rounded
    towards zero, so that what is added is no longer than C, exactly.

    Shape: (U, P) to (P,), whole steps of the grid in float64, and (U,), the norms before clipping.

    Example:
        >>> clip(torch.tensor([[3.0, 4.0], [0.0, 0.5]]), clip_norm=1.0)[1].tolist()
        [5.0, 0.5]
    """
    norms_u: Tensor = torch.linalg.vector_norm(gradients_up, dim=1, dtype=torch.float64)
    is_finite_u = norms_u.isfinite()
    scales_u = (clip_norm / (norms_u * (1 + ROUNDING) + TINY)).clamp(max=1.0)
    total_p = gradients_up.new_zeros(gradients_up.shape[1], dtype=torch.float64)
    for gradient_p, scale, is_finite in zip(gradients_up, scales_u, is_finite_u, strict=True):
        steps_p = noise.to_grid(gradient_p.double() * scale, clip_norm=clip_norm)
        total_p += torch.where(is_finite, steps_p, 0.0)
    return total_p, norms_u


@contextmanager
def prepared(
    engine: Engine, *, method: Method, objective: Objective = SFT, max_tokens: int = 0
) -> Iterator[tuple[Take, bool]]:
    """Make the model's layers tell the gradients of units, until left.

    The loss of a unit is the sum of the negative log-likelihood, in nats, over the answer tokens of its rows, or the
    sum of the losses of its preferences: both answers of a pair are in the one gradient that is clipped. No
    unit's loss depends on another's: a divisor that counts the tokens of the batch, as that of a model's own `.loss`,
    would let one unit move the gradients of all others. The model is held as `uncoupled` says.

    Args:
        engine: In whatever mode; it is the same again afterwards.
        method: `auto` is `microbatch`.
        max_tokens: `microbatch` only: most tokens in memory at once, for units of several rows; 0: any number.

    Yields:
        A function from units to their gradients, (U, P), and whether it takes several units at once.

    Raises:
        ModelError: The method cannot serve this adapter.
        PrivacyError: The objective couples units. Also from the function, if a pass draws random numbers or leaves
            something behind in the model.
    """
    if objective.couples_examples:
        raise PrivacyError(
            "KTO's reference point over a batch couples units; set training.objective.reference_point = 'zero'"
        )
    trained = adapter.parameters(engine.model)
    modules = list(engine.model.modules())

    def backward(units: Sequence[Unit], begin: Callable[[Batch], None] = lambda batch: None) -> Batch:
        examples = [example for unit in units for example in unit]
        batch = objectives.collate(engine, units, allows_packing=method != "opacus")  # it takes a line for a row
        begin(batch)
        with _watched(engine.model, modules):
            objectives.loss(engine, batch, examples, objective).backward()  # type: ignore[no-untyped-call]
        return batch

    with uncoupled(engine.model):
        if method in ("auto", "microbatch"):
            yield lambda units: _one(trained, units, backward, max_tokens=max_tokens), False
            return
        factors = _factors(engine.model, trained)
        if method == "stacked" and not factors:
            raise ModelError(f"privacy.clipping = 'stacked': {WHOLE}; use 'auto'")
        with _stacked(factors, backward) if method == "stacked" else _opacus(engine.model, trained, backward) as take:
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
def _watched(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Fail a pass after which other units would go through another model than before it.

    Raises:
        PrivacyError: A generator of random numbers has moved, or a buffer has changed.
    """
    before, state = _generators(), _state(modules)
    yield
    if any(not np.array_equal(old, new) for old, new in zip(before, _generators(), strict=True)):
        raise PrivacyError(
            "this base draws random numbers in evaluation mode, which would let one unit change the gradients of "
            "others; train it without privacy, or take another base"
        )
    after = _state(modules)
    rope = getattr(model.config, "rope_parameters", None) or {}
    is_set_anew = rope.get("rope_type") == "longrope"  # transformers scales it by each pass's own length, and forgets
    changed = sorted(name for _, name in state.keys() | after.keys() if state.get((_, name)) != after.get((_, name)))
    if changed and not is_set_anew:
        raise PrivacyError(
            f"a pass changed {changed[0]} of the base, which would let one unit change the gradients of others; "
            "lower data.max_length_tokens if these are its positions, or take another base"
        )


def _generators() -> list[np.ndarray]:
    """Where the generators of torch, numpy and Python stand."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    own = [np.random.get_state()[1], np.array(random.getstate()[1])]  # type: ignore[index]
    return [state.numpy() for state in (torch.get_rng_state(), *cuda)] + own


def _state(modules: Sequence[nn.Module]) -> dict[tuple[int, str], tuple[int, int]]:
    """Which buffers the modules have, and how often each was written to."""
    return {
        (number, name): (id(buffer), buffer._version)
        for number, module in enumerate(modules)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def _factors(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Linear]:
    """The linear layers of LoRA whose weights are what is trained; empty if anything else is trained, too."""
    trained = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is None and id(module.weight) in trained:
            found[trained[id(module.weight)]] = module
    is_whole = len(found) == len(trained) and all(trainable.factor_of(name) in ("A", "B") for name in found)
    return found if is_whole else {}


class _Sink:
    """Takes what the backward pass of one batch tells, and fails unless every factor tells exactly once."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._tokens: list[Tensor] = []
        self._units: dict[str, Tensor] = {}

    def start(self, batch: Batch) -> None:
        """Forget the batch before; whose tokens are whose is read off the new one."""
        self._shape, self._units = tuple(batch.row_bt.shape), {}
        self._tokens = [batch.tokens_of(owner) for owner in range(max(batch.owners) + 1)]

    def take(self, name: str, x: Tensor, grad_y: Tensor) -> None:
        """One factor's input and output gradient: each unit's gradient is their product over the unit's tokens.

        Shape: x (B, T, in), grad_y (B, T, out).
        """
        if tuple(x.shape[:-1]) != self._shape:
            raise ModelError(
                f"{name}: an input of shape {tuple(x.shape)} does not have the {self._shape} tokens of the batch; "
                f"{ONE_BY_ONE}"
            )
        if name in self._units:
            raise ModelError(f"{name} is used twice in one pass, which this way of clipping cannot tell; {ONE_BY_ONE}")
        x, grad_y = x.flatten(0, 1).to(grad_y.dtype), grad_y.flatten(0, 1)  # bfloat16 under autocast
        self._units[name] = torch.stack([(grad_y[tokens].T @ x[tokens]).float() for tokens in self._tokens])

    def units(self) -> dict[str, Tensor]:
        """The gradients of units, (U, out, in) by factor."""
        units, self._units = self._units, {}
        return units


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
        grad_x = (grad_y @ weight.to(grad_y.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None  # under autocast
        return grad_x, None, None, None


@contextmanager
def _stacked(factors: dict[str, nn.Linear], backward: Callable[..., Batch]) -> Iterator[Take]:
    """One pass; all units of a physical batch at once."""
    sink = _Sink()

    def take(units: Sequence[Unit]) -> Tensor:
        backward(units, sink.start)
        return _flat(sink.units(), sorted(factors))

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


def _one(
    trained: Mapping[str, nn.Parameter], units: Sequence[Unit], backward: Callable[..., Batch], *, max_tokens: int
) -> Tensor:
    """One unit by plain autograd, the gradients of its parts added up."""
    if len(units) != 1:
        raise ValueError(f"{len(units)} units; this way takes one at a time")
    for parameter in trained.values():
        parameter.grad = None
    for part in objectives.parts(units[0], len(units[0]), max_tokens=max_tokens):
        backward([part])
    gradients = {name: parameter.grad[None] for name, parameter in trained.items() if parameter.grad is not None}
    for parameter in trained.values():
        parameter.grad = None
    return _flat(gradients, sorted(trained))


@contextmanager
def _opacus(model: nn.Module, trained: Mapping[str, nn.Parameter], backward: Callable[..., Batch]) -> Iterator[Take]:
    """Opacus' hooks; they fail under gradient checkpointing without reentry, which then is an error."""
    from opacus.grad_sample import GradSampleHooks

    for module in model.modules():
        if any(id(parameter) in map(id, trained.values()) for parameter in module.parameters(recurse=False)):
            module.training = True  # its hooks pass over a module in evaluation mode
    hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)

    def take(units: Sequence[Unit]) -> Tensor:
        with warnings.catch_warnings():  # of the first layer, whose input needs no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            batch = backward(units)
        gradients = {name: getattr(parameter, "grad_sample", None) for name, parameter in trained.items()}
        for parameter in trained.values():
            parameter.grad, parameter.grad_sample = None, None  # type: ignore[attr-defined]
        rows_rp = _flat({name: rows for name, rows in gradients.items() if isinstance(rows, Tensor)}, sorted(trained))
        owners_r = torch.tensor(batch.owners, device=rows_rp.device)
        return rows_rp.new_zeros((len(units), rows_rp.shape[1])).index_add_(0, owners_r, rows_rp)

    try:
        yield take
    except (AttributeError, ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(f"Opacus cannot serve this model ({type(error).__name__}); set privacy.clipping") from error
    finally:
        hooks.cleanup()


def _flat(gradients: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Gradients of all parameters side by side, one line for each first index.

    Raises:
        ModelError: A parameter has none: it was trained without being clipped.
    """
    missed = sorted(set(names) - gradients.keys())
    if missed:
        raise ModelError(f"no gradient of rows for {missed[0]} ({len(missed)} such tensors); set privacy.clipping")
    return torch.cat([gradients[name].flatten(1) for name in names], dim=1).float()
