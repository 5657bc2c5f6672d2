import itertools
import re
import tomllib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.run.problems import locate

DOCUMENT = '''\
# [not.a.section] a = 1
top = 1 # "
  indented   =   "a = 1 # \\" ["
a.b = 'it\\'
"quoted = key" = 3
'single.quoted'.deep . "x" = 4

many = """
[no]
no = 1 \\""" # ""
"""
five = """"two quotes"""""
raw = \'\'\'
\'no\' = 1
\'\'\'\'\'
list = [ # comment ]
  1, "]", [2, 3], # more
  { inner = 1 },
]
table = { x = 1, "y z" = { deep = [ { z = 1 } ], after = 2 }, s = "}" }
empty = {}

[section] # comment
key = 1
[ a . "b.c" . d ] # dotted
key = 2
[[array]]
key = 1
[[array]]
key = 2
date = 1979-05-27T07:32:00Z
last = [[1, 2], ["]"]]
'''
EXPECTED = {
    ("top",): 2,
    ("indented",): 3,
    ("a",): 4,
    ("a", "b"): 4,
    ("quoted = key",): 5,
    ("single.quoted",): 6,
    ("single.quoted", "deep"): 6,
    ("single.quoted", "deep", "x"): 6,
    ("many",): 8,
    ("five",): 12,
    ("raw",): 13,
    ("list",): 16,
    ("list", "inner"): 18,
    ("table",): 20,
    ("table", "x"): 20,
    ("table", "y z"): 20,
    ("table", "y z", "deep"): 20,
    ("table", "y z", "deep", "z"): 20,
    ("table", "y z", "after"): 20,
    ("table", "s"): 20,
    ("empty",): 21,
    ("section",): 23,
    ("section", "key"): 24,
    ("a", "b.c"): 25,
    ("a", "b.c", "d"): 25,
    ("a", "b.c", "d", "key"): 26,
    ("array",): 27,
    ("array", "1"): 27,
    ("array", "1", "key"): 28,
    ("array", "2"): 29,
    ("array", "2", "key"): 30,
    ("array", "2", "date"): 31,
    ("array", "2", "last"): 32,
}


def test_keys_and_sections_are_found():
    tomllib.loads(DOCUMENT)
    assert locate.key_lines(DOCUMENT) == EXPECTED


def test_windows_line_ends_count_once():
    assert locate.key_lines(DOCUMENT.replace("\n", "\r\n")) == EXPECTED


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "#", "[a]", "a=1"])
def test_small_texts(text: str):
    locate.key_lines(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ("a",)),
        ("a.b", ("a", "b")),
        ("'a.b'.c", ("a.b", "c")),
        ('"\\u00e9"', ("é",)),
        ("a . b", ("a", "b")),
        ("1.5", ("1", "5")),
        ('""', ("",)),
    ],
)
def test_split_key(text: str, parts: tuple[str, ...]):
    assert locate.split_key(text) == parts


def paths(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if path and not isinstance(value, list):
        yield path
    entries = value.items() if isinstance(value, dict) else []
    for name, inner in entries:
        yield (*path, name)
        yield from paths(inner, (*path, name))
    for number, inner in enumerate(value if isinstance(value, list) else [], start=1):
        if len(path) == 1 and path[0].startswith("h"):  # the tables of a [[header]] bear numbers, inline ones do not
            yield from paths(inner, (*path, str(number)))
        else:
            yield from (found for found in paths(inner, path) if found != path)


def test_large_texts_are_read_in_one_pass():
    text = "".join(f"key_{number} = [{number}, 'text'] # comment\n" for number in range(20_000))
    assert locate.key_lines(text)[("key_19999",)] == 20_000


VALUES = [
    "1",
    '"a = 1"',
    "'# no'",
    '"""\n[a]\nx = 1\\"""\n"""',
    "'''\n[a]\n'x' = '1'\n'''",
    '["""a"""", "]", 1]',
    """['''a'''', ']', 1]""",
    "[\n1, # ]\n'[',\n]",
    "{ x = 1, y = [{ z = '}' }] }",
    "[[], [{}]]",
    "true # x = 1",
]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(VALUES)), max_size=12))
def test_any_order_of_values_is_read(entries: list[tuple[bool, str]]):
    text, section, expected = "", "", {}
    for number, (starts_section, value) in enumerate(entries):
        if starts_section:
            section = f"section_{number}"
            expected[(section,)] = text.count("\n") + 1
            text += f"[{section}]\n"
        expected[(section, f"key_{number}") if section else (f"key_{number}",)] = text.count("\n") + 1
        text += f"key_{number} = {value}\n"
    tomllib.loads(text)
    lines = locate.key_lines(text)
    assert {key: lines[key] for key in expected} == expected
    assert {key[-1] for key in lines.keys() - expected} <= {"x", "y", "z"}


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arrays = st.lists(inner, max_size=3).map(lambda items: "[ # ]\n" + ",\n".join(items) + "]")
    tables = st.lists(st.tuples(KEYS, inner), max_size=3).map(
        lambda pairs: "{ " + ", ".join(map(" = ".join, pairs)) + "}"
    )
    return arrays | tables


KEYS = st.lists(st.sampled_from(["a@", "'q.[@'", '"x = \\"@"', "@"]), min_size=1, max_size=3).map(" . ".join)
HEADERS = st.sampled_from(["", "", "[h@]\n", "[ h@ . '@' ] # c\n", "[[h@]]\n"])
NESTED = st.recursive(st.sampled_from(VALUES[:-1]), containers, max_leaves=8)
ENTRIES = st.tuples(HEADERS, KEYS, st.just(" = "), NESTED, st.sampled_from(["\n", " # c\n", "\r\n\n"])).map("".join)


@given(st.lists(ENTRIES, max_size=6).map("".join))
def test_exactly_the_keys_that_tomllib_finds_are_found(text: str):
    numbers = itertools.count()
    text = re.sub("@", lambda _: str(next(numbers)), text)
    assert set(locate.key_lines(text)) == {path[:8] for path in paths(tomllib.loads(text))}
