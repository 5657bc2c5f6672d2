"""`silotune-sim audit` through its own entry point; `tests/privacy/test_audit_mechanism.py` has the fourth part."""

import json

import pytest

from common import cli
from simulations.audit.finding import THREATS
from simulations.cli.app import app
from tests import tiny

OVERFIT = ("training.local_epochs=20", "federation.num_rounds=2", "data.unit_column=patient_id")
ONE_STEP = (
    "adapter.r=32",
    "training.local_epochs=0",
    "training.local_steps=1",
    "training.optimizer.kind=sgd",
    "federation.num_rounds=1",
)


@pytest.fixture
def audit(tiny_base, tmp_path, capsys):
    """Run one part; its exit code and what it told on its last line."""
    path = tmp_path / "run.toml"
    table = tiny.write_table(tmp_path / "rows.jsonl")
    path.write_text(tiny.RUN_FILE.format(base=tiny_base) + f'data.source = "{table}"\n')

    def run(part: str, *more: object, settings=(), as_json: bool = True) -> tuple[int, str]:
        changes = [text for setting in settings for text in ("--set", setting)]
        arguments = ["audit", part, path, *more, *changes, "--threads", 1, *(["--json"] if as_json else [])]
        try:
            cli.run(app, [str(argument) for argument in arguments])
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def told(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


def test_inversion_tells_recall_and_bounds_no_epsilon(audit):
    code, output = audit("inversion", "--notes", 3, settings=ONE_STEP)
    found = told(output)
    assert (code, found["audited_epsilon"], found["claimed_epsilon"]) == (0, None, "infinite")
    assert found["figures"]["recall"] > 0.8
    assert found["threat_model"] == THREATS["inversion"]


def test_people_see_claim_bound_ceiling_m_and_threat(audit):
    code, output = audit("inversion", "--notes", 1, settings=ONE_STEP, as_json=False)
    assert code == 0
    for words in ("claimed epsilon", "audited epsilon", "ceiling", "threat model", "verdict"):
        assert words in output


def test_canaries_that_refute_a_claim_end_with_the_code_of_privacy(audit, tmp_path):
    given = ("--canaries", 20, "--max-share", 2)
    code, output = audit("canaries", *given, "--claim", 0.1, "--output", tmp_path / "a", settings=OVERFIT)
    assert code == 5
    assert told(output)["is_refuted"]
    assert told(output)["num_canaries"] == 20


def test_more_canaries_than_units_can_bear_are_refused(audit):
    code, output = audit("canaries", settings=OVERFIT)
    assert code == 2
    assert "--max-share" in output


def test_mia_deals_all_units(audit, tmp_path):
    code, output = audit("mia", "--output", tmp_path / "a", settings=OVERFIT)
    assert code == 0
    assert told(output)["num_canaries"] == 18
    assert told(output)["figures"]["auc"] > 0.5
