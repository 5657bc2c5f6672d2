"""The list of mutations stays true to the tree; `tests/attacks/test_mutations.py` runs it."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from tests import mutations
from tests.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@cache
def text(file: str) -> str:
    path = ROOT / file
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def is_there(test: str) -> bool:
    file, _, name = test.partition("::")
    return re.search(rf"^def {re.escape(name.partition('[')[0])}\(", text(file), re.MULTILINE) is not None


def test_every_text_that_is_changed_is_in_the_tree_once():
    for mutation in MUTATIONS:
        assert mutation.applied_to(text(mutation.file)) != text(mutation.file)


def test_every_test_that_is_named_exists_and_every_mutation_has_one():
    assert [test for mutation in MUTATIONS for test in mutation.tests if not is_there(test)] == []
    assert all(mutation.tests for mutation in MUTATIONS)


def test_names_are_unique_and_there_are_many():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 60


def test_the_page_is_up_to_date():
    assert mutations.page() == text("docs/mutations.md")


@pytest.mark.parametrize("before", ["no such text", "assert", "if"])
def test_control_a_mutation_that_would_change_nothing_or_much_is_noticed(before):
    stale = dataclasses.replace(MUTATIONS[0], before=before)
    with pytest.raises(ValueError, match=r"times, or stays"):
        stale.applied_to("if one:\n    pass\nif other:\n    pass\n")
    assert not is_there("tests/unit/test_mutations.py::test_that_nobody_wrote")
