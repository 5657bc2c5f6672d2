"""All checks of a site, in the order in which they are read."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from client.doctor import host, keys, work
from client.policy.file import Policy
from common.doctor import checks
from common.doctor.doctor import Result, check, ok
from common.errors import SilotuneError
from common.model import store
from common.run import config, trainable
from common.trust import roster

UNITS: Final = Path("/etc/systemd/system")


@dataclass(frozen=True)
class Machine:
    """What is looked at.

    Attributes:
        node_file: The site's own file.
        keys: Folder of keys and kit; None: that of `agent.identity_key`, if one is named.
        gateway: `host:port` to try; empty: nothing is asked.
        run: An offered run that memory is estimated for; empty: the largest that the policy allows.
        units: Folder of the systemd units; the folder of keys is looked at if it has none.
        clock: Unix seconds.
    """

    node_file: Path
    keys: Path | None = None
    gateway: str = ""
    run: str = ""
    units: Path = UNITS
    clock: Callable[[], float] = time.time


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and the policy, if there is one that can be used."""

    results: tuple[Result, ...]
    policy: Policy | None
    reads_roster: bool = False


def examine(machine: Machine) -> Diagnosis:
    """Run all checks; nothing is changed, and nobody is asked but the gateway that was named."""
    versions, file = checks.versions("client"), site_file(machine.node_file)
    if file.status == "failed":
        return Diagnosis((versions, file), None)
    node = config.load_node(machine.node_file)
    other = host.other_user(node.agent.identity_key)
    allowed = None if other else work.load_policy(node)
    own = Path(node.agent.identity_key).parent if node.agent.identity_key and not other else None
    folder = machine.keys or own
    results = (
        versions,
        file,
        *_of_keys(machine, node, folder, is_agent=not other),
        *([host.of_another(other)] if other else _of_agent(machine, node, folder, allowed)),
        *_of_host(machine, node, folder),
    )
    return Diagnosis(results, allowed, reads_roster=bool(node.agent.roster_folder))


@check("site's own file", remedy="correct the file; docs/config.md lists its settings")
def site_file(path: Path) -> Result:
    """Check the site's own file."""
    node = config.load_node(path)
    return ok(f"{path}: {node.site.name}")


def _of_keys(machine: Machine, node: config.NodeConfig, folder: Path | None, *, is_agent: bool) -> list[Result]:
    """Keys, certificate, roster."""
    now = datetime.datetime.fromtimestamp(machine.clock(), datetime.UTC)
    return [
        keys.key_files(folder, identity_key=node.agent.identity_key if is_agent else ""),
        keys.own_request(folder),
        keys.certificate(folder, now=now),
        keys.certificate_end(folder, now=now),
        keys.membership(folder, name=node.site.name, now=now),
    ]


def _of_agent(machine: Machine, node: config.NodeConfig, folder: Path | None, allowed: Policy | None) -> list[Result]:
    """Policy, log, rows, bases, memory, disk: what the agent's user alone may read."""
    found = work.find_bases(node)
    shelf = Path(node.model.base or node.model.store or store.DEFAULT)
    return [
        work.rules(node, folder),
        work.audited(node),
        work.in_force(node, is_running=host.agent_pid(Path(node.agent.socket)) is not None),
        work.rows(node, allowed),
        work.bases(found, allowed, store=str(shelf)),
        _memory(machine, node, allowed, found),
        work.disk(node),
        work.store_disk(found, shelf),
        host.socket_folder(Path(node.agent.socket), courier_group=node.agent.courier_group),
    ]


@check("memory", remedy="set hardware.device to what this machine has; see: silotune-client runs NODE.toml")
def _memory(machine: Machine, node: config.NodeConfig, allowed: Policy | None, found: dict[str, Path]) -> Result:
    """Estimate memory for the run that was named, or for the largest that is allowed."""
    device = work.device_of(node, agent_pid=host.agent_pid(Path(node.agent.socket)))
    if machine.run:
        run = work.offered(node, machine.run)
        planned = work.work_of(run.run, device, site=node.site.name)
        asked = replace(planned, num_trained=trainable.num_values(run.tensor_specs))
        return work.memory(found.get(run.base_sha256), asked, device)
    listed = [base.sha256 for base in allowed.models.allow] if allowed else list(found)
    folders = [found[sha256] for sha256 in listed if sha256 in found]
    largest = max(folders, key=lambda folder: sum(f.stat().st_size for f in folder.glob("*.safetensors")), default=None)
    return work.memory(largest, work.largest_work(allowed, device), device)


def _of_host(machine: Machine, node: config.NodeConfig, folder: Path | None) -> list[Result]:
    """The machine, the agent, and the way out."""
    path = Path(node.agent.socket)
    units = host.units_of(machine.units, folder)
    limit = host.core_limit(host.agent_pid(path))
    hands = partial(host.shake_hands, machine.gateway, folder, clock=machine.clock, settings=node.link)
    outcome, standing = hands(), hands(path=roster.STANDING_PATH)
    newest = host.ask_roster(hands, agents=node.agent.roster_folder)
    skew_s = None if outcome is None or isinstance(outcome, SilotuneError) else outcome.skew_s
    return [
        host.agent(path),
        host.core_dumps(limit, unit=units.get(host.AGENT_UNIT), pattern=host.core_pattern()),
        host.reporting(units),
        host.gateway(outcome, proxy=node.link.proxy),
        host.registration(standing),
        host.newest_roster(newest),
        checks.clock(skew_s),
    ]
