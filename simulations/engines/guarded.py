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
from common.trust.governance import Governance
from server.members import changes as admit
from server.members import founding
from server.run import link
from server.run.link import Identity
from simulations.engines import deployment, site_files
from simulations.engines.deployment import HOST, Process, Site
from simulations.world import world

FEDERATION: Final = "loopback"
OPERATOR: Final = "operator"
ADMIN_KEY: Final = "admin.pem"
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
        nodes: Each site's own file, by name.
        processes: All that were started.
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


def found(folder: Path, names: Sequence[str], *, fleet_port: int) -> Path:
    """Provision a federation and let its sites enrol, be admitted and install their kits.

    Args:
        folder: Made with a folder `federation` of the coordinator, and `keys/NAME` of each site.
        names: The sites'.
        fleet_port: Of the gateway's listener for sites.

    Returns:
        The coordinator's folder.

    Raises:
        SilotuneError: As the commands.
    """
    now = datetime.datetime.now(datetime.UTC)
    text = _FEDERATION_FILE.format(federation=FEDERATION, host=HOST, port=fleet_port, operator=OPERATOR)
    (folder / "federation.toml").write_text(text)
    made = folder / "federation"
    pinned = founding.provision(folder / "federation.toml", folder=made, now=now)
    for name in names:
        _join(name, made=made, keys=folder / "keys" / name, pinned=pinned, now=now)
    for name in names:
        install.update_roster(made / kit.ROSTER, keys=folder / "keys" / name)
    return made


def _join(name: str, *, made: Path, keys: Path, pinned: Governance, now: datetime.datetime) -> None:
    """One site from its request to its installed kit."""
    keys.parent.mkdir(mode=0o700, exist_ok=True)
    words = enroll.enroll(keys, federation_id=FEDERATION, name=name).words
    members = sorted((made / "governance").iterdir())[: pinned.quorum]
    admit.admit(made, request_file=keys / enroll.REQUEST, words=words, governance_files=members, now=now)
    install.install(made / "kits" / name, keys=keys, words=pinned.words, now=now)


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
def federation(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    settings: config.RunConfig,
    base_folder: Path,
    policy: Callable[[Path], str],
    logs: Path,
    prefixes: Mapping[str, Sequence[str]],
) -> Iterator[Guarded]:
    """Run what `built` builds; see there, and `running` for the prefixes.

    Raises:
        TransportError: Something did not start; the message names its log.
        SilotuneError: As the commands.
    """
    with (
        built(tables, settings=settings, base_folder=base_folder, policy=policy, logs=logs) as ready,
        running(ready, logs=logs, prefixes=prefixes) as started,
    ):
        yield started


@contextmanager
def built(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    settings: config.RunConfig,
    base_folder: Path,
    policy: Callable[[Path], str],
    logs: Path,
) -> Iterator[Built]:
    """Build a federation in a temporary folder, with held-out rows as `world` splits them.

    A site with an identity would hold out units of its own choice, so that held-out rows lie in a file of their own
    here, as the simulation of the run has them.

    Args:
        tables: Rows by site.
        settings: The run; the sites' column names are taken from it.
        base_folder: The base model's folder.
        policy: See `build`; it has to list `held_out.jsonl` beside the rows too.
        logs: See `running`.

    Raises:
        SilotuneError: As the commands.
    """
    divided = _divided(tables, settings)
    with TemporaryDirectory(prefix="silotune-", ignore_cleanup_errors=True) as folder:
        yield build(
            {name: train for name, (train, _) in divided.items()},
            held_out={name: held_out for name, (_, held_out) in divided.items()},
            settings=settings,
            folder=Path(folder),
            base_folder=base_folder,
            policy=policy,
            logs=logs,
        )


