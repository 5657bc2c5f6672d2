"""A federation of processes whose every way out is recorded: SuperLink with a database file, couriers, agents."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from client.memory.history import AUDIT_FILE
from client.policy import file as policy_file
from common import events
from common.event_kinds import Event
from common.run.config import RunConfig
from common.trust import audit_log, identity
from common.trust.audit_log import Entry
from server.folder import run_files
from server.run import link
from server.run.link import RunState
from simulations.engines import deployment, loopback_keys, site_files
from simulations.engines.deployment import HOST, Federation, Process, Site
from tests.leaks import captures, relays
from tests.leaks.relays import Record
from tests.samples import vault

SMUGGLER = Path(__file__).parent / "apps" / "smuggling_agent.py"
OPERATOR_KEY = "operator.key"
FEDERATION = "onco-eu"
START_S = 120.0
RUN_S = 240.0


@dataclass
class Captured:
    """What a run left behind.

    Attributes:
        folder: Of the whole federation.
        sites: By name.
        sockets: What passed between each agent and its courier.
        egress: What passed between each courier and the SuperLink.
        state: How the run ended.
    """

    folder: Path
    sites: Mapping[str, Site]
    sockets: dict[str, Record]
    egress: dict[str, Record]
    state: RunState

    def at_socket(self) -> list[bytes]:
        """All that crossed the agents' sockets, both ways."""
        return [part for record in self.sockets.values() for one in record.all() for part in captures.of_grpc(one)]

    def at_egress(self) -> list[bytes]:
        """All that crossed between couriers and SuperLink, both ways, in plain text."""
        return [one for record in self.egress.values() for one in record.all()]

    def on_disk(self) -> list[bytes]:
        """Every file of the server: as the run ended, and after its processes were stopped."""
        return [data for name in ("ended", "server") for data in captures.of_folder(self.folder / name)]

    def at_couriers(self) -> list[bytes]:
        """Every file of the couriers: logs, and what Flower keeps."""
        return list(captures.of_folder(self.folder / "couriers"))

    def entries(self, site: str, kind: str) -> list[Entry]:
        """Entries of one kind in a site's audit log."""
        key = identity.load(self.sites[site].socket_path.with_name("site.key"))
        log = audit_log.read(self.folder / "logs" / site / AUDIT_FILE, identity.public_hex(key))
        return [entry for entry in log if entry.kind == kind]

    def events(self) -> list[Event]:
        """The run's."""
        return events.read(self.folder / "server" / "run" / events.FILE)


def play(
    settings: RunConfig,
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    *,
    folder: Path,
    base: Path,
    smugglers: Sequence[str],
    policy: str,
) -> Captured:
    """Do one run and stop everything.

    Args:
        settings: The run.
        tables: Rows by site.
        folder: Of a short name, as sockets are in it.
        base: The base model's folder.
        smugglers: Sites whose agents leak, as far as they can.
        policy: What every site allows, its rows' path left open; empty: no site has a guard.
    """
    sites = write_sites(settings, tables, folder=folder, base=base, policy=policy)
    for name in smugglers:
        command = (sys.executable, str(SMUGGLER), sites[name].command[-1])
        sites[name] = dataclasses.replace(sites[name], command=command)
    with ExitStack() as stack:
        running, sockets, egress = _start(stack, sites, folder=folder)
        run_id = running.link.start_run(_submit(settings, folder=folder, base=base), bundle=link.build_bundle())
        state = deployment.wait(running, run_id, timeout_s=RUN_S)
        captures.copy(folder / "server", folder / "ended")
        deployment.stop(running.processes)  # before the relays: nodes sign off through them
    return Captured(folder, sites, sockets, egress, state)


