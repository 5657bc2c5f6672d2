"""What the three commands share: errors to exit codes, `--json`, `-v` and `-q`, quick help. Loads no model library."""

import importlib.abc
import importlib.metadata
import itertools
import json
import platform
import resource
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import click
import typer
from typer.core import TyperOption

from common import extras
from common.errors import ConfigError, SilotuneError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED: Final = 130
TERMINATED: Final = 128 + signal.SIGTERM
SLOW: Final = frozenset({"torch", "transformers", "peft", "datasets", "ray"})  # libraries that take seconds to load
SHOWN: Final = ("torch", "transformers", "peft", "flwr")
Volume = Literal["quiet", "normal", "verbose"]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the last line of stdout.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting: --set training.learning_rate=1e-3", metavar="KEY=VALUE"),
]
AcceptOption = Annotated[
    bool,
    typer.Option(
        "--i-accept", help="Run though the noise for whole sites drowns what they have to say; resume needs it too."
    ),
]


class Stopped(SystemExit):
    """A command that was stopped from outside, after it has put its work away.

    Args:
        message: What is on the disk, and how to go on.
        exit_code: `INTERRUPTED` or `TERMINATED`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(exit_code)
        self.message = message


def stop_code(error: BaseException) -> int:
    """The exit code of a command that Ctrl-C or SIGTERM ended; 0 for any other end."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return TERMINATED if isinstance(error, SystemExit) and error.code == TERMINATED else 0


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that files and other processes are left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make(name: str, summary: str, *, examples: Sequence[str]) -> typer.Typer:
    """A command with sub-commands; its help ends with examples."""
    return typer.Typer(
        suggest_commands=False,  # click does, and both would
        name=name,
        help=summary,
        epilog="\n\n".join(["Examples:", *examples]),
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave the process with its exit code.

    An error of ours is one line on stderr (and an `error` object on stdout under `--json`). Of any other error the type
    and the code lines are shown, but not its message, which could hold a row's text. A library that is not installed is
    named with the command that installs it. Before libraries are loaded that take seconds, a line on stderr says so.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    _add_options(command, is_root=True)
    _volume.set("normal")
    if SLOW.isdisjoint(sys.modules) and not any(isinstance(finder, _Announcer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Announcer())
    begin_s = time.monotonic()
    as_json = "--json" in given
    try:
        command(given)
    except SilotuneError as error:
        # Under `-v`: where the error arose, and what kinds of errors led to it, without their messages.
        lines: list[str] = []
        cause: BaseException | None = error if _volume.get() == "verbose" else None
        while cause:
            lines += [f"  {type(cause).__name__}", *_frames(cause)]
            cause = cause.__cause__
        frames = "\n".join(lines)
        _fail(str(error), code=type(error).__name__, exit_code=error.exit_code, as_json=as_json, frames=frames)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, Stopped):
            message, exit_code = end.message, int(str(end.code))
        elif getattr(end, "code", INTERRUPTED) == INTERRUPTED:  # typer makes an exit of an interruption
            message, exit_code = "stopped", INTERRUPTED
        else:
            raise
        _fail(message, code="Interrupted", exit_code=exit_code, as_json=as_json)
    except Exception as error:  # noqa: BLE001  the program's edge
        name = " ".join([app.info.name or "", *itertools.takewhile(lambda word: word[:1] != "-", given[:1])])
        if isinstance(error, ModuleNotFoundError) and (missing := extras.remedy(error.name or "", command=name)):
            _fail(missing, code=ConfigError.__name__, exit_code=ConfigError.exit_code, as_json=as_json)
        places = "\n".join(_frames(error))
        text = f"internal error {type(error).__name__}; please report it with these lines\n{places}"
        _fail(text, code="InternalError", exit_code=1, as_json=as_json)
    finally:
        if _volume.get() == "verbose":
            used = resource.getrusage(resource.RUSAGE_SELF)
            wall_s, cpu_s, peak_mib = time.monotonic() - begin_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
            print(f"{wall_s:.1f} s, {cpu_s:.1f} CPU s, {peak_mib:,.0f} MiB at most", file=sys.stderr)


def progress(*, as_json: bool) -> "Console":
    """Where progress is shown: stdout, or stderr where stdout is for a program; nowhere under `-q`."""
    from rich.console import Console

    return Console(file=sys.stderr if as_json else sys.stdout, quiet=_volume.get() == "quiet", highlight=False)


def say(line: str) -> None:
    """Print a line on stdout that says what goes on; not under `-q`."""
    if _volume.get() != "quiet":
        typer.echo(line)


def emit(result: dict[str, Any], *, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result for programs or for people."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str))
    else:
        show()


def show(*renderables: Any) -> None:
    """Print for people; a path in brackets is text, not markup.

    Lines are left whole, so that commands can be copied and searched for; tables fit a terminal.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for item in renderables:
        shown = Text(item) if isinstance(item, str) else item
        console.print(shown, soft_wrap=isinstance(shown, Text) or not console.is_terminal)


def quoted(words: Sequence[object]) -> str:
    """A command as a shell takes it, whatever blanks its paths have.

    Example:
        >>> quoted(["silotune-server", "status", Path("my runs/a")])
        "silotune-server status 'my runs/a'"
    """
    return shlex.join(map(str, words))


def next_step(*words: object) -> str:
    """The line that ends a command's output: the next useful command, which works as it is printed."""
    return f"next: {quoted(words)}"


def again(context: typer.Context, command: str = "", *, without: Collection[str] = ()) -> tuple[str, ...]:
    """The command that is being run, as words: what it was given, and not what is left at its default.

    Args:
        command: Another command of the same program that takes these options, or some of them.
        without: Parameters to leave out, by their name in Python.
    """
    root = context.find_root()
    other = root.command.get_command(root, command) if command else context.command  # type: ignore[attr-defined]
    arguments: list[str] = []
    options: list[str] = []
    for parameter in other.params:
        value = context.params.get(parameter.name)
        if parameter.name in without or value in (None, (), []) or value == parameter.get_default(context):
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            if parameter.param_type_name == "argument":
                arguments.append(str(item))
            else:
                options += [parameter.opts[0]] if item is True else [parameter.opts[0], str(item)]
    return (str(root.command.name), str(other.name), *arguments, *options)


def overrides(pairs: Sequence[str] | None) -> dict[str, str]:
    """`--set a.b=c` options as a mapping.

    Raises:
        ConfigError: An option has no `=`.
    """
    split = [pair.partition("=") for pair in pairs or ()]
    for key, sign, _ in split:
        if not sign or not key:
            raise ConfigError(f"--set {key}: write --set section.key=value")
    return {key.strip(): value.strip() for key, _, value in split}


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or the first of `name-2`, `name-3`, ... that does not exist."""
    numbered = (parent / f"{name}-{number}" for number in itertools.count(2))
    return next(folder for folder in itertools.chain([parent / name], numbered) if not folder.exists())


_volume: ContextVar[Volume] = ContextVar("volume", default="normal")


class _Announcer(importlib.abc.MetaPathFinder):
    """Finds no module; says once that a library is about to be loaded that takes seconds."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Look at what is imported."""
        if fullname in SLOW and self in sys.meta_path:
            sys.meta_path.remove(self)
            if _volume.get() != "quiet":
                what = fullname if fullname in ("datasets", "ray") else "torch and transformers"
                print(f"loading {what}, which takes some seconds ...", file=sys.stderr, flush=True)


def _add_options(command: click.Command, *, is_root: bool = False) -> None:
    """Give a command `-v` and `-q`, and so all of its own; `--version` goes to the first."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _add_options(inner)
    flags = [
        (["-v", "--verbose"], _set_volume, "Also show versions, seconds, memory, and where an error arose."),
        (["-q", "--quiet"], _set_volume, "Show results and errors only."),
        (["--version"], _show_version, "Show versions and exit."),
    ]
    for names, callback, text in flags if is_root else flags[:2]:
        flag = TyperOption(
            param_decls=names, is_flag=True, is_eager=True, expose_value=False, callback=callback, help=text
        )
        command.params.append(flag)


def _set_volume(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Take `-v` or `-q`, wherever on the line."""
    if not value:
        return
    wanted: Volume = "verbose" if parameter.name == "verbose" else "quiet"
    if _volume.get() not in ("normal", wanted):
        raise click.UsageError("--verbose and --quiet exclude each other; give one of them", context)
    _volume.set(wanted)
    if wanted == "verbose":
        print(_versions(), file=sys.stderr)


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        typer.echo(_versions())
        context.exit()


def _versions() -> str:
    """Of silotune, Python, and what results depend on most; nothing is loaded for it."""
    versions = []
    for name in (extras.PACKAGE, *SHOWN):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} (not installed)")
    return f"{versions[0]} (Python {platform.python_version()}, {', '.join(versions[1:])})"


def _frames(error: BaseException) -> list[str]:
    """Where an error arose, a line for each call."""
    stack = traceback.extract_tb(error.__traceback__)
    return [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in stack]


def _fail(message: str, *, code: str, exit_code: int, as_json: bool, frames: str = "") -> None:
    print(f"error: {message}", file=sys.stderr)
    if frames:
        print(frames, file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"code": code, "message": message, "exit_code": exit_code}}))
    sys.exit(exit_code)
