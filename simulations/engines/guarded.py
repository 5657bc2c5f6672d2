"""A federation as in earnest, on one machine: provisioned, with a gateway before the SuperLink, a signed policy at each
site, and agent, courier and link as processes.

What a coordinator and a site do by commands is done here by the functions behind them. `simulations.engines.deployment`
is the same without gateway, links, roster and policies.
"""

import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from client.courier.tunnel import CERTIFICATE
from client.join import enroll, install
from client.policy import file
from common import cli
from common.data import read
from common.run import config
from common.trust import identity, kit
from server.members import changes as admit
from server.members import founding
from server.run import link
from server.run.link import Identity
from simulations.engines import deployment, site_files
from simulations.engines.deployment import HOST, Process, Site
from simulations.world.world import Source

FEDERATION: Final = "trial"
OPERATOR: Final = "operator"
ADMIN_KEY: Final = "admin.pem"
Fields = Mapping[str, Any]
Policies = Callable[[Path], str]  # path of a site's rows to the text of its policy
NO_PREFIXES: Final[Mapping[str, Sequence[str]]] = {}
_START_S: Final = 180.0
_DATABASE: Final = "superlink.db"
_FEDERATION_FILE: Final = """version = 1
[federation]
id = "{federation}"
host_names = ["{host}"]
fleet_port = {port}
operator_names = ["{operator}"]
"""
_GATEWAY_FILE: Final = """[superlink]
address = "{superlink}"
ca_file = "{federation}/ca/root.pem"
[fleet]
listen = "{fleet}"
certificate_file = "{federation}/servers/gateway.pem"
key_file = "{federation}/servers/gateway.key"
ca_file = "{federation}/ca/sites.pem"
[control]
listen = "{control}"
certificate_file = "{federation}/servers/gateway.pem"
key_file = "{federation}/servers/gateway.key"
ca_file = "{federation}/ca/operators.pem"
[members]
roster_file = "{federation}/roster.json"
governance_file = "{federation}/federation.json"
watermark_file = "{keys}/gateway-epoch.json"
revoked_file = "{federation}/revoked.txt"
[log]
file = "{refusals}"
"""


@dataclass(frozen=True)
class Guarded:
    """A running federation.

    Attributes:
        folder: The coordinator's folder of the federation.
        control: The gateway's listener for operators, `host:port`.
        superlink: The SuperLink behind it, `host:port`.
        refusals: What the gateway refused, one JSON line each.
    """

    folder: Path
    control: str
    superlink: str
    refusals: Path
    nodes: Mapping[str, Path]
    processes: list[Process]

    @property
    def ca_file(self) -> Path:
        """The root certificate."""
        return self.folder / "ca" / "root.pem"

    @property
    def operator(self) -> Identity:
        """The operator's certificate and key, for the gateway."""
        folder = self.folder / "operators"
        return Identity(folder / f"{OPERATOR}.pem", folder / f"{OPERATOR}.key")

    @property
    def operator_key(self) -> Path:
        """The operator's key that signs runs."""
        return self.folder / "operators" / f"{OPERATOR}{founding.SIGNING_SUFFIX}"

    def process(self, name: str) -> Process:
        """One of the processes, such as `alder-agent`."""
        return next(process for process in self.processes if process.name == name)


def establish(folder: Path, names: Sequence[str], *, fleet_port: int) -> Path:
    """Provision a federation and let its sites enrol, be admitted and install their kits.

    Args:
        folder: Made with a folder `federation` of the coordinator, and `keys/NAME` of each site.

    Returns:
        The coordinator's folder.
    """
    now = datetime.datetime.now(datetime.UTC)
    text = _FEDERATION_FILE.format(federation=FEDERATION, host=HOST, port=fleet_port, operator=OPERATOR)
    (folder / "federation.toml").write_text(text)
    made = folder / "federation"
    pinned = founding.provision(folder / "federation.toml", folder=made, now=now)
    members = sorted((made / "governance").iterdir())[: pinned.quorum]
    for name in names:
        keys = folder / "keys" / name
        keys.parent.mkdir(mode=0o700, exist_ok=True)
        words = enroll.enroll(keys, federation_id=FEDERATION, name=name).words
        admit.admit(made, request_file=keys / enroll.REQUEST, words=words, governance_files=members, now=now)
        install.install(made / "kits" / name, keys=keys, words=pinned.words, now=now)
    for name in names:
        install.update_roster(made / kit.ROSTER, keys=folder / "keys" / name)
    return made


