"""A merged checkpoint as an ONNX graph: tokens in, logits out, float32; by torch's own exporter.

The graph has no cache of keys and values: it scores text, and whoever generates with it computes the prompt again at
every token. Needs the extra `onnx`. Why not Optimum: docs/decisions/0023-onnx-by-torch.md.

B sequences, T tokens, V vocabulary.
"""

import importlib
import logging
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from common import extras
from common.errors import ConfigError, ModelError
from server.export import tokenizer

MODEL_FILE: Final = "model.onnx"
WEIGHTS_FILE: Final = "model.onnx.data"
OPSET: Final = 18
_PACKAGES: Final = ("onnx", "onnxruntime", "onnxscript")
_DOMAINS: Final = frozenset({"", "ai.onnx"})


def require() -> None:
    """Whether the extra is installed.

    Raises:
        ConfigError: It is not.
    """
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"onnx needs the package {name}; install it with: {extras.install('onnx')}") from error


class _Logits(torch.nn.Module):
    """A network whose only answer is its logits."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Shape (B, T, V)."""
        logits: torch.Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def convert(merged: Path, output: Path) -> None:
    """Write a folder with `model.onnx`, its weights beside it, and the tokenizer.

    Inputs are `input_ids` and `attention_mask`, int64 (B, T), both axes free; output is `logits`, float32 (B, T, V).

    Args:
        output: A new folder.

    Raises:
        ConfigError: The extra is not installed.
        ModelError: torch cannot export this architecture.
    """
    require()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:  # with attention written out, as the exporter knows each of its steps
        network: Any = AutoModelForCausalLM.from_pretrained(
            merged, dtype=torch.float32, attn_implementation="eager", **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"onnx: {merged} cannot be loaded ({type(error).__name__}); export it again") from error
    try:
        program = _exported(network)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(
            f"onnx: torch cannot export {type(network).__name__} ({type(error).__name__}); leave onnx out of --formats"
        ) from error
    # The exporter notes for every node which line of which file of this machine it comes from.
    graph_model = program.model
    for node in graph_model.graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()
    graph_model.graph.metadata_props.clear()
    graph_model.metadata_props.clear()
    output.mkdir()
    program.save(output / MODEL_FILE, external_data=True)
    AutoConfig.from_pretrained(merged, local_files_only=True).save_pretrained(output)
    tokenizer.copy(merged, output)
    shutil.copyfile(merged / GENERATION_CONFIG_NAME, output / GENERATION_CONFIG_NAME)


def _exported(network: Any) -> Any:
    """torch's exporter, without its warnings about its own insides and about packages that are not needed."""
    ids_bt = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                _Logits(network).eval(),
                (ids_bt, torch.ones_like(ids_bt)),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        logger.setLevel(level)


def check(path: Path) -> int:
    """A file that an ONNX runtime may be given: standard operators only, weights in one file beside it, all finite.

    Returns:
        Number of tensors.

    Raises:
        ConfigError: The extra is not installed.
        ModelError: Not sound.
    """
    require()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph_model = onnx.load(str(path), load_external_data=False)
        # No operator that a plain runtime does not know, no function, no file but the one beside.
        domains = {node.domain for node in graph_model.graph.node} | {
            entry.domain for entry in graph_model.opset_import
        }
        if domains - _DOMAINS or graph_model.functions:
            raise ModelError(f"{path}: has operators or functions beyond ONNX' own; do not load it")
        end = 0
        for tensor in graph_model.graph.initializer:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            if facts and facts.get("location") != WEIGHTS_FILE:
                raise ModelError(f"{path}: reads a file other than {WEIGHTS_FILE}; do not load it")
            end = max(end, int(facts.get("offset", 0)) + int(facts.get("length", 0)))
        if (path.parent / WEIGHTS_FILE).stat().st_size != end:
            raise ModelError(f"{path}: {WEIGHTS_FILE} does not end where the graph's weights end; export it again")
        onnx.checker.check_model(str(path))
        graph_model = onnx.load(str(path))
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path}: not a sound ONNX file ({type(error).__name__}); export it again") from error
    for tensor in graph_model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not bool(np.isfinite(values).all()):
            raise ModelError(f"{path}: a weight holds NaN or infinity; export it again")
    return len(graph_model.graph.initializer)


class Session:
    """An ONNX graph that answers as a transformers model does."""

    def __init__(self, folder: Path) -> None:
        """Open `folder/model.onnx` on the CPU.

        Raises:
            ConfigError: The extra is not installed.
            ModelError: ONNX Runtime cannot load it.
        """
        require()
        runtime: Any = importlib.import_module("onnxruntime")  # it comes without types
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.device = torch.device("cpu")
        errors = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # none derives from another
        known = (
            errors.Fail,
            errors.InvalidGraph,
            errors.InvalidArgument,
            errors.NotImplemented,
            errors.RuntimeException,
        )
        try:
            self._session = runtime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
        except known as error:
            raise ModelError(
                f"{folder}: ONNX Runtime cannot load it ({type(error).__name__}); export it again"
            ) from error

    def eval(self) -> "Session":
        """It has no other mode."""
        return self

    def __call__(self, *, input_ids: torch.Tensor) -> SimpleNamespace:
        """`logits`, shape (B, T, V)."""
        ids_bt = input_ids.numpy()
        (logits_btv,) = self._session.run(None, {"input_ids": ids_bt, "attention_mask": np.ones_like(ids_bt)})
        return SimpleNamespace(logits=torch.from_numpy(logits_btv))
