"""How much memory a base needs for training, from the headers of its safetensors files; no weight is read.

Estimates, each a sum that is easy to follow; activations hold within a factor of two (see the tests).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from common.errors import ModelError

BLOCK: Final = 64  # weights that share a scale in NF4
SCALES: Final = 256  # scales that share a second scale
FLOAT32_BYTES: Final = 4
EMBEDDINGS: Final = ("embed", "wte", "wpe", "lm_head")  # never quantised, never trained
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class BaseShape:
    """What a base is made of.

    Attributes:
        linears: Module name to (outputs, inputs) of the layers that are quantised and may get an adapter.
        num_other: Values in all other tensors.
        num_layers: Of the transformer.
        hidden_size: Width of the residual stream.
        vocab_size: Width of the logits.
        file_bytes: Size of the files.
    """

    linears: dict[str, tuple[int, int]]
    num_other: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    file_bytes: int

    @property
    def num_linear(self) -> int:
        """Weights in the linear layers."""
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    def targets(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """The layers that `adapter.targets` names; `all-linear` names all."""
        is_all, ends = tuple(names) == ("all-linear",), tuple(f".{name}" for name in names)  # as peft compares names
        return [shape for name, shape in self.linears.items() if is_all or f".{name}".endswith(ends)]

    def num_adapter_parameters(self, names: Sequence[str], *, r: int) -> int:
        """Values in the two factors of all targets: r (inputs + outputs) each."""
        return sum(r * (outputs + inputs) for outputs, inputs in self.targets(names))


@dataclass(frozen=True)
class Work:
    """What is done with a base.

    Attributes:
        quantization: As `model.quantization`.
        double_quantization: As `model.double_quantization`.
        dtype: Compute type.
        targets: As `adapter.targets`, split.
        r: Rank.
        num_rows: Rows in memory at once.
        num_tokens: Of a row.
        is_checkpointing: Whether activations are computed again.
        is_adam: Whether the optimizer keeps two moments.
        num_trained: Values of the adapter where its tensors are known; 0: those of LoRA on the targets.
    """

    quantization: str
    double_quantization: bool
    dtype: str
    targets: tuple[str, ...]
    r: int
    num_rows: int
    num_tokens: int
    is_checkpointing: bool
    is_adam: bool = True
    num_trained: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes for the base, for the adapter with its gradient and optimizer, and for activations."""

    base: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.activations


def read(folder: Path) -> BaseShape:
    """Read names and shapes of a base's tensors, and its configuration.

    Raises:
        ModelError: A file is missing or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged; fetch the base again") from error
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not any(word in name for word in EMBEDDINGS)
    }
    num_all = sum(math.prod(shape) for shape in shapes.values())
    num_linear = sum(math.prod(shape) for shape in linears.values())
    num_layers, hidden_size, vocab_size = _config(folder)
    return BaseShape(
        linears={name: (shape[0], shape[1]) for name, shape in linears.items()},
        num_other=num_all - num_linear,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        file_bytes=sum(file.stat().st_size for file in files),
    )


def estimate(shape: BaseShape, work: Work) -> Memory:
    """Estimate what training needs, the runtime's own memory aside.

    The adapter is float32 with a gradient and, under AdamW, two moments. Activations are the input and the output of
    every linear layer in the compute type and, where that is not float32, a float32 copy of each adapter's input, for
    every token; with checkpointing those of one layer, and the residual stream at the others; and the logits with their
    gradient.
    """
    num_parameters = work.num_trained or shape.num_adapter_parameters(work.targets, r=work.r)
    copies = 4 if work.is_adam else 2
    return Memory(
        base=round(weight_bytes(shape, work)),
        adapter=num_parameters * FLOAT32_BYTES * copies,
        activations=work.num_rows * work.num_tokens * _bytes_per_token(shape, work),
    )


def weight_bytes(shape: BaseShape, work: Work) -> float:
    """Bytes of the frozen base, as it is stored.

    Source: NF4 costs 4 bits a weight and 32 / 64 = 0.5 bits for scales, 0.127 bits with double quantisation (Dettmers
    et al. 2023, arXiv:2305.14314, section 3).
    """
    size = DTYPE_BYTES[work.dtype]
    if work.quantization == "none":
        return (shape.num_linear + shape.num_other) * size
    if work.quantization == "int8":
        return (
            shape.num_linear
            + sum(outputs for outputs, _ in shape.linears.values()) * FLOAT32_BYTES
            + (shape.num_other * size)
        )
    scale = 1 / BLOCK + FLOAT32_BYTES / (BLOCK * SCALES) if work.double_quantization else FLOAT32_BYTES / BLOCK
    return shape.num_linear * (0.5 + scale) + shape.num_other * size


def _bytes_per_token(shape: BaseShape, work: Work) -> int:
    """Activations of one token; see `estimate`."""
    size = DTYPE_BYTES[work.dtype]
    layers = sum(outputs + inputs for outputs, inputs in shape.linears.values()) * size
    copied = 0 if work.dtype == "float32" else sum(inputs for _, inputs in shape.targets(work.targets))
    layers += (copied + work.r * len(shape.targets(work.targets))) * FLOAT32_BYTES
    if work.is_checkpointing:
        layers = layers // shape.num_layers + shape.num_layers * shape.hidden_size * size
    return layers + shape.vocab_size * (size + 2 * FLOAT32_BYTES)


def _config(folder: Path) -> tuple[int, int, int]:
    """Number of layers, hidden size and size of the vocabulary."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
        found = found.get("text_config", found)
        layers, hidden, vocabulary = (int(found[key]) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} does not tell the base's size; fetch the base again") from error
    return layers, hidden, vocabulary
