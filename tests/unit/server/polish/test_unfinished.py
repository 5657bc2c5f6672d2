"""A stage that was stopped in its middle goes on there, and ends with the very adapter that it would have had."""

import json
from pathlib import Path

import pytest
import torch

from common import events
from common.adapter import adapter
from common.event_kinds import Event
from common.run import config
from server.folder import run_files
from server.polish import reward_model, rows, stages, unfinished
from server.run import run
from tests import tiny
from tests.samples import stage_data

STAGE = {"steps": 7, "batch_size": 4, "max_length_tokens": 64, "learning_rate": 1e-2, "held_out_fraction": 0.25}
SAMPLED = {"max_new_tokens": 4, "num_generations": 2, "held_out_fraction": 0.4}
KINDS = {
    "sft": stage_data.instructions(16),
    "cpt": stage_data.texts(16),
    "dpo": stage_data.pairs(16),
    "kto": stage_data.judged(16),
    "orpo": stage_data.pairs(16),
    "simpo": stage_data.pairs(16),
    "reward": stage_data.pairs(16),
    "rloo": stage_data.questions(16),
    "grpo": stage_data.questions(16),
}  # three steps an epoch, so that seven begin a third one


class Trial:
    """One stage that may be stopped and gone on with."""

    def __init__(self, engine, base, folder, kind: str, **settings) -> None:
        own = {
            "rloo": {**SAMPLED, "reward_stage": "judge"},
            "grpo": {**SAMPLED, "reward": "regex", "pattern": "[^A-Z]*"},
        }.get(kind, {})
        own |= {"micro_batch_size": 2} if kind in ("sft", "dpo", "grpo") else {}
        data = stage_data.write(folder / "data.jsonl", KINDS[kind])
        self.stage = stage_data.stage(kind, data=data, **{**STAGE, **own, **settings})
        self.engine, self.place, self.steps = engine, folder / "unfinished", []
        self.rows = rows.load(self.stage, engine, tiny.settings(base).data)
        self.judge = None
        if kind == "rloo":
            first = Trial(engine, base, folder, "reward")
            self.judge = first.play(keeps=False).reward

    def play(self, *, stop_at: int = 0, keeps: bool = True) -> stages.Played:
        self.steps = []

        def tell(step: int, _) -> None:
            self.steps.append(step)
            if step == stop_at:
                raise KeyboardInterrupt

        return stages.play(
            self.stage, self.engine.initial, engine=self.engine, data=self.rows, tell=tell, judge=self.judge,
            unfinished_in=self.place if keeps else None,
        )  # fmt: skip

    def begin(self) -> int:
        return unfinished.begin(self.place, {"stage": self.stage.model_dump(mode="json")})


def outcome(played: stages.Played) -> dict[str, torch.Tensor]:
    return dict(played.tensors) if played.reward is None else reward_tensors(played.reward)


def reward_tensors(reward: reward_model.RewardModel) -> dict[str, torch.Tensor]:
    return {**reward.tensors, "head": reward.head}


def same(left: stages.Played, right: stages.Played) -> bool:
    one, other = outcome(left), outcome(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "sft"]


@pytest.mark.parametrize("kind", ["sft", *SLOW])
@pytest.mark.parametrize("stop_at", [pytest.param(3, marks=pytest.mark.slow), 6])
def test_what_was_stopped_ends_as_if_it_had_not_been(engine, tiny_base, tmp_path, kind, stop_at):
    trial = Trial(engine, tiny_base, tmp_path, kind)
    whole = trial.play(keeps=False)
    assert trial.steps == list(range(1, 8))
    trial.begin()
    with pytest.raises(KeyboardInterrupt):
        trial.play(stop_at=stop_at)
    assert trial.begin() == stop_at - 1
    resumed = trial.play()
    assert trial.steps == list(range(stop_at, 8))  # it did go on, and did not begin anew
    assert same(whole, resumed)
    assert (whole.before, whole.after) == (resumed.before, resumed.after)
    again = trial.play()  # as if stopped after its last step, before its record was written
    assert trial.steps == [7]
    assert same(whole, again)


def test_what_is_not_whole_or_of_another_start_is_not_gone_on_from(engine, tiny_base, tmp_path):
    trial = Trial(engine, tiny_base, tmp_path, "sft")
    trial.begin()
    with pytest.raises(KeyboardInterrupt):
        trial.play(stop_at=4)
    assert [path.name for path in sorted(trial.place.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    assert trial.begin() == 3  # control
    names = {path.name for path in trial.place.rglob("*") if path.is_file()}
    assert names == unfinished.FILES
    assert torch.load(trial.place / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"] != {}
    path = trial.place / "checkpoint-3" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert trial.begin() == 2
    (trial.place / "checkpoint-2" / unfinished.WHOLE_FILE).unlink()
    assert trial.begin() == 0

    with pytest.raises(KeyboardInterrupt):
        trial.play(stop_at=3)
    assert trial.begin() == 2  # control
    assert unfinished.begin(trial.place, {"stage": "another"}) == 0


def test_a_run_that_was_stopped_within_a_stage_goes_on_there_and_leaves_no_pickle(engine, tiny_base, tmp_path):
    data = stage_data.write(tmp_path / "rows.jsonl", stage_data.instructions(16))
    table = {"name": "teach", "kind": "sft", "data": data, **STAGE}
    text = tiny.RUN_FILE.format(base=tiny_base) + f"polish = {json.dumps([table]).replace(': ', ' = ')}\n"
    quick = {"training.batch_size": "12", "federation.num_rounds": "1"}
    settings = config.parse(text, name="run.toml", overrides=quick)

    def play(name: str, *, stop_at: int = 0, resume: bool = False) -> Path:
        adapter.write(engine.model, engine.initial)
        log = run_files.prepare(settings, tmp_path / name, resume=resume)
        log.listeners.append(lambda event: interrupt(event, stop_at))
        fleet = tiny.fleet(tiny.make_nodes(engine))
        run.execute(settings, fleet=fleet, engine=engine, folder=tmp_path / name, log=log, resume=resume)
        return tmp_path / name

    whole = play("whole")
    with pytest.raises(KeyboardInterrupt):
        play("cut", stop_at=5)
    assert list((tmp_path / "cut" / "polish" / "01-teach" / stages.UNFINISHED).glob("checkpoint-4/*.pt"))
    cut = play("cut", resume=True)
    log = events.read(cut / events.FILE)
    assert [event["num_steps_done"] for event in log if event["kind"] == "polish_started"] == [0, 4]
    assert [event["step"] for event in log if event["kind"] == "polish_step"] == [1, 2, 3, 4, 5, 5, 6, 7]
    places = [folder / run_files.EXPORT_FOLDER / "adapter_model.safetensors" for folder in (whole, cut)]
    assert places[0].read_bytes() == places[1].read_bytes()
    for folder in (whole, cut):
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
            ".json", ".jsonl", ".safetensors", ".md",
        }  # fmt: skip


def interrupt(event: Event, stop_at: int) -> None:
    if event["kind"] == "polish_step" and event["step"] == stop_at:
        raise KeyboardInterrupt
