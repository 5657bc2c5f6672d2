import errno
import json
import os
from pathlib import Path

import pytest

from common import events
from common.errors import DataError, StorageError
from common.events import EventLog


@pytest.fixture
def log(tmp_path):
    return EventLog(tmp_path / "run" / "events.jsonl", clock=lambda: 12.34567)


def test_an_event_is_a_line_with_kind_time_and_fields(log):
    log.append("site_trained", site="zürich", loss=0.5)
    assert log.path.read_text() == '{"kind": "site_trained", "time": 12.346, "site": "zürich", "loss": 0.5}\n'


def test_events_are_read_in_order(log):
    written = [log.append("tick", number=number) for number in range(3)]
    assert events.read(log.path) == written


def test_listeners_hear_of_an_event_once_it_is_on_disk(log):
    heard = []
    log.listeners.append(lambda event: heard.append((event["kind"], len(events.read(log.path)))))
    log.append("first")
    log.append("second")
    assert heard == [("first", 1), ("second", 2)]


def test_a_last_line_that_was_cut_is_left_out(log):
    log.append("whole")
    with log.path.open("a") as file:
        file.write('{"kind": "cu')
    assert [event["kind"] for event in events.read(log.path)] == ["whole"]


def test_a_line_that_was_cut_by_a_crash_does_not_spoil_those_that_follow(log):
    log.append("whole")
    with log.path.open("a") as file:
        file.write('{"kind": "cu')
    EventLog(log.path).append("after the crash")
    assert [event["kind"] for event in events.read(log.path)] == ["whole", "after the crash"]


def test_a_line_that_did_not_fit_on_the_disk_does_not_spoil_those_that_follow(log, monkeypatch):
    log.append("whole")
    real_open = Path.open

    def full(path, *_):
        with real_open(path, "a") as file:
            file.write('{"kind": "cu')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(StorageError, match="No space left"):
            log.append("lost")
    log.append("space again")
    assert [event["kind"] for event in events.read(log.path)] == ["whole", "space again"]


def test_a_file_that_is_one_cut_line_begins_anew(log):
    log.path.parent.mkdir()
    log.path.write_text('{"kind": "cu')
    log.append("first")
    assert [event["kind"] for event in events.read(log.path)] == ["first"]


def test_a_last_line_that_was_cut_within_a_character_is_left_out(log):
    log.append("whole", site="zürich")
    data = log.path.read_bytes()
    log.path.write_bytes(data + data[: data.index("ü".encode()) + 1])
    assert len(events.read(log.path)) == 1


def test_a_broken_line_in_the_middle_is_an_error_that_names_the_file(log):
    log.path.parent.mkdir()
    log.path.write_text('{"kind": "a"}\nnot json\n{"kind": "b"}\n')
    with pytest.raises(DataError, match=r"events\.jsonl"):
        events.read(log.path)


@pytest.mark.parametrize("line", ["7", "null", "[]", '"kind"', '{"time": 1}', '{"kind": 7}'])
def test_a_line_that_is_no_event_is_an_error(log, line):
    log.path.parent.mkdir()
    log.path.write_text(line + "\n")
    with pytest.raises(DataError):
        events.read(log.path)


def test_a_missing_file_asks_whether_this_is_a_run(tmp_path):
    with pytest.raises(DataError, match="run folder"):
        events.read(tmp_path / "events.jsonl")


def test_numbers_that_json_does_not_have_are_a_mistake_of_the_caller(log):
    with pytest.raises(ValueError, match="JSON"):
        log.append("bad", loss=float("nan"))
    assert not log.path.exists()


def test_a_disk_that_refuses_is_an_error_with_its_own_exit_code(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError) as caught:
        EventLog(tmp_path / "taken" / "events.jsonl").append("any")
    assert caught.value.exit_code == 8


def test_text_that_no_encoding_takes_costs_a_character_and_not_the_run(log):
    log.append("odd", reason="half a pair \ud800")
    assert events.read(log.path)[0]["reason"] == "half a pair ?"


def followed(path: Path, **given: object) -> list[str]:
    return [event["kind"] for event in events.follow(path, poll_s=0.001, **given)]


@pytest.mark.parametrize("last", ["run_finished", "run_failed"])
def test_follow_ends_with_the_run(log, last):
    for kind in ("run_started", last):
        log.append(kind)
    assert followed(log.path, is_over=lambda: False) == ["run_started", last]


def test_follow_gives_events_that_come_while_it_looks(log):
    calls = []

    def write_more() -> bool:
        calls.append(log.append("run_finished" if len(calls) == 2 else f"round_{len(calls)}"))
        return False

    assert followed(log.path, is_over=write_more) == ["round_0", "round_1", "run_finished"]


def test_follow_gives_what_was_written_before_the_writer_went(log):
    def go() -> bool:
        log.append("last words")
        return True

    assert followed(log.path, is_over=go) == ["last words"]


def test_follow_ends_where_nothing_was_ever_written(tmp_path):
    assert followed(tmp_path / "events.jsonl", is_over=lambda: True) == []


def test_follow_passes_over_an_earlier_try(log):
    for kind in ("run_started", "run_failed", "run_started", "run_finished"):
        log.append(kind)
    assert followed(log.path, is_over=lambda: True, num_skipped=2) == ["run_started", "run_finished"]


def test_follow_waits_for_the_end_of_a_line(log):
    log.append("whole")
    with log.path.open("a") as file:
        file.write(json.dumps({"kind": "half"})[:9])
    assert followed(log.path, is_over=lambda: True) == ["whole"]
