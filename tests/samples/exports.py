"""Exports of adapters that were drawn, for whatever reads them."""

from pathlib import Path

import torch

from common.model import loading
from common.model.base import Engine
from common.run import config
from common.run.manifest import RunManifest
from common.trust import identity
from server.export import folder as export_folder
from server.export.folder import Exported
from tests import tiny

KEY = identity.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def drawn(settings: config.RunConfig, base: Path, *, size: float = 0.15) -> tuple[Engine, Exported]:
    """A run's engine, and a checkpoint of it whose every tensor was drawn."""
    engine = loading.engine_of(settings, base, device_name="cpu", num_threads=1)
    generator = torch.Generator().manual_seed(8)
    state = {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    manifest = RunManifest(settings, engine.base_sha256, engine.tensor_specs)
    return engine, Exported(state, manifest, 1, {"north": 5}, [])


def write(folder: Path, engine: Engine, base: Path, *, seed: int, template: str) -> Path:
    """A signed export whose name is the folder's."""
    name = folder.name.replace(".", "-")
    generator = torch.Generator().manual_seed(seed)
    state = {n: 0.2 * torch.randn(tensor.shape, generator=generator) for n, tensor in engine.initial.items()}
    settings = tiny.settings(base, {"name": f'"{name}"', "model.chat_template": f'"{template}"'})
    source = Exported(state, RunManifest(settings, engine.base_sha256, engine.tensor_specs), 1, {"north": 5}, [])
    export_folder.write(folder, source, formats=("peft", "vllm"), base=base, llama_cpp=None, key=KEY)
    return folder
