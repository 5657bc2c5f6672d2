"""All that is wrong with the rows of a run, at once: files, columns, units, sites, the split, tokens and delta.

Every step is the one that a run takes. A row that fails at one step is left out of the next ones, so that one fault is
reported once, and the others are still found.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from client.agent.agent import SiteData
from client.data import check as checks
from client.data import findings as noted
from client.data.check import CheckReport
from client.data.findings import Finding
from common import accounting
from common.data import overlap, read
from common.data.files import Located
from common.data.overlap import OverlapCounts
from common.data.problems import Problems, UnusableError
from common.data.rows import Row
from common.errors import ModelError
from common.loss import objectives
from common.run import config
from common.run.schema.training import Objective
from common.text import prompts
from simulations.world import partition, world
from simulations.world.world import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Report:
    """Counts and problems of a run's rows.

    Attributes:
        sites: Counts of the rows that can be used, by site.
        overlaps: Of each site, the held-out rows whose text is trained on at any; empty where rows cannot be split.
    """

    sites: dict[str, CheckReport] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    overlaps: dict[str, OverlapCounts] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give counts and problems as JSON types."""
        sites = {site: asdict(report) for site, report in self.sites.items()}
        overlaps = {site: counts.as_dict() for site, counts in self.overlaps.items()}
        total = {**overlap.total(self.overlaps.values()).as_dict(), "sites": overlaps}
        return {
            "sites": sites,
            **({"overlap": total} if overlaps else {}),
            "problems": [asdict(finding) for finding in self.findings],
        }


def check(settings: config.RunConfig, *, base_folder: Callable[[str], Path] | None) -> Report:
    """Look through the rows of all sites.

    Args:
        base_folder: Finds the base, whose tokenizer counts tokens; None leaves tokens out.

    Returns:
        Counts of each site and all problems; no text of a row. That the base is not here is a problem too, without
        which the rows are still checked.
    """
    tokenizer, report, source = None, Report(), Source.of(settings)
    if base_folder is not None:
        from common.model import base_files  # loads transformers

        try:
            tokenizer = base_files.tokenizer_of(base_folder(settings.model.base))
            tokenizer = prompts.use_template(tokenizer, settings.model.chat_template)
        except ModelError as error:
            report.findings.append(Finding("", "", f"no token was counted: {error}", "or give --rows-only"))
    num_before = len(report.findings)
    parts = _parts(source, report.findings)
    is_whole = len(report.findings) == num_before
    # Both sides of each site as the run splits them, over all sites; or why it cannot.
    joint: dict[str, SiteData] = {}
    errors: list[Finding] = []
    if is_whole:
        with noted.noting(errors, site=""):
            columns, name = source.columns, source.data.source
            rows = {site: read.scan(located, columns, source=name)[0] for site, located in parts.items()}
            joint = source.split(rows)
    objective = settings.training.objective
    for site, located in parts.items():
        _check_site(site, located, source, objective, tokenizer, report, is_whole=is_whole, sides=joint.get(site))
    if joint:
        report.overlaps = world.overlaps(joint)
    elif len(report.findings) == num_before:  # no site alone has said why
        report.findings += errors
    return report


def render(report: Report, next_step: str) -> list[Any]:
    """Show the sites side by side, what is notable in each, and all problems; or the next command, `next_step`."""
    table = Table("site", "rows", "units", "duplicates", "tokens of the longest", "too long", "units alike")
    notes = []
    for site, counted in report.sites.items():
        tokens = counted.tokens
        longest, too_long = (f"{tokens.quantiles['100%']:,}", f"{tokens.num_too_long:,}") if tokens else ("", "")
        counts = (f"{count:,}" for count in (counted.num_rows, counted.num_units, counted.num_duplicates))
        table.add_row(site, *counts, longest, too_long, f"{counted.num_units_alike:,}")
        notes += [f"{site}: units alike in {places}" for places in counted.alike]
    if any(counted.num_units_alike for counted in report.sites.values()):
        notes.append("units alike differ only in case, leading zeros, blanks or dashes; if two are one patient, say so")
    if report.overlaps:
        notes.append(overlap.sentence(overlap.total(report.overlaps.values()).as_dict()))
    if not_read := sorted({name for counted in report.sites.values() for name in counted.not_read}):
        notes.append(f"in the folder, not read: {', '.join(not_read)}")
    return [table, *notes, noted.render(report.findings) if report.findings else next_step]


