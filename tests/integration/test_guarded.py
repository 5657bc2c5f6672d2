"""A federation as in earnest: provisioned, gateway, links, couriers and agents as processes, policies on.

It trains the adapter of the simulation of the same run file, byte for byte. In the gate it has one site, whose policy
lets runs pass without a person; the slow one has three, each of which approves, and one agent has no network at all.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from client.courier import line
from client.join import enroll
from client.memory import consent
from client.memory.history import AUDIT_FILE
from client.review import review
from common import events
from common.errors import ProtocolError, SilotuneError
from common.frame import wire
from common.frame.wire import Frame
from common.run import config
from common.trust import audit_log, identity, kit
from server.folder import run_files
from server.members import changes as admit
from server.run import launch, link
from simulations.engines import deployment, guarded, site_files
from simulations.engines.guarded import FEDERATION, Guarded
from simulations.world import run, world
from simulations.world.world import Source, World
from tests import tiny
from tests.attacks.test_no_route import UNSHARE, can_unshare
from tests.samples import vault

SITES = ("alder", "birch", "cedar")
TIMEOUT_S = 240.0
CHANGES = {
    "model.quantization": '"nf4"',
    "training.local_epochs": "0.0",
    "training.local_steps": "3",
    "federation.num_rounds": "1",
    "federation.round_timeout_s": "120.0",
    "data.same_text": '"count"',  # the rows of this test have five texts
}


@dataclass
class Case:
    """A run and where it goes."""

    folder: Path
    base: Path
    settings: config.RunConfig

    @property
    def names(self) -> list[str]:
        return list(Source.of(self.settings).tables())

    def simulate(self, name: str = "simulated", **changes) -> tuple[str, str]:
        """Play it in this process; hashes of the adapter and of the base."""
        settings, folder = self.settings.model_copy(update=changes), self.folder / name
        engine, log = world.load_engine(settings, num_threads=1), run_files.prepare(settings, folder)
        run.in_process(World(settings, engine, Source.of(settings).sites(), folder), log=log)
        return digest(folder), engine.base_sha256

    @contextmanager
    def federation(self, base_sha256: str, *, prefixes=None, **policy: str):
        """The processes, each site with a policy for this base."""
        epoch = len(self.names) + 1
        rules = {"id": f'"{FEDERATION}"', "operators": f"[]\nroster_epoch_min = {epoch}", **policy}
        source, logs = Source.of(self.settings), self.folder / "logs"
        text = lambda rows: vault.policy_text(base_sha256, path=f'"{rows}"', **rules) + held_out_rules(rows)  # noqa: E731
        with (
            guarded.built(source, source.tables(), base_folder=self.base, policy=text, logs=logs) as built,
            guarded.running(built, logs=logs, prefixes=prefixes or {}) as running,
        ):
            yield running

    def launch(self, running: Guarded, *, resume: bool = False) -> None:
        """What `silotune-server run` does, by the operator's certificate and key."""
        launch.run(
            self.settings,
            address=running.control,
            ca_file=running.ca_file,
            identity=running.operator,
            folder=self.folder / "run",
            base=self.base,
            resume=resume,
            is_quiet=True,
            operator_key=running.operator_key,
            federation=FEDERATION,
            roster_folder=running.folder,
        )


def held_out_rules(rows: Path) -> str:
    """The lines of a policy that allow the file of held-out rows."""
    path, columns = rows.with_name(site_files.HELD_OUT), '["instruction", "output", "patient_id"]'
    return f'\n[data.datasets.held-out]\npath = "{path}"\ncolumns = {columns}\nmax_rows = 100\n'


