"""A base's layers without their weights, for whoever asks about shapes and names alone."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.errors import ModelError


def settings(folder: Path) -> PretrainedConfig:
    """The base's configuration, as transformers reads it.

    Raises:
        ModelError: The configuration cannot be read.
    """
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: no configuration that transformers can read; fetch the base again") from error
    return found


def build(folder: Path) -> PreTrainedModel:
    """The base on torch's meta device; of its files only the configuration is read.

    Raises:
        ModelError: The configuration cannot be read.
    """
    shape = settings(folder)
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return made
