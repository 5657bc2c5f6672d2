"""Adapters of other kinds than LoRA as peft saves them: names of its files, and its configuration.

n virtual tokens, h width of an embedding.
"""

from typing import Any

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


@torch.no_grad()
def parts(
    tensors: Tensors, settings: config.AdapterConfig, *, base: str | None
) -> tuple[dict[str, Tensor], PeftConfig]:
    """Tensors under the names of peft's files, and the configuration that says what they are.

    Args:
        base: Its name in the configuration; None: none.
    """
    modules = [name.removeprefix("base_model.model.") for name in adapter.module_names(adapter.specs(tensors)) if name]
    with model.quiet_peft():
        made = peft_kinds.configuration(settings, modules, base=base, is_trained=False)
    if settings.kind == "p_tuning":  # what its network makes is all that is left of it after training, shape (n, h)
        network: Any = peft_kinds.configuration(settings, ())
        network.token_dim = network.encoder_hidden_size = tensors[_EMBEDDING].shape[1]
        network.num_transformer_submodules = 1
        encoder = PromptEncoder(network)  # type: ignore[no-untyped-call]
        encoder.load_state_dict({name.removeprefix("prompt_encoder."): tensor for name, tensor in tensors.items()})
        return {_SAVED: encoder(torch.arange(settings.num_virtual_tokens)[None])[0].clone()}, made
    if KINDS[settings.kind].layers == "input":
        return {_SAVED: tensors[_EMBEDDING]}, made
    # DoRA's lengths lie in a module of their own, which peft's files do not name.
    lengths = ".lora_magnitude_vector"
    return {name.replace(f"{lengths}.weight", lengths): tensor for name, tensor in tensors.items()}, made


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