def write_sites(
    settings: RunConfig, tables: Mapping[str, Sequence[Mapping[str, str]]], *, folder: Path, base: Path, policy: str
) -> dict[str, Site]:
    """Rows, own file and, with a policy, what belongs to it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    operator = identity.public_hex(identity.create(folder / OPERATOR_KEY))
    policy = policy.replace(identity.public_hex(vault.OPERATOR), operator)
    written = site_files.write(
        tables, data=settings.data, folder=folder / "s", base_folder=base, log_folder=folder / "logs", num_threads=1
    )
    for site in written if policy else ():
        _give_policy(site.socket_path.parent, policy)
    return {site.name: site_files.guarded(site) if policy else site for site in written}


def _give_policy(folder: Path, policy: str) -> None:
    """Sign a policy for this site's rows and name it in the site's own file."""
    path, key = folder / "policy.toml", folder / "site.key"
    path.write_text(policy.replace('path = "rows.jsonl"', f'path = "{folder / "rows.jsonl"}"'))
    policy_file.sign(path, vault.ADMIN)
    identity.create(key)
    lines = {"policy": path, "policy_signer": identity.public_hex(vault.ADMIN), "identity_key": key}
    with (folder / "node.toml").open("a") as file:  # its last section is [agent]
        file.writelines(f'{name} = "{value}"\n' for name, value in lines.items())


def _submit(settings: RunConfig, *, folder: Path, base: Path) -> dict[str, str | int]:
    """Prepare the run's folder; Flower's run config for it."""
    run_files.prepare(settings, folder / "server" / "run")
    key = folder / OPERATOR_KEY
    paths = {"run-folder": str(folder / "server" / "run"), "base-folder": str(base), "operator-key": str(key)}
    return {**paths, "federation": FEDERATION, "num-threads": 1}


def _start(
    stack: ExitStack, sites: Mapping[str, Site], *, folder: Path
) -> tuple[Federation, dict[str, Record], dict[str, Record]]:
    """Start SuperLink, agents and couriers, with a relay at both ends of each courier."""
    keys, logs, server = folder / "keys", folder / "couriers" / "logs", folder / "server"
    for path in (keys, logs, server / "logs", server / "tmp", folder / "logs"):
        path.mkdir(parents=True)
    loopback_keys.write_certificates(keys)
    address, processes = f"{HOST}:{deployment.free_port()}", list[Process]()
    stack.callback(deployment.stop, processes)
    env = deployment.environment(flwr_home=server / "flower", num_threads=1) | {"TMPDIR": str(server / "tmp")}
    command = [
        *deployment.superlink_command(address, ca_file=keys / "ca.pem", certificate=keys / "server.pem"),
        "--database",
        str(server / "superlink.db"),
    ]
    processes.append(deployment.start("superlink", command, logs=server / "logs", env=env))
    env = deployment.environment(flwr_home=folder / "couriers" / "flower", num_threads=1)
    processes += [deployment.start(name, site.command, logs=folder / "logs", env=env) for name, site in sites.items()]
    connected = stack.enter_context(link.connect(address, ca_file=keys / "ca.pem"))
    running = Federation(link=connected, address=address, keys=keys, processes=processes)
    _wait(lambda: deployment.accepts(address) and all(site.socket_path.exists() for site in sites.values()), processes)
    sockets, egress = {}, {}
    for name, site in sites.items():
        door = dataclasses.replace(site, socket_path=site.socket_path.with_name("courier.sock"))
        port = deployment.free_port()
        sockets[name] = stack.enter_context(relays.before_socket(door.socket_path, site.socket_path))
        egress[name] = stack.enter_context(relays.before_superlink(port, address, keys=keys))
        connected.register(loopback_keys.write_node_key(keys / f"{name}.key"), name=name)
        recorded = dataclasses.replace(running, address=f"{HOST}:{port}")
        command = deployment.supernode_command(recorded, site=door)
        processes.append(deployment.start(f"{name}-supernode", command, logs=logs, env=env))
    _wait(lambda: len(connected.online_node_ids()) == len(sites), processes)
    return running, sockets, egress


def _wait(is_done, processes: Sequence[Process]) -> None:
    """Until something holds."""
    end = time.monotonic() + START_S
    while not is_done():
        for process in processes:
            process.check()
        assert time.monotonic() < end, processes[0].log_path.parent
        time.sleep(0.2)