def make_case(folder: Path, base: Path, sites: Sequence[str], **more: str) -> Case:
    """One round of three QLoRA steps, unless more changes."""
    table = [
        {"site": site, "patient_id": f"{site}-{number // 2}", "instruction": "Code it.", "output": f"{number * 7 % 5}"}
        for site in sites
        for number in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    count = {"federation.min_sites": str(len(sites)), "federation.num_sites": str(len(sites))}
    changes = {**CHANGES, **count, "data.source": f'"{folder / "rows.jsonl"}"', **more}
    return Case(folder, base, tiny.settings(base, changes))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def approve(node_file: Path) -> None:
    """What somebody at a site does when a run waits."""
    node, end = config.load_node(node_file), time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        try:
            desk = review.open_desk(node)
        except SilotuneError:
            desk = None  # the agent has not begun its log
        if desk and desk.history.runs:
            review.decide(desk, "tiny", is_approved=True, by="tester")
            return
        time.sleep(0.2)


def entries(node_file: Path) -> list[audit_log.Entry]:
    """A site's audit log, which must be whole."""
    agent = config.load_node(node_file).agent
    key = identity.public_hex(identity.load(Path(agent.identity_key)))
    return list(audit_log.read(Path(agent.log_folder) / AUDIT_FILE, key))


def check_log(node_file: Path, run_folder: Path, decided: list[str]) -> None:
    """Offer, decision, roster and all that left are in a site's log, about this very run."""
    log = entries(node_file)
    run_sha256 = hashlib.sha256((run_folder / "manifest.json").read_bytes()).hexdigest()
    assert [entry.kind for entry in log if entry.kind not in ("started", "roster", "left")] == decided
    left = [(entry.facts["step"], entry.facts["round_index"]) for entry in log if entry.kind == "left"]
    assert left == [("open", 0), ("evaluate", 0), ("train", 0), ("evaluate", 1)]
    assert {entry.facts["run"] for entry in log if "run" in entry.facts} == {run_sha256}


def check_revocation(running: Guarded, name: str) -> None:
    """A revoked site's agent refuses what it took before, by the roster; the gateway turns its courier away."""
    agent = config.load_node(running.nodes[name]).agent
    (offer,) = (path.read_bytes() for path in (Path(agent.log_folder) / consent.FOLDER).iterdir())
    assert ask(agent, offer).kind == "opened"
    members = sorted((running.folder / "governance").iterdir())[:2]
    admit.revoke(running.folder, name, governance_files=members, now=datetime.datetime.now(datetime.UTC))
    shutil.copy(running.folder / kit.ROSTER, Path(agent.roster_folder) / kit.ROSTER)
    assert ask(agent, offer).head["code"] == "PolicyRefusedError"
    last = entries(running.nodes[name])[-1]
    assert (last.kind, last.facts["rule"]) == ("refused", "roster")
    end = time.monotonic() + 60
    while '"revoked"' not in running.refusals.read_text():
        assert time.monotonic() < end
        time.sleep(0.2)


def ask(agent: config.AgentConfig, frame: bytes) -> Frame:
    """What a courier does with a frame of the kind `open`."""
    return wire.unpack(line.call(Path(agent.socket), "open", frame, 60.0), max_body_bytes=1 << 20)


def test_one_site_behind_gateway_and_link_trains_the_simulations_adapter(tiny_base, tmp_path):
    case = make_case(tmp_path, tiny_base, SITES[:1])
    adapter, base_sha256 = case.simulate()
    with case.federation(base_sha256, min_sites="1", approval='"none"') as running:
        case.launch(running)
        check_log(running.nodes[SITES[0]], tmp_path / "run", ["offered", "opened"])
        check_revocation(running, SITES[0])
    assert [*json.loads((tmp_path / "run" / run_files.NODES_FILE).read_bytes()).values()] == [SITES[0]]
    assert digest(tmp_path / "run") == adapter
    assert case.simulate("other", seed=6)[0] != adapter  # control: the adapter depends on the seed


@pytest.mark.slow
def test_a_run_goes_on_after_its_superlink_was_killed_and_its_site_learns_of_another_one_meanwhile(tiny_base, tmp_path):
    """The couriers come back by themselves, the run finds its site, and its adapter is the simulation's."""
    case = make_case(tmp_path, tiny_base, SITES[:1], **{"federation.num_rounds": "2"})
    adapter, base_sha256 = case.simulate()
    with case.federation(base_sha256, min_sites="1", approval='"none"') as running:
        killing = threading.Thread(target=restart_superlink, args=(case, running), daemon=True)
        killing.start()
        with pytest.raises(ProtocolError, match="interrupted"):
            case.launch(running)
        killing.join(60)
        with link.connect(running.control, ca_file=running.ca_file, identity=running.operator) as connected:
            (node,) = connected.nodes()  # registered as before, without anybody's doing
            wait = partial(deployment.until, timeout_s=90, watched=running.processes)
            wait(lambda: connected.online_node_ids() == [node.node_id], what="the courier")
        admit_another(running, tmp_path)
        case.launch(running, resume=True)  # offered under the next epoch, so the site must have it
        assert digest(tmp_path / "run") == adapter
        assert [entry.facts["epoch"] for entry in entries(running.nodes[SITES[0]]) if entry.kind == "roster"] == [2, 3]


def restart_superlink(case: Case, running: Guarded) -> None:
    """Once the first round is over, kill the SuperLink with all that it started, and start it again."""
    process, path = running.process("superlink"), case.folder / "run" / events.FILE
    proc, end = Path(f"/proc/{process.popen.pid}"), time.monotonic() + TIMEOUT_S
    command, env = ((proc / name).read_text().split("\0")[:-1] for name in ("cmdline", "environ"))
    while not (path.is_file() and "round_finished" in path.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.popen.pid, signal.SIGKILL)
    process.popen.wait()
    variables = dict(pair.split("=", 1) for pair in env)
    again = deployment.start("superlink", command, logs=case.folder, env=variables)
    running.processes[running.processes.index(process)] = again


def admit_another(running: Guarded, folder: Path) -> None:
    """A site joins; the coordinator's folder has the next roster, which the gateway of this federation reads there."""
    words = enroll.enroll(folder / "newcomer", federation_id=FEDERATION, name="dogwood").words
    admit.admit(
        running.folder,
        request_file=folder / "newcomer" / enroll.REQUEST,
        words=words,
        governance_files=sorted((running.folder / "governance").iterdir())[:2],
        now=datetime.datetime.now(datetime.UTC),
    )


@pytest.fixture(scope="module")
def case(tiny_base, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp("three"), tiny_base, SITES)


@pytest.fixture(scope="module")
def expected(case) -> tuple[str, str]:
    return case.simulate()


@pytest.fixture(scope="module")
def played(case, expected):
    """Three sites, still running, after the run."""
    prefixes = {SITES[0]: UNSHARE} if can_unshare() else {}
    with case.federation(expected[1], prefixes=prefixes, min_sites="3") as running:
        approving = threading.Thread(target=lambda: [approve(node) for node in running.nodes.values()], daemon=True)
        approving.start()
        case.launch(running)
        approving.join(1)
        yield running


@pytest.mark.slow
def test_who_waited_has_a_name_and_is_no_trouble_once_it_was_approved(case, played):
    log = events.read(case.folder / "run" / events.FILE)
    waited = [event for event in log if event["kind"] == "site_refused"]
    assert waited
    assert {event["site"] for event in waited} <= set(SITES)
    assert {(event["state"], event["reason"]) for event in waited} == {("waits for approval", "waits for approval")}
    assert "What went wrong" not in (case.folder / "run" / "report.html").read_text()


@pytest.mark.slow
def test_the_federation_trains_the_simulations_adapter_byte_for_byte(case, played, expected):
    assert digest(case.folder / "run") == expected[0]
    assert case.simulate("other", seed=6)[0] != expected[0]


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="this user may not make a network namespace")
def test_one_agent_had_no_route_and_the_others_had(played):
    routes, devices = {}, {}
    for name in SITES:
        proc = Path(f"/proc/{played.process(f'{name}-agent').popen.pid}/net")
        routes[name] = (proc / "route").read_text().splitlines()[1:]
        devices[name] = re.findall(r"^\s*(\S+):", (proc / "dev").read_text(), re.MULTILINE)
    assert (routes[SITES[0]], devices[SITES[0]]) == ([], ["lo"])
    own = Path("/proc/self/net/dev").read_text()
    assert devices[SITES[1]] == re.findall(r"^\s*(\S+):", own, re.MULTILINE)


@pytest.mark.slow
def test_every_site_logged_offer_approval_roster_and_all_that_left(case, played):
    for node_file in played.nodes.values():
        check_log(node_file, case.folder / "run", ["offered", "approved", "opened"])
        assert [entry.facts["epoch"] for entry in entries(node_file) if entry.kind == "roster"] == [4]


@pytest.mark.slow
def test_nothing_went_past_the_gateway_and_nothing_was_refused_there(played):
    assert played.refusals.read_text() == ""
    for name in SITES:
        command = Path(f"/proc/{played.process(f'{name}-courier').popen.pid}/cmdline").read_bytes().decode()
        assert played.superlink not in command
