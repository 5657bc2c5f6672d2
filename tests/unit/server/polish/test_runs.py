"""Stages within a run: events, files, cards, resuming, and what is refused."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common import events
from common.adapter import adapter
from common.errors import ConfigError, DataError, GateRefused, ModelError
from common.event_kinds import Event
from common.model.base import Engine
from common.run import config
from common.run.schema.gate import GateConfig
from server.evaluate.figures import bootstrap
from server.evaluate.figures.bootstrap import Scores
from server.export import adapter as export
from server.folder import run_files
from server.gate import decide
from server.polish import stages
from server.report import report, status
from server.run import finish, polish, run
from tests import tiny
from tests.samples import stage_data
from tests.samples.events import event, view, whole

CHANGES = {"training.batch_size": "12", "federation.num_rounds": "1"}
# The stages train on the very rows of the coordinator, so that its figures move.
STAGE = {"steps": 2, "batch_size": 4, "max_length_tokens": 64, "learning_rate": 1e-2, "overlap": "allow"}


@dataclass(frozen=True)
class World:
    """Runs of one run file, with a reward model between two other stages, in one folder."""

    engine: Engine
    settings: config.RunConfig
    folder: Path

    def play(self, name: str, *, resume: bool = False, stop_at: str = "") -> Path:
        """A run; `stop_at` names a stage in whose first step it is interrupted."""
        adapter.write(self.engine.model, self.engine.initial)
        folder = self.folder / name
        log = run_files.prepare(self.settings, folder, resume=resume)

        def listen(event: Event) -> None:
            if event["kind"] == "polish_step" and event["stage"] == stop_at:
                raise KeyboardInterrupt

        log.listeners.append(listen)
        fleet = tiny.fleet(tiny.make_nodes(self.engine))
        run.execute(self.settings, fleet=fleet, engine=self.engine, folder=folder, log=log, resume=resume)
        return folder

    def copy(self, name: str) -> Path:
        """A finished run that a test may spoil."""
        return Path(shutil.copytree(self.folder / "whole", self.folder / name))


@pytest.fixture(scope="module")
def world(shared_engine, tiny_base, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("polish")
    pairs = stage_data.write(folder / "pairs.jsonl", stage_data.pairs(10))
    rows = stage_data.write(folder / "rows.jsonl", stage_data.instructions(10))
    kinds = [("teach", "sft", rows), ("judge", "reward", pairs), ("align", "dpo", pairs)]
    tables = [{"name": name, "kind": kind, "data": data, **STAGE} for name, kind, data in kinds]
    task = f"{{name = 'server-data', kind = 'answers', data = '{rows}', metrics = ['exact_match']}}"
    own = {"evaluation.server_data": rows, "evaluation.tasks": f"[{task}]", "evaluation.max_new_tokens": "2"}
    plain = json.loads(config.resolved_json(tiny.settings(tiny_base, {**CHANGES, **own})))
    made = World(shared_engine, config.RunConfig.model_validate({**plain, "polish": tables}), folder)
    made.play("whole")
    return made


def of(folder, kind: str) -> list[Event]:
    return [event for event in events.read(folder / events.FILE) if event["kind"] == kind]


def exported(folder) -> bytes:
    return (folder / run_files.EXPORT_FOLDER / "adapter_model.safetensors").read_bytes()


def test_a_run_goes_on_into_its_stages_and_tells_of_them(world):
    folder = world.folder / "whole"
    assert [event["stage"] for event in of(folder, "polish_started")] == ["teach", "judge", "align"]
    assert [event["trainer"] for event in of(folder, "polish_finished")] == ["sft", "reward", "dpo"]
    assert {event["step"] for event in of(folder, "polish_step")} == {1, 2}
    assert of(folder, "polish_finished")[2]["before"]["margin"] == 0.0
    assert [event["stage"] for event in of(folder, "measured")] == [
        "base",
        "final",
        "polish-01-teach",
        "polish-03-align",
    ]
    assert sorted(path.name for path in (folder / "polish").iterdir()) == ["01-teach", "02-judge", "03-align"]
    assert [path.parent.name for path in folder.rglob("reward_model.safetensors")] == ["02-judge"]
    card = (folder / run_files.EXPORT_FOLDER / "README.md").read_text()
    assert "| polish | teach (sft, 2 steps), then judge (reward, 2 steps), then align (dpo, 2 steps) |" in card
    assert "not covered by any privacy guarantee" in card
    assert "costs the sites' units nothing" not in card  # this run's adapter was not private
    page = report.render(view(events.read(folder / events.FILE)))
    assert "<h2>Polish</h2>" in page
    assert "align (dpo): loss" in str(status.read(folder)["finished_stages"])
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md", ".html"}


def test_each_stage_is_compared_with_the_one_before_by_the_paired_bootstrap(world):
    folder = world.folder / "whole"
    found = {event["stage"]: event for event in of(folder, "measured")}
    kept = {name: json.loads((folder / "scores" / f"{name}.json").read_bytes())["scores"] for name in found}

    def rows(stage: str) -> Scores:
        one = kept[stage]["server-data.exact_match"]
        return Scores(tuple(map(tuple, one["rows"])), one["statistic"], one["higher_is_better"])

    for before, stage in (("final", "polish-01-teach"), ("polish-01-teach", "polish-03-align")):
        told = found[stage]["gains"]["previous"]["server-data.exact_match"]
        assert told == dataclasses.asdict(bootstrap.gain(rows(stage), rows(before)))
        assert set(found[stage]["gains"]) == {"base", "previous"}
    assert set(found["final"]["gains"]) == {"base"}  # control: rounds are not compared with each other
    assert "previous" in report.render(view(events.read(folder / events.FILE)))


def test_a_private_run_s_card_says_what_polish_costs_and_what_is_not_covered(tiny_base, engine):
    from common.run.manifest import RunManifest

    private = {
        "privacy.mode": "unit", "privacy.noise_multiplier": "1.0", "privacy.sampling_prob": "0.1",
        "training.local_epochs": "0.0", "training.local_steps": "2",
    }  # fmt: skip
    manifest = RunManifest(tiny.settings(tiny_base, private), engine.base_sha256, engine.tensor_specs)
    done = {
        "kind": "polish_finished", "stage": "align", "trainer": "dpo", "number": 1, "num_stages": 1, "num_rows": 9,
        "num_held_out": 1, "num_steps": 2, "before": {"margin": 0.0}, "after": {"margin": 1.0}, "seconds": 1.0,
    }  # fmt: skip
    text = export.card(manifest, num_rounds=1, sites={"north": 3}, log=[whole(done)], kind="adapter")
    assert "it costs the sites' units nothing" in " ".join(text.split())
    assert "not covered by any privacy guarantee" in text
    without = export.card(manifest, num_rounds=1, sites={"north": 3}, log=[], kind="adapter")
    assert "olish" not in without


def test_an_interrupted_run_ends_with_the_adapter_it_would_have_had(world):
    with pytest.raises(KeyboardInterrupt):
        world.play("cut", stop_at="align")
    assert not (world.folder / "cut" / "polish" / "03-align" / stages.RECORD_FILE).exists()
    folder = world.play("cut", resume=True)
    assert exported(folder) == exported(world.folder / "whole")
    assert [event["stage"] for event in of(folder, "polish_finished")] == ["teach", "judge", "align"]


def test_stages_can_be_played_later_without_the_sites(world, tiny_base, tmp_path):
    folder = world.copy("later")
    (folder / "polish" / "03-align" / stages.RECORD_FILE).unlink()
    half = finish.stored(folder, num_rounds=0)
    assert [event["stage"] for event in half.log if event["kind"] == "polish_finished"] == ["teach", "judge"]
    with (tmp_path / "screen").open("w") as screen:
        told = polish.polish(folder, base=tiny_base, num_threads=1, console=Console(file=screen))
    assert told["stages"] == ["teach", "judge", "align"]
    assert exported(folder) == exported(world.folder / "whole")
    plain, last = finish.stored(folder, num_rounds=1), finish.stored(folder, num_rounds=0)
    assert not [event for event in plain.log if event["kind"].startswith("polish")]
    assert not all(torch.equal(plain.tensors[name], last.tensors[name]) for name in plain.tensors)


def test_stages_that_changed_the_adapter_come_before_rounds_where_one_is_chosen_for_export(world):
    folder = world.folder / "whole"
    found = list(decide.of_run(folder, run_files.stored_manifest(folder)))
    assert [one.stage for one in found] == ["polish-03-align", "polish-01-teach", "final"]
    assert [one.names for one in found] == [("teach", "judge", "align"), ("teach",), ()]
    finished = {event["stage"]: event["adapter_sha256"] for event in of(folder, "polish_finished")}
    assert [adapter.digest(one.tensors) for one in found[:2]] == [finished["align"], finished["teach"]]


def test_a_stage_that_the_gate_refuses_gives_way_to_the_one_before(world):
    def gated(stage: str, is_passed: bool) -> Event:
        return event("gated", stage=stage, num_rounds=1, adapter_sha256=stage, is_passed=is_passed)

    log = [gated("polish-03-align", False), gated("polish-01-teach", True)]
    run_with_gate = world.settings.model_copy(update={"gate": GateConfig(rules=[{"kind": "schema"}])})
    assert decide.exported(run_with_gate, view(log)).stage == "polish-01-teach"
    audited = [*log, gated("polish-03-align", True)]  # judged anew
    assert decide.exported(run_with_gate, view(audited)).stage == "polish-03-align"
    compared = [*log, gated("polish-03-align", False), gated("polish-01-teach", False), gated("final", True)]
    assert decide.exported(run_with_gate, view(compared)).stage == "final"
    with pytest.raises(GateRefused):
        decide.exported(run_with_gate, view(compared[:-1]))


def test_a_stage_whose_last_event_was_lost_is_told_of_again(world, tiny_base, tmp_path):
    folder = world.copy("untold")
    path = folder / events.FILE
    kept = [line for line in path.read_text().splitlines() if '"kind": "polish_finished"' not in line]
    path.write_text("\n".join(kept) + "\n")
    with (tmp_path / "screen").open("w") as screen:
        polish.polish(folder, base=tiny_base, num_threads=1, console=Console(file=screen))
    assert [event["stage"] for event in of(folder, "polish_finished")] == ["teach", "judge", "align"]
    assert "align (dpo): loss" in (tmp_path / "screen").read_text()


def test_a_run_with_a_side_adapter_is_polished_with_it_in_place(load_tiny, tiny_base, tmp_path):
    changes = {"aggregation.method": "flora", "aggregation.residual_rank": "8"}
    engine = load_tiny(changes)
    rows = stage_data.write(tmp_path / "rows.jsonl", stage_data.instructions(10))
    tables = [{"name": "teach", "kind": "sft", "data": rows, **STAGE}]
    plain = json.loads(config.resolved_json(tiny.settings(tiny_base, {**CHANGES, **changes})))
    settings = config.RunConfig.model_validate({**plain, "polish": tables})
    made = World(engine, settings, tmp_path)
    folder = made.play("run")
    before, after = finish.stored(folder, num_rounds=1).tensors, finish.stored(folder, num_rounds=0).tensors
    side = [name for name in before if ".residual_" in name]
    assert side
    assert any(before[name].any() for name in side)
    assert all(torch.equal(before[name], after[name]) for name in side)
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_a_stage_that_was_changed_on_disk_is_not_gone_on_from(world):
    folder = world.copy("changed")
    path = folder / "polish" / "01-teach" / stages.ADAPTER_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="was changed, or began with another adapter"):
        world.play("changed", resume=True)


def test_data_of_a_late_stage_are_found_wrong_before_the_first_round(world):
    spoilt = stage_data.write(world.folder / "spoilt.jsonl", [{"prompt": "a", "chosen": "b"}])
    *others, last = world.settings.polish
    tables = (*others, last.model_copy(update={"data": spoilt}))
    other = dataclasses.replace(world, settings=world.settings.model_copy(update={"polish": tables}))
    with pytest.raises(DataError, match="has no column 'rejected'"):
        other.play("spoilt")
    assert not (world.folder / "spoilt" / events.FILE).exists()


def test_rows_that_the_result_is_judged_on_are_found_before_the_first_round(world):
    first, *_ = world.settings.polish
    tables = (first.model_copy(update={"overlap": "error"}),)
    other = dataclasses.replace(world, settings=world.settings.model_copy(update={"polish": tables}))
    with pytest.raises(DataError, match=r"stage 'teach': 10 of 10 rows .* 10 of 10 rows of task server-data"):
        other.play("judged")
    assert not (world.folder / "judged" / events.FILE).exists()
    told = of(world.folder / "whole", "polish_finished")[0]["overlaps"]  # which the run allows
    assert [counts["num_exact"] for counts in told.values()] == [10]


def test_polish_refuses_what_it_cannot_do(engine, nodes, tiny_base, tmp_path):
    settings = tiny.settings(tiny_base, CHANGES)
    folder = tmp_path / "run"
    log = run_files.prepare(settings, folder)
    run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=folder, log=log)
    with pytest.raises(ConfigError, match=r"no \[\[polish\]\] tables"):
        polish.polish(folder, base=tiny_base, num_threads=1, console=Console())


def test_an_adapter_on_the_output_layer_is_refused(load_tiny):
    from common.run.schema.polish import SftStage

    engine = load_tiny({"adapter.targets": '["lm_head"]'})
    stage = SftStage(name="teach", kind="sft", data="x")
    with pytest.raises(ConfigError, match="leave lm_head out"):
        stages.play(stage, engine.initial, engine=engine, data=None, tell=None)
