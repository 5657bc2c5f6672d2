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
from server.gateway import settings as gateway_settings
from server.members import folder
from server.members.folder import Registry


@dataclass(frozen=True)
class Machine:
    """What is looked at; whatever is None is left out.

    Attributes:
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


def examine(machine: Machine) -> list[Result]:
    """Run all checks; nothing is changed, and nobody is asked but the listeners that GATEWAY.toml names."""
    results = [checks.versions("server")]
    held = None
    now = datetime.datetime.fromtimestamp(machine.clock(), datetime.UTC)
    if machine.federation is not None:
        results.append(federation.folder(machine.federation))
        held = federation.load(machine.federation)
    if held is not None:
        results += [
            federation.quorum(held),
            federation.authorities(held, now=now),
            federation.own_certificates(held, now=now),
            federation.consistency(held),
            federation.authorities_end(held, now=now),
            federation.own_end(held, now=now),
            federation.sites_end(held, now=now),
        ]
    if machine.gateway is not None:
        results += _of_gateway(machine.gateway, held, machine)
    elif machine.superlink:
        results.append(gateway.superlink(machine.superlink, listening=gateway.listening_on))
    if machine.run is not None:
        results.append(run.file(machine.run))
        if results[-1].status != "failed":
            settings = config.load(machine.run)
            num_core_heads, num_rounds = settings.aggregation.num_core_heads, settings.federation.num_rounds
            base = str(machine.base or settings.model.base)
            results.append(run.base(settings, machine.base))
            results.append(
                run.checkpoints(
                    settings.output, settings.adapter, base, num_rounds=num_rounds, num_core_heads=num_core_heads
                )
            )
            results.append(run.server_rows(settings.evaluation.server_data, settings.data))
    return results


def _of_gateway(path: Path, held: Registry | None, machine: Machine) -> list[Result]:
    """GATEWAY.toml and what runs by it."""
    results = [gateway.file(path)]
    now = datetime.datetime.fromtimestamp(machine.clock(), datetime.UTC)
    if results[0].status == "failed":
        return results
    file = gateway_settings.load(path)
    results += [gateway.certificates(file), gateway.known_members(file, held.roster if held else None)]
    if results[1].status == "failed":
        return results
    results += [gateway.log_disk(file), gateway.superlink(file.superlink.address, listening=gateway.listening_on)]
    ca_file = held.folder / folder.ISSUERS / "root.pem" if held else Path(file.fleet.certificate_file)
    operator = machine.operator or (federation.operator(held) if held else None)
    outcome = gateway.ask_control(file, operator, ca_file=ca_file, clock=machine.clock)
    skew_s = None if outcome is None or isinstance(outcome, SilotuneError) else outcome.skew_s
    results += [gateway.fleet_listener(file, ca_file=ca_file), gateway.control_listener(outcome)]
    is_served = isinstance(outcome, Answer) and outcome.status == 200
    nodes = gateway.ask_nodes(file, operator if is_served else None, ca_file=ca_file)
    results.append(gateway.registrations(held.roster if held else None, nodes))
    return [*results, gateway.end(file, now=now), checks.clock(skew_s)]
