"""All that is wrong with the rows of a run, at once: files, columns, units, sites, the split, tokens and delta.

Every step is the one that a run takes. A row that fails at one step is left out of the next ones, so that one fault is
told once, and the others are still found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from client.agent.agent import SiteData
from client.data import check as checks
from client.data import findings as noted
from client.data import split
from client.data.check import CheckReport
from client.data.findings import Finding
from common import accounting
from common.data import overlap, read
from common.data.files import Located
from common.data.overlap import Overlap
from common.data.problems import Problems, UnusableError
from common.data.rows import Row
from common.errors import ModelError
from common.loss import objectives
from common.loss.objectives import Objective
from common.run import config
from common.text import prompts
from common.text.prompts import Encoded
from simulations.world import partition, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Found:
    """What a check saw.

    Attributes:
        sites: Counts of the rows that can be used, by site.
        findings: All problems.
        overlaps: Of each site, the held-out rows whose text is trained on at any; empty where rows cannot be split.
    """

    sites: dict[str, CheckReport] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    overlaps: dict[str, Overlap] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give counts and problems as JSON types."""
        sites = {site: asdict(report) for site, report in self.sites.items()}
        overlaps = {site: found.as_dict() for site, found in self.overlaps.items()}
        told = {"overlap": {**overlap.total(self.overlaps.values()).as_dict(), "sites": overlaps}} if overlaps else {}
        return {"sites": sites, **told, "problems": [asdict(finding) for finding in self.findings]}


def check(settings: config.RunConfig, *, base_folder: Callable[[config.RunConfig], Path] | None) -> Found:
    """Look through the rows of all sites.

    Args:
        settings: The run file.
        base_folder: Finds the base, whose tokenizer counts tokens; None leaves tokens out.

    Returns:
        Counts of each site and all problems; no text of a row. That the base is not here is a problem too, without
        which the rows are still looked at.
    """
    tokenizer, found = None, Found()
    if base_folder is not None:
        from common.model import base

        try:
            loaded = base.load_tokenizer(base_folder(settings))
            tokenizer = prompts.use_template(loaded, settings.model.chat_template)
        except ModelError as error:
            found.findings.append(Finding("", "", f"no token was counted: {error}", "or give --rows-only"))
    num_before = len(found.findings)
    parts = _parts(settings, found.findings)
    is_whole = len(found.findings) == num_before
    joint, errors = _split(parts, settings) if is_whole else ({}, [])
    for site, located in parts.items():
        _check_site(site, located, settings, tokenizer, found, is_whole=is_whole, sides=joint.get(site))
    if joint:
        found.overlaps = world.overlaps({site: SiteData(*sides) for site, sides in joint.items()})
    elif len(found.findings) == num_before:  # no site alone has told why
        found.findings += errors
    return found


def render(found: Found, next_step: str) -> list[Any]:
    """Show the sites side by side, what is notable in each, and all problems; or the next command.

    Args:
        found: From `check`.
        next_step: The line for rows without a problem.
    """
    table = Table("site", "rows", "units", "duplicates", "tokens of the longest", "too long", "units alike")
    notes = []
    for site, report in found.sites.items():
        tokens = report.tokens
        longest, too_long = (f"{tokens.quantiles['100%']:,}", f"{tokens.num_too_long:,}") if tokens else ("", "")
        counts = (f"{count:,}" for count in (report.num_rows, report.num_units, report.num_duplicates))
        table.add_row(site, *counts, longest, too_long, f"{report.num_units_alike:,}")
        notes += [f"{site}: units alike in {places}" for places in report.alike]
    if any(report.num_units_alike for report in found.sites.values()):
        notes.append("units alike differ only in case, leading zeros, blanks or dashes; if two are one patient, say so")
    if found.overlaps:
        notes.append(overlap.sentence(overlap.total(found.overlaps.values()).as_dict()))
    if not_read := sorted({name for report in found.sites.values() for name in report.not_read}):
        notes.append(f"in the folder, not read: {', '.join(not_read)}")
    ending = noted.render(found.findings) if found.findings else next_step
    return [table, *notes, ending]


