"""Silence: no telemetry, no update checks, no look-ups on a model hub, no alarming noise. Call before other imports."""

import logging
import os
from collections.abc import Mapping, MutableMapping
from typing import Final

SWITCHES: Final[Mapping[str, str]] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; else every start warns
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",  # forks after tokenising would warn and may deadlock
}
OFFLINE: Final[Mapping[str, str]] = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SHARED_CORES: Final[Mapping[str, str]] = {"GOMP_SPINCOUNT": "1000"}
NOISE: Final[Mapping[str, str]] = {
    # an optional kernel that would come from a hub is absent, and the built-in one is used
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # what LLM.int8 does with every input of another type, logged at every layer of every step
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


def hush(environ: MutableMapping[str, str] | None = None, *, allow_hub: bool = False) -> None:
    """Turn off everything that calls out on its own, for this process and its children.

    Also keeps OpenMP's idle threads from spinning for milliseconds, unless the user has set how long they may: where
    cores are shared with other processes, spinning makes a small model's step up to twenty times slower.

    Must run before `torch`, `flwr`, `transformers`, `datasets` or `ray` is imported: they read the switches once.

    Args:
        allow_hub: Leave the model hub's offline switches as the user set them.

    Example:
        >>> environ = {}
        >>> hush(environ, allow_hub=True)
        >>> environ["FLWR_TELEMETRY_ENABLED"], "HF_HUB_OFFLINE" in environ
        ('0', False)
    """
    target = os.environ if environ is None else environ
    target.update(SWITCHES)
    for name, value in SHARED_CORES.items():
        target.setdefault(name, value)
    if not allow_hub:
        target.update(OFFLINE)
    for name in NOISE:
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Drop what a library says in `NOISE`, and nothing else of it."""
    return not str(record.msg).startswith(NOISE[record.name])
