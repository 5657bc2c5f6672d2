"""The coordinator's Flower ServerApp: builds the pieces and calls `server.run.execute`. No logic.

Flower's run config says where the run is: `run-folder` as `server.run.prepare` left it, `base-folder` of the base on
this machine (empty: the store), `num-threads` for torch (0: all cores) and `resume`.
"""

from pathlib import Path

from flwr.app import Context
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid, ServerApp

from common import config, model, store
from common.errors import SilotuneError
from common.events import EventLog
from server import run
from server.grid import GridFleet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do the run that the run config points to; why it failed is an event of the run, Flower gets a code."""
    options = context.run_config
    log = EventLog(Path(str(options["run-folder"])) / run.EVENTS_FILE)
    try:
        _execute(grid, log, options)
    except Exception as error:  # noqa: BLE001 - the app's edge; Flower keeps and shows an exception's text
        code = report_failure(log, error)
        raise RuntimeError(code) from None  # Flower forwards this text


def report_failure(log: EventLog, error: Exception) -> str:
    """Write why a run failed into its events; returns the code, all that anybody else is told.

    The message of an error that is not of our tree is left out: it could hold anything.
    """
    is_ours = isinstance(error, SilotuneError)
    code = type(error).__name__
    exit_code = error.exit_code if isinstance(error, SilotuneError) else 1
    log.append("run_failed", error=code, reason=str(error) if is_ours else code, exit_code=exit_code)
    return code if is_ours else "InternalError"


def _execute(grid: Grid, log: EventLog, options: UserConfig) -> None:
    """Load the base and run."""
    folder = log.path.parent
    settings = run.stored_settings(folder)
    engine = model.load(
        _base_folder(settings, str(options["base-folder"])),
        model=settings.model,
        adapter_settings=settings.adapter,
        seed=settings.seed,
        num_threads=int(options["num-threads"]),
    )
    run.execute(settings, fleet=GridFleet(grid), engine=engine, folder=folder, log=log, resume=bool(options["resume"]))


def _base_folder(settings: config.RunConfig, folder: str) -> Path:
    """Where the base is on this machine."""
    return Path(folder) if folder else store.resolve(settings.model.base)
