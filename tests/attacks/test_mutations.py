"""Guards are switched off one at a time, and a test notices; see `tests/mutations.py`."""

import dataclasses
import json
import subprocess
import sys

import pytest

from tests import mutations
from tests.mutations import MUTATIONS


@pytest.mark.slow
def test_every_guard_that_is_switched_off_is_noticed():
    ended = subprocess.run(
        [sys.executable, "-m", "tests.mutations", "--json"], cwd=mutations.ROOT, capture_output=True, check=False
    )
    told = json.loads(ended.stdout)
    assert [trial for trial in told["trials"] if not trial["is_right"]] == []
    assert len(told["trials"]) == 1 + len(MUTATIONS)
    assert ended.returncode == 0


@pytest.mark.slow
def test_control_a_change_that_switches_nothing_off_and_one_that_cannot_be_imported_are_not_noticed():
    first = next(mutation for mutation in MUTATIONS if mutation.name == "frame-hash")
    idle = dataclasses.replace(first, name="idle", after=first.before.replace("if ", "if bool(1) and "))
    broken = dataclasses.replace(first, name="broken", before="import hashlib\n", after="import no_such_module\n")
    control, noticed, *others = mutations.trials([first, idle, broken])
    assert (control.exit_code, noticed.exit_code) == (0, mutations.NOTICED)
    assert [(trial.name, trial.is_right) for trial in others] == [("idle", False), ("broken", False)]
