"""Patterns that a user writes, held against what a model writes: each attempt has a limit of time.

Python's own engine goes back over a text for as long as it takes, which for `(a+)+b` and 30 letters are minutes, and
nothing can stop it. The package regex takes the same patterns and a limit.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jsonschema
import regex

TIMEOUT_S: Final = 1.0


class Pattern:
    """A compiled pattern; what has not been found when the time is over counts as not there.

    Args:
        written: As in the package regex, which takes what Python's `re` takes.

    Raises:
        ValueError: It is no pattern; the message says where it ends to be one.

    Example:
        >>> Pattern("[A-Z][0-9]+").is_whole("A41"), Pattern("(a+)+").is_whole(30 * "a" + "!")
        (True, False)
    """

    def __init__(self, written: str) -> None:
        try:
            self._compiled = regex.compile(written)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from error

    def is_whole(self, text: str) -> bool:
        """Whether it matches all of a text."""
        try:
            return self._compiled.fullmatch(text, timeout=TIMEOUT_S) is not None
        except TimeoutError:
            return False

    def is_in(self, text: str) -> bool:
        """Whether it matches some of a text."""
        try:
            return self._compiled.search(text, timeout=TIMEOUT_S) is not None
        except TimeoutError:
            return False

    def findall(self, text: str) -> list[Any]:
        """All matches, as `re.findall` gives them; none where the time is over."""
        try:
            return list(self._compiled.findall(text, timeout=TIMEOUT_S))
        except TimeoutError:
            return []


compiled: Final = functools.lru_cache(maxsize=1024)(Pattern)


def in_schema(schema: Any) -> set[str]:
    """Every pattern of a JSON schema, of texts and of properties' names."""
    parts = list(parts_of(schema))
    texts = {part["pattern"] for part in parts if isinstance(part.get("pattern"), str)}
    names = [part["patternProperties"] for part in parts if isinstance(part.get("patternProperties"), dict)]
    return texts.union(*names)


def parts_of(node: Any) -> Iterator[dict[str, Any]]:
    """Every table in a JSON value."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts_of(inner)


def _text(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """Keyword `pattern`."""
    if validator.is_type(instance, "string") and not compiled(pattern).is_in(instance):
        yield jsonschema.ValidationError("no match")


def _named(validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    """Keyword `patternProperties`."""
    for name, value in instance.items() if validator.is_type(instance, "object") else ():
        for pattern in [pattern for pattern in patterns if compiled(pattern).is_in(name)]:
            yield from validator.descend(value, patterns[pattern], path=name, schema_path=pattern)


def _others(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """Keyword `additionalProperties`."""
    patterns = schema.get("patternProperties", {})
    for name, value in instance.items() if validator.is_type(instance, "object") else ():
        if name not in schema.get("properties", {}) and not any(compiled(pattern).is_in(name) for pattern in patterns):
            yield from validator.descend(value, wanted, path=name)


KEYWORDS: Final = {"pattern": _text, "patternProperties": _named, "additionalProperties": _others}
