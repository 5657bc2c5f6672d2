"""What to say about a wrong setting: what is allowed, and for an unknown key the right one."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.run.problems import foreign
from common.run.schema.shape import Table

Key = tuple[str, ...]

_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")

MAX_SHOWN_CHARACTERS = 80
_CREDENTIALS = re.compile(r"//[^/\s]*@")
_KINDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "string_unicode": "must be valid Unicode text",
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_too_long": "must be at most {max_length} characters long",
    "value_error": "{error}",
}
_MISSING = {
    ("version",): "must be set: write version = 1 at the top of the file",
    ("privacy", "mode"): (
        'must be set: write mode = "unit" under [privacy] for differential privacy of each unit, with sampling_prob '
        'and epsilon, or mode = "none" to state that updates leave the sites unprotected'
    ),
    ("privacy", "sampling_prob"): (
        "must be set: the probability with which a unit is in a step, such as 0.02, or a site in a round"
    ),
}


@dataclass(frozen=True)
class Guide:
    """Leads from an unknown key to the right one.

    Attributes:
        own: Dotted keys of this file.
        other: Dotted keys of the other file.
        other_name: What messages call the other file.
        arrays: Keys of the tables of each array, by the array's dotted name.
    """

    own: tuple[str, ...]
    other: tuple[str, ...]
    other_name: str
    arrays: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def unknown(self, key: Key) -> str:
        """Say what an unknown key should be."""
        for name, known in self.arrays.items():
            if key[: name.count(".") + 1] == tuple(name.split(".")):
                return f"unknown setting; {self._in_table(key, known)}"
        return f"unknown setting; {self._foreign(key) or self._elsewhere(key) or self._near(key) or self._listed(key)}"

    def _in_table(self, key: Key, known: tuple[str, ...]) -> str:
        """Name the nearest key of a table in an array, or all of them."""
        near = difflib.get_close_matches(_plain(key[-1]), known, n=1)
        return f"did you mean {near[0]}?" if near else f"such a table has {', '.join(known)}"

    def _foreign(self, key: Key) -> str:
        """Translate a name that other tools use."""
        hint = foreign.find(key)
        if hint is None:
            return ""
        if not hint.key:
            return hint.note
        place = "" if hint.key in self.own else f" of {self.other_name}"
        return f"here it is {hint.key}{place}" + (f" ({hint.note})" if hint.note else "")

    def _elsewhere(self, key: Key) -> str:
        """Name the keys of this name: the one in this section or in one that is named alike, or all of them."""
        name = _plain(key[-1])
        homes = [known for known in self.own if known.split(".")[-1] == name]
        sections = {home.split(".")[0]: home for home in homes}
        near = difflib.get_close_matches(_plain(key[0]), sections, n=1)
        if near and len(key) > 1:
            return f"did you mean {sections[near[0]]}?"
        if homes and name != key[-1]:
            return f"did you mean {' or '.join(homes)}?"
        if homes:
            return f"it belongs {self._places(homes)}"
        others = [known for known in self.other if known.split(".")[-1] == name]
        return f"it belongs {self._places(others)} of {self.other_name}" if others else ""

    def _near(self, key: Key) -> str:
        """Name the key that is written almost like it, first of all in its own section; in none that is not here."""
        siblings = {known.split(".")[-1]: known for known in self._siblings(key)}
        sections = {section: self._brackets(section) for section in self._sections()} if len(key) == 1 else {}
        sections_here = {section.strip("[]") for section in self._sections()}
        is_here = len(key) == 1 or difflib.get_close_matches(_plain(key[0]), sections_here, n=1)
        everything = {known.split(".")[-1]: known for known in self.own} if is_here else {}
        for names in ({**siblings, **sections}, everything):
            if near := difflib.get_close_matches(_plain(key[-1]), names, n=1):
                return f"did you mean {names[near[0]]}?"
        return ""

    def _listed(self, key: Key) -> str:
        """Name what there is instead."""
        siblings = self._siblings(key)
        if len(key) == 1 or not siblings:
            return f"the sections are {', '.join(self._sections())}"
        return f"{self._brackets('.'.join(key[:-1]))} has {', '.join(known.split('.')[-1] for known in siblings)}"

    def _brackets(self, section: str) -> str:
        """A section as its header stands in the file."""
        return f"[[{section}]]" if section in self.arrays else f"[{section}]"

    def _places(self, keys: list[str]) -> str:
        """Name the places of known keys."""
        top = "at the top, before any section"
        return " or ".join(f"in {self._brackets(key.rpartition('.')[0])}" if "." in key else top for key in keys)

    def _siblings(self, key: Key) -> list[str]:
        """List the known keys of the section that a key stands in."""
        return [known for known in self.own if tuple(known.split(".")[:-1]) == key[:-1]]

    def _sections(self) -> list[str]:
        """List this file's sections."""
        arrays = [f"[{name}]" for name in self.arrays if "." not in name]
        return [*dict.fromkeys(known.split(".")[0] for known in self.own if "." in known), *arrays]


