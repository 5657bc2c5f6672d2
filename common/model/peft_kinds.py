"""Kinds of adapters beside LoRA, as peft attaches them; `common.run.catalogue.kinds` says what holds of each.

Names of layers follow from base and `[adapter]`; starts are drawn from the seed on the CPU, the same on every
device.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import peft
import torch
from peft import PeftConfig, PeftType
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from common.errors import ModelError
from common.model import skeleton
from common.run.catalogue.kinds import KINDS
from common.run.schema.model import AdaLoraAdapter, AdapterConfig, DoraAdapter, TokensAdapter

TASK: Final = "CAUSAL_LM"
FEED_FORWARD: Final = frozenset(
    name.rpartition(".")[2]
    for names in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.values()
    for name in names
)


def attach(base: Any, settings: AdapterConfig, *, seed: int) -> nn.Module:
    """A base with an adapter of any kind but LoRA: float32, as peft starts it, drawn from the seed.

    Raises:
        ModelError: The base has no such layers, or a setting does not fit them.
    """
    modules = layers(base, settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, configuration(settings, modules), autocast_adapter_dtype=True)
        except (ValueError, KeyError) as error:
            raise ModelError(f"adapter.kind = '{settings.kind}' does not fit this base: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model


def configuration(
    settings: AdapterConfig, modules: Sequence[str], *, base: str | None = None, is_trained: bool = True
) -> PeftConfig:
    """peft's configuration of `[adapter]`.

    Args:
        modules: Full names of the layers, as in the base; none for virtual tokens.
        is_trained: Whether it is for training; else it is what an export says.
    """
    shared = {"task_type": TASK, "inference_mode": not is_trained, "base_model_name_or_path": base}
    if KINDS[settings.kind].layers != "input":
        shared["target_modules"] = list(modules)
    make: Any = functools.partial  # peft's configurations are told apart by nothing that a type checker sees
    own: dict[str, Any] = {}
    if isinstance(settings, DoraAdapter | AdaLoraAdapter):
        own = {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": "none"}
    if settings.kind == "dora":
        own |= {"use_dora": True, "r": settings.r, "use_rslora": settings.use_rslora}
    elif settings.kind == "adalora":  # the schedule is the coordinator's, in rounds (`server.aggregate.adalora`)
        own |= {"init_r": settings.r, "target_r": settings.final_r, "total_step": 1}
    elif isinstance(settings, TokensAdapter):
        own = {"num_virtual_tokens": settings.num_virtual_tokens}
    feed_forward = [name for name in modules if name.rpartition(".")[2] in FEED_FORWARD]
    makers = {
        "dora": peft.LoraConfig,
        "adalora": peft.AdaLoraConfig,
        "ia3": make(peft.IA3Config, feedforward_modules=feed_forward),
        "ln_tuning": peft.LNTuningConfig,
        "full": peft.LNTuningConfig,  # peft trains a copy of whatever layer it is given
        "prompt_tuning": make(peft.PromptTuningConfig, prompt_tuning_init="SAMPLE_VOCAB"),
        "prefix_tuning": peft.PrefixTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
    }
    made: PeftConfig = makers[settings.kind](**shared, **own)
    return made


def layers(base: nn.Module, settings: AdapterConfig) -> list[str]:
    """Full names of the layers that the run's kind stands on.

    Raises:
        ModelError: A name of `adapter.targets` matches no layer.
    """
    where, names = KINDS[settings.kind].layers, settings.layers
    if where == "input":
        return []
    if where == "norms":
        return _found(_norms(base), "normalisation layer")
    is_all = names == ("all-linear",)
    head = base.get_output_embeddings()  # type: ignore[operator]
    linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head]
    allowed = linears + (_norms(base) if where == "both" else [])
    if is_all:
        return _found(allowed, "linear layer")
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in allowed):  # as peft compares them
            last = sorted({name.rpartition(".")[2] for name in allowed})
            raise ModelError(f"adapter.targets: '{wanted}' matches no module; choose among {', '.join(last)}")
    return [name for name in allowed if f".{name}".endswith(tuple(f".{wanted}" for wanted in names))]


def num_prepended(model: nn.Module) -> int:
    """Virtual tokens before a row's own: all logits come so many places later."""
    settings = getattr(model, "active_peft_config", None)
    if settings is None or settings.peft_type not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        return 0
    return int(settings.num_virtual_tokens)


def _norms(base: nn.Module) -> list[str]:
    """All normalisation layers with a weight."""
    return [
        name
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    ]


def _found(names: list[str], what: str) -> list[str]:
    """The names, of which there must be some."""
    if not names:
        raise ModelError(f"this base has no {what}; choose another adapter.kind")
    return names


def num_parameters(folder: Path, settings: AdapterConfig) -> int:
    """Values of an adapter of any kind but LoRA on a base, by peft itself on shapes alone; no weight is read.

    Raises:
        ModelError: The base's configuration cannot be read, or the kind does not fit it.
    """
    base = skeleton.build(folder)
    with torch.device("meta"):
        base.requires_grad_(False)
        model = attach(base, settings, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