@dataclass(frozen=True)
class Built:
    """A federation on disk, nothing of which runs.

    Attributes:
        folder: With `federation` of the coordinator, `keys/NAME` of each site, and the sites' own files.
        sites: With the commands that start their agents.
        ports: Of `superlink`, of the gateway's listeners `fleet` and `control`, and of each site's link, by name.
    """

    folder: Path
    sites: Sequence[Site]
    ports: Mapping[str, int]

    def address(self, name: str) -> str:
        """Of one of the ports, `host:port`."""
        return f"{HOST}:{self.ports[name]}"


@contextmanager
def built(
    source: Source, tables: Mapping[str, Sequence[Fields]], *, base_folder: Path, policy: Policies, logs: Path
) -> Iterator[Built]:
    """Build a federation in a temporary folder, with held-out rows as `world` splits them.

    A site with an identity would hold out units of its own choice, so that held-out rows lie in a file of their own
    here, as the simulation of the run has them.

    Args:
        source: What the run says about its rows; the sites' column names are taken from it.
        policy: See `build`; it has to list `held_out.jsonl` beside the rows too.
    """
    rows = {name: read.to_rows(list(map(dict, table)), source.columns) for name, table in tables.items()}
    train: dict[str, list[Fields]] = {name: [] for name in tables}
    held_out: dict[str, list[Fields]] = {name: [] for name in tables}
    for name, data in source.split(rows).items():
        aside = {row.row_id for row in data.held_out}
        for fields, row in zip(tables[name], rows[name], strict=True):
            (held_out if row.row_id in aside else train)[name].append(fields)
    with TemporaryDirectory(prefix="silotune-", ignore_cleanup_errors=True) as folder:
        files = {"folder": Path(folder), "base_folder": base_folder, "logs": logs}
        yield build(train, held_out=held_out, data=source.data, policy=policy, **files)


def build(
    tables: Mapping[str, Sequence[Fields]],
    *,
    data: config.DataConfig,
    folder: Path,
    base_folder: Path,
    policy: Policies,
    logs: Path,
    held_out: Mapping[str, Sequence[Fields]] = site_files.NO_ROWS,
) -> Built:
    """Provision, let every site join, and write the sites' files and policies.

    Args:
        data: `[data]` of the run, from which the sites' column names are taken.
        folder: Where to; short, as each agent's socket is in it, too.
        policy: Path of a site's rows to the text of its policy, which is signed here by one admin for all.
    """
    ports = {name: deployment.free_port() for name in ("superlink", "fleet", "control", *tables)}
    establish(folder, list(tables), fleet_port=ports["fleet"])
    admin = identity.public_hex(identity.create(folder / ADMIN_KEY))
    lines = {}
    for name in tables:
        keys = folder / "keys" / name
        named = {"policy": keys / kit.POLICY, "policy_signer": admin, "identity_key": keys / enroll.IDENTITY_KEY}
        lines[name] = [f"{key} = {json.dumps(str(value))}" for key, value in {**named, "roster_folder": keys}.items()]
    sites = site_files.write(
        tables,
        held_out=held_out,
        data=data,
        folder=folder,
        base_folder=base_folder.absolute(),
        log_folder=logs.absolute() / "sites",
        num_threads=1,
        agent_lines=lines,
        is_named=True,
    )
    for site in sites:
        path = folder / "keys" / site.name / kit.POLICY
        path.write_text(policy(site.socket_path.parent / site_files.ROWS))
        file.sign(path, identity.load(folder / ADMIN_KEY))
    return Built(folder, sites, ports)


def kit_policy(rows_file: Path, *, base_sha256: str, changes: Mapping[str, str]) -> str:
    """The policy that came with a site's kit, which allows nothing, with what it allows filled in.

    Args:
        rows_file: The site's rows, in the site's folder of a federation that `build` builds.
        base_sha256: Of the base that is allowed.
        changes: Key to value, as TOML; a key that the policy has once.

    Raises:
        KeyError: The policy has no such key, or several.
    """
    site, columns = rows_file.parent, json.dumps(["instruction", "input", "output", "patient_id"])
    files = {"notes": rows_file, "held-out": rows_file.with_name(site_files.HELD_OUT)}
    datasets = (f"{name} = {{ path = {json.dumps(str(path))}, columns = {columns}, max_rows = 10_000 }}"
                for name, path in files.items())  # fmt: skip
    filled = {
        "allow": f'[{{ name = "base", sha256 = "{base_sha256}" }}]',
        "targets": '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]',
        "secagg": '"none"',
        "datasets": f"{{ {', '.join(datasets)} }}",
        **changes,
    }
    lines = (site.parent / "keys" / site.name / kit.POLICY).read_text().splitlines()
    for key, value in filled.items():
        numbers = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
        if len(numbers) != 1:
            raise KeyError(f"{key} occurs {len(numbers)} times in the policy of a kit")
        lines[numbers[0]] = f"{key} = {value}"
    return "\n".join([*lines, ""])


