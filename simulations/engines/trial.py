"""A standing federation on one machine, to try silotune before there is one in earnest.

Nothing in it is simulated: a SuperLink, a gateway, and three sites with a policy, a privacy ledger, agent, courier and
link. Only the patients are invented, and the keys of all parties lie in one folder. What people do in earnest by
`provision`, `enroll`, `admit`, `install` and `sign-policy` is done by the functions behind these commands; to launch a
run, to look at it and to approve it stays with whoever tries.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from common import quiet, storage
from common.errors import ConfigError, TransportError
from common.model.base import hash_base
from common.run import config
from server.folder import lock
from server.members import founding
from simulations.embedded import records
from simulations.engines import deployment, guarded, site_files
from simulations.engines.guarded import Built
from simulations.world import world

SITES: Final = ("alder", "birch", "cedar")
SCALE: Final = 4  # times the patients of the demo: differential privacy needs many
RUN_FILE: Final = Path(__file__).parents[1] / "configs" / "trial.toml"
STATE: Final = "trial.json"  # the ports; locked while the federation runs
PID: Final = "trial.pid"
LOGS: Final = "logs"
BASE: Final = "base"
PUBLIC: Final = "public.jsonl"  # the coordinator's own rows: of a hospital that is no member
ENV: Final = "env"
_START_S: Final = 300.0
_STOP_S: Final = 60.0
_POLL_S: Final = 0.5

_TASK: Final = """
# What the coordinator measures by itself, on rows of its own, before the first round and after the last.
[[evaluation.tasks]]
name = "region"
kind = "perplexity"
data = {path}
text_column = "text"
"""
# What these sites change in the policy of their kit, apart from what `guarded.kit_policy` fills in.
_POLICY: Final = {
    "learning_rate": "[1e-6, 1e-2]",
    "min_local_steps": "10",
    "min_records": "100",
    "dp_delta": "1e-5",
    "min_sites": "3",
    "min_slice": "20",
}


def make(folder: Path) -> Built:
    """Found the federation, let the sites join, write their rows, own files, policies and the run file.

    Args:
        folder: Must not exist, or be empty.

    Raises:
        ConfigError: There is something else in it.
        StorageError: Disk full or not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty and holds no trial; give another folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.absolute()
    rows = [row for row in records.generate(scale=SCALE) if row["site"] in SITES]
    base_sha256 = hash_base(world.EMBEDDED_BASE)
    built = guarded.build(
        {name: [row for row in rows if row["site"] == name] for name in SITES},
        data=config.load(RUN_FILE).data,
        folder=folder,
        base_folder=world.EMBEDDED_BASE,
        policy=lambda rows_file: guarded.kit_policy(rows_file, base_sha256=base_sha256, changes=_POLICY),
        logs=folder / LOGS,
    )
    (folder / BASE).symlink_to(world.EMBEDDED_BASE)
    regional = [row for row in records.generate() if row["instruction"] in (records.TRIAGE, records.FORMULARY)]
    public = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in regional if row["site"] not in SITES]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in public)
    storage.write_atomic(folder / PUBLIC, lines.encode())
    task = _TASK.format(path=json.dumps(str(folder / PUBLIC)))
    storage.write_atomic(folder / "run.toml", RUN_FILE.read_bytes() + task.encode())
    storage.write_atomic(folder / ENV, f"GATEWAY={built.address('control')}\n".encode())
    storage.write_atomic(folder / STATE, json.dumps({"ports": built.ports}).encode())  # last: now it is whole
    return built


