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
        The path of each key to its line, counted from 1. A section also stands under its own path, and the second
        table of an array `[[runs]]` under ("runs", "2"), its keys below. The keys of inline tables inside an array
        stand under the array's path, and what is nested deeper than `MAX_DEPTH` is left out.

    Example:
        >>> key_lines('seed = 1\\n[model]\\nbase = "x"')
        {('seed',): 1, ('model',): 2, ('model', 'base'): 3}
    """
    lines: Lines = {}
    section: Key = ()
    counts: dict[Key, int] = {}
    words = _words(text)
    for word, line in words:
        if word == "[":
            section = _section(_join_until("\n", words, keep="["), counts)
            _note(section, line, lines)
        elif word != "\n":
            _read_pair(word, line, words, section, lines)
    return lines


def _section(head: str, counts: dict[Key, int]) -> Key:
    """Read what follows the first bracket of a section's head; a table of an array bears its number too."""
    path = split_key(head.lstrip("["))
    within = next((path[:end] for end in range(len(path) - 1, 0, -1) if path[:end] in counts), ())
    if head.startswith("["):
        counts[path] = counts.get(path, 0) + 1
        return (*path, str(counts[path]))
    return (*within, str(counts[within]), *path[len(within) :]) if within else path


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


def _join_until(end: str, words: Words, *, keep: str = "") -> str:
    """Join the words before `end`, without the brackets that are not in `keep`."""
    parts: list[str] = []
    for word, _ in words:
        if word == end:
            break
        parts.append(word if word not in "[]" or word in keep else "")
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
