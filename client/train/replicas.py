"""Several devices of one site: each holds a copy of the model and takes a share of every step's rows.

The process that trains owns the step: draws, optimiser, clipping norm and noise. Before a step it writes the adapter
into memory that it shares with the other processes; they take the gradients of their rows, under unit privacy the sum
of their units' clipped gradients, and put them into shared memory, where they are added up. So clipping comes before
the sum and noise is added once, as on one device, and nothing of it can be told apart from a step on one device but
the order of sums; under unit privacy these are of whole numbers and exact.

Tensors cross by shared memory (on cards by CUDA's handles between processes), rows and orders by a pipe. No port is
opened and nothing is written to disk. P trained parameters in the order of their names.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
import torch.multiprocessing as torch_multiprocessing
from torch import Tensor, nn

from client.train import answering, private
from client.train.loop import mean_gradient
from client.train.private import Unit
from common import keyfile
from common.adapter import adapter
from common.errors import ModelError, SilotuneError
from common.loss import objectives
from common.loss.objectives import Example, Objective
from common.model.base import Engine

Load = Callable[[str], Engine]  # of a device's name; must be picklable
WAIT_S: Final = 10.0  # for a process that was told to end


@dataclass(frozen=True)
class Work:
    """What is the same in all steps of a round.

    Attributes:
        trained: Names of the tensors that are trained.
        objective: What is lowered.
        clipping: As `privacy.clipping`; None: training is not private.
        micro_batch_size: As `training.micro_batch_size`.
        micro_batch_tokens: As `training.micro_batch_tokens`.
        is_watched: Whether to watch which rows answer the adapter's questions.
    """

    trained: tuple[str, ...]
    objective: Objective
    clipping: private.Method | None
    micro_batch_size: int
    micro_batch_tokens: int
    is_watched: bool = False


def shares(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """Units over devices, so that each has about as many tokens; each keeps the order that they came in.

    Example:
        >>> from types import SimpleNamespace as N
        >>> row = lambda n: N(rows=[N(input_ids=range(n))])
        >>> [[len(u[0].rows[0].input_ids) for u in part] for part in shares([[row(n)] for n in (5, 2, 4, 3)], 2)]
        [[5, 2], [4, 3]]
    """
    sizes = [sum(len(row.input_ids) for example in unit for row in example.rows) for unit in units]
    loads, chosen = [0] * count, list[list[int]]([] for _ in range(count))
    for number in sorted(range(len(units)), key=lambda number: -sizes[number]):
        device = loads.index(min(loads))
        loads[device] += sizes[number]
        chosen[device].append(number)
    return [[units[number] for number in sorted(numbers)] for numbers in chosen]


class Replicas:
    """The other devices of this site.

    Args:
        load: Loads the engine on a device, as the first one was loaded.
        devices: Names of the devices, such as `cuda:1`; not that of the process that trains.

    Raises:
        ModelError: A process could not load its engine.
    """

    def __init__(self, load: Load, devices: Sequence[str]) -> None:
        context = torch_multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, load, device), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()
        self._adapters: list[Tensor] = []
        self._gradients: list[Tensor] = []

    @property
    def count(self) -> int:
        """Devices beside the first."""
        return len(self._pipes)

    def begin(self, engine: Engine, work: Work) -> None:
        """Start a round: the others get the adapter that is in the engine, whatever its form."""
        self._work = work
        self._tell([("begin", adapter.read(engine.model), work)] * self.count)
        shared = self._answers()
        self._adapters, self._gradients = [pair[0] for pair in shared], [pair[1] for pair in shared]

    def mean_gradient(self, engine: Engine, rows: Sequence[Example]) -> Tensor:
        """As `loop.mean_gradient`, over all devices."""
        work = self._work
        parts = [[row for unit in part for row in unit] for part in shares([[row] for row in rows], self.count + 1)]
        terms = [objectives.num_terms(part, work.objective) for part in parts]
        parameters = adapter.parameters(engine.model)
        self._publish(parameters)
        self._tell([("mean", part) for part in parts[1:]])
        total = torch.zeros((), device=engine.device)
        if parts[0]:
            total += _mean(engine, parts[0], work) * (terms[0] / sum(terms))
        flat_p = _flat(parameters).mul_(terms[0] / sum(terms))
        for loss, gradient_p, count in zip(self._answers(), self._gradients, terms[1:], strict=True):
            flat_p.add_(gradient_p[: len(flat_p)].to(flat_p.device, torch.float32), alpha=count / sum(terms))
            total += loss * (count / sum(terms))
        _put(flat_p, parameters)
        return total

    def clipped_sum(
        self, engine: Engine, units: Sequence[Unit], take: private.Take, *, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        """As `private.clipped_sum` of one unit a pass, over all devices: the same sum to the bit.

        Returns:
            The sum, (P,) whole steps of the grid in float64, and all norms in the order of the units.
        """
        parts = shares(units, self.count + 1)
        parameters = adapter.parameters(engine.model)
        self._publish(parameters)
        self._tell([("clipped", part, clip_norm) for part in parts[1:]])
        sum_p, norms_u = _clipped(engine, parts[0], take, clip_norm)
        norms = [norms_u]
        for their_norms, gradient_p in zip(self._answers(), self._gradients, strict=True):
            sum_p.add_(gradient_p.to(sum_p.device))
            norms.append(their_norms.to(sum_p.device))
        return sum_p, torch.cat(norms)

    def end(self) -> list[answering.Sums]:
        """End a round.

        Returns:
            What each device saw of which rows answer; see `answering.Answering.add`.
        """
        self._adapters, self._gradients = [], []
        self._tell([("end",)] * self.count)
        return [seen for seen in self._answers() if seen is not None]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()  # they end when nobody can tell them anything any more
        for process in self._processes:
            process.join(WAIT_S)
            if process.is_alive():
                process.kill()

    def _publish(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write the adapter as it is now where the other processes read it."""
        for shared_p in self._adapters:
            start = 0
            for parameter in parameters.values():
                shared_p[start : start + parameter.numel()].copy_(parameter.detach().flatten())
                start += parameter.numel()
        for device in {shared_p.device for shared_p in self._adapters if shared_p.is_cuda}:
            torch.cuda.synchronize(device)

    def _tell(self, orders: Sequence[tuple[Any, ...]]) -> None:
        for pipe, order in zip(self._pipes, orders, strict=True):
            pipe.send(order)

    def _answers(self) -> list[Any]:
        """One answer of each process.

        Raises:
            ModelError: A process failed or is gone.
        """
        found = []
        for number, pipe in enumerate(self._pipes):
            try:
                is_good, answer = pipe.recv()
            except (EOFError, OSError) as error:
                raise ModelError(
                    f"the process of device {number + 1} ended; the round is lost, start it again"
                ) from error
            if not is_good:
                raise ModelError(f"device {number + 1}: {answer}")
            found.append(answer)
        return found


