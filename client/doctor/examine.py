"""All checks of a site, in the order in which they are read."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from client.doctor import host, keys, work
from client.policy.file import Policy
from common.doctor import checks
from common.doctor.doctor import Result, check, ok
from common.errors import SilotuneError
from common.model import store
from common.run import config
from common.trust import roster

UNITS: Final = Path("/etc/systemd/system")


@dataclass(frozen=True)
class Machine:
    """The site's machine, and what of it is examined.

    Attributes:
        node_file: The site's own file.
        keys: Folder of keys and kit; None: that of `agent.identity_key`, if one is named.
        gateway: `host:port` to try; empty: nobody is asked.
        run: An offered run that memory is estimated for; empty: the largest that the policy allows.
        units: Folder of the systemd units; the folder of keys is read if it has none.
    """

    node_file: Path
    keys: Path | None = None
    gateway: str = ""
    run: str = ""
    units: Path = UNITS
    clock: Callable[[], float] = time.time


@dataclass(frozen=True)
class Diagnosis:
    """Results of all checks, and the policy, if there is one that can be used."""

    results: tuple[Result, ...]
    policy: Policy | None
    reads_roster: bool = False


def examine(machine: Machine) -> Diagnosis:
    """Run all checks, in the order in which they are read.

    Nothing is changed, and nobody is asked but the gateway that was named.
    """
    versions, file = checks.versions("client"), site_file(machine.node_file)
    if file.status == "failed":
        return Diagnosis((versions, file), None)
    node = config.load_node(machine.node_file)
    agent, site = node.agent, node.site.name
    other = host.other_user(agent.identity_key)
    folder = machine.keys
    if folder is None and agent.identity_key and not other:
        folder = Path(agent.identity_key).parent
    now = datetime.datetime.fromtimestamp(machine.clock(), datetime.UTC)
    results = [
        versions,
        file,
        keys.key_files(folder, identity_key="" if other else agent.identity_key),
        keys.own_request(folder),
        keys.certificate(folder, now=now),
        keys.certificate_end(folder, now=now),
        keys.membership(folder, name=site, now=now),
    ]
    socket = Path(agent.socket)
    agent_pid, allowed = host.agent_pid(socket), None
    if other:  # the rest of the agent's files is for its user alone to read
        results.append(host.of_another(other))
    else:
        allowed, bases = work.load_policy(agent), work.find_bases(node.model)
        shelf = Path(node.model.base or node.model.store or store.DEFAULT)
        device_name, run = node.hardware.device, machine.run
        results += [
            work.rules(agent, node.data, folder),
            work.audited(agent),
            work.in_force(agent, is_running=agent_pid is not None),
            work.rows(node.data, allowed),
            work.bases(bases, allowed, store=str(shelf)),
            work.memory_of(run, agent, allowed, bases, device_name=device_name, agent_pid=agent_pid, site=site),
            work.disk(Path(agent.log_folder)),
            work.store_disk(bases, shelf),
            host.socket_folder(socket, courier_group=agent.courier_group),
        ]
    units = host.units_of(machine.units, folder)
    ask = partial(host.shake_hands, machine.gateway, folder, clock=machine.clock, settings=node.link)
    outcome = ask()
    results += [
        host.agent(socket),
        host.core_dumps(host.core_limit(agent_pid), unit=units.get(host.AGENT_UNIT), pattern=host.core_pattern()),
        host.reporting(units),
        host.gateway(outcome, proxy=node.link.proxy),
        host.registration(ask(path=roster.STANDING_PATH)),
        host.newest_roster(host.ask_roster(ask, agents=agent.roster_folder)),
        checks.clock(None if outcome is None or isinstance(outcome, SilotuneError) else outcome.skew_s),
    ]
    return Diagnosis(tuple(results), allowed, reads_roster=bool(agent.roster_folder))


@check("site's own file", remedy="correct the file; docs/config.md lists its settings")
def site_file(path: Path) -> Result:
    """Check the site's own file."""
    node = config.load_node(path)
    return ok(f"{path}: {node.site.name}")
