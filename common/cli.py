"""What the three commands share: errors to exit codes, `--json`, quick help. Loads neither torch nor Flower."""

import itertools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from common.errors import ConfigError, SilotuneError

INTERRUPTED: Final = 130
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
    and the code lines are shown, but not its message, which could hold a row's text.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given)
    except SilotuneError as error:
        _fail(str(error), code=type(error).__name__, exit_code=error.exit_code, as_json="--json" in given)
    except (KeyboardInterrupt, SystemExit) as end:
        if getattr(end, "code", INTERRUPTED) != INTERRUPTED:  # typer makes an exit of an interruption
            raise
        _fail(
            "stopped; finished rounds are on disk", code="Interrupted", exit_code=INTERRUPTED, as_json="--json" in given
        )
    except Exception as error:  # noqa: BLE001  the program's edge
        frames = traceback.extract_tb(error.__traceback__)
        places = "\n".join(f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
        text = f"internal error {type(error).__name__}; please report it with these lines\n{places}"
        _fail(text, code="InternalError", exit_code=1, as_json="--json" in given)


def emit(result: dict[str, Any], *, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result for programs or for people."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str))
    else:
        show()


def show(*renderables: Any) -> None:
    """Print for people; a path in brackets is text, not markup."""
    from rich.console import Console
    from rich.text import Text

    shown = [Text(item) if isinstance(item, str) else item for item in renderables]
    Console(highlight=False).print(*shown, sep="\n", soft_wrap=True)


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


def _fail(message: str, *, code: str, exit_code: int, as_json: bool) -> None:
    """Say what is wrong and exit."""
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"code": code, "message": message, "exit_code": exit_code}}))
    sys.exit(exit_code)