def _serve(pipe: Connection, load: Load, device: str) -> None:
    """The process of one device: load, then do as told until the pipe ends."""
    keyfile.harden()
    try:
        engine = load(device)
        pipe.send((True, None))
        worker = _Worker(engine)
        while True:
            kind, *given = pipe.recv()
            pipe.send((True, getattr(worker, kind)(*given)))
    except (EOFError, OSError):
        return
    except SilotuneError as error:
        pipe.send((False, str(error)))
    except Exception as error:  # noqa: BLE001  its text could hold values of rows
        pipe.send((False, f"{type(error).__name__} in its process"))


class _Worker:
    """What the process of a device does between two orders."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stack = ExitStack()

    def begin(self, tensors: adapter.Tensors, work: Work) -> tuple[Tensor, Tensor]:
        """Take an adapter; the shared memory for coming ones, and for gradients."""
        self._work, model = work, self._engine.model
        adapter.write(model, tensors)
        self._stack.enter_context(adapter.training_only(model, work.trained))
        self._seen = self._stack.enter_context(answering.watching(model)) if work.is_watched else None
        model.train()
        if work.clipping is not None:
            prepared = private.prepared(
                self._engine, method=work.clipping, objective=work.objective, max_tokens=work.micro_batch_tokens
            )
            self._take, _ = self._stack.enter_context(prepared)
        self._parameters = adapter.parameters(model)
        size = sum(parameter.numel() for parameter in self._parameters.values())
        is_private = work.clipping is not None
        self._adapter_p = torch.empty(size, device=self._engine.device)
        self._gradient_p = self._adapter_p.new_empty(size, dtype=torch.float64 if is_private else torch.float32)
        for shared_p in (self._adapter_p, self._gradient_p):
            shared_p.share_memory_()
        return self._adapter_p, self._gradient_p

    def mean(self, rows: Sequence[Example]) -> float:
        """Share the gradient of the mean loss of some rows, whose value is the answer."""
        _put_values(self._adapter_p, self._parameters)
        for parameter in self._parameters.values():
            parameter.grad = None
        loss = float(_mean(self._engine, rows, self._work)) if rows else 0.0
        self._gradient_p.copy_(_flat(self._parameters))
        self._wait()
        return loss

    def clipped(self, units: Sequence[Unit], clip_norm: float) -> Tensor:
        """Share the sum of some units' clipped gradients; the answer is their norms."""
        _put_values(self._adapter_p, self._parameters)
        sum_p, norms_u = _clipped(self._engine, units, self._take, clip_norm)
        self._gradient_p.copy_(sum_p)
        self._wait()
        return norms_u.cpu()

    def end(self) -> "answering.Sums | None":
        """Leave the round."""
        self._stack.close()
        return self._seen.sums() if self._seen else None

    def _wait(self) -> None:
        """Until what was written is there for other processes."""
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)


def _mean(engine: Engine, rows: Sequence[Example], work: Work) -> Tensor:
    """The mean loss of some rows, its gradient set."""
    return mean_gradient(
        engine,
        rows,
        micro_batch_size=work.micro_batch_size,
        micro_batch_tokens=work.micro_batch_tokens,
        objective=work.objective,
    )


def _clipped(engine: Engine, units: Sequence[Unit], take: private.Take, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Of one unit a pass, as on one device."""
    size = sum(parameter.numel() for parameter in adapter.parameters(engine.model).values())
    each = ([unit] for unit in units)
    return private.clipped_sum(each, take=take, clip_norm=clip_norm, num_parameters=size, device=engine.device)


def _flat(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """All gradients, one behind the other; zero where there is none. Shape: (P,)."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters.values()])


def _put(flat_p: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """Values as the parameters' gradients."""
    start = 0
    for parameter in parameters.values():
        parameter.grad = flat_p[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


@torch.no_grad()
def _put_values(flat_p: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """Values as the parameters themselves."""
    start = 0
    for parameter in parameters.values():
        parameter.copy_(flat_p[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()
