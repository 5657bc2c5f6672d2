"""What the sites say of a polished adapter: of the very adapter that is exported, judged by the gate, and resumed."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from client.policy import rules as policy
from client.policy.rules import Usage
from common import events
from common.adapter import adapter
from common.errors import ConfigError, PolicyRefusedError
from common.event_kinds import Event
from common.frame import wire
from common.loss import evaluation
from common.model import base as model
from common.model.base import Engine
from common.run import config, egress
from common.run.manifest import RunManifest, parse
from common.run.plan import Plan
from common.trust import audit_log, identity
from server.export import adapter as export
from server.folder import run_files
from server.gate import decide
from server.polish import stages as polish_stages
from server.report import report, status
from server.run import finish, run
from server.run import polish as command
from server.view import fairness
from server.view import polish as told
from tests import tiny
from tests.samples import stage_data, vault
from tests.samples.events import view

STAGE = {"steps": 2, "batch_size": 4, "max_length_tokens": 64, "learning_rate": 1e-2, "overlap": "allow"}
RULES = {"gate.rules": "[{kind = 'sites', max_rise = 0.1}, {kind = 'loss'}]"}
ASKED = {"evaluation.num_polish_stages": "1"}
TEACH = '[{name = "teach", kind = "sft", data = "rows.jsonl"}]'


@dataclass
class World:
    """Runs with stages in one folder; `nodes` may be spoilt by a test."""

    engine: Engine
    base: Path
    folder: Path
    nodes: dict = field(default_factory=dict)

    def settings(self, changes, *stages) -> config.RunConfig:
        """A run of one round and these stages, one of imitation if none is named."""
        rows = stage_data.write(self.folder / "rows.jsonl", stage_data.instructions(10))
        tables = [{"name": "teach", "kind": "sft", "data": rows, **STAGE, **stage} for stage in stages or ({},)]
        quick = {"training.batch_size": "12", "federation.num_rounds": "1"}
        polish = f"polish = {json.dumps(tables).replace(': ', ' = ')}"
        return tiny.settings(self.base, {**quick, **changes}, more=polish)

    def play(self, settings, *, name: str = "run", resume: bool = False, operator=None) -> Path:
        adapter.write(self.engine.model, self.engine.initial)
        folder = self.folder / name
        log = run_files.prepare(settings, folder, resume=resume)
        fleet = tiny.fleet(self.nodes or tiny.make_nodes(self.engine))
        run.execute(settings, fleet=fleet, engine=self.engine, folder=folder, log=log, resume=resume, operator=operator)
        return folder

    def losses(self, tensors) -> dict[str, float]:
        """Each site's held-out loss with an adapter, by this process and no request."""
        adapter.write(self.engine.model, tensors)
        found = {}
        for site, count in tiny.SITES.items():
            held_out = tiny.site_data(site, count).held_out
            encoded = model.encode(self.engine, held_out, tiny.settings(self.base).data)[0]
            nll, num_tokens = evaluation.held_out_nll(self.engine, encoded, batch_size=16)
            found[site] = nll / num_tokens
        return found


@pytest.fixture
def world(engine, tiny_base, tmp_path) -> World:
    return World(engine, tiny_base, tmp_path)


@pytest.fixture(scope="module")
def whole(shared_engine, tiny_base, tmp_path_factory) -> tuple[World, Path]:
    """A run of two stages, of which the second teaches wrong answers with all its might."""
    world = World(shared_engine, tiny_base, tmp_path_factory.mktemp("at-sites"))
    rows = [{"instruction": stage_data.question(n), "output": "no no no no"} for n in range(10)]
    wrong = stage_data.write(world.folder / "wrong.jsonl", rows)
    harm = {"name": "harm", "data": wrong, "learning_rate": 0.1, "steps": 6}
    asked = {"evaluation.num_polish_stages": "2", "evaluation.exact_match_rows": "2", "evaluation.max_new_tokens": "2"}
    return world, world.play(world.settings({**RULES, **asked}, {}, harm))


def of(folder: Path, kind: str) -> list[Event]:
    return [event for event in events.read(folder / events.FILE) if event["kind"] == kind]


def losses_in(event) -> dict[str, float]:
    return {site: found["loss"] for site, found in event["sites"].items()}