def build(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    settings: config.RunConfig,
    folder: Path,
    base_folder: Path,
    policy: Callable[[Path], str],
    logs: Path,
    held_out: Mapping[str, Sequence[Mapping[str, Any]]] = site_files.NO_ROWS,
) -> Built:
    """Provision, let every site join, and write the sites' files and policies.

    Args:
        tables: Rows by site.
        settings: The sites' column names are taken from it.
        folder: Where to; short, as each agent's socket is in it, too.
        base_folder: The base model's folder.
        policy: Path of a site's rows to the text of its policy, which is signed here by one admin for all.
        logs: For the sites' own logs.
        held_out: See `site_files.write`.

    Raises:
        SilotuneError: As the commands.
    """
    ports = {name: deployment.free_port() for name in ("superlink", "fleet", "control", *tables)}
    found(folder, list(tables), fleet_port=ports["fleet"])
    admin = identity.public_hex(identity.create(folder / ADMIN_KEY))
    lines = {}
    for name in tables:
        keys = folder / "keys" / name
        named = {"policy": keys / kit.POLICY, "policy_signer": admin, "identity_key": keys / enroll.IDENTITY_KEY}
        lines[name] = [f"{key} = {json.dumps(str(value))}" for key, value in {**named, "roster_folder": keys}.items()]
    sites = site_files.write(
        tables,
        held_out=held_out,
        settings=settings,
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
        places = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
        if len(places) != 1:
            raise KeyError(f"{key} stands {len(places)} times in the policy of a kit")
        lines[places[0]] = f"{key} = {value}"
    return "\n".join([*lines, ""])


@contextmanager
def running(
    built: Built, *, logs: Path, prefixes: Mapping[str, Sequence[str]] = NO_PREFIXES, fleet: str = ""
) -> Iterator[Guarded]:
    """Start everything, wait until all nodes are connected; stop everything on leaving.

    Args:
        built: The federation.
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


def _divided(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], settings: config.RunConfig
) -> dict[str, tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]]:
    """Every site's rows to train on and held out, as `world` splits them."""
    plain = {name: list(map(dict, table)) for name, table in tables.items()}
    sides: dict[str, tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]] = {}
    for name, data in world.split_sites(plain, settings).items():
        held_out = {row.row_id for row in data.held_out}
        sides[name] = ([], [])
        for fields, row in zip(plain[name], read.to_rows(plain[name], world.columns_of(settings)), strict=True):
            sides[name][row.row_id in held_out].append(fields)
    return sides


def _start(running: Guarded, built: Built, *, logs: Path, prefixes: Mapping[str, Sequence[str]], fleet: str) -> None:
    """SuperLink, gateway and agents; then links and couriers, which the gateway registers."""
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
    gateway_file = _write_gateway(running, folder=folder, fleet=built.address("fleet"))
    start("gateway", [sys.executable, "-m", "server.cli.app", "gateway", str(gateway_file)])
    for site in sites:
        start(f"{site.name}-agent", [*prefixes.get(site.name, ()), *site.command])
    wait(lambda: all(map(deployment.accepts, (running.superlink, running.control))), "SuperLink and gateway")
    with link.connect(running.control, ca_file=running.ca_file, identity=running.operator) as connected:
        for site in sites:
            start(
                f"{site.name}-link",
                _link_command(folder, site, gateway=fleet, address=built.address(site.name)),
            )
            wait(partial(deployment.accepts, built.address(site.name)), "a link")
            keys, ca_file = folder / "keys" / site.name, site.socket_path.parent / "link" / CERTIFICATE
            key_file = keys / enroll.NODE_KEY
            command = deployment.courier_command(
                built.address(site.name), ca_file=ca_file, key_file=key_file, site=site
            )
            start(f"{site.name}-courier", command)
        wait(lambda: len(connected.online_node_ids()) == len(sites), "all couriers")
    wait(lambda: all(map(deployment.agent_answers, sites)), "all agents")


def _write_gateway(running: Guarded, *, folder: Path, fleet: str) -> Path:
    """The gateway's own file."""
    text = _GATEWAY_FILE.format(
        superlink=running.superlink,
        control=running.control,
        fleet=fleet,
        keys=folder,
        federation=running.folder,
        refusals=running.refusals.absolute(),
    )
    (folder / "gateway.toml").write_text(text)
    return folder / "gateway.toml"


def _link_command(folder: Path, site: Site, *, gateway: str, address: str) -> list[str]:
    """The command of one site's link."""
    keys = folder / "keys" / site.name
    options = {
        "gateway": gateway,
        "port": address.rpartition(":")[2],
        "state": site.socket_path.parent / "link",
        "ca": keys / kit.CA,
        "certificate": keys / kit.CERTIFICATE,
        "key": keys / enroll.TLS_KEY,
        "agent": site.socket_path,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "client.cli.app", "link", *given]
