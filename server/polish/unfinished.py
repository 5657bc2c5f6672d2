"""A stage in the middle: what its trainer leaves on the disk from time to time, and from where it goes on.

A checkpoint holds what is trained (safetensors), and what transformers keeps of optimizer, schedule and random numbers.
These are pickles, which transformers loads with `weights_only`; here only files are looked at whose hashes were written
down by this run. The folder goes when its stage is done, and nothing of it is ever exported.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch

from common import storage
from common.adapter import adapter
from common.frame import wire

BEGUN_FILE: Final = "begun.json"
WHOLE_FILE: Final = "whole.json"
TRAINED_FILE: Final = "trained.safetensors"
FILES: Final = frozenset(
    {BEGUN_FILE, WHOLE_FILE, TRAINED_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
)
_PREFIX: Final = "checkpoint-"  # transformers' own


class Kept:
    """For a trainer, before its class: checkpoints of what is trained alone, and none of TRL's other files."""

    model: Any
    state: Any
    num_epochs_done = 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL would write one beside each checkpoint."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """In the place of peft's folder, the tokenizer and `training_args.bin`."""
        if output_dir is None:
            raise ValueError("a checkpoint needs a folder")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.parameters(self.model).items()}
        storage.write_atomic(Path(output_dir) / TRAINED_FILE, safetensors.torch.save(tensors))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """What transformers writes, then the hashes, so that half a checkpoint is none."""
        if self.state.global_step >= self.state.max_steps:
            return  # from the last step transformers would go on with one too many
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(self._get_output_dir(trial=trial)) / f"{_PREFIX}{self.state.global_step}"  # type: ignore[attr-defined]
        storage.write_atomic(folder / WHOLE_FILE, wire.canonical_json(_hashes(folder)))

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Values into the parameters that are there, whose type stays."""
        folder = Path(resume_from_checkpoint)
        epochs = json.loads((folder / "trainer_state.json").read_bytes())["epoch"]
        self.num_epochs_done = int(epochs + 1e-6)  # a sum of fractions may fall just short of a whole epoch
        tensors = safetensors.torch.load((folder / TRAINED_FILE).read_bytes())
        for name, parameter in adapter.parameters(self.model).items():
            parameter.data.copy_(tensors[name])


def begin(folder: Path, facts: Mapping[str, Any]) -> int:
    """Make a stage's folder ready; what another start, other settings or other rows have left is removed.

    Args:
        facts: On what the stage's result depends, as JSON.

    Returns:
        Steps that are done already.

    Raises:
        StorageError: Disk full or not writable.
    """
    content = wire.canonical_json(dict(facts))
    path = folder / BEGUN_FILE
    if not path.is_file() or path.read_bytes() != content:
        shutil.rmtree(folder, ignore_errors=True)
        storage.write_atomic(path, content)
    for checkpoint in folder.glob(f"{_PREFIX}*"):
        hashes = None
        with suppress(OSError, ValueError):
            hashes = json.loads((checkpoint / WHOLE_FILE).read_bytes())
        if hashes != _hashes(checkpoint):
            shutil.rmtree(checkpoint)
    return _step(newest(folder))


def newest(folder: Path) -> Path | None:
    """The checkpoint from which the stage goes on; None: from its beginning."""
    return max(folder.glob(f"{_PREFIX}*"), key=_step, default=None)


def _step(checkpoint: Path | None) -> int:
    """Steps behind a checkpoint."""
    return int(checkpoint.name.removeprefix(_PREFIX)) if checkpoint else 0


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint."""
    files = sorted(path for path in folder.iterdir() if path.name != WHOLE_FILE)
    return {path.name: storage.sha256(path) for path in files}
