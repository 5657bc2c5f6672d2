"""A peft configuration as its file has it: the same bytes in every process, for peft keeps some lists as sets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig, PeftConfig

from common import storage

FILE: Final = "adapter_config.json"


def settings_of(made: PeftConfig) -> dict[str, Any]:
    """A configuration's values, sets in order."""
    found: dict[str, Any] = made.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


def canonical(rank: int, modules: Sequence[str], *, base: str | None = None) -> LoraConfig:
    """peft's configuration of a canonical adapter; every module is named in full, so that no other can match."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[name.removeprefix("base_model.model.") for name in modules],
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def write(folder: Path, made: PeftConfig) -> None:
    """Write `adapter_config.json`, in the form of peft's own `save_pretrained`.

    Raises:
        StorageError: Disk full or not writable.
    """
    storage.write_atomic(folder / FILE, json.dumps(settings_of(made), indent=2, sort_keys=True).encode())