def stage_adapter(world: World, folder: Path, name: str = "01-teach"):
    data = (folder / "polish" / name / "adapter_model.safetensors").read_bytes()
    return adapter.decode(data, world.engine.tensor_specs, dtype="float32")


def test_the_sites_score_the_adapter_of_each_stage(whole):
    world, folder = whole
    found = of(folder, "polish_evaluated")
    assert [(event["stage"], event["number"], event["stale"]) for event in found] == [("teach", 1, []), ("harm", 2, [])]
    for event, name in zip(found, ("01-teach", "02-harm"), strict=True):
        tensors = stage_adapter(world, folder, name)
        assert event["adapter_sha256"] == adapter.digest(tensors)
        assert losses_in(event) == pytest.approx(world.losses(tensors), rel=1e-6)
    before = losses_in(of(folder, "evaluated")[-1])
    assert losses_in(found[0]) != pytest.approx(before, rel=1e-3)  # control: of another adapter
    assert [event["exact_match"] is None for event in found] == [True, False]  # answers are generated once


def test_a_stage_that_harms_the_sites_is_refused_and_the_one_before_it_exported(whole):
    _, folder = whole
    first, second = of(folder, "polish_evaluated")
    gated = of(folder, "gated")
    assert [(one["stage"], one["is_passed"]) for one in gated] == [("polish-02-harm", False), ("polish-01-teach", True)]
    assert [one["name"] for one in gated[0]["verdicts"] if not one["is_met"]] == ["sites"]
    by_name = {one["name"]: one["value"] for one in gated[1]["verdicts"]}
    base = of(folder, "evaluated")[0]
    gains = (base["loss"] - first["loss"], fairness.decisive(base) - fairness.decisive(first))
    assert by_name["loss"] == pytest.approx(min(gains))
    assert by_name["sites"] == pytest.approx(max(one["change"] for one in first["sites"].values()))
    assert adapter.digest(finish.stored(folder, num_rounds=0).tensors) == first["adapter_sha256"]
    card = (folder / run_files.EXPORT_FOLDER / "README.md").read_text()
    assert f"| {of(folder, 'evaluated')[0]['loss']:.4f} | {first['loss']:.4f} |" in card
    assert f"{second['loss']:.4f}" not in card
    assert "not asked again" not in card


def test_a_stage_that_no_site_was_asked_about_passes_no_rule_of_theirs(whole, tmp_path):
    folder = Path(shutil.copytree(whole[1], tmp_path / "run"))
    manifest = run_files.stored_manifest(folder)
    assert [one["is_passed"] for one in decide.judge_again(folder, manifest)] == [False, True]  # control
    path = folder / events.FILE
    kept = [line for line in path.read_text().splitlines() if '"kind": "polish_evaluated"' not in line]
    path.write_text("\n".join(kept) + "\n")
    judged = decide.judge_again(folder, manifest)
    assert [one["is_passed"] for one in judged] == [False, False, True]
    assert "the sites were not asked after polish-01-teach" in str(judged[1]["verdicts"])


def test_figures_of_another_adapter_of_the_same_stage_do_not_count(whole, tmp_path):
    folder = Path(shutil.copytree(whole[1], tmp_path / "run"))
    path, first = folder / events.FILE, of(whole[1], "polish_evaluated")[0]["adapter_sha256"]
    lines = path.read_text().splitlines()
    path.write_text("".join(
        (line.replace(first, "ab" * 32) if '"kind": "polish_evaluated"' in line else line) + "\n" for line in lines
    ))  # fmt: skip
    judged = decide.judge_again(folder, run_files.stored_manifest(folder))
    assert [one["is_passed"] for one in judged] == [False, False, True]


