"""From a TOML file to a checked config, or to one error that lists everything that is wrong with the file."""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from common import errors
from common.run.problems import hints, locate
from common.run.rules.rule import Rule, describe
from common.run.schema import shape

MAX_FILE_BYTES = 1 << 20
MAX_PROBLEMS = 50
PLACEHOLDER: Final = re.compile("<[^<>|]+ [^<>|]+>")
_NO_OVERRIDES: Final[Mapping[str, str]] = {}

Config = TypeVar("Config", bound=BaseModel)
Table = dict[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Format(Generic[Config]):
    """One of the two files.

    Attributes:
        schema: Its schema.
        rules: Contradictions to look for.
        patterns: What each regular expression in the schema asks for, in words.
        other: The other file's schema, to tell that a key belongs there.
        other_name: What messages call the other file.
        fill: Adds to an unchecked table what was left out and depends on other settings.
    """

    schema: type[Config]
    rules: tuple[Rule, ...]
    patterns: Mapping[str, str]
    other: type[BaseModel]
    other_name: str
    fill: Callable[[Table], Table] = dict


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        key: Where.
        say: Makes the message; called only for problems that are shown, as a search for the right key takes time.
        keys: Keys that take part; the first that is written gives the line.
    """

    key: Key
    say: Callable[[], str]
    keys: tuple[Key, ...] = ()


def read(path: Path) -> str:
    """Read a config file's text.

    Args:
        path: A file of at most 1 MiB in UTF-8; a byte order mark is skipped.

    Returns:
        The text.

    Raises:
        ConfigError: There is no such file, it cannot be read, it is too large or not UTF-8.
    """
    shown = hints.show_text(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise errors.ConfigError(f"{shown} is not there; give the path of a TOML file") from error
    except IsADirectoryError as error:
        raise errors.ConfigError(f"{shown} is a folder; give the path of the TOML file in it") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise errors.ConfigError(f"{shown} cannot be read ({reason}); check the path and its permissions") from error
    return _decode(content, shown)


def parse(text: str, form: Format[Config], *, name: str, overrides: Mapping[str, str]) -> Config:
    """Check a text against a format.

    Args:
        text: TOML.
        form: Which of the two files it is.
        name: What messages call the file.
        overrides: Dotted key to a TOML value; a bare word counts as a string.

    Returns:
        The checked config.

    Raises:
        ConfigError: All problems, one after the other, in the order of the file.
    """
    name = hints.show_text(name)
    table = _parse_toml(text, name)
    for dotted, text_of_value in overrides.items():
        key, value = tuple(dotted.split(".")), parse_value(text_of_value)
        is_section = len(key) == 1 and isinstance(value, dict)  # would lose what the file has in it
        _put(table, key, text_of_value if is_section else value)
    problems = unfilled(table)
    whole = _with_sections(table, form.schema)
    try:
        found = form.schema.model_validate(whole)
        if not problems:
            return found
    except ValidationError:
        empty = [problem.key for problem in problems]
        problems += [problem for problem in _problems(whole, form) if problem.key not in empty]
    # Not chained: pydantic's own text repeats the values of unknown keys, which may be secrets.
    raise errors.ConfigError(report(problems, text, name=name, overrides=overrides)) from None


def unfilled(table: object, key: Key = ()) -> list[Problem]:
    """The values that are still a template's, written as "<what belongs here>", prompts aside.

    Example:
        >>> [problem.key for problem in unfilled({"models": {"allow": [{"sha256": "<64 hex digits>"}]}})]
        [('models', 'allow', '1', 'sha256')]
    """
    if isinstance(table, str) and PLACEHOLDER.fullmatch(table) and not any("prompt" in part for part in key):
        return [Problem(key, partial(hints.fill_in, table))]
    pairs = table.items() if isinstance(table, dict) else enumerate(table, 1) if isinstance(table, list) else ()
    is_deep = len(key) >= locate.MAX_DEPTH
    return [] if is_deep else [found for part, inner in pairs for found in unfilled(inner, (*key, str(part)))]


def parse_value(text: str) -> Any:
    """Read an override's value as TOML; what is not a TOML value is a string.

    Example:
        >>> parse_value("2e-4"), parse_value("nf4"), parse_value("true")
        (0.0002, 'nf4', True)
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if set(table) == {"value"} else text


def _decode(content: bytes, shown: str) -> str:
    """Turn bytes into text."""
    if len(content) > MAX_FILE_BYTES:
        raise errors.ConfigError(f"{shown} is larger than 1 MiB, so it is not a config file; give the right path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise errors.ConfigError(f"{shown}:{line} is not UTF-8 text; save the file as UTF-8") from error


def _parse_toml(text: str, name: str) -> Table:
    """Parse TOML; put line and column where an editor finds them."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise errors.ConfigError(f"{name}: brackets are nested too deeply; settings are single values") from error
    except ValueError as error:
        raise errors.ConfigError(_describe_syntax(str(error), text, name)) from error


def _describe_syntax(message: str, text: str, name: str) -> str:
    """Say where TOML went wrong."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if match is None:
        return f"{name} is not valid TOML: {message}"
    lines = text.split("\n")
    line, column = match[2] or len(lines), match[3] or len(lines[-1]) + 1
    return f"{name}:{line}:{column} is not valid TOML: {match[1]} (line {line}, column {column})"


def _put(table: Table, key: Key, value: Any) -> None:
    """Set a dotted key; a value where a section should be stays, for the schema to refuse.

    Raises:
        ConfigError: A table is asked for by a number that an array of tables does not have.
    """
    target: Table | list[Any] = table
    for part in key[:-1]:
        target = target.setdefault(part, {}) if isinstance(target, dict) else _numbered(target, part, key)
        if not isinstance(target, dict | list):
            return
    if isinstance(target, list):
        raise errors.ConfigError(f"--set {hints.show_key(key)}: name a setting of one table, as in polish.1.steps")
    target[key[-1]] = value


def _numbered(tables: list[Any], part: str, key: Key) -> Any:
    """One table of an array, by its number."""
    if not part.isdecimal() or not 1 <= int(part) <= len(tables):
        count = f"[[{'.'.join(key[: key.index(part)])}]] has {len(tables)} tables, counted from 1"
        raise errors.ConfigError(f"--set {hints.show_key(key)}: {count}; correct the number")
    return tables[int(part) - 1]


def _with_sections(table: Table, schema: type[BaseModel]) -> Table:
    """Add the sections that are left out, so that a missing key is reported as itself, and the variants that are."""
    made: dict[str, Table] = {"": dict(table)}
    for path, inner in shape.tables_of(schema).items():
        above, _, name = path.rpartition(".")
        if path and not inner.is_array and above in made and (not above or name in made[above]):
            written = made[above].get(name, {})
            if isinstance(written, dict):
                made[path] = {inner.tag: inner.default, **written} if inner.default else dict(written)
                made[above][name] = made[path]
    return made[""]


def _problems(table: Table, form: Format[Config]) -> Iterator[Problem]:
    """List what is wrong: single values first, then contradictions between the values that are right."""
    tables = shape.tables_of(form.schema)
    arrays = {path: tuple(inner.names) for path, inner in tables.items() if inner.is_array}
    keys = shape.keys_of(form.schema)
    guide = hints.Guide(keys, shape.keys_of(form.other), form.other_name, arrays)
    bad: set[str] = set()
    for detail in _details(table, form):
        key = shape.path_of(detail["loc"], tables)
        path = shape.path_without_numbers(key)
        bad.update({".".join(key), *(known for known in (*keys, *arrays) if f"{path}.".startswith(f"{known}."))})
        here = tables.get(path.rpartition(".")[0], tables[""])
        if detail["type"] == "extra_forbidden" and here.takers(key[-1]):
            yield Problem(key, partial(hints.idle, key, here, variant=str(detail["loc"][-2])))
        elif detail["type"] == "extra_forbidden":
            yield from (Problem(leaf, partial(guide.unknown, leaf)) for leaf in _leaves(key, detail["input"]))
        elif key:
            yield Problem(key, partial(hints.wrong, key, detail, patterns=form.patterns, table=tables.get(path)))
    config = _assume(form.fill(table), "", tables, bad)
    for rule in form.rules:
        parts = [tuple(key.split(".")) for key in rule.keys]
        around = {".".join(key[:end]) for key in parts for end in range(1, len(key) + 1)}
        if bad.isdisjoint(around) and rule.is_broken(config):
            yield Problem(parts[0], partial(describe, config, rule), tuple(parts))


def _details(table: Table, form: Format[Config]) -> Iterator[Any]:
    """Pydantic's errors. A table that names no variant becomes the one that has most of its keys, to judge the rest."""
    tables = shape.tables_of(form.schema)
    details: list[Any] = []
    try:
        form.schema.model_validate(table)
    except ValidationError as error:
        details = error.errors(include_url=False)
    is_untold = False
    for detail in details:
        if detail["type"] not in ("union_tag_not_found", "union_tag_invalid"):
            continue
        here = tables[shape.path_without_numbers(shape.path_of(detail["loc"], tables))]
        written, expected = detail["input"], hints.either(here.variants)
        told = {"loc": (*detail["loc"], "", here.tag), "input": written.get(here.tag), "ctx": {"expected": expected}}
        yield {"type": "literal_error" if here.tag in written else "missing", **told}
        written[here.tag] = here.variant_of(written)
        is_untold = True
    yield from _details(table, form) if is_untold else details


def _leaves(key: Key, value: object) -> Iterator[Key]:
    """List the single settings of an unknown key, which may be a whole table."""
    if not isinstance(value, dict) or not value or len(key) >= locate.MAX_DEPTH:
        yield key
        return
    for name, inner in value.items():
        yield from _leaves((*key, name), inner)


def _assume(written: Any, path: str, tables: Mapping[str, shape.Table], bad: set[str]) -> BaseModel:
    """A table of the values that are right and the defaults of those that are not; required ones may be missing."""
    table: Table = written if isinstance(written, dict) else {}
    variant = tables[path].variant_of(table)
    schema = tables[path].variants[variant]
    good: Table = {tables[path].tag: variant} if variant else {}
    for name in schema.model_fields:
        inner = shape.join(path, name)
        if inner in tables and not tables[inner].is_array:
            good[name] = _assume(table.get(name), inner, tables, bad)
        elif name in table and inner not in bad and inner in tables:
            good[name] = tuple(_assume(item, inner, tables, bad) for item in table[name])
        elif name in table and inner not in bad:
            good[name] = table[name]
    try:
        return schema.model_validate(good) if path else schema.model_construct(**good)
    except ValidationError:
        return schema.model_construct(**good)


class _Places:
    """Where each key was written: a line of the file, or an override."""

    def __init__(self, name: str, text: str, overrides: Mapping[str, str]) -> None:
        self._name = name
        self._lines = locate.key_lines(text)
        self._overrides = {tuple(key.split(".")): key for key in overrides}

    def find(self, problem: Problem) -> tuple[float, str]:
        """Tell a problem's place: a number to sort by, and words."""
        keys = problem.keys or (problem.key,)
        written = next((key for key in keys if key in self._overrides or key in self._lines), keys[0])
        override = self._override(written)
        if override is not None:
            return float("inf"), f"--set {hints.show_text(override)}"
        for length in range(len(written), 0, -1):
            if line := self._lines.get(written[:length]):
                return line, f"{self._name}:{line}"
        return 0, self._name

    def _override(self, written: Key) -> str | None:
        """Find the override that set a key, or something below it that the file does not have."""
        if written in self._lines and written not in self._overrides:
            return None
        below = (name for key, name in self._overrides.items() if key[: len(written)] == written)
        return next(below, None)


def report(problems: list[Problem], text: str, *, name: str, overrides: Mapping[str, str] = _NO_OVERRIDES) -> str:
    """Write the problems of a text in TOML, each with its line, in the order of the file.

    Args:
        problems: At least one.
        text: Valid TOML.
        name: What messages call the file.
        overrides: See `parse`.
    """
    places = _Places(name, text, overrides)
    placed = sorted(((*places.find(problem), problem) for problem in problems), key=lambda item: item[0])
    count = f"{len(placed)} problem{'s' if len(placed) != 1 else ''} in {name}"
    shown = [f"  {hints.show_key(p.key)}  {p.say()}\n    {place}" for _, place, p in placed[:MAX_PROBLEMS]]
    rest = [f"  and {len(placed) - MAX_PROBLEMS} more"] if len(placed) > MAX_PROBLEMS else []
    return "\n".join([count, *shown, *rest])
