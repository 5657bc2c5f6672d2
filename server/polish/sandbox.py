"""Run code that a model wrote: one process, no network, no files but the system's own, no rights, and not for long.

util-linux's `unshare` makes new user, mount, network, process and IPC namespaces. In them a new root is put together
in memory: the system's libraries and this Python, read-only, and an empty /tmp. `setpriv` then gives up every
capability for good, so nothing of it can be undone from within, and resource limits hold memory, processor time, file
sizes and open files. A limit is of one process, so there is only one: before the code begins, a filter of system calls
(seccomp) takes away processes, threads, other programs, sockets, and memory that no limit counts. When the time is up
the first process is killed, and with it whatever is in its namespace.

It protects the machine. It does not protect the reward from code that pretends: see docs/polish.md.
"""

import functools
import os
import platform
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from common.errors import ConfigError

MEMORY_BYTES: Final = 1 << 30
FILE_BYTES: Final = 1 << 20
NAMESPACES: Final = ("--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts")
_TOOLS: Final = ("unshare", "setpriv", "prlimit", "mount", "chroot", "sh")
_ENTER: Final = """
set -e
root=$1; prefix=$2; seconds=$3; python=$4; first=$5; filter=$6
mount -t tmpfs -o size=1m,nr_inodes=1k,mode=755,nosuid,nodev tmpfs "$root"
for folder in /usr /bin /lib /lib64 "$prefix"; do
    if [ -L "$folder" ]; then ln -s "$(readlink "$folder")" "$root$folder"
    elif [ -d "$folder" ] && [ ! -e "$root$folder/." ]; then
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
        mount -o remount,bind,ro,nosuid,nodev "$root$folder"
    fi
done
mkdir "$root/tmp"
mount -t tmpfs -o size=8m,nr_inodes=1k,mode=777,nosuid,nodev tmpfs "$root/tmp"
mount -o remount,bind,ro,nosuid,nodev "$root"
cd "$root"
exec env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin prlimit --as=MEMORY --cpu="$seconds" --fsize=FILE --nofile=32 --core=0 \\
    chroot "$root" /usr/bin/setpriv --no-new-privs --inh-caps=-all --ambient-caps=-all --bounding-set=-all \\
    "$python" -I -S -c "$first" "$filter"
""".replace("MEMORY", str(MEMORY_BYTES)).replace("FILE", str(FILE_BYTES))
# Runs first in the new process: sets the filter that it is given, in hexadecimal, and then runs what it reads.
_FIRST: Final = """
import sys
words = bytes.fromhex(sys.argv.pop())
if words:
    import ctypes
    kernel, held = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(words, len(words))
    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("words", ctypes.c_void_p)]
    program = Program(len(words) // 8, ctypes.addressof(held))
    if kernel.prctl(38, 1, 0, 0, 0) or kernel.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise SystemExit(125)
    del kernel, held, program, Program, ctypes
del words
exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})
"""
# System calls that are taken away, by machine; the rest of the tables is Linux' arch/x86/entry/syscalls/syscall_64.tbl
# and include/uapi/asm-generic/unistd.h. The first line is of both.
_BOTH: Final = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435,
    "pidfd_getfd": 438, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
REFUSED: Final[Mapping[str, Mapping[str, int]]] = {
    "x86_64": {
        "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "socket": 41, "socketpair": 53,
        "shmget": 29, "shmat": 30, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166,
        "pivot_root": 155, "chroot": 161, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "add_key": 248,
        "request_key": 249, "keyctl": 250, "name_to_handle_at": 303, "open_by_handle_at": 304, "fanotify_init": 300,
        "inotify_init": 253, "inotify_init1": 294, "personality": 135, "kexec_load": 246, "init_module": 175,
        "finit_module": 313, "delete_module": 176, **_BOTH,
    },
    "aarch64": {
        "clone": 220, "execve": 221, "execveat": 281, "socket": 198, "socketpair": 199, "shmget": 194, "shmat": 196,
        "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "chroot": 51, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "add_key": 217, "request_key": 218,
        "keyctl": 219, "name_to_handle_at": 264, "open_by_handle_at": 265, "fanotify_init": 262, "inotify_init1": 26,
        "personality": 92, "kexec_load": 104, "init_module": 105, "finit_module": 273, "delete_module": 106, **_BOTH,
    },
}  # fmt: skip
NEWEST_CALL: Final = 462  # mseal, Linux 6.10; what came later nobody here has looked at
_MACHINE: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
# What must be impossible within, by namespaces and limits alone; each line that succeeds is a hole.
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