def test_report_status_and_card_tell_of_it(whole):
    _, folder = whole
    log = events.read(folder / events.FILE)
    losses = [of(folder, "evaluated")[-1]["loss"], *(event["loss"] for event in of(folder, "polish_evaluated"))]
    assert [shown[-1] for _, shown in told.stages(view(log))] == [
        (told.AT_SITES, losses[0], losses[1]), (told.AT_SITES, losses[1], losses[2]),
    ]  # fmt: skip
    page = report.render(view(log))
    assert "Sites after polish, stage harm" in page
    assert f"<td>{told.AT_SITES}</td><td>{losses[1]:.3f}</td><td>{losses[2]:.3f}</td>" in page
    found = status.read(folder)
    assert (found["held_out_loss"], found["held_out_after"]) == (losses[2], "polish, stage harm")

    unasked = [event for event in log if event["kind"] != "polish_evaluated"]  # control
    assert told.AT_SITES not in report.render(view(unasked))
    assert "Sites after 1 rounds" in report.render(view(unasked))
    text = export.card(run_files.stored_manifest(folder), num_rounds=1, sites={"north": 3}, log=unasked, kind="adapter")
    assert "They were not asked again after polish." in text


def test_without_the_sites_the_stages_are_not_played(whole):
    world, folder = whole
    with pytest.raises(ConfigError, match="the sites score what polish leaves, and here there are none; go on with"):
        command.polish(folder, base=world.base, num_threads=1, console=Console())


def is_after_polish(frame: bytes) -> bool:
    """Whether a request is about a polished adapter of a run of one round."""
    found = wire.unpack(frame, max_body_bytes=1 << 24)
    return found.kind == "evaluate" and found.head["round_index"] > 1


