"""The site's machine and its way out: socket, core dumps, Flower's reporting, the agent, and the gateway."""

import base64
import grp
import hashlib
import os
import pwd
import shlex
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Concatenate, Final, ParamSpec

from client.courier import door, doorkeeper, line, tunnel
from client.courier import proxy as proxying
from client.join import enroll
from common import quiet
from common.doctor import probe
from common.doctor.doctor import Result, check, failed, ok, skipped, warning
from common.doctor.probe import Answer
from common.errors import ConfigError, SilotuneError
from common.frame import wire
from common.run.config import LinkConfig
from common.trust import certs, governance, kit, roster

AGENT_UNIT: Final = "silotune-agent.service"
COURIER_UNIT: Final = "silotune-courier.service"
SWITCHES: Final = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")
CORE_PATTERN: Final = Path("/proc/sys/kernel/core_pattern")
DRY_PATH: Final = "/v1/fleet/get-run"  # without a signature the SuperLink answers 401 and does nothing
UNAUTHENTICATED: Final = 401
NO_PROXY: Final = LinkConfig()
Outcome = Answer | SilotuneError | None  # why there is no answer; None: nobody was asked
P = ParamSpec("P")
_ASK: Final = "ask the coordinator"
_REFUSALS: Final = {
    "not_in_roster": (
        "its roster does not have this certificate's key",
        "install the newest kit; if that is done, the coordinator must copy the newest roster to the gateway",
    ),
    "revoked": ("this certificate was revoked", f"{_ASK}; a revoked site enrols anew, in a new folder"),
    "expired": ("this certificate has ended", "run: silotune-client renew KEYS"),
    "node_key_other": ("node.key is not that of the certificate's site", "use keys of one folder"),
    "path": ("it does not know Flower's paths: another version", "install the coordinator's release"),
    "superlink": ("the SuperLink behind it does not answer", f"{_ASK} to start it"),
    "members_unreadable": ("it cannot read its roster, so it lets nobody in", f"{_ASK}; the gateway's stderr says why"),
    "rate": ("this site asks too often", "wait a minute; if it lasts, look for a second SuperNode"),
}


def other_user(key_file: str) -> str:
    """Whose the agent's files are, by the site's identity key; empty if they are this user's, or there is no key."""
    try:
        owner = Path(key_file).stat().st_uid if key_file else os.geteuid()
    except PermissionError:
        return "the agent's user"
    except OSError:
        return ""  # the check of key files reports it
    try:
        return "" if owner == os.geteuid() else pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"'#{owner}'"


@check("agent's files", remedy="")
def of_another(user: str) -> Result:
    """Say who must look at what the agent alone may read."""
    what = "policy, audit log, rows, bases, memory, disk and socket"
    return skipped(f"{what} are {user}'s to look at", f"run: sudo -u {user} silotune-client doctor NODE.toml")


@check("agent's socket", remedy="make the folder for the agent's user alone: install -d -m 700 FOLDER")
def socket_folder(path: Path, *, courier_group: str) -> Result:
    """Check that nobody else can put a socket there, and that the courier's group may reach it."""
    folder = path.absolute().parent
    if not folder.is_dir() and folder.parent == Path("/run"):
        return warning(f"{folder} is not there yet", f"start {AGENT_UNIT}, which makes it, and look again")
    door.check_folder(path)
    facts = folder.stat()
    mode = f"{folder}: mode {stat.S_IMODE(facts.st_mode):04o}"
    if not courier_group:
        return ok(f"{mode}; for a courier of this user")
    try:
        group = grp.getgrnam(courier_group).gr_gid
    except KeyError:
        return failed(f"there is no group {courier_group}", f"run: groupadd --system {courier_group}")
    if group not in (os.getegid(), *os.getgroups()) and os.geteuid() != 0:
        return failed(f"this user is not in group {courier_group}", f"run: usermod -aG {courier_group} USER")
    if not (facts.st_mode & stat.S_IXOTH or (facts.st_gid == group and facts.st_mode & stat.S_IXGRP)):
        return failed(f"{mode}: group {courier_group} cannot enter", f"run: chgrp {courier_group} {folder}; chmod 750")
    return ok(f"{mode}; group {courier_group} may enter")


@check("agent", remedy="read the agent's log; start it with: silotune-client serve NODE.toml")
def agent(path: Path) -> Result:
    """Say hello to the agent."""
    if not path.exists():
        return skipped(f"no agent runs at {path}", "start it with: silotune-client serve NODE.toml")
    hello = line.hello(path)
    if hello.wire_version != wire.VERSION:
        versions = f"the agent speaks version {hello.wire_version} of the frames, this release {wire.VERSION}"
        return failed(versions, "restart agent and courier with the same release")
    return ok(f"answers at {path}, {'at work' if hello.is_busy else 'idle'}")


