"""All checks of a coordinator, in the order in which they are read."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.doctor import checks
from common.doctor.doctor import Result
from common.doctor.probe import Answer
from common.errors import SilotuneError
from common.run import config
from server.doctor import federation, gateway, run
from server.gateway import settings
from server.members import folder
from server.members.folder import Registry


@dataclass(frozen=True)
class Patient:
    """What is looked at; whatever is None is left out.

    Attributes:
        federation: The federation's folder.
        gateway: GATEWAY.toml.
        run: The run file.
        base: Folder of its base; None: `model.base`, in the store.
        superlink: `host:port` of a SuperLink without a gateway.
        operator: Certificate and key; None: those of the federation's first operator.
        clock: Unix seconds.
    """

    federation: Path | None = None
    gateway: Path | None = None
    run: Path | None = None
    base: Path | None = None
    superlink: str = ""
    operator: tuple[Path, Path] | None = None
    clock: Callable[[], float] = time.time


def examine(patient: Patient) -> list[Result]:
    """Run all checks; nothing is changed, and nobody is asked but the listeners that GATEWAY.toml names."""
    results = [checks.versions("server")]
    held = None
    if patient.federation is not None:
        results.append(federation.folder(patient.federation))
        held = federation.load(patient.federation)
    if held is not None:
        results += _of_federation(held, patient)
    if patient.gateway is not None:
        results += _of_gateway(patient.gateway, held, patient)
    elif patient.superlink:
        results.append(gateway.superlink(patient.superlink, listening=gateway.listening_on))
    if patient.run is not None:
        results += _of_run(patient.run, patient.base)
    return results


def _of_federation(held: Registry, patient: Patient) -> list[Result]:
    """The folder that provision made."""
    now = _now(patient)
    return [
        federation.quorum(held),
        federation.authorities(held, now=now),
        federation.own_certificates(held, now=now),
        federation.consistency(held),
        federation.authorities_end(held, now=now),
        federation.own_end(held, now=now),
        federation.sites_end(held, now=now),
    ]


def _of_gateway(path: Path, held: Registry | None, patient: Patient) -> list[Result]:
    """GATEWAY.toml and what runs by it."""
    results = [gateway.file(path)]
    if results[0].status == "failed":
        return results
    found = settings.load(path)
    results += [gateway.certificates(found), gateway.known_members(found, held.roster if held else None)]
    if results[1].status == "failed":
        return results
    results += [gateway.log_disk(found), gateway.superlink(found.superlink.address, listening=gateway.listening_on)]
    ca_file = held.folder / folder.ISSUERS / "root.pem" if held else Path(found.fleet.certificate_file)
    operator = patient.operator or (federation.operator(held) if held else None)
    outcome = gateway.ask_control(found, operator, ca_file=ca_file, clock=patient.clock)
    skew_s = None if outcome is None or isinstance(outcome, SilotuneError) else outcome.skew_s
    results += [gateway.fleet_listener(found, ca_file=ca_file), gateway.control_listener(outcome)]
    is_served = isinstance(outcome, Answer) and outcome.status == 200
    nodes = gateway.ask_nodes(found, operator if is_served else None, ca_file=ca_file)
    results.append(gateway.registrations(held.roster if held else None, nodes))
    return [*results, gateway.end(found, now=_now(patient)), checks.clock(skew_s)]


def _of_run(path: Path, base: Path | None) -> list[Result]:
    """The run file and what it needs here."""
    results = [run.file(path)]
    if results[0].status == "failed":
        return results
    found = config.load(path)
    return [*results, run.base(found, base), run.checkpoints(found, base), run.server_rows(found)]


def _now(patient: Patient) -> datetime.datetime:
    """The time, with its zone."""
    return datetime.datetime.fromtimestamp(patient.clock(), datetime.UTC)
