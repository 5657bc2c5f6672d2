"""Arrays of tables in a config file: places, hints and documentation."""

import json

import pytest
from pydantic import Field

from common.errors import ConfigError
from common.run import pages, reading
from common.run.schema.section import Section, Tables


class Step(Section):
    """One step."""

    name: str = Field(description="Its name.")
    size: int = Field(default=1, ge=1, description="Its size.")


class Inner(Section):
    """A section with an array."""

    depth: int = Field(default=0, description="A setting.")
    steps: Tables[Step] = Field(default=(), description="Steps of the section.")


class Whole(Section):
    """A file with arrays at the top and in a section."""

    inner: Inner = Field(default_factory=Inner)
    last: Tables[Step] = Field(default=(), description="Steps at the end.")


FORM = reading.Format(Whole, rules=(), patterns={}, other=Step, other_name="another file")
TWO = """
[inner]
depth = 2
[[inner.steps]]
name = "a"
[[inner.steps]]
name = "b"
size = 3
[[last]]
name = "c"
"""


def parse(text: str) -> Whole:
    return reading.parse(text, FORM, name="file.toml", overrides={})


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_arrays_are_read_in_order_and_can_be_hashed_and_stored():
    found = parse(TWO)
    assert [(step.name, step.size) for step in found.inner.steps] == [("a", 1), ("b", 3)]
    assert [step.name for step in found.last] == ["c"]
    assert hash(found) == hash(parse(TWO))
    assert Whole.model_validate(json.loads(found.model_dump_json())) == found
    assert Whole.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size = 3", "size = 0", "inner.steps.2.size  must be at least 1 (you wrote 0)\n    file.toml:8"),
        ("size = 3", 'size = "3"', "inner.steps.2.size  must be a whole number"),
        ("size = 3", "siz = 3", "inner.steps.2.siz  unknown setting; did you mean size?\n    file.toml:8"),
        ("size = 3", "zzz = 3", "unknown setting; such a table has name, size\n    file.toml:8"),
        ('name = "b"', "", "inner.steps.2.name  must be set; it has no default\n    file.toml:6"),
        ('name = "c"', "nam = 1", "last.1.nam  unknown setting; did you mean name?\n    file.toml:10"),
    ],
)
def test_a_mistake_in_one_table_is_found_at_its_line(old, new, message):
    assert message in problem(TWO.replace(old, new))


def test_something_else_than_an_array_is_refused():
    assert "must be an array of tables, [[inner.steps]]" in problem("inner.steps = 3")
    assert "must be a table" in problem("inner.steps = [3]")
    assert "unknown setting" in problem("[[inner.step]]\nname = 'a'")


def test_arrays_have_a_chapter_of_their_own_and_no_key():
    assert reading.keys_of(Whole) == ("inner.depth",)
    assert list(reading.arrays_of(Whole)) == ["last", "inner.steps"]
    text = "\n".join(pages._tables(Whole))
    assert "### [[inner.steps]]\n\nOne step." in text
    assert text.count("| `size` | whole number, at least 1 | `1` | Its size. |") == 2
    assert "steps =" not in pages.example(Whole)
