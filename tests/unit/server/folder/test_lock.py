"""One process at work in a run's folder, and watching it from others."""

import http.server
import subprocess
import sys
import threading

import pytest
from flwr.supercore.control import ControlHttpClient

from common import events
from common.errors import DataError, ProtocolError, RunBusyError, TransportError
from common.event_kinds import RunFailed, RunFinished
from common.events import EventLog
from server.folder import lock, run_files
from server.gate import decide
from server.report import status
from server.run import launch, run
from server.run.link import Link
from tests import tiny
from tests.samples import events as sample_events

HOLD = """
import sys
from pathlib import Path
from server.folder import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, tiny_base):
    """A run whose last event is of its first round."""
    log = run_files.prepare(tiny.settings(tiny_base), tmp_path / "run")
    for event in sample_events.LOG:
        log.append(sample_events.whole(event))
    return tmp_path / "run"


@pytest.fixture
def other(folder):
    """Another process at work in that folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_has_one_process_at_work_and_a_killed_one_gives_it_up(folder, other):
    assert lock.is_live(folder)
    with pytest.raises(RunBusyError, match="another process"), lock.hold(folder):
        pass
    other.kill()
    other.wait()
    assert not lock.is_live(folder)
    with lock.hold(folder), lock.hold(folder):  # twice by one thread is once
        assert lock.is_live(folder)
        caught = []

        def second() -> None:
            try:
                with lock.hold(folder):
                    pass
            except RunBusyError as error:
                caught.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(caught) == 1
    assert not lock.is_live(folder)


def test_nothing_is_written_beside_a_live_coordinator(folder, other, engine, tiny_base):
    settings, before = run_files.stored_settings(folder), (folder / events.FILE).read_bytes()
    log, names = EventLog(folder / events.FILE), sorted(path.name for path in folder.iterdir())
    with pytest.raises(RunBusyError):
        run_files.prepare(settings, folder, resume=True)
    with pytest.raises(RunBusyError) as caught:
        run.execute(settings, fleet=tiny.fleet({}), engine=engine, folder=folder, log=log, resume=True)
    assert run_files.report_failure(log, caught.value) == "RunBusyError"
    with pytest.raises(RunBusyError):
        decide.judge_again(folder, run.manifest_of(settings, engine))
    assert (folder / events.FILE).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == names


def test_status_tells_a_live_run_from_a_killed_one(folder, other):
    found = status.read(folder)
    assert (found["status"], found["is_live"]) == ("running, 1 of 2 rounds", True)
    other.kill()
    other.wait()
    found = status.read(folder)
    assert (found["status"].split(",")[0], found["is_live"]) == ("interrupted", False)
    assert "--resume" in found["status"]
    assert "interrupted" in (folder / "report.html").read_text()


def test_status_shows_what_can_be_read_of_damaged_events_and_a_resume_names_the_line(folder, tiny_base):
    path = folder / events.FILE
    lines = path.read_text().splitlines(keepends=True)
    for number in range(1, len(lines) + 1):
        path.write_text("".join([*lines[: number - 1], "{cut\n", *lines[number:]]))
        found = status.read(folder)
        assert found["damaged_events"] == [number]
        assert f"sed -i '{number}d' {path}" in found["damage"]
        assert status.render(found).row_count > 4
        with pytest.raises(DataError, match=f"line {number} is not a JSON event"):
            events.read(path)
    path.write_text("".join(lines))
    assert (status.read(folder)["damaged_events"], len(events.read(path))) == ([], len(lines))  # control


def test_a_run_can_be_watched_again_to_its_end(folder, other, capsys):
    end = {"adapter": "adapter", "num_rounds": 2, "stage": "final"}
    log = EventLog(folder / events.FILE)
    threading.Timer(1.5, lambda: (log.append(RunFinished(**end)), other.kill())).start()
    assert launch.watch(folder, is_quiet=True)["status"] == "finished"


def test_watching_a_run_whose_process_is_gone_says_how_to_go_on(folder, capsys):
    with pytest.raises(ProtocolError, match=r"interrupted.*--resume"):
        launch.watch(folder, is_quiet=True)
    EventLog(folder / events.FILE).append(RunFailed(error="TooFewSitesError", reason="too few", exit_code=6))
    with pytest.raises(ProtocolError, match="the run failed: too few"):
        launch.watch(folder, is_quiet=True)


def test_a_gateway_that_answers_502_is_asked_again_less_and_less_often(folder, other):
    answered = []

    class BadGateway(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answered.append(self.path)
            self.send_error(502)

        def log_message(self, *_: object) -> None:
            pass

    now = [0.0]
    with http.server.HTTPServer(("127.0.0.1", 0), BadGateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = ControlHttpClient(f"http://127.0.0.1:{server.server_port}", interceptors=[])
        is_over = launch.Poll(lambda: Link(client).state(1).is_finished, folder=folder, clock=lambda: now[0])
        for now[0] in range(1000):
            assert not is_over()  # a process is at work there
        assert 30 < len(answered) < 50  # after 1, 2, 4, 8, 16 and then each 30 s
        other.kill()
        other.wait()
        now[0] += 60.0
        with pytest.raises(TransportError, match="silotune-server watch"):
            is_over()
        server.shutdown()
        client.close()
    again = launch.Poll(lambda: True, folder=folder)  # control
    assert again()