@check("core dumps", remedy="set LimitCORE=0 in silotune-agent.service, and restart it")
def core_dumps(limit: str | None, *, unit: str | None, pattern: str) -> Result:
    """Check that the agent's memory, which holds rows, cannot end up in a file.

    Args:
        limit: The running agent's largest core file; None: no agent runs.
        unit: Text of the agent's unit; None: there is none.
        pattern: The kernel's core pattern: a pipe gets a dump whatever the limit is.
    """
    handler = pattern.removeprefix("|").split()[0] if pattern.startswith("|") else ""
    if limit is None and unit is None:
        return skipped("no agent runs, and no unit is there to read", "start the agent, or give --units DIR")
    if limit not in (None, "0"):
        return failed(
            f"the running agent may write a core file of {limit} bytes", "start it with silotune-client serve"
        )
    lines = (unit or "").splitlines()
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    settings = {name.strip(): value.strip() for name, _, value in pairs}  # a later line wins
    if limit is None and settings.get("LimitCORE") != "0":
        return warning(f"{AGENT_UNIT} does not set LimitCORE=0")
    if handler and Path(handler).name != "systemd-coredump":  # which keeps nothing where the limit is 0
        remedy = "run: sysctl kernel.core_pattern=core, or let that program keep nothing"
        return warning(f"the limit is 0, but the kernel pipes dumps to {handler}, which may ignore it", remedy)
    return ok("the running agent's limit is 0" if limit == "0" else f"{AGENT_UNIT} sets LimitCORE=0")


@check("Flower's reporting", remedy="add to the unit: Environment=FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1")
def reporting(units: Mapping[str, str]) -> Result:
    """Check that the units turn off what Flower reports to its makers.

    Args:
        units: Text of each unit, its drop-ins at the end, by file name.
    """
    ours = {name: text for name, text in units.items() if name in (AGENT_UNIT, COURIER_UNIT)}
    if not ours:
        return skipped("no unit of ours is there to read", "give --units DIR; containers: see compose.yaml")
    problems = [
        f"{name} does not set {switch}={quiet.SWITCHES[switch]}"
        for name, text in ours.items()
        for switch in SWITCHES
        if environment(text).get(switch) != quiet.SWITCHES[switch]
    ]
    return failed("\n".join(problems)) if problems else ok(f"off in {', '.join(sorted(ours))}")


