"""The measured arm of `bench dp`: steps of a random model, with and without differential privacy, by turns."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import torch
from torch import nn

from client.train import loop, private
from client.train.loop import mean_gradient
from client.train.private import Unit
from common.adapter import adapter
from common.errors import ModelError
from common.model import base as model
from common.model.base import Engine
from common.privacy.noise import SystemNoise
from common.run import config
from common.run.schema.privacy import UnitPrivacy
from common.text.prompts import Encoded
from simulations.bench.arms import llama, process
from simulations.bench.arms.llama import SHAPES, Shape

NUM_WARM: Final = 3
NUM_STEPS: Final = 12


def main(shape_name: str, arms: str) -> dict[str, Any]:
    """Time and memory of a step of each arm.

    Args:
        shape_name: One of `SHAPES`.
        arms: `plain`, `stacked`, `microbatch`, `opacus`, with commas; measured by turns.

    Returns:
        By arm `seconds` (median; CPU seconds without a GPU) and `peak_mib`: on a GPU the most that was allocated, on a
        CPU the process', so that memory is compared between processes of one arm each.
    """
    device = model.choose_device("auto")
    shape = SHAPES[shape_name]
    engine = llama.make_engine(llama.make_base(shape, device), device, is_checkpointed=device.type == "cuda")
    rows = make_rows(shape)
    names = arms.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    optimizer = loop.make_optimizer(adapter.parameters(engine.model).values(), config.TrainingConfig().optimizer)
    engine.model.train()
    for step in range(NUM_WARM + NUM_STEPS):
        for name in names:
            with _arm(name, engine, rows, optimizer) as take_step:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    began = time.perf_counter()
                    take_step()
                    torch.cuda.synchronize()
                    spent, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**20
                else:  # CPU seconds, as other jobs share the cores
                    began = process.cpu_s()
                    take_step()
                    spent, peak = process.cpu_s() - began, process.peak_rss_mib()
            if step >= NUM_WARM:
                seconds[name].append(spent)
                peaks[name] = max(peaks[name], peak)
    return {name: {"seconds": median(seconds[name]), "peak_mib": peaks[name]} for name in names}


def make_rows(shape: Shape) -> list[Encoded]:
    """Random tokens, the last of them the answer; each row is a unit."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.tokens), generator=generator).tolist()
    is_answer = (False,) * (shape.tokens - shape.answer_tokens) + (True,) * shape.answer_tokens
    return [Encoded(tuple(row), is_answer, f"unit {number}") for number, row in enumerate(ids)]


@contextmanager
def _arm(
    name: str, engine: Engine, rows: list[Encoded], optimizer: torch.optim.Optimizer
) -> Iterator[Callable[[], None]]:
    """One optimiser step, as a site's training takes it."""
    if name == "plain":

        def plain() -> None:
            optimizer.zero_grad()
            mean_gradient(engine, rows, micro_batch_size=len(rows))
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()

        yield plain
        return
    privacy = UnitPrivacy(sampling_prob=1.0, noise_multiplier=1.0, clip_norm=0.1)
    units: list[Unit] = [[row] for row in rows]
    mechanism = private.Mechanism(
        units, parameters=adapter.parameters(engine.model), privacy=privacy, source=SystemNoise()
    )
    if name not in ("stacked", "microbatch", "opacus"):
        raise ModelError(f"no such arm: {name}")
    with private.prepared(engine, method=name) as (take, is_many):  # type: ignore[arg-type]

        def private_step() -> None:
            optimizer.zero_grad()
            mechanism.set_gradients([units] if is_many else [[unit] for unit in units], take=take)
            optimizer.step()

        yield private_step
