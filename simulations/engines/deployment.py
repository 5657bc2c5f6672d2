"""Flower's deployment engine on one machine: SuperLink, SuperNodes and agents as real processes, over TLS on loopback.

Node keys are checked, the bundle carries no code, nothing calls out, and Flower keeps its files in a folder of this
run. Every process writes a log; every wait has an end, and its error names the log to read. Whatever happens, all
processes are stopped.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psutil
from flwr.app.user_config import UserConfig

from client.courier import line
from common import cli, events, quiet
from common.errors import RemoteError, TransportError
from common.event_kinds import Event, RunFailed
from common.events import EventLog
from server.run import link
from server.run.link import Link, RunState
from simulations.engines import loopback_keys

HOST: Final = "127.0.0.1"
STOP_S: Final = 8.0
SERVER_LOG: Final = "server-app.log"
_END_S: Final = 60.0  # from the run's last event to its end at the SuperLink
_POLL_S: Final = 0.25
_TASK_POLL_S: Final = 0.1  # Flower's default of 1 s is waited once per message


@dataclass(frozen=True)
class Site:
    """One site of the federation.

    Attributes:
        name: For log files and error messages.
        command: Starts the site's agent in the foreground.
        socket_path: Where that agent listens.
    """

    name: str
    command: tuple[str, ...]
    socket_path: Path


@dataclass(frozen=True)
class Process:
    """A running process and the file that holds all it printed."""

    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path

    def check(self) -> None:
        """Raise TransportError if it has ended."""
        code = self.popen.poll()
        if code is not None:
            raise TransportError(f"{self.name} ended with code {code}; see {self.log_path}")


@dataclass(frozen=True)
class Federation:
    """A running federation.

    Attributes:
        address: The SuperLink's, `host:port`.
        keys: Folder of its certificates and node keys.
    """

    link: Link
    address: str
    keys: Path
    processes: list[Process]


def run(sites: Sequence[Site], *, log: EventLog, config: UserConfig, timeout_s: float, num_threads: int) -> None:
    """Do a whole run in a federation of processes on this machine.

    Args:
        sites: Their agents are started, too.
        log: Events of a folder that `server.folder.run_files.prepare` made; the server's process writes them, and they
            are passed to those who listen here.
        config: Flower's run config for `server/run/app.py`, without the run folder.
        timeout_s: For the run itself, from submission to end.
        num_threads: CPU threads of each process' linear algebra; 0: all cores. Results are bit-equal for equal
            numbers only.

    Raises:
        TransportError: A process did not start, ended early, or the run took too long. The message names a log.
        RemoteError: The run failed; the message says why, or names the log.
    """
    logs = log.path.parent / "logs"
    given = {**config, "run-folder": str(log.path.parent.absolute()), "num-threads": num_threads}
    num_old = len(events.read(log.path)) if log.path.is_file() else 0
    with federation(sites, logs=logs, num_threads=num_threads) as running:
        run_id = running.link.start_run(given, bundle=link.build_bundle())
        end = time.monotonic() + timeout_s

        def is_over() -> bool:
            _check(running.processes, what="the run to end", end=end, timeout_s=timeout_s)
            return running.link.state(run_id).is_finished

        last: Event | None = None
        for last in events.follow(log.path, is_over=is_over, num_skipped=num_old, poll_s=2 * _POLL_S):
            for listener in log.listeners:
                listener(last)
        state = wait(running, run_id, timeout_s=_END_S)
        (logs / SERVER_LOG).write_text(running.link.log_of(run_id))
    if not state.is_completed:
        reason = last.reason if isinstance(last, RunFailed) else "its server process ended"
        raise RemoteError(f"the run failed: {reason}; see {logs / SERVER_LOG}")


def wait(running: Federation, run_id: int, *, timeout_s: float) -> RunState:
    """Wait for a run to end, well or not.

    Raises:
        TransportError: A process ended, or the time is over.
    """
    until(
        lambda: running.link.state(run_id).is_finished,
        what="the run to end",
        timeout_s=timeout_s,
        watched=running.processes,
    )
    return running.link.state(run_id)


@contextmanager
def federation(
    sites: Sequence[Site], *, logs: Path, num_threads: int = 1, start_timeout_s: float = 120.0
) -> Iterator[Federation]:
    """Start everything, wait until all nodes are connected; stop everything on leaving.

    Args:
        logs: Folder for one log file a process; made if it is not there.
        start_timeout_s: For all processes together.

    Raises:
        TransportError: Something did not start; the message names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(cli.unwinding_on_sigterm())
        keys = Path(stack.enter_context(TemporaryDirectory(prefix="silotune-keys-", ignore_cleanup_errors=True)))
        loopback_keys.write_certificates(keys)
        env = environment(flwr_home=keys / "flower", num_threads=num_threads)
        address = f"{HOST}:{free_port()}"
        processes: list[Process] = []
        stack.callback(stop, processes)
        processes.append(
            start(
                "superlink",
                superlink_command(address, ca_file=keys / "ca.pem", certificate=keys / "server.pem"),
                logs=logs,
                env=env,
            )
        )
        processes.extend(start(f"{site.name}-agent", site.command, logs=logs, env=env) for site in sites)
        until(lambda: accepts(address), what="the SuperLink", timeout_s=start_timeout_s, watched=processes)
        connected = stack.enter_context(link.connect(address, ca_file=keys / "ca.pem"))
        running = Federation(link=connected, address=address, keys=keys, processes=processes)
        for site in sites:
            connected.register(loopback_keys.write_node_key(keys / f"{site.name}.key"), name=site.name)
            command = supernode_command(running, site=site)
            processes.append(start(f"{site.name}-supernode", command, logs=logs, env=env))

        def are_all_there() -> bool:
            return len(connected.online_node_ids()) == len(sites) and all(map(agent_answers, sites))

        until(are_all_there, what="all sites", timeout_s=start_timeout_s, watched=processes)
        yield running