@contextmanager
def running(
    built: Built, *, logs: Path, prefixes: Mapping[str, Sequence[str]] = NO_PREFIXES, fleet: str = ""
) -> Iterator[Guarded]:
    """Start everything, wait until all nodes are connected; stop everything on leaving.

    Args:
        logs: Folder for one log file a process, and the gateway's refusals.
        prefixes: What a site's agent is started under, by the site's name, such as `unshare --net`.
        fleet: Where the links connect, `host:port`; default: the gateway.

    Raises:
        TransportError: Something did not start; the message names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    nodes = {site.name: site.socket_path.parent / site_files.NODE for site in built.sites}
    refusals = logs / "refusals.jsonl"
    made = built.folder / "federation"
    started = Guarded(made, built.address("control"), built.address("superlink"), refusals, nodes, [])
    with cli.unwinding_on_sigterm(), ExitStack() as stack:
        stack.callback(deployment.stop, started.processes)
        _start(started, built, logs=logs, prefixes=prefixes, fleet=fleet or built.address("fleet"))
        yield started


def _start(running: Guarded, built: Built, *, logs: Path, prefixes: Mapping[str, Sequence[str]], fleet: str) -> None:
    """Start SuperLink, gateway and agents; then links and couriers, which the gateway registers."""
    folder, sites = built.folder, built.sites
    env = deployment.environment(flwr_home=folder / "flower", num_threads=1)

    def start(name: str, command: Sequence[str]) -> None:
        running.processes.append(deployment.start(name, command, logs=logs, env=env))

    def wait(is_done: Callable[[], bool], what: str) -> None:
        deployment.until(is_done, what=what, timeout_s=_START_S, watched=running.processes)

    certificate = running.folder / "servers" / f"{founding.SUPERLINK}.pem"
    for left in folder.glob(f"{_DATABASE}*"):  # of a federation that was killed: its nodes would count as connected
        left.unlink()
    files = {"ca_file": running.ca_file, "certificate": certificate, "database": folder / _DATABASE}
    start("superlink", deployment.superlink_command(running.superlink, **files))
    gateway_file = folder / "gateway.toml"
    text = _GATEWAY_FILE.format(
        superlink=running.superlink,
        control=running.control,
        fleet=built.address("fleet"),
        keys=folder,
        federation=running.folder,
        refusals=running.refusals.absolute(),
    )
    gateway_file.write_text(text)
    start("gateway", [sys.executable, "-m", "server.cli.app", "gateway", str(gateway_file)])
    for site in sites:
        start(f"{site.name}-agent", [*prefixes.get(site.name, ()), *site.command])
    wait(lambda: all(map(deployment.accepts, (running.superlink, running.control))), "SuperLink and gateway")
    with link.connect(running.control, ca_file=running.ca_file, identity=running.operator) as connected:
        for site in sites:
            keys, state, address = (
                folder / "keys" / site.name,
                site.socket_path.parent / "link",
                built.address(site.name),
            )
            options = {
                "gateway": fleet,
                "port": built.ports[site.name],
                "state": state,
                "ca": keys / kit.CA,
                "certificate": keys / kit.CERTIFICATE,
                "key": keys / enroll.TLS_KEY,
                "agent": site.socket_path,
            }
            given = [f"--{name}={value}" for name, value in options.items()]
            start(f"{site.name}-link", [sys.executable, "-m", "client.cli.app", "link", *given])
            wait(partial(deployment.accepts, address), "a link")
            key_files = {"ca_file": state / CERTIFICATE, "key_file": keys / enroll.NODE_KEY}
            start(f"{site.name}-courier", deployment.courier_command(address, site=site, **key_files))
        wait(lambda: len(connected.online_node_ids()) == len(sites), "all couriers")
    wait(lambda: all(map(deployment.agent_answers, sites)), "all agents")
