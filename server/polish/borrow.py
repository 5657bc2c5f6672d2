"""Lend the engine to a trainer and take it back as it was, but for what was trained.

TRL's trainers assume that the model is theirs: they wrap its forward, turn dropout off for good, cast adapters over a
quantised base to bfloat16 and leave a copy of the adapter behind.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from common.adapter import adapter, cores
from common.adapter.adapter import Tensors
from common.errors import ModelError
from common.model import base as model
from common.model.base import Engine
from common.run.schema.polish import PolishStage

REFERENCE: Final = "ref"  # the name under which TRL looks for it
_MISSING: Final = object()


@contextmanager
def lent(engine: Engine) -> Iterator[None]:
    """Undo afterwards whatever a trainer does to the model, its weights aside; generators of random numbers too."""
    base: Any = engine.model.get_base_model()  # type: ignore[operator]
    forwards = [(owner, owner.__dict__.get("forward", _MISSING)) for owner in (base, engine.model)]
    configs = [(owner, dict(vars(owner))) for owner in (base.config, base.generation_config)]
    dropouts = [(module, module.p) for module in engine.model.modules() if isinstance(module, nn.Dropout)]
    attributes = [(owner, set(vars(owner))) for owner in (base, engine.model)]
    numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), model.quiet_peft():
        base.generation_config.eos_token_id = list(engine.stop_ids)
        try:
            yield
        finally:
            drop(engine.model, REFERENCE)
            for owner, forward in forwards:
                owner.__dict__.pop("forward", None)
                if forward is not _MISSING:
                    owner.__dict__["forward"] = forward
            for owner, values in configs:
                vars(owner).clear()
                vars(owner).update(values)
            for module, share in dropouts:
                module.p = share
            for owner, before in attributes:
                for name in set(vars(owner)) - before:
                    delattr(owner, name)
            random.setstate(numbers[0])
            np.random.set_state(numbers[1])
            engine.model.zero_grad()


@contextmanager
def memory_named(stage: PolishStage) -> Iterator[None]:
    """Too little memory as an error of ours, which names the settings that need less.

    Raises:
        ModelError: The device's memory was not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"polish stage '{stage.name}': out of memory; lower its micro_batch_size ({stage.micro_rows} rows now) "
            "or max_length_tokens"
        ) from error


@torch.no_grad()
def write_masters(engine: Engine, tensors: Tensors) -> None:
    """Put an adapter into the model as float32, whatever its parameters were cast to."""
    for name, parameter in adapter.parameters(engine.model).items():
        if name in tensors or cores.is_scale(name):
            parameter.data = tensors.get(name, parameter).to(engine.device, torch.float32, copy=True)


@torch.no_grad()
def set_reference(peft_model: Any, tensors: Tensors, *, reference: str) -> None:
    """Freeze the adapter that a stage begins with beside the one that it trains; for `base`, or none, keep no copy.

    TRL switches to the adapter called "ref" where there is one, and switches adapters off where there is none, so the
    base is in memory once either way.
    """
    drop(peft_model, REFERENCE)
    if reference == "start":
        add_frozen(peft_model, REFERENCE, tensors)


@torch.no_grad()
def add_frozen(peft_model: Any, name: str, tensors: Tensors) -> None:
    """A second adapter beside the one that is trained, as a plain pair of its rank; float32, frozen and not active."""
    plain = cores.plain(tensors)
    with torch.random.fork_rng():
        peft_model.add_adapter(name, peft_model.peft_config["default"])
    for full_name, parameter in peft_model.named_parameters():
        if f".{name}." in full_name:
            parameter.data = plain[full_name.replace(f".{name}.", ".")].to(parameter.device, torch.float32, copy=True)
            parameter.requires_grad_(False)


def drop(peft_model: Any, name: str) -> None:
    """Remove an adapter that may be there."""
    if name in peft_model.peft_config:
        peft_model.delete_adapter(name)