# What must be impossible within by the filter, whatever else holds.
_BOUNDS: Final = """
import os, socket, subprocess, sys, threading, ctypes
def tried(act):
    try: act()
    except (OSError, RuntimeError): return
    raise SystemExit(9)
tried(os.fork)
tried(lambda: threading.Thread(target=print).start())
tried(lambda: subprocess.run([sys.executable, "-c", "0"]))
tried(lambda: os.execv(sys.executable, [sys.executable, "-c", "0"]))
tried(lambda: socket.socket(socket.AF_INET))
tried(lambda: socket.socket(socket.AF_UNIX))
tried(lambda: os.memfd_create("own"))
if ctypes.CDLL(None).shmget(0, 4096, 0o1600) != -1:
    raise SystemExit(9)
print("fine")
"""


def require() -> None:
    """Refuse a machine on which such code cannot be shut in.

    Raises:
        ConfigError: A tool is missing, the kernel allows no such namespaces or filter, or a probe found a hole.
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
    token = secrets.token_hex(16)  # printed at the end, so that code that leaves early has not passed
    program = f"{code}\n\n{tests}\n\nprint({token!r})\n"
    exit_code, printed = _run(program, timeout_s=timeout_s)
    return exit_code == 0 and printed.rstrip().endswith(token.encode())


@functools.cache
def _missing() -> str:
    """Why code cannot be shut in here; empty if it can."""
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{absent[0]} is missing"
    if platform.machine() not in REFUSED:
        return f"there is no filter of system calls for {platform.machine()}"
    if _run("print(1)", timeout_s=20) != (0, b"1\n"):
        return "namespaces or a filter of system calls are refused by the kernel or a container"
    # A probe that tries to become many, or to reach anybody, must fail at every point.
    is_alone = _run(_BOUNDS, timeout_s=20) == (0, b"fine\n")
    return "" if _holds() and is_alone else "a probe could do what it must not"


def _holds() -> bool:
    """Whether a probe without the filter that tries to get out fails at every point, while somebody listens there."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"PORT": server.getsockname()[1], "OUTSIDE": str(Path(__file__).resolve().parent), "OWN": os.getpid()}
        program = _HOLES
        for name, value in names.items():
            program = program.replace(name, repr(value))
        return _run(program, timeout_s=20, refused={})[0] == 0


def filter_of(machine: str, refused: Mapping[str, int]) -> bytes:
    """The filter as the kernel takes it; none for no calls.

    Args:
        refused: Calls that fail with EPERM, by name.

    Returns:
        Instructions of 8 bytes. Another machine's calls end the process; x32's and those that are newer than this file
        fail with ENOSYS.

    Source: linux/filter.h, linux/seccomp.h; seccomp(2).
    """
    if not refused:
        return b""
    kill, allow, denied, unknown = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026
    load, equal, greater, end = 0x20, 0x15, 0x25, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, _MACHINE[machine]), (end, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(greater, 0, 1, NEWEST_CALL), (end, 0, 0, unknown)]
    for number in sorted(refused.values()):
        steps += [(equal, 0, 1, number), (end, 0, 0, denied)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (end, 0, 0, allow)])


def _run(program: str, *, timeout_s: float, refused: Mapping[str, int] | None = None) -> tuple[int, bytes]:
    """A program's exit code, 124 if it was killed for the time it took, and what it printed."""
    python, machine = os.path.realpath(sys.executable), platform.machine()
    words = filter_of(machine, REFUSED[machine] if refused is None else refused).hex()
    command = ["unshare", *NAMESPACES, "--fork"]
    with tempfile.TemporaryDirectory(prefix="silotune-sandbox-") as root, tempfile.TemporaryFile() as output:
        order = [
            *command,
            "--kill-child",
            "sh",
            "-c",
            _ENTER,
            "sh",
            root,
            sys.base_prefix,
            str(int(timeout_s) + 1),
            python,
        ]
        order += [_FIRST, words]
        try:  # what is printed goes into a file, whose size is limited as that of any other
            ended = subprocess.run(
                order, input=program.encode(errors="replace"), stdout=output, stderr=subprocess.DEVNULL,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, b""
        output.seek(0)
        return ended.returncode, output.read(FILE_BYTES)
