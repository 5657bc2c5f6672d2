"""The table of methods for people: on the terminal, as JSON, and as docs/methods.md. Loads no torch.

Run as `python -m server.report.methods` to write the page; `--check` says whether it is up to date.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.run.catalogue.kinds import KINDS, Kind
from common.run.catalogue.methods import FACTS, Facts
from common.run.rules import compatibility, wire
from common.run.rules.compatibility import FEATURES, SITE_ALLOWS, SITE_REFUSES, UNDER_SITE, Cell
from common.run.rules.kinds import KIND_FEATURES
from common.run.schema import shape
from common.run.schema.tables import RunTables
from common.run.trainable import in_words

PAGE: Final = Path(__file__).parents[2] / "docs" / "methods.md"
TEMPLATE: Final = Path(__file__).with_name("methods.md.j2")
COLUMNS: Final = 80  # of a terminal


def as_dict() -> dict[str, Any]:
    """Every method's facts, and what it may be combined with."""
    cells = [cell for _, cell in compatibility.cells(FACTS, FEATURES)]
    return {
        "methods": {name: dataclasses.asdict(facts) for name, facts in FACTS.items()},
        "combinations": {name: {cell.feature: _outcome(cell) for cell in cells if cell.row == name} for name in FACTS},
        "kinds": {name: dataclasses.asdict(kind) for name, kind in KINDS.items()},
        "kind_combinations": {name: {cell.feature: _outcome(cell) for cell in row} for name, row in kind_rows()},
        "site_level": {key: {"is_allowed": is_allowed, "reason": reason} for key, is_allowed, reason in site_level()},
        "wire": {option.name: {"setting": option.setting, "why_not": option.why_not} for option in wire.OPTIONS},
        "apart": [[first.name, second.name] for first, second in compatibility.apart()],
    }


def render() -> RenderableType:
    """The table for a terminal, and why each refusal is one."""
    kinds = _folding("kind", "paper", "mean", "what is trained", "its settings", title="kinds of adapters")
    for kind in KINDS.values():
        kinds.add_row(*(Text(text) for text in _kind(kind)))
    facts = _folding("method", "paper", "a site sends", "exact", "what the coordinator does", title="methods")
    for method in FACTS.values():
        facts.add_row(*(Text(text) for text in _summary(method)))
    features = _matrix("method", [feature.name for feature in FEATURES], rows())
    of_kinds = _matrix("kind", [feature.name for feature in KIND_FEATURES], kind_rows())
    for_sites = _folding("setting", "goes together", "why", title="noise for whole sites (privacy.mode = site)")
    for key, is_allowed, reason in site_level():
        for_sites.add_row(*(Text(text) for text in (key, "yes" if is_allowed else "no", reason)))
    lines = (Text(line) for line in (*reasons(), *together(), *wire.reasons(), *kind_reasons()))
    return Group(facts, *features, *_of_wire(), for_sites, kinds, *of_kinds, *lines)


def rows() -> list[tuple[str, list[Cell]]]:
    """The cells of each method, in the order of the features."""
    cells = [cell for _, cell in compatibility.cells(FACTS, FEATURES)]
    return [(name, [cell for cell in cells if cell.row == name]) for name in FACTS]


def reasons() -> list[str]:
    """Why each refused cell is refused and what to take, and what to know of allowed ones."""
    cells = [cell for _, cell in compatibility.cells(FACTS, FEATURES) if cell.reason]
    return [f"{cell.row}, {cell.feature}: {cell.reason}{_instead(cell)}" for cell in cells]


def together() -> list[str]:
    """What no method goes together with, though each of the two has methods."""
    return [f"{first.name} with {second.name}: no method has both" for first, second in compatibility.apart()]


def site_level() -> list[tuple[str, bool, str]]:
    """What noise for whole sites goes together with, and why."""
    refused = [(rule.keys[0], False, rule.words.removeprefix(UNDER_SITE)) for rule in SITE_REFUSES]
    return [*refused, *((key, True, reason) for key, reason in SITE_ALLOWS.items())]


