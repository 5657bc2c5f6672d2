import json
import os
from pathlib import Path

import pytest

from common import event_kinds, events
from common.errors import DataError, StorageError
from common.event_kinds import PolishStep, Stopped, Unknown, Warned
from common.events import EventLog, Tail
from tests.samples import events as samples


@pytest.fixture
def log(tmp_path):
    return EventLog(tmp_path / "run" / "events.jsonl", clock=lambda: 12.34567)


def reasons(path: Path) -> list[str]:
    return [event.reason for event in events.read(path)]


def test_an_event_is_a_line_with_kind_time_and_fields(log):
    log.append(Stopped(num_rounds=3, reason="zürich"))
    assert log.path.read_text() == '{"kind": "stopped", "time": 12.346, "num_rounds": 3, "reason": "zürich"}\n'


@pytest.mark.parametrize("kind", sorted(event_kinds.KINDS))
def test_an_event_of_each_kind_is_read_as_it_was_written(log, kind):
    written = log.append(samples.event(kind))
    assert events.read(log.path) == [written]
    assert json.loads(log.path.read_text()) == written.as_dict()


def test_what_a_newer_version_wrote_is_kept_and_passed_over(log):
    log.append(Warned(reason="before"))
    newer = ['{"kind": "from the future", "time": 1, "who": [1]}', '{"kind": "warned", "reason": "a", "colour": "red"}']
    with log.path.open("a") as file:
        file.write("\n".join(newer) + "\n")
    _, unknown, known = events.read(log.path)
    assert (type(unknown), unknown.name, known.reason) == (Unknown, "from the future", "a")
    assert [unknown.line, known.line] == newer


@pytest.mark.parametrize(
    "line",
    ['{"kind": "warned"}', '{"kind": "warned", "reason": 7}', '{"kind": "stopped", "num_rounds": "x", "reason": ""}'],
)
def test_a_line_whose_fields_are_not_those_of_its_kind_is_no_event(log, line):
    log.path.parent.mkdir()
    log.path.write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        events.read(log.path)


def test_events_are_read_in_order(log):
    written = [log.append(Warned(reason=str(number))) for number in range(3)]
    assert events.read(log.path) == written


def test_listeners_hear_of_an_event_once_it_is_on_disk(log):
    heard = []
    log.listeners.append(lambda event: heard.append((event.reason, len(events.read(log.path)))))
    log.append(Warned(reason="first"))
    log.append(Warned(reason="second"))
    assert heard == [("first", 1), ("second", 2)]


def test_a_last_line_that_was_cut_is_left_out(log):
    log.append(Warned(reason="whole"))
    with log.path.open("a") as file:
        file.write('{"kind": "cu')
    assert reasons(log.path) == ["whole"]


def test_a_line_that_was_cut_by_a_crash_does_not_spoil_those_that_follow(log):
    log.append(Warned(reason="whole"))
    with log.path.open("a") as file:
        file.write('{"kind": "cu')
    EventLog(log.path).append(Warned(reason="after the crash"))
    assert reasons(log.path) == ["whole", "after the crash"]


def test_a_line_that_did_not_fit_on_the_disk_does_not_spoil_those_that_follow(log, monkeypatch):
    log.append(Warned(reason="whole"))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:12]))
        with pytest.raises(StorageError, match="No space left"):
            log.append(Warned(reason="lost"))
    log.append(Warned(reason="space again"))
    assert reasons(log.path) == ["whole", "space again"]


def test_a_file_that_is_one_cut_line_begins_anew(log):
    log.path.parent.mkdir()
    log.path.write_text('{"kind": "cu')
    log.append(Warned(reason="first"))
    assert reasons(log.path) == ["first"]


def test_a_last_line_that_was_cut_within_a_character_is_left_out(log):
    log.append(Warned(reason="zürich"))
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
        log.append(PolishStep(stage="a", step=1, num_steps=2, figures={"loss": float("nan")}))
    assert not log.path.exists()


def test_a_disk_that_refuses_is_an_error_with_its_own_exit_code(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError) as caught:
        EventLog(tmp_path / "taken" / "events.jsonl").append(Warned(reason="any"))
    assert caught.value.exit_code == 8


