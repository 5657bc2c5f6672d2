"""The threat model names tests as its evidence; each must exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFINED = re.compile(r"^def (test_\w+)\(", re.MULTILINE)


def named() -> set[str]:
    return set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")))


def defined() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for text in texts for name in DEFINED.findall(text)}


def test_every_test_that_the_threat_model_names_exists():
    assert len(named()) > 40
    assert named() <= defined()


def test_control_a_name_without_a_test_is_noticed():
    assert not {"test_that_nobody_wrote"} <= defined()
