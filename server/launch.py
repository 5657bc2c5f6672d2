"""Starting a run at a SuperLink and watching it; the run itself is done by the SuperLink's ServerApp process."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from common import config, events, privacy_plan
from common.errors import GateRefused, ProtocolError
from common.events import Event
from server import link, offer, report, status
from server import run as server_run
from server.link import Identity, Link
from server.show import Screen


def run(
    settings: config.RunConfig,
    *,
    address: str,
    ca_file: Path,
    identity: Identity | None = None,
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
) -> dict[str, Any]:
    """Submit a run, show its events as they come and return how it ended.

    Ctrl-C ends the watching, not the run.

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

    Raises:
        ConfigError: The operator's key or the roster cannot be used, or no federation is named.
        AuthError: The roster is not the federation's.
        AuditError: The operator's audit log is not whole.
        TransportError: The SuperLink did not take the run.
        ProtocolError: The run failed; the message says why.
    """
    key_file, audit, roster = (_absolute(path) for path in (operator_key, audit_folder, roster_folder))
    # a wrong key, an old roster or a broken log is told here, before anything starts
    offer.operator(key_file, federation=federation, days=offer_days, audit_folder=audit, roster_folder=roster)
    settings = privacy_plan.resolve(settings)
    log = server_run.prepare(settings, folder, resume=resume)
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
    screen = Screen(Console(file=sys.stderr if is_quiet else sys.stdout, highlight=False))
    with link.connect(address, ca_file=ca_file, identity=identity) as connected:
        run_id = connected.start_run(options, bundle=link.build_bundle())
        last = _watch(connected, run_id, log.path, screen, num_old=num_old)
    report.write(folder)
    if last.get("kind") != "run_finished":
        reason = last.get("reason", "its server process ended")
        if last.get("error") == GateRefused.__name__:
            raise GateRefused(f"{folder}: {reason}")
        raise ProtocolError(f"{folder}: the run failed: {reason}")
    return {**status.read(folder), "folder": str(folder)}


def _absolute(path: Path | None) -> str:
    """A path that a process with another working folder finds; empty: none."""
    return str(path.absolute()) if path else ""


def _watch(connected: Link, run_id: int, path: Path, screen: Screen, *, num_old: int) -> Event:
    """Show events until the run is over; the last one."""
    last: Event = {}
    for last in events.follow(
        path, is_over=lambda: connected.state(run_id).is_finished, num_skipped=num_old, poll_s=1.0
    ):
        screen(last)
    return last