def kind_rows() -> list[tuple[str, list[Cell]]]:
    """The cells of each kind, in the order of the features."""
    cells = [cell for _, cell in compatibility.cells(KINDS, KIND_FEATURES)]
    return [(name, [cell for cell in cells if cell.row == name]) for name in KINDS]


def kind_reasons() -> list[str]:
    """Why each refused cell is refused, kinds with the same reason together, and the kind to take."""
    return [
        f"{feature.name}: {reason}; not with {', '.join(kinds)} (nearest: {nearest})"
        for feature, kinds, reason, nearest in compatibility.refusals(KINDS, KIND_FEATURES)
    ]


def page() -> str:
    """docs/methods.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701  Markdown
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    methods = list(FACTS.values())
    return template.render(
        methods=methods, features=FEATURES, rows=rows(), reasons=reasons(), summary=_summary,
        wire_columns=wire.COLUMNS, wire_options=wire.OPTIONS, wire_reasons=wire.reasons(),
        apart=compatibility.apart(), site_level=site_level(),
        kinds=[(kind, _kind(kind)) for kind in KINDS.values()],
        kind_features=KIND_FEATURES, kind_rows=kind_rows(), kind_reasons=kind_reasons(),
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Write docs/methods.md, or check it."""
    if "--check" not in arguments:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is stale; run: python -m server.report.methods", file=sys.stderr)
    return 1


def _summary(facts: Facts) -> tuple[str, str, str, str, str]:
    """A method in a line."""
    exact = "-" if facts.is_personal else "yes" if facts.is_exact else "no"
    paper = f"{facts.title}, {facts.source}" + ", experimental" * facts.is_experimental
    return facts.name, paper, in_words(facts.sends), exact, facts.rule


def _settings(kind: str) -> list[str]:
    """The settings of `[adapter]` that a kind has."""
    fields = shape.tables_of(RunTables)["adapter"].variants[kind].model_fields
    return [name for name in fields if name != "kind"]


def _kind(kind: Kind) -> tuple[str, str, str, str, str]:
    """A kind in a line."""
    mean = f"approximate: {kind.inexact}" if kind.inexact else "exact"
    return kind.name, f"{kind.title}, {kind.source}", mean, kind.rule, ", ".join(_settings(kind.name)) or "none"


def _of_wire() -> list[Table]:
    """What sends less, and what it goes together with under one method at least."""
    settings = _folding("option", "setting", title="on the wire")
    for option in wire.OPTIONS:
        settings.add_row(Text(option.name), Text(option.setting))
    answers = [(option.name, [column not in option.why_not for column in wire.COLUMNS]) for option in wire.OPTIONS]
    return [settings, *_tables("option", wire.COLUMNS, answers)]


def _folding(first: str, *others: str, title: str) -> Table:
    """A table whose first column is whole, and whose others go on in the next line where they are too long."""
    table = Table(title=title)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, overflow="fold")
    return table


def _matrix(head: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> list[Table]:
    """Which of the features each of them goes together with."""
    return _tables(head, columns, [(name, [cell.is_allowed for cell in cells]) for name, cells in rows])


def _tables(head: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[bool]]]) -> list[Table]:
    """A table of yes and no, cut into as many as it takes for each to fit a terminal."""
    room = COLUMNS - max(len(name) for name, _ in rows) - 4
    parts: list[list[int]] = [[]]
    used = 0
    for number, column in enumerate(columns):
        width = max(map(len, column.split())) + 3
        if used + width > room:
            parts.append([])
            used = 0
        parts[-1].append(number)
        used += width
    tables = []
    for numbers in parts:
        table = Table(title="what they go together with")
        table.add_column(head, no_wrap=True)
        for number in numbers:
            table.add_column(columns[number], min_width=max(map(len, columns[number].split())))
        for name, answers in rows:
            table.add_row(Text(name), *(Text("yes" if answers[number] else "no") for number in numbers))
        tables.append(table)
    return tables


def _outcome(cell: Cell) -> dict[str, Any]:
    """A cell without its place."""
    return {"is_allowed": cell.is_allowed, "reason": cell.reason, "nearest": cell.nearest}


def _instead(cell: Cell) -> str:
    """What to take in place of a refused method."""
    return f" (nearest: {cell.nearest})" if cell.nearest else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
