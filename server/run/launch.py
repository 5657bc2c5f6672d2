"""Starting a run at a SuperLink and watching it; the run itself is done by the SuperLink's ServerApp process."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common import cli, events, storage
from common.errors import GateRefused, ProtocolError, TransportError
from common.event_kinds import Compared, End, Event, Judged, LaterFinished, LaterStarted, RunFailed, RunStarted
from common.privacy import cost
from common.run import config
from common.run.catalogue.methods import FACTS
from server.fleet import trail
from server.folder import begun, lock, run_files
from server.report import report, status
from server.report.terminal import Screen
from server.view.run_view import RunView

if TYPE_CHECKING:
    from server.run.link import Identity, Link

POLL_S: Final = 1.0
MAX_PAUSE_S: Final = 30.0  # between polls of a SuperLink or gateway that does not answer
GIVE_UP_S: Final = 600.0
_AFTER_END: Final = (Judged, Compared, LaterStarted, LaterFinished)  # may come after the end of a run


def run(
    settings: config.RunConfig,
    *,
    address: str,
    ca_file: Path,
    identity: "Identity | None" = None,
    folder: Path,
    base: Path | None,
    resume: bool,
    is_quiet: bool,
    operator_key: Path | None = None,
    federation: str = "",
    offer_days: float = 30.0,
    audit_folder: Path | None = None,
    roster_folder: Path | None = None,
    is_noise_accepted: bool = False,
    start: begun.Begun | None = None,
) -> dict[str, Any]:
    """Submit a run, show its events as they come and return how it ended.

    Ctrl-C ends the watching, not the run; `watch` begins it again. A SuperLink that does not answer for a while ends
    neither.

    Args:
        settings: The run file.
        address: The SuperLink's, on this machine: its ServerApp process writes into `folder`.
        ca_file: PEM certificate that the other end's own must lead to.
        identity: The operator's certificate and key, where a gateway is before the SuperLink.
        folder: The run's folder.
        base: The base's folder; None looks in the store.
        resume: Go on after the newest whole checkpoint.
        is_quiet: Show progress on stderr, as stdout is for a program.
        operator_key: Private key that signs the run's manifest; None: unsigned, for sites without a policy.
        federation: Id of the federation whose sites are asked; with a key only.
        offer_days: How long sites may open a signed run.
        audit_folder: Of the operator's audit log; None: beside the key.
        roster_folder: Of the federation's signed roster; None: sites are known by the keys that they tell first.
        is_noise_accepted: Run though the noise for sites as a whole drowns what they have to say.
        start: How the run is begun, for whoever resumes it.

    Raises:
        ConfigError: The operator's key or the roster cannot be used, or no federation is named.
        AuthError: The roster is not the federation's.
        AuditError: The operator's audit log is not whole.
        TransportError: The SuperLink did not take the run.
        ProtocolError: The run failed; the message says why.
    """
    key_file, audit, roster = (_absolute(path) for path in (operator_key, audit_folder, roster_folder))
    # a wrong key, an old roster or a broken log is told here, before anything starts
    trail.operator(key_file, federation=federation, days=offer_days, audit_folder=audit, roster_folder=roster)
    settings = cost.resolve(settings)
    log = run_files.prepare(settings, folder, resume=resume, start=start)
    num_old = len(events.read(log.path)) if log.path.is_file() else 0
    options: dict[str, bool | float | int | str] = {
        "run-folder": str(folder.absolute()),
        "base-folder": _absolute(base),
        "resume": resume,
        "num-threads": 0,
        "operator-key": key_file,
        "federation": federation,
        "offer-days": offer_days,
        "audit-folder": audit,
        "roster-folder": roster,
        "i-accept": is_noise_accepted,
    }
    console = cli.progress(as_json=is_quiet)  # the SuperLink's process loads torch before its first event
    line = f"starting {settings.name} in {folder} at the SuperLink {address}"
    console.print(line, markup=False, soft_wrap=True)
    from server.run import link  # loads Flower, which watching needs not

    with link.connect(address, ca_file=ca_file, identity=identity) as connected:
        names = {str(node_id): name for node_id, name in connected.names().items()}
        storage.write_atomic(folder / run_files.NODES_FILE, json.dumps(names).encode())
        run_id = connected.start_run(options, bundle=link.build_bundle())
        with _watched(folder):
            last = _watch(connected, run_id, log.path, Screen(console), num_old=num_old)
    return _ending(folder, last)


def watch(folder: Path, *, is_quiet: bool) -> dict[str, Any]:
    """Show a run's events, those to come too, until it ends or the process that did it is gone.

    Needs no SuperLink: the events are on this machine, and whether somebody is at work on them shows by their lock.

    Args:
        folder: The run's.
        is_quiet: Show progress on stderr, as stdout is for a program.

    Raises:
        DataError: Not a run folder.
        GateRefused: The gate refused what the run made.
        ProtocolError: The run failed or was interrupted; the message says why, or how to go on.
    """
    run_files.stored_settings(folder)
    path = folder / events.FILE
    last: Event | None = None
    screen = Screen(cli.progress(as_json=is_quiet))
    past, is_live = events.read(path) if path.is_file() else [], lock.is_live(folder)
    starts = [number for number, event in enumerate(past) if isinstance(event, RunStarted)]
    num_skipped = starts[-1] if starts else 0
    if is_live and past and isinstance(past[-1], End):
        num_skipped = len(past)  # of an earlier try: the one that is live loads its base
    with _watched(folder):
        for last in events.follow(path, is_over=lambda: not lock.is_live(folder), num_skipped=num_skipped, poll_s=1.0):
            screen(last)
    return _ending(folder, last or (past[-1] if past else None))


def _ending(folder: Path, last: Event | None) -> dict[str, Any]:
    """How a run ended by its last event, as a result or as an error; its report is drawn."""
    report.write(folder)
    if isinstance(last, _AFTER_END):  # added after the end
        last = RunView.read(folder / events.FILE).end
    if not isinstance(last, End) or (isinstance(last, RunFailed) and last.error == events.INTERRUPTED):
        raise ProtocolError(f"{folder}: the run was interrupted, its process is gone; {begun.go_on(folder)}")
    if isinstance(last, RunFailed):
        if last.error == GateRefused.__name__:
            raise GateRefused(f"{folder}: {last.reason}")
        raise ProtocolError(f"{folder}: the run failed: {last.reason}")
    return {**status.read(folder), "folder": str(folder)}


def next_steps(folder: Path) -> list[str]:
    """The command for a run that has finished; none where each site has its own adapter, and here is none to export."""
    settings = run_files.stored_settings(folder)
    if FACTS[settings.aggregation.method].is_personal:
        return []
    base = begun.read(folder).base
    given = ("--base", base) if base else ()
    return [cli.next_step("silotune-server", "export", folder, "--merged", folder / "merged", *given)]


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """Whoever stops the watching is told how to begin it again; the run goes on."""
    try:
        with cli.unwinding_on_sigterm():
            yield
    except (KeyboardInterrupt, SystemExit) as error:
        if code := cli.stop_code(error):
            command = cli.next_step("silotune-server", "watch", folder)
            raise cli.Stopped(f"stopped watching; the run goes on\n{command}", code) from None
        raise


def _absolute(path: Path | None) -> str:
    """A path that a process with another working folder finds; empty: none."""
    return str(path.absolute()) if path else ""


def _watch(connected: "Link", run_id: int, path: Path, screen: Screen, *, num_old: int) -> Event | None:
    """Show events until the run is over; the last one."""
    last: Event | None = None
    is_over = Poll(lambda: connected.state(run_id).is_finished, folder=path.parent)
    for last in events.follow(path, is_over=is_over, num_skipped=num_old, poll_s=1.0):
        screen(last)
    return last


@dataclass
class Poll:
    """Whether a run is over, asked less often while the SuperLink does not answer.

    Attributes:
        ask: Whether it is over, at the SuperLink.
        folder: The run's: while a process is at work there, the run is not over, whatever the SuperLink answers.
        clock: Seconds, monotonic.
    """

    ask: Callable[[], bool]
    folder: Path
    clock: Callable[[], float] = time.monotonic
    _silent_since: float | None = None
    _not_before: float = 0.0
    _pause_s: float = POLL_S

    def __call__(self) -> bool:
        """Ask, unless it was asked in vain a moment ago.

        Raises:
            TransportError: No answer for `GIVE_UP_S`, and no process is at work in the folder.
        """
        now = self.clock()
        if now < self._not_before:
            return False
        try:
            is_over = self.ask()
        except TransportError as error:
            self._silent_since = now if self._silent_since is None else self._silent_since
            self._not_before, self._pause_s = now + self._pause_s, min(2 * self._pause_s, MAX_PAUSE_S)
            if now - self._silent_since < GIVE_UP_S or lock.is_live(self.folder):
                return False
            raise TransportError(
                f"{error}; the run may go on without it, watch it with silotune-server watch {self.folder}"
            ) from error
        self._silent_since, self._pause_s = None, POLL_S
        return is_over and not lock.is_live(self.folder)
