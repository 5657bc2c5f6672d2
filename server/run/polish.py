"""`silotune-server polish`: the stages of a run whose rounds are done, without its sites; its own, or later ones."""

from pathlib import Path
from typing import Any

from rich.console import Console

from common import events, storage
from common.adapter import adapter
from common.errors import ConfigError
from common.events import EventLog
from common.model.base import Engine
from common.run.manifest import RunManifest
from server.evaluate import examples, kept_apart, suite
from server.evaluate.kept_apart import KnownRows
from server.fleet.run import Run
from server.folder import checkpoint, run_files
from server.polish import addendum, stages
from server.report import report
from server.report.terminal import Screen
from server.run import later, run
from server.view.run_view import RunView


def polish(
    run_folder: Path,
    *,
    base: Path | None,
    num_threads: int,
    console: Console,
    stages_file: Path | None = None,
    num_kept: int | None = None,
) -> dict[str, Any]:
    """Play the stages that a run has left, or new ones after its end, and export the adapter.

    No site is asked and nothing is trained at one, so that a private run pays nothing more.

    Args:
        run_folder: Its rounds must be done.
        base: The base's folder; None looks for the run's base in the store.
        num_threads: CPU threads of torch; 0: all cores.
        console: Where progress is shown.
        stages_file: New stages, which go into a folder of their own (`server/run/later.py`); None: those that the
            folder's run file names.
        num_kept: See `later.begin`; only with a stages file.

    Returns:
        The folder that the stages are in, their names, the label and the hash of the adapter, and paths of adapter and
        report.

    Raises:
        ConfigError: The run names no stages, a stage cannot be played here, the sites are to be asked after it, or the
            stages file does not fit the run.
        DataError: Not a run folder, its rounds are not done, a stage's data are unusable, or the coordinator's rows
            are not those that were fixed before training.
        GateRefused: What the stages have left does not show what the gate asks for; nothing is exported.
        ModelError: The base is not here or another one, or a stage failed.
        RunBusyError: Another process is at work in the folder.
    """
    if num_kept is not None and stages_file is None:
        raise ConfigError("--keep-stages is for new stages; give them with --stages FILE")
    run_files.stored_manifest(run_folder)
    with later.held(run_folder):
        storage.remove_leftovers(run_folder)
        if stages_file is None:
            manifest = run_files.stored_manifest(run_folder)
            _check(run_folder, manifest)
            engine = later.engine_of(manifest, manifest.run, base, num_threads)
            return _polish(run_folder, manifest, engine=engine, console=console)
        folder, engine = later.begin(run_folder, stages_file, num_kept=num_kept, base=base, num_threads=num_threads)
        with later.held(folder):
            return _polish(folder, run_files.stored_manifest(folder), engine=engine, console=console)


def _check(run_folder: Path, manifest: RunManifest) -> None:
    """Whether a run's own stages can be played without its sites."""
    settings, is_later = manifest.run, addendum.read(run_folder) is not None
    if not settings.polish:
        raise ConfigError(
            f"{run_folder}: its run file has no [[polish]] tables; give stages that are played after its end with "
            "--stages FILE"
        )
    if (count := settings.evaluation.num_polish_stages) and not is_later:
        raise ConfigError(
            f"{run_folder}: evaluation.num_polish_stages = {count}: the sites score what polish leaves, and here there "
            "are none; go on with silotune-server run RUN_FILE --resume"
        )
    later.last_round(run_folder, settings.federation.num_rounds)


def _polish(run_folder: Path, manifest: RunManifest, *, engine: Engine, console: Console) -> dict[str, Any]:
    """The stages, by the process that holds the run's folder."""
    settings, made = manifest.run, addendum.read(run_folder)
    wanted = later.last_round(run_folder, settings.federation.num_rounds)
    last = checkpoint.load(run_folder, manifest.tensor_specs, num_rounds=wanted, run_sha256=manifest.sha256)
    screen = Screen(console)
    log = EventLog(run_folder / events.FILE, [screen])
    if derived := RunView.read(log.path).derived:
        screen(derived)
    measured = later.open_suite(settings, made, engine=engine, folder=run_folder, log=log)
    suite.require_same(measured.sha256, manifest.evaluation_sha256)
    own_rows, apart = run.read_own_rows(settings, engine), kept_apart.tables(measured.tasks, KnownRows())
    prompts = examples.read_prompts(
        settings.output.example_prompts,
        engine,
        max_new_tokens=settings.evaluation.max_new_tokens,
        system_prompt=settings.data.system_prompt,
    )
    held = Run(manifest, run_folder, log, suite=measured, own_rows=own_rows, apart=apart, examples=prompts)
    try:
        outcome = run.finish(held, last.tensors, stages.run(held, last.tensors, engine=engine))
    except BaseException as error:
        run_files.report_failure(log, error)
        raise
    view = RunView.read(log.path)
    origin = later.finish(run_folder, view)
    page = report.write(run_folder)
    if origin:
        report.write(origin)
    return {
        "folder": str(run_folder),
        "stages": [event.stage for _, event in sorted(view.polish_finished.items())],
        "stage": view.exported_stage,
        "adapter_sha256": adapter.digest(outcome.tensors),
        "adapter": str(outcome.folder / run_files.EXPORT_FOLDER),
        "report": str(page),
    }