def test_text_that_no_encoding_takes_costs_a_character_and_not_the_run(log):
    log.append(Warned(reason="half a pair \ud800"))
    assert events.read(log.path)[0].reason == "half a pair ?"


def followed(path: Path, **given: object) -> list[str]:
    return [event.kind for event in events.follow(path, poll_s=0.001, **given)]


@pytest.mark.parametrize("last", ["run_finished", "run_failed"])
def test_follow_ends_with_the_run(log, last):
    for kind in ("run_started", last):
        log.append(samples.event(kind))
    assert followed(log.path, is_over=lambda: False) == ["run_started", last]


def test_follow_gives_events_that_come_while_it_looks(log):
    calls = []

    def write_more() -> bool:
        calls.append(log.append(samples.event("run_finished" if len(calls) == 2 else "round_started")))
        return False

    assert followed(log.path, is_over=write_more) == ["round_started", "round_started", "run_finished"]


def test_follow_gives_what_was_written_before_the_writer_went(log):
    def go() -> bool:
        log.append(Warned(reason="last words"))
        return True

    assert followed(log.path, is_over=go) == ["warned"]


def test_follow_ends_where_nothing_was_ever_written(tmp_path):
    assert followed(tmp_path / "events.jsonl", is_over=lambda: True) == []


def test_follow_passes_over_an_earlier_try(log):
    for kind in ("run_started", "run_failed", "run_started", "run_finished"):
        log.append(samples.event(kind))
    assert followed(log.path, is_over=lambda: True, num_skipped=2) == ["run_started", "run_finished"]


def test_follow_waits_for_the_end_of_a_line(log):
    log.append(Warned(reason="whole"))
    with log.path.open("a") as file:
        file.write(json.dumps({"kind": "half"})[:9])
    assert followed(log.path, is_over=lambda: True) == ["warned"]


def looked(tail: Tail) -> list[str]:
    return [event.reason for event in tail.look()]


def test_a_tail_reads_each_line_once_and_a_cut_one_when_it_is_whole(log):
    tail, second = Tail(log.path), json.dumps({"kind": "warned", "reason": "zürich"}).encode() + b"\n"
    assert (looked(tail), tail.num_starts) == ([], 0)  # no file yet
    log.append(Warned(reason="first"))
    assert looked(tail) == ["first"]
    for end in range(len(second)):
        with log.path.open("ab") as file:
            file.write(second[end : end + 1])
        assert looked(tail) == ([] if end < len(second) - 1 else ["zürich"])
    assert (looked(tail), tail.num_starts) == ([], 1)


def test_a_tail_reads_no_more_than_was_added(log, monkeypatch):
    for number in range(200):
        log.append(Warned(reason=str(number)))
    tail, parsed, real = Tail(log.path), [], event_kinds.parse
    tail.look()
    monkeypatch.setattr(event_kinds, "parse", lambda line: parsed.append(line) or real(line))
    log.append(Warned(reason="new"))
    assert (looked(tail), len(parsed)) == (["new"], 1)
    assert len(events.read(log.path)) == 201  # control: a reader without a place parses all
    assert len(parsed) == 202


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def cut_within_a_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def replaced_by_another_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def rewritten_longer(path: Path) -> None:
    path.write_text("".join(json.dumps({"kind": "warned", "reason": f"other {n}"}) + "\n" for n in range(9)))


@pytest.mark.parametrize("change", [cut_to_nothing, cut_within_a_line, replaced_by_another_file, rewritten_longer])
def test_a_tail_begins_anew_with_a_log_that_was_truncated_or_replaced(log, change):
    for number in range(3):
        log.append(Warned(reason=str(number)))
    tail = Tail(log.path)
    tail.look()
    change(log.path)
    expected = [event.reason for event in events.read(log.path)]
    assert (looked(tail), tail.num_starts) == (expected, 2)
    log.append(Warned(reason="after"))
    assert looked(tail) == ["after"]


def test_a_tail_names_damaged_lines_by_their_number_in_the_file(log):
    log.append(Warned(reason="first"))
    tail = Tail(log.path)
    tail.look()
    with log.path.open("a") as file:
        file.write('not json\n{"kind": "warned", "reason": "third"}\n')
    assert (looked(tail), tail.damaged) == (["third"], [2])
    rewritten_longer(log.path)
    assert (len(looked(tail)), tail.damaged) == (9, [])
