import json

import pytest

from client.agent import sitelog
from common.errors import ApprovalRequired, DataError, PolicyRefusedError, StorageError

CANARY = "patient Ada Lovelace has a rare disease"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error with a trace, as it is caught."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def entries(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_error_of_ours_is_told_in_full(tmp_path):
    sitelog.report(tmp_path / "log" / "agent.jsonl", "0a1b", raised(DataError("rows.jsonl line 3: no answer")))
    (entry,) = entries(tmp_path / "log" / "agent.jsonl")
    assert (entry["reference"], entry["error"]) == ("0a1b", "DataError")
    assert entry["message"] == "rows.jsonl line 3: no answer"


def test_of_a_foreign_error_only_type_and_place_are_told(tmp_path):
    error = raised(ValueError(CANARY), KeyError(CANARY))
    sitelog.report(tmp_path / "log", "0a1b", error)
    (entry,) = entries(tmp_path / "log")
    assert entry["error"] == "ValueError"
    assert "test_sitelog.py" in entry["at"][0]
    assert CANARY not in (tmp_path / "log").read_text()
    assert CANARY in str(error)  # control


def test_the_foreign_cause_of_an_error_of_ours_is_not_told(tmp_path):
    sitelog.report(tmp_path / "log", "0a1b", raised(DataError("line 3"), ValueError(CANARY)))
    assert CANARY not in (tmp_path / "log").read_text()


def test_failures_are_appended(tmp_path):
    for reference in ("1", "2"):
        sitelog.report(tmp_path / "log", reference, raised(DataError("x")))
    assert [entry["reference"] for entry in entries(tmp_path / "log")] == ["1", "2"]


def test_a_log_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError):
        sitelog.report(tmp_path / "taken" / "log", "1", raised(DataError("x")))


def test_a_flood_of_failures_is_counted_and_not_written(tmp_path):
    now = [1000.0]
    report = sitelog.reporter(tmp_path / "log", clock=lambda: now[0])
    for number in range(sitelog.MAX_A_MINUTE + 500):
        report(f"{number:04x}", raised(DataError("x")))
    found = entries(tmp_path / "log")
    assert len(found) == sitelog.MAX_A_MINUTE + 1
    assert "suppressing" in found[-1]
    now[0] += 60
    report("after", raised(DataError("x")))
    *_, counted, last = entries(tmp_path / "log")
    assert (counted["num_suppressed"], last["reference"]) == (500, "after")


def test_control_few_failures_are_all_written(tmp_path):
    report = sitelog.reporter(tmp_path / "log", clock=lambda: 1000.0)
    for number in range(sitelog.MAX_A_MINUTE):
        report(str(number), raised(DataError("x")))
    assert [entry["reference"] for entry in entries(tmp_path / "log")] == [str(n) for n in range(sitelog.MAX_A_MINUTE)]


def test_people_are_told_a_line_where_a_run_waits_or_is_refused_and_once_while_it_waits(tmp_path):
    told: list[str] = []
    report = sitelog.reporter(tmp_path / "log", tell=told.append)
    for number in range(3):
        report(f"ref-{number}", ApprovalRequired("run 'triage' waits; see: silotune-client review 0a1b"))
    report("ref-3", PolicyRefusedError("train.learning_rate: 0.5", rule="train.learning_rate"))
    report("ref-4", KeyError("a row's text"))
    assert told == [
        "waits for approval: run 'triage' waits; see: silotune-client review 0a1b (reference ref-0)",
        "refused by rule: train.learning_rate: 0.5 (reference ref-3)",
        "failed: internal error KeyError (reference ref-4)",
    ]
