"""On which line of a TOML text each key stands: tomllib does not tell.

The text has been accepted by tomllib, so this reads keys, skips values and checks nothing.
"""

import re
import tomllib
from collections.abc import Iterator

Key = tuple[str, ...]
Lines = dict[Key, int]
Words = Iterator[tuple[str, int]]

MAX_DEPTH = 8
_WORD = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?!")'  # a multi-line string may end in up to five quotes
    r"|'''.*?'''(?!')"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|[\n\[\]{},=]"
    r"|[^\s\"'#\[\]{},=]+",
    re.DOTALL,
)
_BARE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def key_lines(text: str) -> Lines:
    """Find the line of every key and section.

    Args:
        text: A valid TOML text.

    Returns:
        The path of each key to its line, counted from 1. A section also stands under its own path; the keys of
        tables inside an array stand under the array's path, and what is nested deeper than `MAX_DEPTH` is left out.

    Example:
        >>> key_lines('seed = 1\\n[model]\\nbase = "x"')
        {('seed',): 1, ('model',): 2, ('model', 'base'): 3}
    """
    lines: Lines = {}
    section: Key = ()
    words = _words(text)
    for word, line in words:
        if word == "[":
            section = split_key(_join_until("\n", words))
            _note(section, line, lines)
        elif word != "\n":
            _read_pair(word, line, words, section, lines)
    return lines


def table_lines(text: str) -> Lines:
    """Find the line of every key in an array of tables, `[[name]]`, under the number of its table.

    Args:
        text: A valid TOML text.

    Returns:
        As `key_lines`, of those keys only; the tables' numbers count from 0.

    Example:
        >>> table_lines('[[polish]]\\nsteps = 1\\n[[polish]]\\nsteps = 2')[("polish", "1", "steps")]
        4
    """
    lines: Lines = {}
    counts: dict[Key, int] = {}
    section: Key = ()
    words = _words(text)
    for word, line in words:
        if word == "[":
            section = _number(*_read_header(words), counts)
            _note(section, line, lines)
        elif word != "\n":
            _read_pair(word, line, words, section, lines if section else {})
    return lines


def _read_header(words: Words) -> tuple[Key, bool]:
    """Read a section's name after its first bracket, and whether it is one of an array of tables."""
    first, _ = next(words)
    rest = _join_until("\n", words)
    return split_key(rest if first == "[" else first + rest), first == "["


def _number(name: Key, is_array: bool, counts: dict[Key, int]) -> Key:
    """A section's path with the number of the table that it is or belongs to; empty outside arrays of tables."""
    if is_array:
        counts[name] = counts.get(name, -1) + 1
    for length in range(len(name), 0, -1):
        if name[:length] in counts:
            return (*name[:length], str(counts[name[:length]]), *name[length:])
    return ()


def split_key(text: str) -> Key:
    """Split a dotted key, quoted or not, into its parts.

    Example:
        >>> split_key('model."a.b"')
        ('model', 'a.b')
    """
    if _BARE.fullmatch(text):
        return tuple(text.split("."))
    parts: list[str] = []
    table: object = tomllib.loads(f"{text} = 0")
    while isinstance(table, dict):
        name, table = next(iter(table.items()))
        parts.append(name)
    return tuple(parts)


def _words(text: str) -> Words:
    """Cut a text into words, each with the line on which it begins; comments are left out."""
    line, seen = 1, 0
    for match in _WORD.finditer(text):
        line += text.count("\n", seen, match.start())
        seen = match.start()
        if not match[0].startswith("#"):
            yield match[0], line


def _join_until(end: str, words: Words) -> str:
    """Join the words before `end`, without brackets."""
    parts: list[str] = []
    for word, _ in words:
        if word == end:
            break
        parts.append(word if word not in "[]" else "")
    return "".join(parts)


def _note(path: Key, line: int, lines: Lines) -> None:
    """Note a key and the sections around it, unless they were seen before."""
    for length in range(1, min(len(path), MAX_DEPTH) + 1):
        lines.setdefault(path[:length], line)


def _read_pair(word: str, line: int, words: Words, section: Key, lines: Lines) -> str:
    """Read a key that begins with `word`, and its value; tell what ended it."""
    path = section + split_key(word + _join_until("=", words))
    _note(path, line, lines)
    return _skip_value(words, path, lines)


def _skip_value(words: Words, path: Key, lines: Lines) -> str:
    """Skip a value but for the keys in it; tell what ended it: a line end, a comma or a bracket."""
    for word, _ in words:
        if word == "{":
            _read_inline_table(words, path, lines)
        elif word == "[":
            _skip_array(words, path, lines)
        elif word in ("\n", ",", "]", "}"):
            return word
    return ""


def _skip_array(words: Words, path: Key, lines: Lines) -> None:
    """Skip values until the array's bracket closes."""
    while _skip_value(words, path, lines) not in ("]", ""):
        pass


def _read_inline_table(words: Words, path: Key, lines: Lines) -> None:
    """Read pairs until the inline table's bracket closes."""
    for word, line in words:
        if word == "}":
            return
        if word not in (",", "\n") and _read_pair(word, line, words, path, lines) == "}":
            return
