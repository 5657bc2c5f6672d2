"""A base's files quantised one layer at a time, as loading it would, with no second base in memory.

Which layers, and how, is asked of transformers' own quantiser on a model without weights.

d outputs, k inputs of a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from common.errors import ModelError
from common.model import base as model
from common.model import codes, skeleton
from common.model.base import Engine
from common.run.catalogue.kinds import Quantization
from common.run.schema import precisions
from common.run.schema.model import ModelConfig


@dataclass(frozen=True)
class Layer:
    """One linear layer of a base.

    Attributes:
        name: Of the module.
        weight_dk: As in the files.
        stored: As it is held in memory at this precision: packed codes, 8-bit codes, or values of the compute type.
        used_dk: What the layer computes with: `stored` dequantised.
    """

    name: str
    weight_dk: Tensor
    stored: Tensor
    used_dk: Tensor


def layers(folder: Path, settings: ModelConfig, device: torch.device) -> Iterator[Layer]:
    """Every layer that a quantiser would touch, in the order of the names, at the precision of `settings`.

    Args:
        settings: Section `[model]`; of `site_quantization` nothing is read.
        device: Where to quantise, one layer at a time.

    Raises:
        ModelError: A file is missing or damaged, or names a layer in another way than the model does.
    """
    base, quantizer = _replaced(folder, settings, device)
    files = _files(folder)
    dtype = model.resolve_dtype(settings, device)
    for name in sorted(name for name, module in base.named_modules() if codes.is_quantised(module)):
        weight = _read(folder, files, f"{name}.weight").to(device)
        is_turned = issubclass(base.get_submodule(name).source_cls, Conv1D)  # type: ignore[arg-type]
        weight_dk = weight.T.contiguous() if is_turned else weight
        if settings.quantization == "none":
            yield Layer(name, weight_dk, weight_dk.to(dtype), weight_dk.to(dtype))
        else:
            full_name = f"{name}.weight"
            made = quantizer.get_quantize_ops().convert({full_name: weight.to(dtype)}, model=base)[full_name]
            used_dk = dequantize_bnb_weight(made, getattr(base.get_submodule(name), "state", None))
            yield Layer(name, weight_dk, made.data, used_dk)


def codes_of_run(engine: Engine, settings: ModelConfig) -> str:
    """Hash of the 4-bit codes for a run's manifest: the engine's own, or of its files where only some sites are 4-bit.

    Args:
        engine: The base at the run's own precision.

    Raises:
        ModelError: As `layers`.
    """
    if engine.codes_sha256 or "nf4" not in precisions.used(settings):
        return engine.codes_sha256
    found = layers(engine.folder, precisions.at(settings, "nf4"), engine.device)
    return codes.digest((layer.name, tuple(layer.weight_dk.shape), layer.stored) for layer in found)


def _replaced(folder: Path, settings: ModelConfig, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The model without weights, its layers replaced as for a quantised base; the quantiser."""
    told: Quantization = "int8" if settings.quantization == "none" else settings.quantization
    configuration = model.quantization_config(precisions.at(settings, told), model.resolve_dtype(settings, device))
    quantizer = AutoHfQuantizer.from_config(configuration, pre_quantized=False)  # type: ignore[arg-type]
    base = skeleton.build(folder)
    quantizer.preprocess_model(base, device_map={"": device})
    return base, quantizer


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged; fetch the base again") from error
    return found


def _read(folder: Path, files: dict[str, Path], name: str) -> Tensor:
    """One tensor."""
    if name not in files:
        raise ModelError(
            f"{folder}: no tensor {name} in its files, which name layers in another way than transformers; with such a "
            "base give all sites one precision and remove model.site_quantization"
        )
    with safe_open(files[name], framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(name)
    return found
