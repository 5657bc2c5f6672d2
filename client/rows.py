"""What `check` and `preview` do: a site looks at its own rows before it joins a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client.data import check as checks
from client.data.check import CheckReport, Preview
from client.serve import read_rows
from common import config, prompts, store
from common.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(node: config.NodeConfig, *, base: str, max_length_tokens: int | None) -> CheckReport:
    """Count the site's rows, held-out ones included; with a base, their tokens too.

    Raises:
        DataError: Rows are missing or unusable; the message lists them by number.
        ModelError: The base is not on this machine.
    """
    paths = filter(None, (node.data.path, node.data.held_out_path))
    rows = [row for path in paths for row in read_rows(node, path)]
    tokenizer = load_tokenizer(node, base) if base or node.model.base else None
    return checks.check(rows, tokenizer=tokenizer, max_length_tokens=max_length_tokens)


def preview(node: config.NodeConfig, *, base: str, limit: int, max_length_tokens: int | None) -> Sequence[Preview]:
    """The site's first rows as the model will get them.

    Raises:
        DataError: Rows are missing or unusable.
        ModelError: No base is named, or it is not on this machine.
    """
    tokenizer = load_tokenizer(node, base)
    rows = read_rows(node, node.data.path)
    return checks.preview(rows, tokenizer, limit=limit, max_length_tokens=max_length_tokens)


def load_tokenizer(node: config.NodeConfig, base: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the base that is named, else of the one that the site's file names."""
    from common.model import load_tokenizer as load

    if not (base or node.model.base):
        raise ModelError("no base model is named; give --base, or model.base in this site's file")
    folder = Path(node.model.store) if node.model.store else store.DEFAULT
    return prompts.use_template(load(store.resolve(base or node.model.base, store=folder)), "tokenizer")
