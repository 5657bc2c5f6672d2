"""What `check` and `preview` do: a site looks at its own rows before it joins a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from client.data import check as checks
from client.data.check import CheckReport, Preview
from client.serve import read_rows
from common import config, prompts, store
from common.config_objective import ObjectiveName
from common.errors import ConfigError, ModelError
from common.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(node: config.NodeConfig, *, base: str, max_length_tokens: int | None, objective: str = "sft") -> CheckReport:
    """Count the site's rows, held-out ones included; with a base, their tokens too.

    Of a pair each of the two answers counts as a row here, so that both are held to the limit of tokens.

    Raises:
        ConfigError: No such objective.
        DataError: Rows are missing or unusable; the message lists them by number.
        ModelError: The base is not on this machine.
    """
    paths = filter(None, (node.data.path, node.data.held_out_path))
    rows = [row for path in paths for row in _conversations(node, path, objective)]
    tokenizer = load_tokenizer(node, base) if base or node.model.base else None
    return checks.check(rows, tokenizer=tokenizer, max_length_tokens=max_length_tokens)


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
    rows = _conversations(node, node.data.path, objective)
    return checks.preview(rows, tokenizer, limit=limit, max_length_tokens=max_length_tokens)


def _conversations(node: config.NodeConfig, path: str, objective: str) -> list[Row]:
    """Everything that would go through the model, a pair as two rows."""
    name = next((known for known in get_args(ObjectiveName) if known == objective), None)
    if name is None:
        raise ConfigError(f"--objective {objective}: choose one of {', '.join(get_args(ObjectiveName))}")
    rows = read_rows(node, path, objective=name)
    both = ((row, replace(row, messages=row.rejected)) if row.rejected else (row,) for row in rows)
    return [row for shown in both for row in shown]


def load_tokenizer(node: config.NodeConfig, base: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the base that is named, else of the one that the site's file names."""
    from common.model import load_tokenizer as load

    if not (base or node.model.base):
        raise ModelError("no base model is named; give --base, or model.base in this site's file")
    folder = Path(node.model.store) if node.model.store else store.DEFAULT
    return prompts.use_template(load(store.resolve(base or node.model.base, store=folder)), "tokenizer")
