"""Run code that a model wrote: no network, no files but the system's own, no rights, and not for long.

util-linux's `unshare` makes new user, mount, network, process and IPC namespaces. In them a new root is put together
in memory: the system's libraries and this Python, read-only, and an empty /tmp. `setpriv` then gives up every
capability for good, so nothing of it can be undone from within, and resource limits hold memory, processor time, file
sizes and open files. When the time is up the first process is killed, and with it all others of its namespace.

It protects the machine. It does not protect the reward from code that pretends: see docs/polish.md.
"""

import functools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from common.errors import ConfigError

MEMORY_BYTES: Final = 1 << 30
FILE_BYTES: Final = 1 << 20
_TOOLS: Final = ("unshare", "setpriv", "prlimit", "mount", "chroot", "sh")
_ENTER: Final = """
set -e
root=$1; prefix=$2; seconds=$3; python=$4
mount -t tmpfs -o size=1m,mode=755,nosuid,nodev tmpfs "$root"
for folder in /usr /bin /lib /lib64 "$prefix"; do
    if [ -L "$folder" ]; then ln -s "$(readlink "$folder")" "$root$folder"
    elif [ -d "$folder" ] && [ ! -e "$root$folder/." ]; then
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
        mount -o remount,bind,ro,nosuid,nodev "$root$folder"
    fi
done
mkdir "$root/tmp"
mount -t tmpfs -o size=8m,mode=777,nosuid,nodev tmpfs "$root/tmp"
mount -o remount,ro "$root"
cd "$root"
exec env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin prlimit --as=MEMORY --cpu="$seconds" --fsize=FILE --nofile=32 --core=0 \\
    chroot "$root" /usr/bin/setpriv --no-new-privs --inh-caps=-all --ambient-caps=-all --bounding-set=-all \\
    "$python" -I -S -c 'import sys; exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})'
""".replace("MEMORY", str(MEMORY_BYTES)).replace("FILE", str(FILE_BYTES))
# What must be impossible within; each line that succeeds is a hole.
_HOLES: Final = """
import os, socket
def tried(act):
    try: act()
    except OSError: return
    raise SystemExit(9)
tried(lambda: socket.create_connection(("127.0.0.1", PORT), 1))
tried(lambda: open("/usr/silotune-hole", "w"))
tried(lambda: open("/silotune-hole", "w"))
tried(lambda: os.listdir(OUTSIDE))
tried(lambda: os.kill(OWN, 0))
tried(lambda: os.chroot("/tmp"))
open("/tmp/fine", "w").write("fine")
"""


def require() -> None:
    """Refuse a machine on which such code cannot be shut in.

    Raises:
        ConfigError: A tool is missing, the kernel allows no such namespaces, or a probe found a hole.
    """
    if why := _missing():
        raise ConfigError(
            f"reward 'unit_test' runs code that the model writes, and the sandbox is not available here: {why}; "
            "install util-linux 2.32 or newer and allow unprivileged user namespaces, or choose another reward"
        )


def passes(code: str, tests: str, *, timeout_s: float) -> bool:
    """Whether `tests` run to their end after `code`, in one fresh process.

    Args:
        code: Python that nobody has looked at.
        tests: Python that raises if the code is wrong; the coordinator's own.
        timeout_s: Longest time, seconds.
    """
    token = secrets.token_hex(16)  # told at the end, so that code that leaves early has not passed
    program = f"{code}\n\n{tests}\n\nprint({token!r})\n"
    exit_code, told = _run(program, timeout_s=timeout_s)
    return exit_code == 0 and told.rstrip().endswith(token.encode())


@functools.cache
def _missing() -> str:
    """Why code cannot be shut in here; empty if it can."""
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{absent[0]} is missing"
    if _run("print(1)", timeout_s=20) != (0, b"1\n"):
        return "namespaces are refused by the kernel or a container"
    return "" if _holds() else "a probe could do what it must not"


def _holds() -> bool:
    """Whether a probe that tries to get out fails at every point, while somebody listens where it knocks."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"PORT": server.getsockname()[1], "OUTSIDE": str(Path(__file__).resolve().parent), "OWN": os.getpid()}
        program = _HOLES
        for name, value in names.items():
            program = program.replace(name, repr(value))
        return _run(program, timeout_s=20)[0] == 0


def _run(program: str, *, timeout_s: float) -> tuple[int, bytes]:
    """A program's exit code, 124 if it was killed for the time it took, and what it printed."""
    python = os.path.realpath(sys.executable)
    command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork"]
    with tempfile.TemporaryDirectory(prefix="silotune-sandbox-") as root, tempfile.TemporaryFile() as told:
        order = [*command, "--kill-child", "sh", "-c", _ENTER, "sh", root, sys.base_prefix, _whole(timeout_s), python]
        try:  # what is printed goes into a file, whose size is limited as that of any other
            ended = subprocess.run(
                order, input=program.encode(errors="replace"), stdout=told, stderr=subprocess.DEVNULL,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, b""
        told.seek(0)
        return ended.returncode, told.read(FILE_BYTES)


def _whole(seconds: float) -> str:
    """Processor time is limited in whole seconds."""
    return str(int(seconds) + 1)
