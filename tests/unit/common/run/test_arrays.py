"""Arrays of tables in a config file: places, hints and documentation."""

import json
from typing import Annotated, Literal

import pytest
from pydantic import Field

from common.errors import ConfigError
from common.run import pages, reading
from common.run.schema import shape
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
    assert shape.keys_of(Whole) == ("inner.depth",)
    assert [path for path, table in shape.tables_of(Whole).items() if table.is_array] == ["inner.steps", "last"]
    text = "\n".join(pages._tables(Whole))
    assert "### [[inner.steps]]\n\nOne step." in text
    assert text.count("| `size` | whole number, at least 1 | `1` | Its size. |") == 2
    assert "steps =" not in pages.example(Whole)


class Fine(Section):
    """A fine grain."""

    kind: Literal["fine", "finest"] = Field(default="fine", description="How fine.")
    size: int = Field(default=1, ge=1, description="Its size.")


class Coarse(Section):
    """A coarse grain."""

    kind: Literal["coarse"] = Field(default="coarse", description="How fine.")
    size: int = Field(default=9, ge=1, description="Its size.")
    share: float = Field(default=0.5, description="Its share.")


Grain = Annotated[Fine | Coarse, Field(discriminator="kind")]


class Mill(Section):
    """A section with a table in it that comes in variants."""

    speed: int = Field(default=1, description="A setting.")
    grain: Grain = Field(default_factory=Fine)


class Works(Section):
    """A file with a table that has to say what it is, one that need not, and an array of them."""

    mill: Mill = Field(default_factory=Mill)
    last: Grain
    all: Tables[Grain] = Field(default=(), description="Grains.")


WORKS = reading.Format(Works, rules=(), patterns={}, other=Step, other_name="another file")


def heard(text: str, **overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        reading.parse(text, WORKS, name="file.toml", overrides=overrides)
    return str(caught.value)


def test_a_table_is_of_the_variant_that_it_names_or_else_the_default_one():
    text = 'last.kind = "coarse"\n[mill.grain]\nsize = 3\n[[all]]\nkind = "finest"'
    found = reading.parse(text, WORKS, name="file.toml", overrides={"mill.speed": "4"})
    assert (found.mill.grain, found.last, found.all) == (Fine(size=3), Coarse(), (Fine(kind="finest"),))
    overrides = {"mill.grain.kind": "coarse", "mill.grain.share": "0.1"}
    assert reading.parse(text, WORKS, name="file.toml", overrides=overrides).mill.grain == Coarse(size=3, share=0.1)
    assert Works.model_validate_json(found.model_dump_json()) == found
    assert shape.keys_of(Works)[:3] == ("mill.speed", "mill.grain.kind", "mill.grain.size")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "[mill.grain]\nshare = 0.1",
            ['mill.grain.share  has no effect with kind = "fine"; remove it, or set mill.grain.kind to "coarse"', ":3"],
        ),
        ('[[all]]\nkind = "fine"\nshare = 1.0', ["all.1.share  has no effect with kind", ":4"]),
        ('[[all]]\nkind = "finer"', ['all.1.kind  must be "fine", "finest" or "coarse" (you wrote "finer")', ":3"]),
        ("[[all]]\nshare = 1.0", ["all.1.kind  must be set", ":2"]),
        ("[mill.grain]\nkind = 3", ['mill.grain.kind  must be "fine", "finest" or "coarse" (you wrote 3)', ":3"]),
        (
            "[mill.grain]\nkind = 3\nsize = 0\nsiz = 1",
            ["3 problems", "mill.grain.size  must be at least 1", "mill.grain.siz  unknown setting; did you mean"],
        ),
        ('mill.grain = "coarse"', ['must be a section, [mill.grain] (you wrote "coarse"); write "coarse" as kind']),
        ("[mill.grain]\nzzzz = 1", ["[mill.grain] has kind, size, share", ":3"]),
        ("[mill]\nshare = 1", ["did you mean mill.grain.share?"]),
        ("[mill]\nshare = 1\nspeed = true", ["2 problems", "must be a whole number"]),
    ],
)
def test_what_is_wrong_with_a_table_of_variants_is_said_where_it_stands(text, messages):
    message = heard(f'last.kind = "fine"\n{text}')
    assert all(part in message for part in messages), message


def test_a_table_that_has_to_say_what_it_is():
    assert "last.kind  must be set" in heard("")
    assert "last.kind  must be set" in heard("[last]\nsize = 0")
    assert "last.size  must be at least 1" in heard("[last]\nsize = 0")
    assert heard('last.kind = "fine"', **{"mill.grain.share": "1.0"}).endswith("--set mill.grain.share")


def test_a_setting_that_variants_have_differently_is_described_for_each():
    text = "\n".join(pages._tables(Works))
    assert "| `size` | whole number, at least 1 | `1` | With `fine`, `finest`: Its size. |" in text
    assert "| `size` | whole number, at least 1 | `9` | With `coarse`: Its size. |" in text
    assert '| `kind` | `"fine"`, `"finest"`, `"coarse"` | must be set | How fine. |' in text
    assert '| `kind` | `"fine"`, `"finest"`, `"coarse"` | `"fine"` | How fine. |' in text
