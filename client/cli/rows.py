"""What `check` and `preview` do: a site looks at its own rows before it joins a run."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from client.data import check as checks
from client.data import findings as noted
from client.data import site_files, split
from client.data.check import Preview
from client.data.findings import Checked, Finding
from client.memory import consent
from client.review import review
from common.data import read
from common.data.problems import Problems
from common.data.rows import Row
from common.errors import ConfigError, ModelError
from common.model import store
from common.run import config, manifest
from common.run.schema.training import ObjectiveName
from common.text import prompts, templates
from common.text.prompts import TemplateName, TooLong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """What a run makes of rows.

    Attributes:
        objective: `training.objective.kind`: which columns are read.
        max_length_tokens: `data.max_length_tokens`; None: no limit.
        too_long: `data.too_long`.
        system_prompt: `data.system_prompt`.
        chat_template: `model.chat_template`.
        date: Day, YYYY-MM-DD, for a chat template that prints one.
        base: Folder or name of the base; empty: the one of the site's file.
    """

    objective: str = "sft"
    max_length_tokens: int | None = None
    too_long: TooLong = "truncate"
    system_prompt: str = ""
    chat_template: TemplateName = "tokenizer"
    date: str = ""
    base: str = ""

    def in_words(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """One line for people; of the system prompt only its length."""
        limit = f"{self.max_length_tokens:,} tokens at most" if self.max_length_tokens else "no limit of tokens"
        system = (
            f"system prompt of {len(self.system_prompt):,} characters" if self.system_prompt else "no system prompt"
        )
        day = f", date {self.date}" if templates.is_dated(str(tokenizer.chat_template)) else ""
        return f"chat template {self.chat_template}, {system}, {limit}{day}; what is learnt stands in \u27e6 \u27e7"


def asked(node: config.NodeConfig, run: str, given: Asked) -> Asked:
    """What a run asks: one that was offered to this site, or a run file.

    Args:
        run: Name or first digits of the hash of an offer, or a TOML file; empty: `given` is all.
        given: From the command line; its base wins over the run's, and its date is that of a run file.

    Raises:
        ConfigError: More than the base is given beside a run, no such file, or a site without a policy, which keeps no
            offers.
        DataError: No such run, or its offer was removed.
        ModelError: The run's base is not on this machine.
    """
    if not run:
        return given
    if replace(given, base="", date="") != Asked():
        raise ConfigError("--run: the run says the rest; leave out all other options but --base, --limit and --json")
    if run.endswith(".toml"):
        settings, date = config.load(Path(run)), given.date
        base = given.base or settings.model.base
    elif not node.agent.policy:
        raise ConfigError("--run: this site has no policy, so it keeps no offers; give the run's TOML file instead")
    else:
        desk = review.open_desk(node)
        offered = manifest.parse(consent.load(desk.folder, consent.find(desk.history, run)).manifest)
        settings, date = offered.run, offered.date
        base = given.base or str(store.find_by_hash(offered.base_sha256, site_files.base_folders(node.model)))
    data = settings.data
    return Asked(
        settings.training.objective.kind,
        data.max_length_tokens,
        data.too_long,
        data.system_prompt,
        settings.model.chat_template,
        date,
        base,
    )


def check(data: config.NodeDataConfig, model: config.NodeModelConfig, given: Asked, *, site: str) -> Checked:
    """Count the site's rows, held-out ones included, and find all that would stop a run; with a base, their tokens too.

    Of a pair each of the two answers counts as a row here, so that both are held to the limit of tokens.

    Raises:
        ConfigError: No such objective.
        ModelError: The base is not on this machine, or cannot be trained on rows of that length.
    """
    columns = site_files.columns_of(data, objective=_objective(given.objective))
    tokenizer = None
    if given.base or model.base:
        tokenizer = load_tokenizer(model, given)

        from common.model import base_files  # loads transformers

        folder = _folder(model, given.base)
        base_files.check_unquantised(folder)
        if given.max_length_tokens is not None:
            base_files.check_length(folder, given.max_length_tokens)
    findings: list[Finding] = []
    sides: list[list[Row]] = []
    not_read: list[str] = []
    for path in filter(None, (data.path, data.held_out_path)):
        problems = Problems()
        with noted.noting(findings, site=site):
            located = read.gather(path, problems)
            not_read += read.left_out(path)
            rows, unusable = read.scan(located, columns, source=path) if located else ([], Problems())
            problems.found += unusable.found
            sides.append(list(checks.told_apart(rows, path=path, unit_column=columns.unit)))
        findings += noted.find(site, problems)
    with noted.noting(findings, site=site):
        if data.held_out_path and len(sides) > 1 and data.unit_column:
            site_files.check_apart(*sides)
        elif sides and sides[0] and not findings:  # with rows missing, too few units may be none too few
            split.split(sides[0], held_out_fraction=config.DataConfig().held_out_fraction, seed=0)
    shown = _conversations([row for side in sides for row in side])
    if not shown:
        return Checked(None, tuple(findings))
    problems = Problems()
    report = checks.check(
        shown,
        tokenizer=tokenizer,
        max_length_tokens=given.max_length_tokens,
        too_long=given.too_long,
        system_prompt=given.system_prompt,
        problems=problems,
        held_out=_conversations(sides[1]) if len(sides) > 1 else None,
    )
    return Checked(replace(report, not_read=tuple(not_read)), (*findings, *noted.find(site, problems)))


def preview(
    data: config.NodeDataConfig, model: config.NodeModelConfig, given: Asked, *, limit: int
) -> tuple[str, Sequence[Preview]]:
    """The site's first rows as the model will get them; of a pair the chosen answer, then the rejected one.

    Returns:
        What was asked in one line, and the rows.
    """
    tokenizer = load_tokenizer(model, given)
    rows = _conversations(site_files.read_rows(data, data.path, objective=_objective(given.objective)))
    return given.in_words(tokenizer), checks.preview(
        rows,
        tokenizer,
        limit=limit,
        max_length_tokens=given.max_length_tokens,
        too_long=given.too_long,
        system_prompt=given.system_prompt,
    )


def day(text: str, today: datetime.date) -> str:
    """A date of the command line; today's where none is given.

    Raises:
        ConfigError: It is none.
    """
    try:
        return (datetime.date.fromisoformat(text) if text else today).isoformat()
    except ValueError as error:
        raise ConfigError(f"--date {text}: is no date; write YYYY-MM-DD") from error


def _objective(name: str) -> ObjectiveName:
    """The objective that an option names."""
    known = next((known for known in get_args(ObjectiveName) if known == name), None)
    if known is None:
        raise ConfigError(f"--objective {name}: choose one of {', '.join(get_args(ObjectiveName))}")
    return cast("ObjectiveName", known)


def _conversations(rows: Sequence[Row]) -> list[Row]:
    """Everything that would go through the model, a pair as two rows."""
    both = ((row, replace(row, messages=row.rejected)) if row.rejected else (row,) for row in rows)
    return [row for shown in both for row in shown]


def load_tokenizer(model: config.NodeModelConfig, given: Asked) -> "PreTrainedTokenizerBase":
    """The tokenizer of the base that is named, else of the one that the site's file names, with the run's template."""
    from common.model import base_files  # loads transformers, and neither torch's training nor peft

    if not (given.base or model.base):
        raise ModelError("no base model is named; give --base, or model.base in this site's file")
    if given.chat_template not in get_args(TemplateName):
        raise ConfigError(f"--chat-template {given.chat_template}: choose one of {', '.join(get_args(TemplateName))}")
    tokenizer = base_files.tokenizer_of(_folder(model, given.base))
    return prompts.use_template(tokenizer, given.chat_template, date=given.date)


def _folder(model: config.NodeModelConfig, base: str) -> Path:
    folder = Path(model.store) if model.store else store.DEFAULT
    return store.resolve(base or model.base, store=folder)
