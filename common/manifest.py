"""The run manifest: a run as data. A site acts on this and on nothing else that a coordinator sends."""

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from common import config, wire
from common.errors import ConfigError, WireError
from common.records import TensorSpec

VERSION = 1


@dataclass(frozen=True)
class RunManifest:
    """What a site must know of a run, and may check before it takes part.

    Attributes:
        run: The resolved run file without what is the coordinator's own affair.
        base_sha256: Hash of the base model's files.
        tensor_specs: The adapter's tensors: exactly these go down and come back.
    """

    run: config.RunConfig
    base_sha256: str
    tensor_specs: tuple[TensorSpec, ...]

    def to_bytes(self) -> bytes:
        """Canonical bytes; the same manifest always gives the same."""
        tensors = [[spec.name, list(spec.shape)] for spec in self.tensor_specs]
        run = json.loads(config.resolved_json(public_part(self.run)))
        return wire.canonical_json(
            {"version": VERSION, "run": run, "base_sha256": self.base_sha256, "tensors": tensors}
        )

    @property
    def sha256(self) -> str:
        """The run's identity; travels in every message."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def public_part(run: config.RunConfig) -> config.RunConfig:
    """The run file with paths of the coordinator's machine left out."""
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"base": "by-hash"}),
            "data": run.data.model_copy(update={"source": "site"}),
            "evaluation": run.evaluation.model_copy(update={"server_data": ""}),
            "output": config.OutputConfig(),
        }
    )


@functools.lru_cache(maxsize=2)
def parse(data: bytes) -> RunManifest:
    """Bytes to manifest; they must be the canonical ones.

    Kept for the bytes that came last: a thousand virtual sites then hold one manifest between them.

    Raises:
        WireError: Not a manifest of this version, an unknown setting, or not in canonical form.
    """
    try:
        fields = json.loads(data, object_pairs_hook=wire.unique_pairs)
        manifest = _from_fields(fields)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, ConfigError) as error:
        raise WireError(f"not a run manifest of version {VERSION} ({type(error).__name__})") from error
    if manifest.to_bytes() != data:
        raise WireError("run manifest is not in canonical form")
    return manifest


def _from_fields(fields: dict[str, Any]) -> RunManifest:
    """Typed fields; whatever is lost or added here shows as a difference to the canonical bytes."""
    if fields["version"] != VERSION:
        raise ValueError("version")
    specs = tuple(TensorSpec(str(name), tuple(int(size) for size in shape)) for name, shape in fields["tensors"])
    return RunManifest(config.RunConfig.model_validate(fields["run"]), str(fields["base_sha256"]), specs)