def _parts(source: Source, findings: list[Finding]) -> dict[str, list[Located]]:
    """The rows that can be used, by site; empty if they cannot be given to sites."""
    data, problems = source.data, Problems()
    located: list[Located] = []
    usable: list[Located] = []
    with noted.noting(findings, site=""):
        located = source.locate(problems)
        if located:
            rows, unusable = read.scan(located, source.columns, source=data.source)
            problems.found += unusable.found
            ids = {row.row_id for row in rows}
            usable = [row for row in located if row.place in ids]
    if data.partition != "iid" and data.site_column in {name for row in located for name in row.fields}:
        nowhere = [located[number] for number in partition.without_site([r.fields for r in located], data.site_column)]
        what = f"has no value in the column {data.site_column!r}, so it belongs to no site"
        for row in nowhere:
            problems.add(row.place, UnusableError(what, "fill it in, or correct data.site_column"))
        dropped = {row.place for row in nowhere}
        usable = [row for row in usable if row.place not in dropped]
    is_named = data.partition == "column"
    sites = {row.place: partition.site_in(row.fields, data.site_column) if is_named else "" for row in located}
    findings += [replace(finding, site=sites.get(finding.place, "")) for finding in noted.find("", problems)]
    with noted.noting(findings, site=""):
        return source.part(usable) if usable else {}
    return {}


def _check_site(
    site: str,
    located: Sequence[Located],
    source: Source,
    objective: Objective,
    tokenizer: "Tokenizer | None",
    report: Report,
    *,
    is_whole: bool,
    sides: SiteData | None,
) -> None:
    """One site's rows, both sides of the split."""
    data, privacy = source.data, source.privacy
    rows: Sequence[Row] = []
    with noted.noting(report.findings, site=site):
        rows, _ = read.scan(located, source.columns, source=data.source)
    if not rows:
        return
    shown: dict[str, list[Row]] = {"": list(rows)}
    with noted.noting(report.findings if is_whole else [], site=site):  # with rows missing, too few may be none too few
        split = sides or source.split({"": rows})[""]  # the finding names the site
        shown = {"training": list(split.train), "held-out": list(split.held_out)}
        num_units = len({row.unit for row in split.train})
        if privacy.mode == "unit" and privacy.dp_delta > accounting.largest_delta(num_units):
            what = f"privacy.dp_delta = {privacy.dp_delta:g} is too large for the {num_units} units of this site"
            report.findings.append(Finding(site, "", what, f"set {accounting.delta_rule(num_units)}"))
    for name, side in list(shown.items()):
        with noted.noting(report.findings, site=site):
            if objective.kind != "sft" and side:
                both = objectives.with_others(side, objective)
                shown[name] = [row for pair in both for row in pair if row is not None]
    counted = checks.check(rows)
    if tokenizer is not None:
        problems = Problems()
        limits: dict[str, Any] = {"max_length_tokens": data.max_length_tokens, "too_long": data.too_long}
        limits["system_prompt"] = data.system_prompt
        everything = [row for side in shown.values() for row in side]
        tokens = checks.check(everything, tokenizer=tokenizer, problems=problems, **limits).tokens
        counted = replace(counted, tokens=tokens)
        report.findings += noted.find(site, problems)
        # Sides of which the limit of tokens leaves nothing; an example is lost with any of its conversations.
        for name, side in shown.items() if tokens and tokens.num_dropped and not problems.found else ():
            lost = {row.row_id for row in side if prompts.encode(row, tokenizer, **limits) is None}
            if lost == {row.row_id for row in side}:
                what = f"no answer token is left in any of {len(lost)} {name} rows".replace("  ", " ")
                what += f" at data.max_length_tokens = {data.max_length_tokens}"
                report.findings.append(Finding(site, "", what, "raise it"))
    not_read = () if data.source == "embedded" else tuple(read.left_out(data.source))
    report.sites[site] = replace(counted, not_read=not_read)
