"""What stays at a site: its own factors from round to round, and the adapter that they make with the global ones.

A round starts from the factors as the site's last round before it left them. So a round that is asked again starts
where it did before, and gives the same answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig

from common import storage
from common.adapter import adapter, peft_config
from common.adapter.adapter import Tensors
from common.errors import ConfigError, DataError, ModelError, ProtocolError, WireError
from common.frame import wire
from common.frame.wire import Frame
from common.run import manifest
from common.run.manifest import RunManifest

FOLDER: Final = "personal"
MANIFEST_FILE: Final = "manifest.json"
ADAPTER_FILE: Final = "adapter.frame"
NUM_KEPT: Final = 2  # rounds: the newest, which the coordinator may ask again, and the one before
MAX_BYTES: Final = 2047 << 20
_FACTORS: Final = "kept-{:05d}.frame"


@dataclass(frozen=True)
class Shelf:
    """A folder with what a site keeps of its runs, each under the hash of its manifest.

    Attributes:
        folder: Of this user alone.
    """

    folder: Path

    def before(self, run: RunManifest, round_index: int) -> Tensors:
        """The site's own factors as a round must find them: from its newest round before, or zero before its first.

        Raises:
            ProtocolError: The run goes back further than what is kept here.
            ModelError: A file is not what was written.
        """
        specs = run.plan.tensors.kept
        rounds = self._rounds(run)
        earlier = [number for number in rounds if number < round_index]
        if earlier:
            return adapter.decode(self._read(run, _FACTORS.format(earlier[-1])).body, specs, dtype="float32")
        if rounds and not self._read(run, _FACTORS.format(rounds[0])).head["is_first"]:
            raise ProtocolError(
                f"round {round_index} goes back behind round {rounds[0]}, before which this site's own factors are not "
                "kept any more; resume from a later checkpoint, or give the run another name"
            )
        return {spec.name: torch.zeros(spec.shape) for spec in specs}

    def keep(self, run: RunManifest, round_index: int, tensors: Tensors) -> None:
        """Put down the site's own factors after a round; on the disk when this returns.

        Raises:
            StorageError: Disk full or not writable; the round must not be answered then.
        """
        earlier = [number for number in self._rounds(run) if number < round_index]
        head = {"round_index": round_index, "is_first": not earlier}
        kept = {spec.name: tensors[spec.name] for spec in run.plan.tensors.kept}
        self._write(run, _FACTORS.format(round_index), head, kept)
        for number in earlier[: 1 - NUM_KEPT]:
            (self._place(run) / _FACTORS.format(number)).unlink()

    def note(self, run: RunManifest, num_rounds: int, tensors: Tensors) -> None:
        """Put down the whole adapter as it was scored here after so many rounds, in the place of an earlier one.

        Raises:
            StorageError: Disk full or not writable.
        """
        self._write(run, ADAPTER_FILE, {"num_rounds": num_rounds}, tensors)

    def runs(self) -> list[str]:
        """Hashes of the runs that an adapter is kept of."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{ADAPTER_FILE}"))

    def export(self, run_sha256: str, folder: Path) -> int:
        """Write this site's adapter of a run as a peft folder.

        Args:
            run_sha256: Hash of the run's manifest, or how it begins.
            folder: A new one.

        Returns:
            The number of rounds behind the adapter.

        Raises:
            ConfigError: `folder` holds something.
            DataError: No such run, or more than one.
            ModelError: A file is not what was written.
            StorageError: Disk full or not writable.
        """
        found = [name for name in self.runs() if name.startswith(run_sha256)]
        if len(found) != 1:
            raise DataError(f"{self.folder}: {len(found)} runs with an adapter of this site begin with '{run_sha256}'")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: holds something already; give a new folder")
        run = self._manifest(found[0])
        frame = self._read(run, ADAPTER_FILE)
        tensors = adapter.decode(frame.body, run.tensor_specs, dtype="float32")
        data = adapter.encode(tensors, dtype="float32")
        storage.write_atomic(folder / "adapter_model.safetensors", data, mode=storage.PRIVATE)
        peft_config.write(folder, _lora_config(run))
        return int(frame.head["num_rounds"])

    def _place(self, run: RunManifest) -> Path:
        """Where a run's files are."""
        return self.folder / run.sha256

    def _rounds(self, run: RunManifest) -> list[int]:
        """Rounds after which the site's factors are kept, ascending."""
        return sorted(int(path.stem.removeprefix("kept-")) for path in self._place(run).glob("kept-*.frame"))

    def _write(self, run: RunManifest, name: str, head: dict[str, Any], tensors: Tensors) -> None:
        """One file, and the manifest that says what it is."""
        place = self._place(run)
        for folder in (self.folder, place):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (place / MANIFEST_FILE).exists():
            storage.write_atomic(place / MANIFEST_FILE, run.to_bytes(), mode=storage.PRIVATE)
        body = adapter.encode(tensors, dtype="float32")
        kept = wire.pack(Frame("kept", {"run_sha256": run.sha256, **head}, body))
        storage.write_atomic(place / name, kept, mode=storage.PRIVATE)

    def _read(self, run: RunManifest, name: str) -> Frame:
        """One file, which must be this run's."""
        place = self._place(run) / name
        try:
            frame = wire.expect(place.read_bytes(), "kept", max_body_bytes=MAX_BYTES)
        except (OSError, WireError) as error:
            raise ModelError(f"{place}: cannot be read, or is not what was written; restore it from a copy") from error
        if frame.head["run_sha256"] != run.sha256:
            raise ModelError(f"{place}: belongs to another run")
        return frame

    def _manifest(self, run_sha256: str) -> RunManifest:
        """The run of a folder."""
        place = self.folder / run_sha256 / MANIFEST_FILE
        try:
            run = manifest.parse(place.read_bytes())
        except (OSError, WireError) as error:
            raise ModelError(f"{place}: cannot be read, or is not what was written") from error
        if run.sha256 != run_sha256:
            raise ModelError(f"{place}: belongs to another run")
        return run


def _lora_config(run: RunManifest) -> LoraConfig:
    """peft's configuration; every module is named in full, so that no other can match."""
    settings = run.run.adapter
    if settings.kind != "lora":
        raise ModelError(f"adapter.kind = '{settings.kind}': what stays at a site are factors of lora")
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        use_rslora=settings.use_rslora,
        target_modules=[name.removeprefix("base_model.model.") for name in adapter.module_names(run.tensor_specs)],
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