def idle(key: Key, table: Table, *, variant: str) -> str:
    """Say that a setting belongs to another variant of its table, which as `variant` does not look at it."""
    others = either(table.takers(key[-1]))
    setting = show_key((*key[:-1], table.tag))
    return f"has no effect with {table.tag} = {show_value(variant)}; remove it, or set {setting} to {others}"


def wrong(key: Key, detail: Mapping[str, Any], *, patterns: Mapping[str, str], table: Table | None = None) -> str:
    """Say what is wrong with a value, and what was written.

    Args:
        key: Path of the setting.
        detail: One of pydantic's errors.
        patterns: What each regular expression in the schema asks for, in words.
        table: The table that has this path; None where it is no table's.

    Returns:
        One line.
    """
    kind, written = detail["type"], detail["input"]
    if kind == "missing":
        return _MISSING.get(key, "must be set; it has no default")
    words = _limit(key, kind, detail.get("ctx", {}), patterns) or detail["msg"]
    if kind == "value_error" and isinstance(written, dict):
        return words  # a whole table, whose values do not go together
    hint = foreign.VALUES.get((".".join(key), _plain(str(written))), "")
    if table and table.tag and isinstance(written, str):
        note = foreign.VALUES.get((f"{table.path}.{table.tag}", _plain(written)), f"write {show_value(written)}")
        hint = hint or f"{note} as {table.tag} under [{table.path}]"
        if table.is_array:  # several words may have stood in one text
            words = written.replace(",", " ").split()
            hint = f"write {' and '.join(f'a table with {table.tag} = {show_value(word)}' for word in words)}"
    return f"{words} (you wrote {show_value(written)})" + (f"; {hint}" if hint else "")


def fill_in(placeholder: str) -> str:
    """Say that a template's words still stand where a value belongs."""
    return f"is not filled in: write your own value in the place of {show_value(placeholder)}"


def _limit(key: Key, kind: str, context: Mapping[str, Any], patterns: Mapping[str, str]) -> str:
    """Say what a value must be; nothing for a kind of error that is not known."""
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a table" if key[-1].isdecimal() else f"must be a section, [{show_key(key)}]"
    if kind == "tuple_type":
        return f"must be an array of tables, [[{'.'.join(key)}]]"
    if kind == "literal_error":
        return f"must be {str(context['expected']).replace(chr(39), chr(34))}"
    if kind == "string_pattern_mismatch":
        return f"must be {patterns.get(context['pattern'], context['pattern'])}"
    limits = {name: show_number(value) if isinstance(value, int | float) else value for name, value in context.items()}
    return _KINDS.get(kind, "").format(**limits)


def show_key(key: Key) -> str:
    """Write a path as a dotted key, quoted where TOML needs it.

    Example:
        >>> show_key(("model", "a b"))
        'model."a b"'
    """
    return ".".join(part if part and set(part) <= _BARE else show_value(part) for part in map(_cut, key))


def show_value(value: object) -> str:
    """Write a value about as it stands in the file, on one line and not too long; without the password of a URL.

    Example:
        >>> show_value(True), show_value("nf8"), show_value(2e-4), show_value("http://me:secret@host:1")
        ('true', '"nf8"', '0.0002', '"http://...@host:1"')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = show_text(json.dumps(value, ensure_ascii=False, default=str))
    return _cut(_CREDENTIALS.sub("//...@", text))


def either(values: Iterable[object]) -> str:
    """Write a choice of values.

    Example:
        >>> either(["none", "int8", "nf4"])
        '"none", "int8" or "nf4"'
    """
    *most, last = map(show_value, values)
    return f"{', '.join(most)} or {last}" if most else last


def show_number(value: float) -> str:
    """Write a limit.

    Example:
        >>> show_number(65536), show_number(0.5)
        ('65,536', '0.5')
    """
    return f"{value:,.10g}"


def show_text(text: object) -> str:
    """Write a text or path on one line that every terminal can show."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in str(text))


def _cut(text: str) -> str:
    """Keep the beginning of a long text."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _plain(name: str) -> str:
    """Write a name the way all names here are written."""
    return name.lower().replace("-", "_").replace(" ", "_")
