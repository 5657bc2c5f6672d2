"""What both doctors share: a check's result, how checks are declared, and the table that people read.

A check is a plain function that returns a `Result`. It looks and changes nothing, and what it reports is counts, names,
sizes, dates and hashes: never data, keys or prompts.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, ParamSpec

from rich import box
from rich.table import Table
from rich.text import Text

from common.errors import SilotuneError

Status = Literal["ok", "warning", "failed", "skipped"]
STYLES: Final[dict[Status, str]] = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
MIB: Final = 1 << 20
GIB: Final = 1 << 30
P = ParamSpec("P")


@dataclass(frozen=True)
class Result:
    """The outcome of a check.

    Attributes:
        status: `failed`: a run cannot work, or is not protected; `warning`: it will, or may; `skipped`: not examined.
        found: What there is, in one or a few lines.
        remedy: What to do; always there after `warning` and `failed`. Of `skipped`, what would let it be examined.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def ok(what: str) -> Result:
    """All is well."""
    return Result("", "ok", what)


def warning(what: str, remedy: str = "") -> Result:
    """It works now, and should be seen to; without a remedy, the check's own is shown."""
    return Result("", "warning", what, remedy)


def failed(what: str, remedy: str = "") -> Result:
    """Not as it must be; without a remedy, the check's own is shown."""
    return Result("", "failed", what, remedy)


def skipped(what: str, remedy: str = "") -> Result:
    """Not examined, and why."""
    return Result("", "skipped", what, remedy)


def check(name: str, *, remedy: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Declare a check: give its result a name, and its failures a remedy.

    An error of ours that it raises is a failure; the remedy that the error's message names after its first semicolon
    is then shown instead of `remedy`. So are a file that cannot be read and a package that cannot be imported.

    Example:
        >>> @check("disk", remedy="free some space")
        ... def disk(num_free: int) -> Result:
        ...     return ok("enough") if num_free else failed("full")
        >>> disk(0)
        Result(name='disk', status='failed', found='full', remedy='free some space')
    """

    def declare(look: Callable[P, Result]) -> Callable[P, Result]:
        @functools.wraps(look)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                result = look(*args, **kwargs)
            except (SilotuneError, OSError, ImportError) as error:
                result = failed(*problem_and_remedy(error))
            needs_remedy = result.status in ("warning", "failed")
            return replace(result, name=name, remedy=result.remedy or (remedy if needs_remedy else ""))

        return checked

    return declare


def problem_and_remedy(error: SilotuneError | OSError | ImportError) -> tuple[str, str]:
    """What an error says is wrong, and the remedy that it names; empty if it names none, or several problems.

    Example:
        >>> problem_and_remedy(SilotuneError("site.key: mode 0644; run: chmod 600 site.key"))
        ('site.key: mode 0644', 'run: chmod 600 site.key')
    """
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: cannot be read ({error.strerror or 'damaged'})", ""
    if isinstance(error, ImportError):
        return f"{error.name or 'a package'} cannot be imported", ""
    text = str(error)
    if "\n" in text:
        return text, ""
    message, _, remedy = text.partition(". Remedy: " if ". Remedy: " in text else "; ")
    return message, remedy


def summary(results: Sequence[Result]) -> str:
    """How many checks ended how.

    Example:
        >>> summary([Result("a", "ok", ""), Result("b", "failed", "", "mend it")])
        '1 failed, 0 warning, 1 ok, 0 skipped'
    """
    numbers = Counter(result.status for result in results)
    return ", ".join(f"{numbers[status]} {status}" for status in ("failed", "warning", "ok", "skipped"))


def is_healthy(results: Sequence[Result]) -> bool:
    """Whether nothing failed."""
    return all(result.status != "failed" for result in results)


def as_dict(results: Sequence[Result]) -> dict[str, Any]:
    """Give results as JSON types."""
    return {"is_healthy": is_healthy(results), "checks": [asdict(result) for result in results]}


def render(results: Sequence[Result]) -> Table:
    """Show results as a table; a remedy follows what was found."""
    table = Table("check", "status", "found", box=box.SIMPLE_HEAD, caption=summary(results), caption_justify="left")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for result in results:
        cell = Text(result.found)
        if result.remedy:
            cell.append(f"\n-> {result.remedy}", style="bold" if result.status != "skipped" else "dim")
        table.add_row(result.name, Text(result.status, style=STYLES[result.status]), cell)
    return table


def size(num_bytes: float) -> str:
    """Bytes for people.

    Example:
        >>> size(6.6 * 2**20), size(4.44 * 2**30)
        ('6.6 MiB', '4.4 GiB')
    """
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:,.1f} MiB"


def count(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> count(1, "site"), count(1200, "row")
        ('1 site', '1,200 rows')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def show(*renderables: Any) -> None:
    """Print for people; unlike `cli.show`, long cells are wrapped to the terminal's width."""
    from rich.console import Console

    console = Console(highlight=False)
    for item in renderables:
        console.print(Text(item) if isinstance(item, str) else item)
