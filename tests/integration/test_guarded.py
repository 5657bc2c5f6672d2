"""A federation as in earnest: provisioned, gateway, links, couriers and agents as processes, policies and approvals on.

It trains the adapter of the simulation of the same run file, byte for byte, and one agent has no network at all.
"""

import hashlib
import json
import re
import threading
import time
from pathlib import Path

import pytest

from client import review
from common import audit, config, identity
from common.errors import SilotuneError
from server import launch
from server import run as server_run
from simulations import guarded, run, world
from simulations.guarded import FEDERATION, Guarded
from tests import tiny, vault
from tests.attacks.test_no_route import UNSHARE, can_unshare

SITES = ("alder", "birch", "cedar")
TIMEOUT_S = 240.0
CHANGES = {
    "model.quantization": '"nf4"',
    "training.local_epochs": "0.0",
    "training.local_steps": "3",
    "federation.num_rounds": "1",
    "federation.min_sites": "3",
    "federation.round_timeout_s": "120.0",
}


@pytest.fixture(scope="module")
def settings(tiny_base, tmp_path_factory) -> config.RunConfig:
    """Three sites, one round of three QLoRA steps."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    table = [
        {"site": site, "patient_id": f"{site}-{number // 2}", "instruction": "Code it.", "output": f"{number * 7 % 5}"}
        for site in SITES
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return tiny.settings(tiny_base, {**CHANGES, "data.source": f'"{path}"'})


def simulated(settings: config.RunConfig, folder: Path) -> tuple[str, str]:
    """Hashes of the adapter and of the base."""
    engine, log = world.load_engine(settings, num_threads=1), server_run.prepare(settings, folder)
    run.in_process(settings, sites=world.load_sites(settings), engine=engine, folder=folder, log=log)
    return digest(folder), engine.base_sha256


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory) -> tuple[str, str]:
    return simulated(settings, tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="module")
def played(settings, expected, tiny_base, tmp_path_factory):
    """The federation, still running, after the run; and the run's folder."""
    folder = tmp_path_factory.mktemp("played")

    def policy(rows: Path) -> str:
        return vault.policy_text(
            expected[1], id=f'"{FEDERATION}"', operators="[]\nroster_epoch_min = 4", path=f'"{rows}"', min_sites="3"
        )

    prefixes = {SITES[0]: UNSHARE} if can_unshare() else {}
    started = guarded.federation(
        world.load_tables(settings),
        settings=settings,
        base_folder=tiny_base,
        policy=policy,
        logs=folder / "logs",
        prefixes=prefixes,
    )
    with started as running:
        play(running, settings, folder=folder / "run", base=tiny_base)
        yield running, folder / "run"


def play(running: Guarded, settings: config.RunConfig, *, folder: Path, base: Path) -> None:
    """Launch the run by the operator's certificate and key, and let each site approve what it was offered."""
    approving = threading.Thread(target=lambda: [approve(node) for node in running.nodes.values()], daemon=True)
    approving.start()
    launch.run(
        settings,
        address=running.control,
        ca_file=running.ca_file,
        identity=running.operator,
        folder=folder,
        base=base,
        resume=False,
        is_quiet=True,
        operator_key=running.operator_key,
        federation=FEDERATION,
    )
    approving.join(1)
    assert not approving.is_alive()


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


def entries(node_file: Path) -> list[audit.Entry]:
    """A site's audit log, which must be whole."""
    agent = config.load_node(node_file).agent
    key = identity.public_hex(identity.load(Path(agent.identity_key)))
    return list(audit.read(Path(agent.log_folder) / "audit.jsonl", key))


def test_the_federation_trains_the_simulations_adapter_byte_for_byte(played, expected):
    assert digest(played[1]) == expected[0]


def test_control_the_adapter_depends_on_the_seed(settings, expected, tmp_path):
    other = simulated(settings.model_copy(update={"seed": 6}), tmp_path)
    assert other[0] != expected[0]
    assert other[1] == expected[1]


@pytest.mark.skipif(not can_unshare(), reason="this user may not make a network namespace")
def test_one_agent_had_no_route_and_the_others_had(played):
    running, _ = played
    routes, devices = {}, {}
    for name in SITES:
        proc = Path(f"/proc/{running.process(f'{name}-agent').popen.pid}/net")
        routes[name] = (proc / "route").read_text().splitlines()[1:]
        devices[name] = re.findall(r"^\s*(\S+):", (proc / "dev").read_text(), re.MULTILINE)
    assert (routes[SITES[0]], devices[SITES[0]]) == ([], ["lo"])
    own = Path("/proc/self/net/dev").read_text()
    assert devices[SITES[1]] == re.findall(r"^\s*(\S+):", own, re.MULTILINE)


def test_every_site_logged_offer_approval_roster_and_all_that_left(played):
    running, folder = played
    run_sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for node_file in running.nodes.values():
        log = entries(node_file)
        assert [entry.facts["epoch"] for entry in log if entry.kind == "roster"] == [4]
        decided = [entry.kind for entry in log if entry.kind in ("offered", "approved", "opened", "denied", "refused")]
        assert decided == ["offered", "approved", "opened"]
        left = [(entry.facts["step"], entry.facts["round_index"]) for entry in log if entry.kind == "left"]
        assert left == [("open", 0), ("evaluate", 0), ("train", 0), ("evaluate", 1)]
        assert {entry.facts["run"] for entry in log if "run" in entry.facts} == {run_sha256}


def test_nothing_went_past_the_gateway_and_nothing_was_refused_there(played):
    running, _ = played
    assert running.refusals.read_text() == ""
    for name in SITES:
        command = Path(f"/proc/{running.process(f'{name}-courier').popen.pid}/cmdline").read_bytes().decode()
        assert running.superlink not in command