def load(folder: Path) -> Built:
    """A federation that `make` wrote.

    Raises:
        ConfigError: It was not written to its end, or by another release.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        ports = {str(name): int(port) for name, port in state["ports"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder} holds no whole trial; remove it and begin anew") from None
    folder = folder.absolute()
    return Built(folder, [site_files.site_at(folder / name, name=name, has_policy=True) for name in SITES], ports)


def _open(folder: Path) -> Built:
    """The federation of a folder, made first if it is not there."""
    return load(folder) if (folder / STATE).is_file() else make(folder)


def serve(folder: Path, *, announce: Callable[[Built], None]) -> None:
    """Run the federation until SIGTERM, Ctrl-C or the end of one of its processes; made first if it is not there.

    Args:
        announce: Called when all parties are connected.

    Raises:
        ConfigError: As `make` and `load`, or it runs already.
        TransportError: A process did not start or has ended; the message names its log.
    """
    built = _open(folder)
    with ExitStack() as stack:
        file = stack.enter_context((folder / STATE).open("rb"))
        if not lock.try_lock(file.fileno(), fcntl.LOCK_EX, folder):
            raise _busy(folder)
        started = stack.enter_context(guarded.running(built, logs=folder / LOGS))
        # Each site's privacy ledger, by the site's own command; its agent has begun its log by now.
        for site in built.sites:
            if any((folder / LOGS / "sites" / site.name).rglob("*.ledger")):
                continue
            node = site.socket_path.with_name(site_files.NODE)
            command = (sys.executable, "-m", "client.cli.app", "ledger", "create", str(node))
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise TransportError(f"{site.name}: {done.stderr.strip()}")
        storage.write_atomic(folder / PID, f"{os.getpid()}\n".encode())
        try:
            announce(built)
            while True:
                for process in started.processes:
                    process.check()
                time.sleep(_POLL_S)
        finally:
            (folder / PID).unlink(missing_ok=True)


def detach(folder: Path) -> Built:
    """Run the federation in a process of its own, and return when all parties are connected."""
    built = _open(folder)
    if is_running(folder):
        raise _busy(folder)
    logs = folder / LOGS
    logs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "simulations.engines.trial", str(folder)]
    child = deployment.start("trial", command, logs=logs, env=os.environ)
    deployment.until((folder / PID).is_file, what="all parties of the trial", timeout_s=_START_S, watched=[child])
    return built


def stop(folder: Path) -> None:
    """Stop a federation that runs; its folder stays, and another start goes on with it.

    Raises:
        ConfigError: None runs there.
        TransportError: It did not end in time.
    """
    if not (folder / PID).is_file() or not is_running(folder):
        raise ConfigError(f"no trial runs in {folder}; start it with: silotune-server trial {folder}")
    os.kill(int((folder / PID).read_text()), signal.SIGTERM)
    end = time.monotonic() + _STOP_S
    while is_running(folder):
        if time.monotonic() > end:
            raise TransportError(f"the trial in {folder} did not end within {_STOP_S:g} s; see {folder / LOGS}")
        time.sleep(_POLL_S)


def is_running(folder: Path) -> bool:
    """Whether a process runs the federation of a folder."""
    with (folder / STATE).open("rb") as file:
        return not lock.try_lock(file.fileno(), fcntl.LOCK_SH, folder)


def commands(folder: Path, built: Built) -> list[str]:
    """What to type next, in another terminal: a run from its launch to its approval."""
    made = folder / "federation"
    operator = made / "operators" / guarded.OPERATOR
    run = [
        *("silotune-server", "run", folder / "run.toml", "--base", folder / BASE, "--output", folder / "run"),
        *("--superlink", built.address("control"), "--ca", made / "ca" / "root.pem"),
        *("--certificate", f"{operator}.pem", "--key", f"{operator}.key"),
        *("--operator-key", f"{operator}{founding.SIGNING_SUFFIX}"),
        *("--federation", guarded.FEDERATION, "--roster", made),
    ]
    nodes = [folder / name / site_files.NODE for name in SITES]
    desk = [
        ("silotune-client", "review", nodes[0], "trial"),
        *(("silotune-client", "approve", node, "trial") for node in nodes),
    ]
    return [shlex.join(map(str, command)) for command in (run, *desk)]


def render(folder: Path, commands: Sequence[str], *, is_detached: bool) -> list[str]:
    """Lines for whoever started it."""
    launch, review, *approvals = commands
    ending = (
        f"Stop it with: silotune-server trial {shlex.quote(str(folder))} --stop" if is_detached else "Ctrl-C stops it."
    )
    return [
        f"A federation of {len(SITES)} sites is running: {', '.join(SITES)}. {ending}",
        f"Rows, policies, keys and logs of all parties are in {folder}.",
        "",
        "next, in another terminal: launch a run as the coordinator"
        if not is_detached
        else "next: launch a run as the coordinator",
        f"  {launch}",
        "then, while it waits, read and approve it as each site",
        *(f"  {command}" for command in (review, *approvals)),
    ]


def _busy(folder: Path) -> ConfigError:
    return ConfigError(f"the trial in {folder} runs already; stop it with: silotune-server trial {folder} --stop")


if __name__ == "__main__":
    quiet.hush()
    serve(Path(sys.argv[1]), announce=lambda _: None)
