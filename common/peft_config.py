"""A peft configuration as its file has it: the same bytes in every process, for peft keeps some lists as sets."""

import json
from pathlib import Path
from typing import Any, Final

from peft import PeftConfig

from common import storage

FILE: Final = "adapter_config.json"


def settings_of(made: PeftConfig) -> dict[str, Any]:
    """A configuration's values, sets in order."""
    found: dict[str, Any] = made.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


def write(folder: Path, made: PeftConfig) -> None:
    """Write `adapter_config.json`, in the form of peft's own `save_pretrained`.

    Raises:
        StorageError: Disk full or not writable.
    """
    storage.write_atomic(folder / FILE, json.dumps(settings_of(made), indent=2, sort_keys=True).encode())