def test_a_run_that_was_stopped_before_the_question_goes_on_and_a_silent_site_keeps_the_gate_shut(world):
    settings = world.settings({**RULES, **ASKED, "federation.round_timeout_s": "0.1"})
    plain, cut = tiny.make_nodes(world.engine), world.folder / "run"

    def stops(frame: bytes) -> bytes:
        if is_after_polish(frame):
            raise KeyboardInterrupt
        return plain[1](frame)

    world.nodes = {**plain, 1: stops}
    with pytest.raises(KeyboardInterrupt):
        world.play(settings)
    assert (len(of(cut, "polish_finished")), of(cut, "polish_evaluated"), of(cut, "gated")) == (1, [], [])

    world.nodes = {**plain, 3: lambda frame: None if is_after_polish(frame) else plain[3](frame)}
    world.play(settings, resume=True)
    assert of(cut, "polish_evaluated")[-1]["stale"] == ["west"]
    assert [(one["stage"], one["is_passed"]) for one in of(cut, "gated")] == [
        ("polish-01-teach", False), ("final", True),
    ]  # fmt: skip
    assert "no figure of this adapter from west" in str(of(cut, "gated")[0]["verdicts"])

    world.nodes = plain
    world.play(settings, resume=True)
    event = of(cut, "polish_evaluated")[-1]
    assert event["stale"] == []
    assert losses_in(event) == pytest.approx(world.losses(stage_adapter(world, cut)), rel=1e-6)
    assert (of(cut, "gated")[-1]["stage"], of(cut, "gated")[-1]["is_passed"]) == ("polish-01-teach", True)
    assert len(of(cut, "polish_started")) == 1  # the stage itself was not played again
    assert adapter.digest(finish.stored(cut, num_rounds=0).tensors) == event["adapter_sha256"]


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation.method": "ffa"},  # sites make A themselves, and polish trains it
        {"wire.down": "int8"},  # the adapter goes down as steps
        {"aggregation.method": "ravan"},  # sites train cores, and polish trains what is beside them
        {"wire.down_density": "0.5"},  # what goes down to be trained is not whole
        {"adapter.kind": "ia3"},
        {"adapter.kind": "adalora", "adapter.r": "4", "adapter.alpha": "8"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_the_sites_have_the_very_adapter_whatever_goes_down_in_rounds(load_tiny, tiny_base, tmp_path, changes):
    world = World(load_tiny(changes), tiny_base, tmp_path)
    folder = world.play(world.settings({**changes, **ASKED}))
    (event,) = of(folder, "polish_evaluated")
    polished = stage_adapter(world, folder)
    assert losses_in(event) == pytest.approx(world.losses(polished), rel=1e-6)
    before = finish.stored(folder, num_rounds=1).tensors
    is_own_a = changes.get("aggregation.method") == "ffa"  # then the control is B alone from the coordinator
    wrong = {name: before[name] if not is_own_a or "lora_A" in name else polished[name] for name in polished}
    assert losses_in(event) != pytest.approx(world.losses(wrong), rel=1e-5)


def test_the_request_is_in_the_audit_log_and_its_bytes_in_what_a_run_declares(world, tmp_path):
    settings = world.settings(ASKED)
    folder = world.play(settings, operator=vault.operator(tmp_path))
    log = list(audit_log.read(tmp_path / "op-audit" / "audit.jsonl", identity.public_hex(vault.OPERATOR)))
    (sent,) = [one.facts for one in log if one.kind == "sent" and one.facts["round_index"] == 2]
    assert (sent["step"], sorted(sent["sites"])) == ("evaluate", ["north", "south", "west"])
    assert sent["adapter_sha256"] == of(folder, "polish_evaluated")[0]["adapter_sha256"]
    sizes = [one.facts["num_bytes"] for one in log if one.kind == "received" and one.facts["round_index"] == 2]
    assert len(sizes) == 3
    assert max(sizes) <= egress.HEAD_BYTES
    specs = run_files.stored_manifest(folder).tensor_specs
    polished, plain = (Plan.of(run, specs).bytes_per_run for run in (settings, world.settings({})))
    assert polished - plain == egress.HEAD_BYTES


def test_a_site_scores_as_many_as_the_manifest_names_and_in_order(engine, tmp_path):
    site = vault.make(tmp_path / "site", engine)
    asked = site.manifest(evaluation__num_polish_stages="1", polish=TEACH)
    assert parse(asked.to_bytes()).run.evaluation.num_polish_stages == 1
    assert parse(asked.to_bytes()).run.polish == ()  # of the stages their number is told
    assert site.open(asked).kind == "opened"
    assert site.step("evaluate", asked, round_index=2).kind == "metrics"
    assert site.step("evaluate", asked, round_index=3).kind == "metrics"
    other = {name: tensor + 0.01 for name, tensor in engine.initial.items()}
    assert site.refused(site.step("evaluate", asked, round_index=3, state=other)) == ("PolicyRefusedError", "rounds")
    assert site.refused(site.step("evaluate", asked, round_index=4))[0] == "ProtocolError"
    assert site.refused(site.step("train", asked, round_index=1)) == ("PolicyRefusedError", "rounds")  # gone by
    assert site.refused(site.step("train", asked, round_index=2))[0] == "ProtocolError"
    assert [step for step in site.sent() if step[0] == "evaluate"] == [("evaluate", 2), ("evaluate", 3)]
    plain = vault.make(tmp_path / "plain", engine)  # control: without the setting
    assert plain.open().kind == "opened"
    assert plain.refused(plain.step("evaluate", round_index=3))[0] == "ProtocolError"


def test_a_site_s_policy_counts_polished_adapters_among_the_rounds(engine, tmp_path):
    rules = vault.make(tmp_path / "site", engine).gate.policy
    settings = tiny.settings("tiny", {"federation.num_rounds": "3"})

    def asked(count: int) -> RunManifest:
        tables = tiny.settings("tiny", {"polish": TEACH}).polish * count
        own = settings.evaluation.model_copy(update={"num_polish_stages": count})
        changed = settings.model_copy(update={"evaluation": own, "polish": tables})
        return RunManifest(changed, engine.base_sha256, engine.tensor_specs)

    policy.check(rules, asked(1), Usage())
    with pytest.raises(PolicyRefusedError, match="3 rounds and 2 adapters after polish are together above 4") as caught:
        policy.check(rules, asked(2), Usage())
    assert caught.value.rule == "train.max_rounds"


def test_of_the_stages_those_that_train_the_adapter_are_counted(world):
    pairs = stage_data.write(world.folder / "pairs.jsonl", stage_data.pairs(10))
    stages = ({}, {"name": "judge", "kind": "reward", "data": pairs}, {"name": "last"})
    for count, expected in ((0, []), (1, [3]), (2, [1, 3])):
        settings = world.settings({"evaluation.num_polish_stages": str(count)}, *stages)
        asked = polish_stages.numbers_to_evaluate(settings.polish, settings.evaluation.num_polish_stages)
        assert asked == expected
    with pytest.raises(ConfigError, match="there are fewer stages"):
        world.settings({"evaluation.num_polish_stages": "3"}, *stages)