def superlink_command(address: str, *, ca_file: Path, certificate: Path, database: Path | None = None) -> list[str]:
    """The command of a SuperLink that checks node keys and installs nothing; its key lies beside its certificate.

    With a database it knows its nodes again after a restart; without one its state is in memory.
    """
    host, port = address.split(":")
    return [
        *("flower-superlink", "--host", host, "--port", port, "--ssl-ca-certfile", str(ca_file)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(certificate.with_suffix(".key"))),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *(("--database", str(database)) if database else ()),
    ]


def supernode_command(running: Federation, *, site: Site) -> list[str]:
    """The command of one SuperNode of this federation."""
    key_file = running.keys / f"{site.name}.key"
    return courier_command(running.address, ca_file=running.keys / "ca.pem", key_file=key_file, site=site)


def courier_command(address: str, *, ca_file: Path, key_file: Path, site: Site) -> list[str]:
    """The command of a SuperNode; it finds its agent by a socket path of its own configuration."""
    return [
        *("flower-supernode", "--superlink", address, "--root-certificates", str(ca_file)),
        *("--auth-supernode-private-key", str(key_file)),
        *("--node-config", f'agent-socket="{site.socket_path.absolute()}"'),
        *("--host", HOST, "--port", str(free_port())),
    ]


def environment(*, flwr_home: Path, num_threads: int) -> dict[str, str]:
    """Every process' variables: silence, this Python's scripts and packages, Flower's files in a folder of the run."""
    env = dict(os.environ)
    quiet.hush(env)
    source = str(Path(link.__file__).parents[2])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [source, env.get("PYTHONPATH", "")]))
    env["FLWR_HOME"] = str(flwr_home)
    env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(_TASK_POLL_S)
    env["PYTHONUNBUFFERED"] = "1"
    return env | ({"OMP_NUM_THREADS": str(num_threads)} if num_threads else {})


def start(name: str, command: Sequence[str], *, logs: Path, env: Mapping[str, str]) -> Process:
    """Start one process in a session of its own, so that a signal reaches its children, too."""
    log_path = logs / f"{name}.log"
    try:
        with log_path.open("wb") as log:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
    except OSError as error:
        raise TransportError(f"cannot start {name}: {command[0]} is not there or not executable") from error
    return Process(name=name, popen=popen, log_path=log_path)


def stop(processes: Sequence[Process]) -> None:
    """Stop all processes, the first (the SuperLink) last, as nodes sign off there; kill what does not end.

    Flower starts apps in sessions of their own, which a signal to ours does not reach; they end when they notice that
    their parent is gone, and are killed if they have not by then.
    """
    started: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            started += psutil.Process(process.popen.pid).children(recursive=True)
    for group in (processes[1:], processes[:1]):
        for process in group:
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + STOP_S
        for process in group:
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, end - time.monotonic()))
            _signal(process, signal.SIGKILL)  # whatever is left of its session
            process.popen.wait()
    for child in tuple(started):  # what they started meanwhile
        with suppress(psutil.NoSuchProcess):
            started += child.children(recursive=True)
    _, left = psutil.wait_procs(started, timeout=STOP_S)
    for child in left:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(left, timeout=STOP_S)


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _signal(process: Process, number: signal.Signals) -> None:
    """Signal a process and its children, if any is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.popen.pid, number)


def until(is_done: Callable[[], bool], *, what: str, timeout_s: float, watched: Sequence[Process]) -> None:
    """Poll until something holds; fail when time is over or a process ends meanwhile."""
    end = time.monotonic() + timeout_s
    while not is_done():
        _check(watched, what=what, end=end, timeout_s=timeout_s)
        time.sleep(_POLL_S)


def _check(watched: Sequence[Process], *, what: str, end: float, timeout_s: float) -> None:
    """Fail when time is over or a process has ended."""
    for process in watched:
        process.check()
    if time.monotonic() > end:
        raise TransportError(f"waited {timeout_s:g} s for {what}; see the logs in {watched[0].log_path.parent}")


def accepts(address: str) -> bool:
    """Whether somebody listens on a `host:port`."""
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def agent_answers(site: Site) -> bool:
    """Whether a site's agent answers a greeting."""
    try:
        line.hello(site.socket_path, timeout_s=1.0)
    except TransportError:
        return False
    return True
