"""An export is rehearsed before round 1: every format that is asked for is written, loaded again and verified, of a
small random model of the base's form with the base's own tokenizer and an adapter of the run's kind.

What a converter, a quantiser or an exporter cannot do with a base is so known before training, by asking them.
"""

import shutil
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from common.adapter import adapter
from common.errors import ConfigError, ModelError
from common.model import loading, skeleton
from common.run import config
from common.run.manifest import RunManifest
from server.export import folder as export_folder
from server.export import perplexity
from server.export.folder import Exported
from server.verify import verify

NUM_LAYERS: Final = 2
_BESIDE: Final = (".json", ".jinja", ".model", ".txt")  # of a base's files all but its weights
_STD: Final = 0.05  # of every tensor of the adapter, so that it does something
_PASSED: Final[set[Hashable]] = set()


@dataclass(frozen=True)
class Order:
    """What is asked for."""

    formats: Sequence[str]
    llama_cpp: Path | None = None
    gguf_type: str = "bf16"


def rehearse(run: config.RunConfig, base: Path, *, base_sha256: str, order: Order) -> None:
    """Write what will be exported, of a small model; what passed once in a process is not tried again.

    Takes the memory of the base's embeddings and two of its layers in float32, three times over, and a folder for
    temporary files with room for them.

    Args:
        base: The base's folder; of its files all but the weights are read.
        base_sha256: Its hash.

    Raises:
        ConfigError: A format is impossible for this base.
        ModelError: A converter fails on it, or what it makes is another model.
    """
    key = (base_sha256, run.model, run.adapter, run.aggregation, run.data.system_prompt, tuple(order.formats),
           order.llama_cpp, order.gguf_type)  # fmt: skip
    if key in _PASSED or not export_folder.NEED_BASE & set(order.formats):
        return
    with tempfile.TemporaryDirectory(prefix="silotune-export-") as folder, torch.random.fork_rng():
        try:
            small = make_small(base, Path(folder) / base.name, targets=run.adapter.layers)
            plain_run = run.model_copy(update={"model": perplexity.plain_model(small, run.model.chat_template)})
            engine = loading.engine_of(plain_run, small, device_name="cpu", num_threads=torch.get_num_threads())
            generator = torch.Generator().manual_seed(run.seed)
            drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
            state = {name: tensor + _STD * drawn[name] for name, tensor in engine.initial.items()}
            adapter.check_specs(adapter.specs(state), engine.tensor_specs)
            source = Exported(state, RunManifest(plain_run, engine.base_sha256, engine.tensor_specs), 1, {}, [])
            export_folder.write(
                Path(folder) / "export", source, formats=order.formats, base=small, llama_cpp=order.llama_cpp, key=None,
                gguf_type=order.gguf_type,
            )  # fmt: skip
            verify.verify(Path(folder) / "export", base=small if {"peft", "vllm"} & set(order.formats) else None)
        except (ConfigError, ModelError) as error:
            raise type(error)(f"[export] was tried on a small random model of this base's form: {error}") from error
    _PASSED.add(key)


def make_small(base: Path, output: Path, *, targets: Sequence[str] = ()) -> Path:
    """A random model with the base's configuration but for its depth, and with all files beside its weights.

    Args:
        output: A new folder.
        targets: `adapter.targets`; a layer that one names by number is kept.

    Raises:
        ModelError: The configuration cannot be read.
    """
    output.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, output / file.name)
        elif file.suffix in _BESIDE and not file.name.endswith(".index.json"):
            shutil.copyfile(file, output / file.name)
    settings = skeleton.settings(base)
    # Two layers, or as many as show every kind of layer and hold those that a target names.
    text: Any = settings.get_text_config()
    depth = text.num_hidden_layers
    lists = {key: value for key, value in vars(text).items() if isinstance(value, list) and len(value) == depth > 1}
    kinds = [tuple(str(value[layer]) for value in lists.values()) for layer in range(depth)]
    wanted = max(kinds.index(kind) for kind in kinds) + 1
    named = [int(part) + 1 for target in targets for part in target.split(".") if part.isdecimal()]
    text.num_hidden_layers = min(depth, max(NUM_LAYERS, wanted, *named, 1))
    for key, value in lists.items():
        setattr(text, key, value[: text.num_hidden_layers])
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)  # type: ignore[no-untyped-call]
    made.save_pretrained(output)
    return output
