"""Whether every format of an export is the same function as its adapter: logits on fixed tokens.

V vocabulary, B sequences, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging as transformers_logging

from common.errors import ModelError
from common.model import base as model
from server.export import gguf, onnx, probe
from server.export.seal import Facts

LIMITS: Final = {"peft": 1e-5, "vllm": 1e-5, "merged": 0.1, "gguf": 0.1, "onnx": 0.1, "int8": 0.2, "nf4": 0.8}
GGUF_LIMITS: Final = {"bf16": 0.1, "q8_0": 0.2, "q6_k": 0.4, "q5_k_m": 0.6, "q4_k_m": 0.8}
ROUNDED: Final = 1e-4
LEAST: Final = 2e-5  # what float32 sums in another order differ by, as ONNX Runtime has them
VISIBLE: Final = 0.3  # a smaller share of a format's own error cannot be distinguished from it


def compare(folder: Path, base: Path, facts: Facts) -> dict[str, dict[str, float]]:
    """Load each format in turn and hold its logits against the adapter's.

    `difference` is the root mean square of the difference over that of the adapter's own logits, both without their
    mean over the vocabulary. bf16 formats are held as well against base plus adapter rounded to bf16: to `ROUNDED`, or
    a share of what the adapter does where that is less, so that one that does little still cannot be missing from them.
    A format must be nearer to the adapter than to the base, unless the adapter does less than `VISIBLE` of the
    format's difference.

    Args:
        folder: The export; it was checked.
        base: The base's folder; its hash was checked.

    Returns:
        Of each format `difference` and `limit`, of bf16 formats `from_rounded`; and of `base`, which is no format, its
        `difference`: how much the adapter does.

    Raises:
        ModelError: No adapter in the export, a format that cannot be loaded, or a limit is passed.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    adapters = {"peft": folder / "peft", "vllm": folder / "vllm" / facts.name}
    adapters = {name: path for name, path in adapters.items() if name in facts.formats}
    if not adapters:
        raise ModelError(f"{folder}: holds no adapter to compare with; export peft as well")
    alone, wanted, rounded = _adapter_logits(base, next(iter(adapters.values())))
    effect = probe.difference(alone, wanted)
    compared = {"base": {"difference": effect}}
    limit_rounded = min(ROUNDED, max(probe.SHARE * effect, LEAST))
    for name in facts.formats:
        path = folder / name
        with _readable(path):
            given = probe.logits(_load(path, base, adapters.get(name)))  # one format in memory at a time
        is_exact = name in ("merged", "onnx") or (name == "gguf" and facts.gguf_type == "bf16")
        limit = GGUF_LIMITS[facts.gguf_type] if name == "gguf" else LIMITS[name]
        difference = probe.difference(given, wanted)
        compared[name] = {"difference": difference, "limit": limit}
        if is_exact:
            compared[name]["from_rounded"] = probe.difference(given, rounded)
        if not difference <= limit:  # nor a difference that is no number
            raise ModelError(
                f"{path}: logits differ from the adapter's by {difference:.2e} of their size, allowed is "
                f"{limit:.0e}; export it again"
            )
        if is_exact and not compared[name]["from_rounded"] <= limit_rounded:
            raise ModelError(
                f"{path}: is not base plus adapter rounded to bf16 (logits differ by "
                f"{compared[name]['from_rounded']:.2e}, allowed is {limit_rounded:.0e}); export it again"
            )
        is_visible = (alone - wanted).norm() > VISIBLE * (given - wanted).norm()
        if is_visible and (given - wanted).norm() >= (given - alone).norm():
            raise ModelError(f"{path}: is nearer to the base than to the adapter; export it again")
    return compared


def _adapter_logits(base: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the base alone, of the adapter beside it in float32, and of their sum rounded to bf16."""
    network = _with_adapter(base, folder)
    with network.disable_adapter():
        alone = probe.logits(network)
    side_by_side = probe.logits(network)
    summed = probe.add_up(network)
    off, effect = (probe.difference(given, side_by_side) for given in (probe.logits(summed), alone))
    if not off <= probe.allowed(effect):
        raise ModelError(f"{folder}: cannot be added to {base} (logits differ by {off:.2e}); serve it beside its base")
    probe.round_weights(summed)
    return alone, side_by_side, probe.logits(summed)


def _load(path: Path, base: Path, adapter: Path | None) -> Any:
    """A format as its users load it, in float32 where it is not quantised."""
    if adapter:
        return _with_adapter(base, adapter)
    if path.name == "gguf":
        return _network(path, gguf_file=gguf.MODEL_FILE, quantization_config=GgufConfig(dequantize=True))
    if path.name == "onnx":
        return onnx.Session(path)
    # A quantised one in its own types: of float32 only some layers would become it, and others stay.
    return _network(path, dtype="auto") if path.name in ("nf4", "int8") else _network(path)


def _with_adapter(base: Path, adapter: Path) -> Any:
    """Plain peft on the plain base."""
    with model.quiet_peft(), _readable(base):
        network = _network(base)
    with model.quiet_peft(), _readable(adapter):
        return PeftModel.from_pretrained(network, str(adapter))


def _network(folder: Path, **options: Any) -> Any:
    """From local files, and only from safetensors or GGUF."""
    fixed = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **fixed, **options})


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of transformers, peft and safetensors as one of ours."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be loaded ({type(error).__name__}); export it again") from error
