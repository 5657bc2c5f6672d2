"""Canaries of a file: a secret, what stands before it, and what else it could have been."""

import hashlib
import json
import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from common.errors import DataError
from server.evaluate.tasks.task import text_of

_FREE: Final = {"#": string.digits, "@": string.ascii_lowercase, "^": string.ascii_uppercase}
_COLUMNS: Final = frozenset({"id", "prompt", "prefix", "secret", "candidates", "pattern", "trained"})


@dataclass(frozen=True)
class Canary:
    """A secret of one row.

    Attributes:
        prompt: The user's message; empty: raw text, without a chat template.
        prefix: What the answer, or the raw text, begins with.
        secret: What must not be known.
        others: What it could have been just as well, without itself.
        is_trained: Whether it was planted in training rows.
        name: What messages call the row.
    """

    prompt: str
    prefix: str
    secret: str
    others: tuple[str, ...]
    is_trained: bool
    name: str


def read(fields: Mapping[str, Any], *, num_candidates: int, where: str) -> Canary:
    """One row: `prefix`, `secret`, and `candidates` (a list) or `pattern`; `prompt` and `trained` may be left out.

    Args:
        num_candidates: Candidates where there is a pattern, the secret included.

    Raises:
        DataError: A column is missing, unknown or unusable.
    """
    if unknown := sorted(set(fields) - _COLUMNS):
        raise DataError(f"{where}: {len(unknown)} unknown columns; a canary has {', '.join(sorted(_COLUMNS))}")
    secret, prefix = text_of(fields, "secret", where=where), text_of(fields, "prefix", where=where)
    is_trained, prompt = fields.get("trained", True), fields.get("prompt") or ""
    if not isinstance(is_trained, bool) or not isinstance(prompt, str):
        raise DataError(f"{where}: column trained must hold true or false, and prompt text")
    if (fields.get("candidates") is None) == (fields.get("pattern") is None):
        raise DataError(f"{where}: give one of the columns candidates (a list of texts) and pattern")
    if fields.get("candidates") is not None:
        listed = fields["candidates"]
        if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip() for text in listed):
            raise DataError(f"{where}: column candidates must hold a list of texts")
        others = tuple(text for text in dict.fromkeys(listed) if text != secret)
        if not others:
            raise DataError(
                f"{where}: column candidates holds nothing but the secret; it needs others to be ranked among"
            )
    else:
        pattern = text_of(fields, "pattern", where=where)
        others = drawn(pattern, secret, count=num_candidates - 1, where=where)
    return Canary(prompt, prefix, secret, others, is_trained, where)


def drawn(pattern: str, secret: str, *, count: int, where: str) -> tuple[str, ...]:
    """Different texts of a pattern, none of them the secret; the same ones for the same pattern and secret.

    Args:
        pattern: `#` stands for a digit, `@` for a small and `^` for a capital letter, all else for itself.
        secret: Of the same pattern.

    Raises:
        DataError: The secret is not of the pattern, or there are not so many texts of it.

    Example:
        >>> len(set(drawn("#-^", "3-K", count=259, where="row 1")))
        259
    """
    classes = {sign: f"[{letters}]" for sign, letters in _FREE.items()}
    if not re.fullmatch("".join(classes.get(sign, re.escape(sign)) for sign in pattern), secret):
        raise DataError(f"{where}: the secret is not of its pattern (# digit, @ small letter, ^ capital letter)")
    letters = [_FREE.get(sign, sign) for sign in pattern]
    sizes = list(map(len, letters))
    if math.prod(sizes) <= count:
        raise DataError(
            f"{where}: {math.prod(sizes)} texts fit the pattern, and num_candidates asks for {count + 1}; lower it"
        )
    seed = hashlib.sha256(json.dumps([pattern, secret]).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(seed, "big"))
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = "".join(signs[i] for signs, i in zip(letters, generator.integers(sizes), strict=True))
        if text != secret:
            texts[text] = None
    return tuple(texts)
