"""All that is wrong with rows, together: collected, and shown by kind with the first places of each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rich.table import Table
from rich.text import Text

from client.data.check import CheckReport
from common.data.problems import Problems
from common.errors import DataError, PrivacyError

MAX_SHOWN: Final = 5


@dataclass(frozen=True)
class Finding:
    """One thing that would stop a run, or spoil it.

    Attributes:
        site: Whose rows; "" before rows are given to sites.
        place: The row or file; "" for the data as a whole.
        what: What is wrong; holds no field's value.
        remedy: What to do; "" where `what` says it.
    """

    site: str
    place: str
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Checked:
    """What a check saw of one site.

    Attributes:
        report: Of the rows that can be used; None if there are none.
    """

    report: CheckReport | None
    findings: tuple[Finding, ...]


def find(site: str, problems: Problems) -> list[Finding]:
    """Problems as findings."""
    return [Finding(site, where, error.what, error.remedy) for where, error in problems.found]


@contextmanager
def noting(findings: list[Finding], *, site: str) -> Iterator[None]:
    """Turn an error into a finding, so that the rest can still be checked."""
    try:
        yield
    except (DataError, PrivacyError) as error:
        findings.append(Finding(site, "", str(error)))


def render(findings: Sequence[Finding]) -> Table:
    """Show problems, at least one, as a table: those of one kind in one line, with the first places."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        groups.setdefault((finding.site, finding.what, finding.remedy), []).append(finding.place)
    table = Table("site", "problem", "where", "remedy", title=f"{len(findings)} problems")
    for (site, what, remedy), places in groups.items():
        more = f" and {len(places) - MAX_SHOWN} more" if len(places) > MAX_SHOWN else ""
        table.add_row(*map(Text, (site, what, ", ".join(places[:MAX_SHOWN]) + more, remedy)))
    return table
