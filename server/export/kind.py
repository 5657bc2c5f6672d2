"""Adapters of other kinds than LoRA as peft saves them: names of its files, and its configuration.

n virtual tokens, h width of an embedding.
"""

import torch
from peft import PeftConfig, PromptEncoder
from torch import Tensor

from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError
from common.model import base as model
from common.model import peft_kinds
from common.run import config
from common.run.catalogue.kinds import KINDS

_EMBEDDING = "prompt_encoder.embedding.weight"
_SAVED = "prompt_embeddings"


def parts(tensors: Tensors, run: config.RunConfig, *, base: str | None) -> tuple[dict[str, Tensor], PeftConfig]:
    """Tensors under the names of peft's files, and the configuration that tells what they are.

    Args:
        base: What peft is told of the base; None: nothing.
    """
    settings = run.adapter
    modules = [name.removeprefix("base_model.model.") for name in adapter.module_names(adapter.specs(tensors)) if name]
    with model.quiet_peft():
        made = peft_kinds.configuration(settings, modules, base=base, is_trained=False)
    if settings.kind == "p_tuning":
        return {_SAVED: _embeddings(tensors, settings)}, made
    if KINDS[settings.kind].layers == "input":
        return {_SAVED: tensors[_EMBEDDING]}, made
    return {_saved_name(name): tensor for name, tensor in tensors.items()}, made


def check_mergeable(kind: str) -> None:
    """Refuse to add to a base's weights what is no part of them.

    Raises:
        ConfigError: The kind is virtual tokens.
    """
    if not KINDS[kind].is_mergeable:
        raise ConfigError(
            f"'{kind}' is virtual tokens before the input and no part of any weight, so it cannot be merged; give "
            "--output for its peft folder"
        )


def _saved_name(name: str) -> str:
    """DoRA's lengths lie in a module of their own, which peft's files do not name."""
    magnitude = ".lora_magnitude_vector"
    return name.removesuffix(".weight") if name.endswith(magnitude + ".weight") else name


@torch.no_grad()
def _embeddings(tensors: Tensors, settings: config.AdapterConfig) -> Tensor:
    """What P-tuning's network makes: all that is left of it after training. Shape (n, h)."""
    made = peft_kinds.configuration(settings, ())
    width = tensors[_EMBEDDING].shape[1]
    made.token_dim, made.encoder_hidden_size, made.num_transformer_submodules = width, width, 1  # type: ignore[attr-defined]
    encoder = PromptEncoder(made)  # type: ignore[no-untyped-call]
    encoder.load_state_dict({name.removeprefix("prompt_encoder."): tensor for name, tensor in tensors.items()})
    found: Tensor = encoder(torch.arange(settings.num_virtual_tokens)[None])[0]
    return found.clone()
