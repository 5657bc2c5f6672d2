"""A coordinator that dies at any step, sites with policies: the resumed run ends with the adapter of a whole one."""

import shutil
from pathlib import Path

import pytest

from common import events, storage
from common.event_kinds import Event
from server.folder import checkpoint, run_files
from server.run import run
from tests import tiny
from tests.samples import vault

SITES = ("north", "south")
POLICY = {"min_local_steps": "1", "min_records": "3", "min_slice": "1"}
CHANGES = {
    "federation.num_rounds": "3",
    "federation.num_sites": "2",
    "training.local_steps": "1",
    "training.local_epochs": "0.0",
}


class World:
    """Coordinator and two sites, all of whose files lie in one folder."""

    def __init__(self, folder: Path, engine, every_rounds: int) -> None:
        self.folder, self.engine = folder, engine
        self.settings = tiny.settings("tiny", {**CHANGES, "evaluation.every_rounds": str(every_rounds)})
        self.sites = [vault.make(folder / name, engine, name=name, count=4, **POLICY) for name in SITES]

    def play(self, tell=lambda: None, *, nodes=None):
        """The run from where its folder is; `tell` is called after every frame and every event."""
        folder = self.folder / "run"
        is_begun = (folder / run_files.RUN_FILE).exists()
        log = run_files.prepare(self.settings, folder, resume=is_begun)
        log.listeners.append(lambda _: tell())

        def telling(site):
            def node(frame: bytes) -> bytes:
                tell()
                answer = site.agent.answer(frame)
                tell()
                return answer

            return node

        fleet = tiny.fleet(nodes or {number: telling(site) for number, site in enumerate(self.sites, start=1)})
        given = {"fleet": fleet, "engine": self.engine, "folder": folder, "log": log, "resume": is_begun}
        return run.execute(self.settings, operator=vault.operator(self.folder), **given).tensors

    def log(self) -> list[Event]:
        return events.read(self.folder / "run" / events.FILE)


def begin(folder: Path, engine, every_rounds: int) -> World:
    """Sites that have approved the run."""
    folder.mkdir()
    world = World(folder, engine, every_rounds)
    changes = {key.replace(".", "__"): value for key, value in CHANGES.items()}
    for site in world.sites:
        site.approve(site.manifest(**changes, evaluation__every_rounds=str(every_rounds)))
    return world


def deaths(folder: Path, engine, every_rounds: int, monkeypatch) -> tuple[list[Path], dict]:
    """What a power cut leaves on the disk after each frame, event and file of a whole run; and the run's adapter."""
    left: list[Path] = []
    world = begin(folder / "whole", engine, every_rounds)

    def cut() -> None:
        left.append(folder / f"cut-{len(left)}")
        shutil.copytree(world.folder, left[-1])

    write = storage.write_atomic

    def writing(path, data, **mode) -> None:
        write(path, data, **mode)
        cut()

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", writing)
        whole = world.play(cut)
    return left, whole


def is_same(first, second) -> bool:
    return all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    ("every_rounds", "step"),  # each place in every schedule is slow
    [(2, 8), *(pytest.param(every, 1, marks=pytest.mark.slow) for every in (1, 2, 3))],
)
def test_a_run_goes_on_wherever_its_coordinator_died(engine, tmp_path, every_rounds, step, monkeypatch):
    left, whole = deaths(tmp_path, engine, every_rounds, monkeypatch)
    assert len(left) > 50
    for folder in left[step - 1 :: step]:
        world = World(folder, engine, every_rounds)
        assert is_same(world.play(), whole), folder.name
        told = {event["num_rounds"] for event in world.log() if event["kind"] == "evaluated"}
        assert told == {0, *range(every_rounds, 4, every_rounds), 3}
        assert not [event for event in world.log() if event["kind"] in ("not_evaluated", "site_failed")]


def test_an_evaluation_that_comes_after_a_later_step_stays_refused_and_ends_no_run(engine, tmp_path):
    world = begin(tmp_path / "run", engine, 1)
    second, asked = world.sites[1].agent.answer, []

    def dies(frame: bytes) -> bytes:
        asked.append(frame)
        if len(asked) == 5:  # opened, evaluated, trained, evaluated
            raise KeyboardInterrupt
        return second(frame)

    with pytest.raises(KeyboardInterrupt):  # north has trained in the second round
        world.play(nodes={1: world.sites[0].agent.answer, 2: dies})
    assert ("train", 1) in world.sites[0].sent()
    fed = tiny.federation(engine, world.folder / "run", {1: world.sites[0].agent.answer}, world.settings)
    fed.offer, fed.trail = (operator := vault.operator(world.folder)).make_offer(fed.manifest), operator.trail
    fed.join()
    state = checkpoint.load(fed.folder, engine.tensor_specs, num_rounds=1, run_sha256=fed.manifest.sha256).tensors
    assert fed.evaluate(state, num_rounds=1, generate=False) is not None  # control: it was asked before
    assert fed.evaluate(engine.initial, num_rounds=1, generate=False) is None  # another adapter
    last = world.sites[0].log()[-1]
    assert (last.kind, last.facts["rule"]) == ("refused", "rounds")
    assert world.log()[-1]["kind"] == "not_evaluated"