def _of_answer(
    unasked: str = "give --gateway HOST:PORT and --keys DIR",
) -> Callable[[Callable[Concatenate[Answer, P], Result]], Callable[Concatenate[Outcome, P], Result]]:
    """Make a check of an answer one of an outcome: skipped where nobody was asked, failed where no answer came."""

    def declare(judge: Callable[Concatenate[Answer, P], Result]) -> Callable[Concatenate[Outcome, P], Result]:
        def judged(outcome: Outcome, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            if outcome is None:
                return skipped("not asked", unasked)
            if isinstance(outcome, SilotuneError):
                raise outcome
            return judge(outcome, *args, **kwargs)

        return judged

    return declare


@check("gateway", remedy=tunnel.INSPECTION)
@_of_answer()
def gateway(outcome: Answer, *, proxy: str = "") -> Result:
    """Judge how the gateway answered the dry handshake; `proxy` is the one through which it was asked."""
    through = f" through the proxy {proxy}" if proxy else ""
    start = f"{outcome.tls} with this site's certificate{through}"
    if outcome.reason == "node_key_missing":
        return ok(f"{start}, which is in the roster; without a node.key that can be used the SuperLink is not reached")
    if outcome.reason in _REFUSALS:
        what, remedy = _REFUSALS[outcome.reason]
        return failed(f"{start}; then {outcome.status}: {what}", remedy)
    if outcome.status == UNAUTHENTICATED and not outcome.reason:
        return ok(f"{start} and node key; the SuperLink behind it answers (401, as this request is not signed)")
    return failed(f"{start}; then {outcome.status}, which is no answer of our gateway", f"{_ASK} for its address")


@check("registration", remedy="see the check of the gateway")
@_of_answer()
def registration(outcome: Answer) -> Result:
    """Judge the gateway's answer on `roster.STANDING_PATH`: this site's registration at the SuperLink."""
    if (outcome.status, outcome.reason) == (200, "registered"):
        return ok("the SuperLink knows this site's node")
    if (outcome.status, outcome.reason) == (200, "unregistered"):
        return failed(
            "the SuperLink does not know this site's node: it lost its state, or the courier never connected",
            "start the courier anew (systemctl restart silotune-courier): the gateway registers it as it connects; if "
            f"that does not help, {_ASK} to start the SuperLink with --database",
        )
    return _refused(outcome)


@check("newest roster", remedy="see the check of the gateway")
@_of_answer("give --gateway HOST:PORT and --keys DIR, as a user who may read agent.roster_folder")
def newest_roster(outcome: Answer) -> Result:
    """Judge the answer to `ask_roster`: whether the agent's roster is the gateway's."""
    if outcome.status == 204:
        return ok("the agent has the roster that the gateway has")
    if outcome.status == 200:
        return warning(
            "the gateway has another roster than the agent",
            "start the link with --agent SOCKET (as the newest kit's unit does), which brings it; else take it by "
            "silotune-client roster ROSTER.json --keys KEYS. If the agent's is newer, the coordinator must copy his to "
            "the gateway",
        )
    return _refused(outcome)


def ask_roster(ask: Callable[..., Outcome], *, agents: str) -> Outcome:
    """Ask the gateway whether its roster is the one in the agent's folder; None where that cannot be read.

    `ask` is `shake_hands` on the way to the gateway.
    """
    try:
        data = governance.read(Path(agents) / kit.ROSTER) if agents else b""
    except ConfigError:
        return None
    known = {roster.KNOWN: hashlib.sha256(data).hexdigest()}
    return ask(path=roster.PATH, more=known) if data else None


def _refused(outcome: Answer) -> Result:
    """The gateway's refusal of a question that it answers itself."""
    what, remedy = _REFUSALS.get(outcome.reason, ("no answer of our gateway", "the coordinator installs this release"))
    return failed(f"{outcome.status}: {what}", remedy)


def shake_hands(
    address: str,
    folder: Path | None,
    *,
    clock: Callable[[], float],
    path: str = DRY_PATH,
    settings: LinkConfig = NO_PROXY,
    more: Mapping[str, str] | None = None,
) -> Outcome:
    """Try the way of the link and the courier, up to a request that nobody signed and that changes nothing.

    Args:
        address: `host:port` of the gateway's listener for sites; empty: nobody is asked.
        folder: Where certificate, TLS key and node key lie.
        more: Headers beside those of the node.
    """
    if not address or folder is None:
        return None
    try:
        context = tunnel.outward_context(
            ca_file=folder / kit.CA,
            certificate_file=folder / kit.CERTIFICATE,
            key_file=folder / enroll.TLS_KEY,
        )
        headers = {"content-type": "application/protobuf", **(more or {})}
        # A SuperNode names its key in a header; a key that cannot be read is for the check of key files to report.
        if (folder / enroll.NODE_KEY).exists():
            with suppress(ConfigError):
                public = certs.public_pem(certs.load_key(folder / enroll.NODE_KEY)).encode("ascii")
                headers["flwr-public-key"] = base64.b64encode(public).decode("ascii")
        proxy = proxying.of_site(settings)

        def dial(target: tuple[str, int], timeout_s: float) -> socket.socket:
            if proxy is None:
                return socket.create_connection(target, timeout_s)
            opened = proxying.connect(proxy, target, timeout_s=timeout_s)
            opened.settimeout(timeout_s)
            return opened

        return probe.ask(address, context=context, path=path, headers=headers, clock=clock, dial=dial)
    except SilotuneError as error:
        return error


def units_of(*folders: Path | None) -> dict[str, str]:
    """Our units in the first folder that has any, each with its drop-ins, by file name."""
    for folder in filter(None, folders):
        names = [name for name in (AGENT_UNIT, COURIER_UNIT) if (folder / name).is_file()]
        if names:
            drop_ins = {name: sorted((folder / f"{name}.d").glob("*.conf")) for name in names}  # in systemd's order
            return {
                name: "\n".join(file.read_text("utf-8", errors="replace") for file in (folder / name, *drop_ins[name]))
                for name in names
            }
    return {}


def agent_pid(path: Path) -> int | None:
    """The process that listens on a socket; None if nobody does."""
    with socket.socket(socket.AF_UNIX) as probe_socket:
        try:
            probe_socket.connect(str(path))
        except OSError:
            return None
        return doorkeeper.process(probe_socket)[0]


def core_limit(pid: int | None) -> str | None:
    """The kernel's limit on a process' core file; None without a process that can be seen."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[4] for line in lines if line.startswith("Max core file size")), None)


def core_pattern() -> str:
    """Where the kernel puts core dumps."""
    try:
        return CORE_PATTERN.read_text().strip()
    except OSError:
        return ""


def environment(unit: str) -> dict[str, str]:
    """The variables that a unit sets; a later line wins.

    Example:
        >>> environment("Environment=A=1 'B=2 3'")
        {'A': '1', 'B': '2 3'}
    """
    lines = (line.partition("=")[2] for line in unit.splitlines() if line.startswith("Environment="))
    try:
        pairs = [pair.partition("=") for line in lines for pair in shlex.split(line)]
    except ValueError as error:
        raise ConfigError("a unit has an Environment line with an open quote; correct it") from error
    return {name: value for name, _, value in pairs}
