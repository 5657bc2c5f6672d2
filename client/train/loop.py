"""One round of local training at a site: a trainer that can be saved between any two steps."""

import contextlib
import copy
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from client.train import private, schedule
from client.train.private import Unit
from common.adapter import adapter, cores
from common.errors import ModelError
from common.loss import objectives, preference_score
from common.loss.objectives import SFT, Example
from common.model.base import Engine
from common.privacy.noise import Noise
from common.run import config
from common.run.catalogue import kinds
from common.run.schema.privacy import PrivacyConfig, Protection
from common.run.schema.training import AdamW, Objective, Sgd

Watch = Callable[[int, int], None]  # called after each step: how many are done, of how many
PROVEN_STEP: Final = 2  # after it the adapter must have moved; a failure costs two steps, not a night
PROBE_TOKENS: Final = 16
REGULARISER_WEIGHT: Final = 0.5  # peft's default, `orth_reg_weight`

_reloaded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that have passed `check_reload`


def unwatched(step: int, num_steps: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class LocalResult:
    """What a round of training did; the loss as in `mean_gradient`. None: not to be told, as it would not be private.

    `spread` is over how many of its steps the gradients were spread, as a share (`spread_of`); it never leaves. None
    where noise covers single units.
    """

    num_steps: int
    num_tokens: int | None
    train_loss: float | None
    seconds: float | None
    protection: Protection
    spread: float | None = None


def spread_of(norms: Sequence[float]) -> float:
    """Over how many steps a round's gradients were spread, as a share of all: (sum n)^2 / sum n^2 / number.

    1 where all are of one length. Where one row alone has a gradient, it is the share of the steps that read this row.

    Example:
        >>> spread_of([1.0, 1.0, 1.0, 1.0]), spread_of([0.0, 0.0, 5.0, 0.0])
        (1.0, 0.25)
    """
    squares = math.fsum(norm * norm for norm in norms)
    return math.fsum(norms) ** 2 / squares / len(norms) if squares > 0 else 0.0


def train(
    engine: Engine,
    rows: Sequence[Example],
    *,
    training: config.TrainingConfig,
    privacy: PrivacyConfig,
    round_index: int,
    num_rounds: int,
    seed: int,
    source: Noise,
    proximal: float = 0.0,
    watch: Watch = unwatched,
) -> LocalResult:
    """Train the adapter in `engine` in place for a round; see `Trainer`.

    Args:
        watch: Called after each step: how many are done, of how many.

    Raises:
        ModelError: The loss is not finite, or the adapter did not move.
        PrivacyError: The site's rows are too few for what the run asks.
    """
    started = time.monotonic()
    trainer = Trainer(
        engine,
        rows,
        training=training,
        privacy=privacy,
        round_index=round_index,
        num_rounds=num_rounds,
        seed=seed,
        source=source,
        proximal=proximal,
    )
    with trainer:
        while trainer.num_done < trainer.num_steps:
            trainer.step(trainer.draw())
            watch(trainer.num_done, trainer.num_steps)
    if engine.model not in _reloaded:
        check_reload(engine)
        _reloaded.add(engine.model)
    return trainer.result(seconds=time.monotonic() - started)


class Trainer:
    """The steps of one round at one site: owns model, optimiser, sampler and random state.

    Between two steps it can be saved (`state`), and a new one that was made of the same arguments goes on from there
    (`load_state`) and ends at the same bits. Used as a context, within which the model is in the mode that steps need.

    Args:
        engine: Holds the adapter to start from.
        rows: The site's training rows; preferences with their references.
        training: Section `[training]`.
        privacy: Section `[privacy]`, resolved.
        round_index: From 0.
        num_rounds: Of the run; the learning-rate schedule spans them all.
        seed: Of this run and site.
        source: Of the draws and the noise where training is private.
        proximal: FedProx's mu.

    Raises:
        PrivacyError: The site's units are too few for what the run asks, or the model couples them.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[Example],
        *,
        training: config.TrainingConfig,
        privacy: PrivacyConfig,
        round_index: int,
        num_rounds: int,
        seed: int,
        source: Noise,
        proximal: float = 0.0,
    ) -> None:
        self._engine, self._rows, self._training, self._privacy = engine, rows, training, privacy
        self._source, self._proximal = source, proximal
        self._objective = training.objective
        self.num_steps = schedule.num_local_steps(len(rows), training)
        self.num_done = 0
        self._rates = schedule.rates(round_index, num_rounds=num_rounds, num_steps=self.num_steps, training=training)
        self._parameters = adapter.parameters(engine.model)
        self._origin = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._optimizer = make_optimizer(self._parameters.values(), training.optimizer)
        self._num_tokens = 0
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._mechanism: private.Mechanism | None = None
        self._order: list[list[int]] = []
        if privacy.mode == "unit":
            units = private.population(rows, dp_delta=privacy.dp_delta)
            self._mechanism = private.Mechanism(units, parameters=self._parameters, privacy=privacy, source=source)
        else:
            self._order = list(
                schedule.batches(
                    num_rows=len(rows),
                    batch_size=training.batch_size,
                    first_step=round_index * self.num_steps,
                    num_steps=self.num_steps,
                    seed=seed,
                )
            )
        with torch.random.fork_rng(self._cuda_devices):
            torch.manual_seed(schedule.derive_seed(seed, round_index))
            self._random = self._random_states()

    def __enter__(self) -> Self:
        """Set the model's mode, and under unit privacy hold the model so that units do not touch."""
        if not self._engine.model.training:
            self._engine.model.train()
        self._exit = contextlib.ExitStack()
        if self._privacy.mode == "unit":
            method = self._privacy.clipping
            prepared = private.prepared(
                self._engine,
                method=method,
                objective=self._objective,
                max_tokens=self._training.micro_batch_tokens,
            )
            self._take, _ = self._exit.enter_context(prepared)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model in training mode."""
        self._exit.close()

    def draw(self) -> Sequence[Unit]:
        """The next step's rows, each as a unit of its own; under unit privacy the units that were drawn in secret."""
        if self._mechanism:
            return self._mechanism.draw()
        return [[self._rows[index]] for index in self._order[self.num_done]]

    def step(self, units: Sequence[Unit]) -> None:
        """Take one step on these rows, private or not.

        Raises:
            ModelError: Two steps, or all, left some module of the adapter as it was, or a loss is not finite.
        """
        training, rate = self._training, self._rates[self.num_done]
        with self._own_random():
            self._optimizer.zero_grad()
            if self._mechanism:  # each unit goes through the model alone, or rounding would couple them
                self._mechanism.set_gradients(([unit] for unit in units), take=self._take)
            else:
                rows = [row for unit in units for row in unit]
                mean = mean_gradient(
                    self._engine,
                    rows,
                    micro_batch_size=training.micro_batch_size or training.batch_size,
                    micro_batch_tokens=training.micro_batch_tokens,
                    objective=self._objective,
                )
                self._losses.append(mean)
                self._norms.append(_clip(self._parameters.values(), training.max_grad_norm))
                self._num_tokens += sum(len(row.input_ids) for example in rows for row in example.rows)
            _add_regulariser(self._parameters)
        if self._proximal and rate:
            self._pull(rate * self._proximal)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.num_done += 1
        if self.num_done in (PROVEN_STEP, self.num_steps):
            self._check()

    def result(self, *, seconds: float) -> LocalResult:
        """What may be told of the steps taken."""
        protection: Protection = "unit" if self._mechanism else "none"
        losses, norms = [float(loss) for loss in self._losses], [float(norm) for norm in self._norms]
        spread = None if self._mechanism else spread_of(norms)
        if self._privacy.mode != "none":  # for the site as a whole too: no noise covers these figures
            return LocalResult(self.num_steps, None, None, None, protection, spread)
        return LocalResult(self.num_steps, self._num_tokens, sum(losses) / len(losses), seconds, protection, spread)

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on and that is not in the arguments; tensors and plain values, copied.

        Privacy: draws and noise of the operating system are not in it: whoever continues draws afresh. What unit
        privacy releases after each step is all that it holds of the rows; without it, it holds gradients' moments.
        """
        return copy.deepcopy(
            {
                "num_done": self.num_done,
                "origin": self._origin,
                "parameters": {name: parameter.detach() for name, parameter in self._parameters.items()},
                "optimizer": self._optimizer.state_dict(),
                "random": self._random,
                "noise": self._source.position(),
                "clip_norm": self._mechanism.limit.value if self._mechanism else 0.0,
                "num_tokens": self._num_tokens,
                "losses": self._losses,
                "norms": self._norms,
            }
        )

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a trainer of the same arguments was saved."""
        state = copy.deepcopy(state)
        for name, parameter in self._parameters.items():
            parameter.copy_(state["parameters"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._source.go_to(state["noise"])
        if self._mechanism:
            self._mechanism.limit.value = state["clip_norm"]
        self.num_done, self._origin, self._random = state["num_done"], state["origin"], state["random"]
        self._num_tokens, self._losses, self._norms = state["num_tokens"], state["losses"], state["norms"]

    @property
    def _cuda_devices(self) -> list[torch.device]:
        """Beside the CPU, whose generator gives the masks of dropout."""
        return [self._engine.device] if self._engine.device.type == "cuda" else []

    def _random_states(self) -> list[Tensor]:
        """Of torch's generators."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda_devices)]

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Continue this trainer's random numbers, and leave the caller's alone."""
        with torch.random.fork_rng(self._cuda_devices):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._cuda_devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._random = self._random_states()

    @torch.no_grad()
    def _pull(self, share: float) -> None:
        """Go a share of the way back to where the round began, before the step along a gradient that is there already.

        With plain SGD both together are a step on FedProx's loss, f + mu/2 || w - w_t ||^2; the pull depends on no
        row, so that neither clipping nor noise has to see it.

        Source: Li et al. 2020, arXiv:1812.06127, equation 2.
        """
        for name, parameter in self._parameters.items():
            parameter.lerp_(self._origin[name], share)

    def _check(self) -> None:
        """Losses are numbers, and every module of the adapter has changed in some value.

        Opacus issue 820 is why: 45 GPU-hours of models that had not moved, without an error.

        Raises:
            ModelError: Names the first step or module of which this is not so.
        """
        for number, loss in enumerate(torch.stack(self._losses).tolist() if self._losses else []):
            if not math.isfinite(loss):
                raise ModelError(f"training loss is {loss} at step {number}; lower training.learning_rate")
        if not any(self._rates[: self.num_done]):
            return
        # The scales of a core have no gradient while it is zero, as it is at the start.
        names = [name for name in self._parameters if not cores.is_scale(name)]
        changes = [(self._parameters[name].detach() != self._origin[name]).any() for name in names]
        moved = {
            kinds.module_of(name)
            for name, is_changed in zip(names, torch.stack(changes).tolist(), strict=True)
            if is_changed
        }
        still = sorted({kinds.module_of(name) for name in names} - moved)
        if still:
            raise ModelError(
                f"training did not change the adapter of {still[0]} ({len(still)} such modules); nothing was sent. "
                "Look at training.learning_rate, or report this"
            )


def make_optimizer(trained: Iterable[nn.Parameter], settings: AdamW | Sgd) -> torch.optim.Optimizer:
    """A fresh optimiser over the adapter, as `[training.optimizer]` says; its rate is set at every step."""
    parameters = list(trained)
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def mean_gradient(
    engine: Engine,
    rows: Sequence[Example],
    *,
    micro_batch_size: int,
    micro_batch_tokens: int = 0,
    objective: Objective = SFT,
) -> Tensor:
    """Set every trainable parameter's `.grad` to that of the mean loss of a batch.

    The mean is over answer tokens, or over examples where preferences are learnt. The batch is cut into micro-batches
    of similar length; the gradient does not depend on the cut.

    Args:
        engine: Model in training mode, gradients cleared.
        rows: The logical batch.
        micro_batch_size: Examples that go through the model at once; a pair has two rows.
        micro_batch_tokens: Tokens that do, in the place of examples; 0: examples are counted.

    Returns:
        The mean loss, a scalar on the device: under `sft` the negative log-likelihood per answer token, nats.
    """
    num_terms = objectives.num_terms(rows, objective)
    size, tokens = micro_batch_size, micro_batch_tokens
    origin = preference_score.reference_point(engine, rows, objective, batch_size=size, max_tokens=tokens)
    total = torch.zeros((), device=engine.device)
    for part in objectives.parts(rows, size, max_tokens=tokens):
        loss = objectives.loss(engine, objectives.collate(engine, [part]), part, objective, origin=origin)
        (loss / num_terms).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total / num_terms


def _clip(parameters: Iterable[nn.Parameter], max_grad_norm: float) -> Tensor:
    """Scale the whole gradient to at most `max_grad_norm`, 0 leaves it alone; its L2 norm as it was, a scalar."""
    trained = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    return norm


def _add_regulariser(parameters: Mapping[str, nn.Parameter]) -> None:
    """Add AdaLoRA's gradient of the mean of || Q Q^T - I ||_F and || P^T P - I ||_F; nothing for other kinds.

    It keeps factors near those of an SVD; Q is (r, k), P is (d, r). It depends on no row, so that neither clipping
    nor noise has to see it.

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 4; norms and weight as peft 0.21 has them.
    """
    grams = [
        factor @ factor.T if name.endswith(".lora_A") else factor.T @ factor
        for name, factor in parameters.items()
        if name.endswith((".lora_A", ".lora_B"))
    ]
    if grams:
        terms = [(gram_rr - torch.eye(len(gram_rr), device=gram_rr.device)).norm() for gram_rr in grams]
        (REGULARISER_WEIGHT * torch.stack(terms).mean()).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def check_reload(engine: Engine) -> None:
    """The trained adapter, written as bytes and read back, gives the same logits.

    Raises:
        ModelError: It does not.
    """
    tensors = adapter.read(engine.model)
    expected = _logits(engine)
    data = adapter.encode(tensors, dtype="float32")
    adapter.write(engine.model, adapter.decode(data, adapter.specs(tensors), dtype="float32"))
    if not torch.equal(_logits(engine), expected):
        raise ModelError("the adapter gives other logits once it is saved and read back; nothing was sent")


def _logits(engine: Engine) -> Tensor:
    """Of a fixed input, in evaluation mode."""
    was_training = engine.model.training
    engine.model.eval()
    ids = torch.arange(PROBE_TOKENS, device=engine.device)[None] % len(engine.tokenizer)
    logits: Tensor = engine.model(input_ids=ids).logits
    engine.model.train(was_training)
    return logits
