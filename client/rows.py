"""What `check` and `preview` do: a site looks at its own rows before it joins a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from client import serve
from client.data import check as checks
from client.data import findings as noted
from client.data import split
from client.data.check import Preview
from client.data.findings import Checked, Finding
from client.serve import read_rows
from common import config, prompts, store
from common.config_objective import ObjectiveName
from common.data import read
from common.data.problems import Problems
from common.errors import ConfigError, ModelError
from common.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(node: config.NodeConfig, *, base: str, max_length_tokens: int | None, objective: str = "sft") -> Checked:
    """Count the site's rows, held-out ones included, and find all that would stop a run; with a base, their tokens too.

    Of a pair each of the two answers counts as a row here, so that both are held to the limit of tokens.

    Raises:
        ConfigError: No such objective.
        ModelError: The base is not on this machine, or cannot be trained on rows of that length.
    """
    site, columns = node.site.name, serve.columns_of(node, objective=_objective(objective))
    tokenizer = None
    if base or node.model.base:
        tokenizer = load_tokenizer(node, base)
        _check_base(_folder(node, base), max_length_tokens)
    findings: list[Finding] = []
    sides: list[list[Row]] = []
    not_read: list[str] = []
    for path in filter(None, (node.data.path, node.data.held_out_path)):
        problems = Problems()
        with noted.noting(findings, site=site):
            located = read.gather(path, problems)
            not_read += read.left_out(path)
            rows, unusable = read.scan(located, columns, source=path) if located else ([], Problems())
            problems.found += unusable.found
            sides.append(list(checks.told_apart(rows, path=path, unit_column=columns.unit)))
        findings += noted.find(site, problems)
    with noted.noting(findings, site=site):
        if node.data.held_out_path and len(sides) > 1 and node.data.unit_column:
            serve.check_apart(*sides)
        elif sides and sides[0] and not findings:  # with rows missing, too few units may be none too few
            split.split(sides[0], held_out_fraction=config.DataConfig().held_out_fraction, seed=0)
    shown = _conversations([row for side in sides for row in side])
    if not shown:
        return Checked(None, tuple(findings))
    problems = Problems()
    held_out = _conversations(sides[1]) if len(sides) > 1 else None
    report = checks.check(
        shown, tokenizer=tokenizer, max_length_tokens=max_length_tokens, problems=problems, held_out=held_out
    )
    return Checked(replace(report, not_read=tuple(not_read)), (*findings, *noted.find(site, problems)))


def preview(
    node: config.NodeConfig, *, base: str, limit: int, max_length_tokens: int | None, objective: str = "sft"
) -> Sequence[Preview]:
    """The site's first rows as the model will get them; of a pair the chosen answer, then the rejected one.

    Raises:
        ConfigError: No such objective.
        DataError: Rows are missing or unusable.
        ModelError: No base is named, or it is not on this machine.
    """
    tokenizer = load_tokenizer(node, base)
    rows = _conversations(read_rows(node, node.data.path, objective=_objective(objective)))
    return checks.preview(rows, tokenizer, limit=limit, max_length_tokens=max_length_tokens)


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


def load_tokenizer(node: config.NodeConfig, base: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the base that is named, else of the one that the site's file names."""
    from common.model import load_tokenizer as load

    if not (base or node.model.base):
        raise ModelError("no base model is named; give --base, or model.base in this site's file")
    return prompts.use_template(load(_folder(node, base)), "tokenizer")


def _folder(node: config.NodeConfig, base: str) -> Path:
    """Where the base is that is named, else the one that the site's file names."""
    folder = Path(node.model.store) if node.model.store else store.DEFAULT
    return store.resolve(base or node.model.base, store=folder)


def _check_base(folder: Path, max_length_tokens: int | None) -> None:
    """What a base's files say against training on them."""
    from common import base_files  # loads transformers

    base_files.check_unquantised(folder)
    if max_length_tokens is not None:
        base_files.check_length(folder, max_length_tokens)
