"""The coordinator's Flower ServerApp: builds the pieces and calls `server.run.run.execute`. No logic.

Flower's run config says where the run is: `run-folder` as `server.folder.run_files.prepare` left it, `base-folder` of
the base on this machine (empty: the store), `num-threads` for torch (0: all cores), `resume`, and who signs it:
`operator-key` (a file on this machine; empty: nobody), `federation`, `offer-days`, `audit-folder` for the log that the
same key signs (empty: beside the key) and `roster-folder`, by which sites are known (empty: by the keys that they tell
first). `i-accept`: run though noise drowns what so few sites have to say. Of the key Flower gets the path only.
"""

import datetime
from pathlib import Path

from flwr.app import Context
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid, ServerApp

from common import events, quiet
from common.events import EventLog
from server.fleet.grid import GridFleet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do the run that the run config points to; why it failed is an event of the run, Flower gets a code."""
    quiet.hush()
    from server.folder import lock, run_files

    log = EventLog(Path(str(context.run_config["run-folder"])) / events.FILE)
    try:
        with lock.hold(log.path.parent):  # from here on the run is live, and no other process touches it
            _execute(grid, log, context.run_config)
    except Exception as error:  # noqa: BLE001 - the app's edge; Flower keeps and shows an exception's text
        raise RuntimeError(run_files.report_failure(log, error)) from None


def _execute(grid: Grid, log: EventLog, options: UserConfig) -> None:
    """Load the base and run."""
    from common.model import loading, store
    from common.run import manifest
    from server.fleet import trail
    from server.folder import run_files
    from server.run import run

    folder, base_folder = log.path.parent, str(options["base-folder"])
    settings = run_files.stored_settings(folder)
    operator = trail.operator(
        str(options["operator-key"]),
        federation=str(options["federation"]),
        days=float(options["offer-days"]),
        audit_folder=str(options["audit-folder"]),
        roster_folder=str(options["roster-folder"]),
    )
    engine = loading.engine_of(
        settings,
        Path(base_folder) if base_folder else store.resolve(settings.model.base),
        num_threads=int(options["num-threads"]),
        date=manifest.date_of(
            folder / run_files.MANIFEST_FILE if options["resume"] else None,
            today=datetime.datetime.now(datetime.UTC).date(),
        ),
    )
    run.execute(
        settings,
        fleet=GridFleet(grid),
        engine=engine,
        folder=folder,
        log=log,
        resume=bool(options["resume"]),
        operator=operator,
        is_noise_accepted=bool(options["i-accept"]),
    )