def _parts(settings: config.RunConfig, findings: list[Finding]) -> dict[str, list[Located]]:
    """The rows that can be used, by site; empty if they cannot be given to sites."""
    data, problems = settings.data, Problems()
    located: list[Located] = []
    usable: list[Located] = []
    with noted.noting(findings, site=""):
        located = world.locate(settings, problems)
        if located:
            rows, unusable = read.scan(located, world.columns_of(settings), source=data.source)
            problems.found += unusable.found
            places = {row.row_id for row in rows}
            usable = [row for row in located if row.place in places]
    if data.partition != "iid" and data.site_column in {name for row in located for name in row.fields}:
        nowhere = set(partition.without_site([row.fields for row in located], data.site_column))
        what = f"has no value in the column {data.site_column!r}, so it belongs to no site"
        for number in sorted(nowhere):
            problems.add(located[number].place, UnusableError(what, "fill it in, or correct data.site_column"))
        dropped = {located[number].place for number in nowhere}
        usable = [row for row in usable if row.place not in dropped]
    is_named = data.partition == "column"
    sites = {row.place: partition.site_in(row.fields, data.site_column) if is_named else "" for row in located}
    findings += [replace(one, site=sites.get(one.place, "")) for one in noted.find("", problems)]
    with noted.noting(findings, site=""):
        return world.part(usable, settings) if usable else {}
    return {}


def _split(
    parts: Mapping[str, Sequence[Located]], settings: config.RunConfig
) -> tuple[dict[str, split.Sides], list[Finding]]:
    """Both sides of each site as the run splits them, over all sites; or why it cannot."""
    errors: list[Finding] = []
    with noted.noting(errors, site=""):
        columns, source = world.columns_of(settings), settings.data.source
        rows = {site: read.scan(located, columns, source=source)[0] for site, located in parts.items()}
        return split.for_run(rows, settings.data, settings.privacy, seed=settings.seed), []
    return {}, errors


def _check_site(
    site: str,
    located: Sequence[Located],
    settings: config.RunConfig,
    tokenizer: "Tokenizer | None",
    found: Found,
    *,
    is_whole: bool,
    sides: split.Sides | None,
) -> None:
    """One site's rows, both sides of the split."""
    data, privacy, objective = settings.data, settings.privacy, Objective.of(settings.training)
    rows: Sequence[Row] = []
    with noted.noting(found.findings, site=site):
        rows, _ = read.scan(located, world.columns_of(settings), source=data.source)
    if not rows:
        return
    shown: dict[str, list[Row]] = {"": list(rows)}
    with noted.noting(found.findings if is_whole else [], site=site):  # with rows missing, too few may be none too few
        train, held_out = (
            sides or split.for_run({"": rows}, data, privacy, seed=settings.seed)[""]
        )  # the finding names the site
        shown = {"training": train, "held-out": held_out}
        num_units = len({row.unit for row in train})
        if privacy.is_private_per_unit and privacy.dp_delta > accounting.largest_delta(num_units):
            what = f"privacy.dp_delta = {privacy.dp_delta:g} is too large for the {num_units} units of this site"
            found.findings.append(Finding(site, "", what, f"set {accounting.delta_rule(num_units)}"))
    for name, side in list(shown.items()):
        with noted.noting(found.findings, site=site):
            if objective.name != "sft" and side:
                both = objectives.with_others(side, objective)
                shown[name] = [one for pair in both for one in pair if one is not None]
    report = checks.check(rows)
    if tokenizer is not None:
        problems = Problems()
        everything = [row for side in shown.values() for row in side]
        tokens = checks.check(
            everything,
            tokenizer=tokenizer,
            max_length_tokens=data.max_length_tokens,
            too_long=data.too_long,
            system_prompt=data.system_prompt,
            problems=problems,
        ).tokens
        report = replace(report, tokens=tokens)
        found.findings += noted.find(site, problems)
        if tokens and tokens.num_dropped and not problems.found:
            found.findings += _lost(site, shown, data, tokenizer)
    not_read = () if data.source == "embedded" else tuple(read.left_out(data.source))
    found.sites[site] = replace(report, not_read=not_read)


def _lost(
    site: str, sides: Mapping[str, Sequence[Row]], data: config.DataConfig, tokenizer: "Tokenizer"
) -> Iterator[Finding]:
    """Sides of which the limit of tokens leaves nothing; an example is lost with any of its conversations."""
    for name, rows in sides.items():
        lost = {row.row_id for row in rows if _tokens(row, data, tokenizer) is None}
        if lost == {row.row_id for row in rows}:
            what = f"no answer token is left in any of {len(lost)} {name} rows".replace("  ", " ")
            yield Finding(site, "", f"{what} at data.max_length_tokens = {data.max_length_tokens}", "raise it")


def _tokens(row: Row, data: config.DataConfig, tokenizer: "Tokenizer") -> Encoded | None:
    """One conversation, as a run would take it."""
    limit, too_long, prompt = data.max_length_tokens, data.too_long, data.system_prompt
    return prompts.encode(row, tokenizer, max_length_tokens=limit, too_long=too_long, system_prompt=prompt)
