"""`silotune-server polish`: the stages of a run whose rounds are done, without its sites."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from common import events, loading, model, storage, store
from common.errors import ConfigError, DataError, TransportError
from common.events import EventLog
from common.manifest import RunManifest
from server import checkpoint, lock, report, run, run_files
from server.aggregate import table
from server.evaluate import suite
from server.federation import Federation
from server.fleet import Reply
from server.polish import kept_apart, stages
from server.polish.kept_apart import KnownRows
from server.show import Screen


class _Nobody:
    """A fleet without nodes: the sites have no part in what follows the rounds."""

    is_closed: bool = True
    names: Mapping[int, str] = MappingProxyType({})

    def explain(self, reference: str) -> str:
        """There is nobody's log."""
        return ""

    def node_ids(self) -> list[int]:
        """Nobody is connected."""
        return []

    def send(self, node_id: int, frame: bytes, *, kind: str, ttl_s: float, max_reply_bytes: int = 0) -> str:
        """Refused."""
        raise TransportError(f"node {node_id} is not connected; polish asks no site")

    def receive(self, tickets: Collection[str]) -> Iterator[Reply]:
        """Nothing comes."""
        return iter(())


def polish(run_folder: Path, *, base: Path | None, num_threads: int, console: Console) -> dict[str, Any]:
    """Play the stages that a run has left, and export its adapter anew.

    Args:
        run_folder: Its rounds must be done.
        base: The base's folder; None looks for the run's base in the store.
        num_threads: CPU threads of torch; 0: all cores.
        console: Where progress is shown.

    Raises:
        ConfigError: The run names no stages, a stage cannot be played here, or the sites are to be asked after it.
        DataError: Not a run folder, its rounds are not done, a stage's data are unusable, or the coordinator's rows
            are not those that were fixed before training.
        ModelError: The base is not here or another one, or a stage failed.
        RunBusyError: Another process is at work in the folder.
    """
    manifest = run_files.stored_manifest(run_folder)
    with lock.hold(run_folder):
        return _polish(run_folder, manifest, base=base, num_threads=num_threads, console=console)


def _polish(
    run_folder: Path, manifest: RunManifest, *, base: Path | None, num_threads: int, console: Console
) -> dict[str, Any]:
    """The stages, by the process that holds the run's folder."""
    storage.remove_leftovers(run_folder)
    settings = manifest.run
    if not settings.polish:
        raise ConfigError(f"{run_folder}: its run file has no [[polish]] tables; add them and begin a new run")
    if count := settings.evaluation.num_polish_stages:
        raise ConfigError(
            f"{run_folder}: evaluation.num_polish_stages = {count}: the sites score what polish leaves, and here there "
            "are none; go on with silotune-server run RUN_FILE --resume"
        )
    wanted = _last_round(run_folder, settings.federation.num_rounds)
    last = checkpoint.load(run_folder, manifest.tensor_specs, num_rounds=wanted, run_sha256=manifest.sha256)
    engine = _engine(manifest, base, num_threads)
    log = EventLog(run_folder / events.FILE, [Screen(console)])
    measured = suite.open_suite(settings, engine=engine, folder=run_folder, log=log)
    suite.require_same(measured.sha256, manifest.evaluation_sha256)
    fed = Federation(manifest, _Nobody(), table.find(settings.aggregation.method), run_folder, log, suite=measured)
    fed.own_rows = run.read_own_rows(settings, engine)
    fed.apart = kept_apart.tables(measured.tasks, KnownRows())
    try:
        outcome = run.finish(fed, last.tensors, stages.run(fed, last.tensors, engine=engine))
    except BaseException as error:
        run_files.report_failure(log, error)
        raise
    page = report.write(run_folder)
    done = [event["stage"] for event in events.read(log.path) if event["kind"] == "polish_finished"]
    return {
        "stages": list(dict.fromkeys(done)),
        "adapter": str(outcome.folder / run_files.EXPORT_FOLDER),
        "report": str(page),
    }


def _last_round(run_folder: Path, num_rounds: int) -> int:
    """The round after which the stages begin: the run's last, or the one at which its gate ended the rounds."""
    done = run_files.finished(run_folder)
    told = events.read(run_folder / events.FILE)
    ended = [event["num_rounds"] for event in told if event["kind"] == "stopped"][-1:] or [num_rounds]
    if ended[0] not in done:
        raise DataError(f"{run_folder}: round {ended[0]}, the last, is not done; go on with run --resume first")
    return int(ended[0])


def _engine(manifest: RunManifest, base: Path | None, num_threads: int) -> model.Engine:
    """The run's base, with an adapter of the run's shape."""
    settings = manifest.run
    folder = base or store.resolve(settings.model.base)
    model.check_hash(folder, manifest.base_sha256)
    return loading.engine_of(settings, folder, num_threads=num_threads, date=manifest.date)
