"""A federation of real processes: SuperLink, SuperNodes and agents over TLS, with node keys."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common import events
from common.errors import RemoteError, TransportError
from common.events import EventLog
from server.run import link
from simulations.engines import deployment, loopback_keys
from simulations.engines.deployment import Federation, Site

APPS = Path(__file__).parent / "apps"


def make_sites(folder: Path) -> list[Site]:
    folder.chmod(0o700)
    command = (sys.executable, str(APPS / "loopback_apps.py"))
    paths = [folder / f"{number}.sock" for number in range(2)]
    return [Site(path.stem, (*command, str(path)), path) for path in paths]


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> list[Site]:
    return make_sites(tmp_path_factory.mktemp("s"))


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def running(sites, logs) -> Iterator[Federation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(APPS), os.environ.get("PYTHONPATH", "")]))
        with deployment.federation(sites, logs=logs) as federation:
            assert processes_that_name(federation.keys)
            yield federation
    wait_for(lambda: processes_that_name(federation.keys) == [])


def test_frames_cross_both_ways_and_a_large_one_is_refused(running, tmp_path):
    bundle = link.build_bundle(server_app="loopback_apps:app")
    run_id = running.link.start_run({"run-folder": str(tmp_path)}, bundle=bundle)
    state = deployment.wait(running, run_id, timeout_s=600)
    assert state.is_completed, running.link.log_of(run_id)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["nodes"] == running.link.online_node_ids()
    assert (told["train"], told["evaluate"]) == ("right", "malformed")


def test_a_failed_run_says_why_here_and_a_code_only_to_flower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")  # no run was prepared in it
    log, heard = EventLog(folder / events.FILE), []
    log.listeners.append(heard.append)
    with pytest.raises(RemoteError, match=rf"the run failed: {folder}: not a run folder"):
        deployment.run(make_sites(folder), log=log, config={}, timeout_s=600, num_threads=1)
    assert [(event["kind"], event["error"]) for event in heard] == [("run_failed", "DataError")]
    told_by_flower = (folder / "logs" / deployment.SERVER_LOG).read_text()
    assert "DataError" in told_by_flower
    assert "not a run folder" not in told_by_flower


def test_a_node_without_a_registered_key_does_not_get_in(running, logs):
    before, processes = running.link.online_node_ids(), []
    env = deployment.environment(flwr_home=running.keys / "stranger", num_threads=1)
    try:
        for key in ("unregistered", "none"):
            stranger = Site(f"stranger-{key}", (), running.keys / "nobody.sock")
            command = deployment.supernode_command(running, site=stranger)
            if key == "none":
                at = command.index("--auth-supernode-private-key")
                del command[at : at + 2]
            else:
                loopback_keys.write_node_key(running.keys / f"{stranger.name}.key")
            processes.append(deployment.start(stranger.name, command, logs=logs, env=env))
        for process in processes:
            process.popen.wait(300)
    finally:
        deployment.stop(processes)
    assert all("SuperNode ID:" not in process.log_path.read_text() for process in processes)
    assert running.link.online_node_ids() == before


def test_control_the_same_command_with_a_registered_key_gets_in(running, logs):
    before = running.link.online_node_ids()
    guest = Site("guest", (), running.keys / "nobody.sock")
    running.link.register(loopback_keys.write_node_key(running.keys / "guest.key"), name="guest")
    env = deployment.environment(flwr_home=running.keys / "guest", num_threads=1)
    command = deployment.supernode_command(running, site=guest)
    process = deployment.start("guest", command, logs=logs, env=env)
    try:
        wait_for(lambda: len(running.link.online_node_ids()) == len(before) + 1)
    finally:
        deployment.stop([process])
    wait_for(lambda: running.link.online_node_ids() == before)


def test_plain_text_and_a_foreign_certificate_authority_are_refused(running, tmp_path):
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{running.address}/health")
    loopback_keys.write_certificates(tmp_path)
    with (
        pytest.raises(TransportError, match="did not answer"),
        link.connect(running.address, ca_file=tmp_path / "ca.pem") as connected,
    ):
        connected.online_node_ids()


def test_a_program_that_is_not_there_and_one_that_ends_are_told(tmp_path, logs):
    with pytest.raises(TransportError, match="cannot start"):
        deployment.start("absent", ["/nowhere/agent"], logs=logs, env={})
    process = deployment.start("brief", ["false"], logs=logs, env=dict(os.environ))
    process.popen.wait(60)
    with pytest.raises(TransportError, match=r"brief ended with code 1; see .*brief\.log"):
        process.check()


def test_an_agent_that_cannot_start_ends_the_start_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # so that every command names this folder
    broken = Site("broken", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "s")
    told = pytest.raises(TransportError, match=r"broken-agent ended with code 3; see .*broken-agent\.log")
    with told, deployment.federation([broken], logs=tmp_path / "logs"):
        pytest.fail("started without an agent")
    wait_for(lambda: processes_that_name(tmp_path) == [])
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_sigterm_leaves_nothing_behind(tmp_path):
    code = (
        "import sys; from pathlib import Path; from simulations.engines import deployment as d\n"
        "folder = Path(sys.argv[1])\n"
        "sites = [d.Site('a', ('sleep', '300'), folder / 's')]\n"
        "with d.federation(sites, logs=folder): pass"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2], env=env)
    wait_for(lambda: (tmp_path / "a-supernode.log").exists())
    wait_for(lambda: len(processes_that_name(tmp_path)) >= 3)
    process.terminate()
    assert process.wait(300) == 143
    wait_for(lambda: processes_that_name(tmp_path) == [])


def processes_that_name(folder: Path) -> list[str]:
    return subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()


def wait_for(condition, *, timeout_s: float = 300.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
