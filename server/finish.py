"""After the rounds: any checkpoint of a run folder as a finished adapter."""

from pathlib import Path

from common import events, model, store
from server import checkpoint, export, run


def export_run(
    run_folder: Path, *, num_rounds: int, output: Path | None, merged: Path | None, base: Path | None
) -> dict[str, str]:
    """Export a checkpoint of a run, finished or not.

    Args:
        run_folder: The run.
        num_rounds: Which checkpoint; 0 is the newest.
        output: For the peft folder; None is `adapter` in the run's folder.
        merged: For a merged bf16 checkpoint; None makes none.
        base: The base's folder; None looks for the run's base in the store.

    Returns:
        Paths of what was written.

    Raises:
        DataError: No such checkpoint.
        ConfigError: The folder for the merged checkpoint holds something.
        ModelError: The checkpoint is damaged, or the base is not here or another one.
        StorageError: Disk full or not writable.
    """
    found = run.stored_manifest(run_folder)
    done = checkpoint.finished(run_folder)
    wanted = num_rounds or (done[-1] if done else 0)
    state = checkpoint.load(run_folder, found.tensor_specs, num_rounds=wanted, run_sha256=found.sha256)
    sites = run.trained_sites(events.read(run_folder / run.EVENTS_FILE), num_rounds=wanted)
    adapter_folder = output or run_folder / run.EXPORT_FOLDER
    export.save_adapter(adapter_folder, state.tensors, run_manifest=found, num_rounds=wanted, sites=sites)
    written = {"adapter": str(adapter_folder)}
    if merged:
        base_folder = base or store.resolve(found.run.model.base)
        model.check_hash(base_folder, found.base_sha256)
        export.merge(adapter_folder, base_folder, merged)
        written["merged"] = str(merged)
    return written
