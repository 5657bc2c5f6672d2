"""Stages after the end of a run: what is added, what stays as it was, and what is refused."""

import hashlib
import io
import json
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common import events
from common.adapter import adapter
from common.errors import ConfigError, DataError, GateRefused, RunBusyError
from common.event_kinds import Event
from common.events import EventLog
from common.privacy import cost
from common.run import config
from common.run import later as config_later
from server.folder import lock, run_files
from server.polish import addendum, stages
from server.report import report, status
from server.report.terminal import Screen
from server.run import finish, later, launch, run
from server.run import polish as command
from server.verify import verify
from tests import tiny
from tests.samples import events as samples
from tests.samples import stage_data

STAGE = {"steps": 2, "batch_size": 4, "max_length_tokens": 64, "learning_rate": 1e-2, "overlap": "allow"}
CHANGES = {
    **tiny.NOISED,
    "federation.num_rounds": "1",
    "evaluation.max_new_tokens": "2",
    "evaluation.num_polish_stages": "1",
    "gate.rules": "[{kind = 'loss', min_gain = 50.0}]",
    "gate.min_rows": "5",
}  # no adapter of this run passes
LENIENT = {
    "rules": [{"kind": "figure", "figure": "server-data.exact_match", "bound": "min", "limit": 0.0}],
    "min_rows": 5,
}
STRICT = {
    "rules": [{"kind": "figure", "figure": "server-data.exact_match", "bound": "min", "limit": 1.5}],
    "min_rows": 5,
}


@dataclass
class World:
    """A finished private run of one round and two stages of its own, which its gate has refused, and its sites."""

    base: Path
    folder: Path
    requests: list[int] = field(default_factory=list)

    def table(self, name: str, kind: str, **more) -> dict:
        """A stage on rows of the coordinator."""
        data = self.folder / ("rows.jsonl" if kind == "sft" else "pairs.jsonl")
        return {"name": name, "kind": kind, "data": str(data), **STAGE, **more}

    def file(self, *tables: dict, gate: dict | None = LENIENT, name: str = "more.toml") -> Path:
        """A stages file, or one of rules."""
        told = {"version": 1, **({"polish": list(tables)} if tables else {}), **({"gate": gate} if gate else {})}
        path = self.folder / name
        path.write_text("".join(f"{key} = {json.dumps(value).replace(': ', ' = ')}\n" for key, value in told.items()))
        return path

    def polish(self, run_folder: Path, stages_file: Path | None = None, **more) -> dict:
        screen = Console(file=io.StringIO())
        return command.polish(
            run_folder, base=self.base, num_threads=1, console=screen, stages_file=stages_file, **more
        )

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "whole", self.folder / name))


@pytest.fixture(scope="module")
def world(shared_engine, tiny_base, tmp_path_factory) -> World:
    made = World(tiny_base, tmp_path_factory.mktemp("later"))
    stage_data.write(made.folder / "pairs.jsonl", stage_data.pairs(10))
    rows = stage_data.write(made.folder / "rows.jsonl", stage_data.instructions(10))
    plain = json.loads(config.resolved_json(tiny.settings(tiny_base, {"evaluation.server_data": rows})))
    plain["polish"] = [made.table("teach", "sft"), made.table("drill", "sft", seed=3)]
    asked = stage_data.write(made.folder / "prompts.jsonl", [{"prompt": "What is <b>?"}, {"prompt": "Which word?"}])
    text = tiny.RUN_FILE.format(base=tiny_base) + f"polish = {json.dumps(plain['polish']).replace(': ', ' = ')}\n"
    task = f"name = 'server-data', kind = 'answers', data = '{rows}', metrics = ['exact_match']"
    settings = config.parse(
        text,
        name="run.toml",
        overrides={
            **CHANGES,
            "evaluation.server_data": rows,
            "evaluation.tasks": f"[{{{task}}}]",
            "output.example_prompts": asked,
        },
    )

    def counted(answer):
        return lambda frame: (made.requests.append(len(frame)), answer(frame))[1]

    adapter.write(shared_engine.model, shared_engine.initial)
    nodes = {node: counted(answer) for node, answer in tiny.make_nodes(shared_engine).items()}
    log = run_files.prepare(settings, made.folder / "whole")
    try:
        run.execute(settings, fleet=tiny.fleet(nodes), engine=shared_engine, folder=made.folder / "whole", log=log)
    except GateRefused as error:
        run_files.report_failure(log, error)
    return made


@pytest.fixture(scope="module")
def polished(world) -> tuple[Path, Path, dict]:
    """The run, the folder of a preference stage after its first stage, and what the command says."""
    folder = world.copy("polished")
    asked = len(world.requests)
    told = world.polish(folder, world.file(world.table("align", "dpo")), num_kept=1)
    assert len(world.requests) == asked > 0  # nothing reaches a site
    return folder, Path(told["folder"]), told


def of(folder: Path, kind: str) -> list[Event]:
    return [event for event in events.read(folder / events.FILE) if event["kind"] == kind]


def hashes(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Every file of a run by its hash, later stages aside."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and addendum.FOLDER not in path.relative_to(folder).parts
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in but
    }


def test_a_finished_private_run_gets_another_stage_and_keeps_all_that_it_had(world, polished):
    folder, made, told = polished
    whole = world.folder / "whole"
    changing = (events.FILE, report.REPORT_FILE)
    assert hashes(folder, but=changing) == hashes(whole, but=changing)
    before, after = (path.joinpath(events.FILE).read_bytes() for path in (whole, folder))
    assert after.startswith(before)
    assert [event["kind"] for event in events.read(folder / events.FILE)][-2:] == ["later_started", "later_finished"]
    started, finished = of(folder, "later_started")[-1], of(folder, "later_finished")[-1]
    record = (made / addendum.FILE).read_bytes()
    assert started["addendum_sha256"] == finished["addendum_sha256"] == hashlib.sha256(record).hexdigest()
    assert json.loads(record)["events_sha256"] == hashlib.sha256(before).hexdigest()
    assert json.loads(record)["stages"][0]["seed"] == 0
    assert json.loads(record)["versions"]["torch"] == torch.__version__
    assert finished["adapter_sha256"] == told["adapter_sha256"] == of(made, "polish_finished")[-1]["adapter_sha256"]
    assert (made / run_files.MANIFEST_FILE).read_bytes() == (folder / run_files.MANIFEST_FILE).read_bytes()
    runs = [run_files.stored_settings(path) for path in (folder, made)]
    assert cost.epsilon(runs[0]) == cost.epsilon(runs[1])


def test_its_stages_begin_with_those_that_are_kept_and_its_figures_are_beside_the_base_s(polished):
    folder, made, told = polished
    assert (told["stages"], told["stage"]) == (["teach", "align"], "polish-02-align")
    assert sorted(path.name for path in (made / "polish").iterdir()) == ["01-teach", "02-align"]
    record = json.loads((made / "polish" / "02-align" / stages.RECORD_FILE).read_bytes())
    assert record["start_sha256"] == of(folder, "polish_finished")[0]["adapter_sha256"]
    measured = {event["stage"]: event for event in of(made, "measured")}
    assert list(measured) == ["base", "final", "polish-01-teach", "polish-02-align"]
    assert set(measured["polish-02-align"]["gains"]) == {"base", "previous"}
    assert not of(made, "polish_evaluated")


def test_report_status_card_and_seal_say_which_polish_they_show(world, polished, tmp_path):
    folder, made, _ = polished
    mark = addendum.read(made).sha256
    page, card = (made / report.REPORT_FILE).read_text(), (made / run_files.EXPORT_FOLDER / "README.md").read_text()
    for text in (page, card, str(status.read(made)["in_words"])):
        assert mark in text
        assert "No site was asked after these stages" in text
        assert "own gate refused polish-01-teach" in text
    assert "fixed before the later stages" in card
    assert "it costs the sites' units nothing" in " ".join(card.split())
    assert (
        "later/01 (align) after polish-01-teach: finished with polish-02-align"
        in (folder / report.REPORT_FILE).read_text()
    )
    assert status.read(folder)["in_words"]["later stages"]
    assert status.read(made)["status"] == "finished"
    sealed = finish.export_to(
        made, tmp_path / "sealed", formats="peft", num_rounds=0, base=None, llama_cpp=None, sign_with=None
    )
    found = verify.verify(Path(str(sealed["folder"])))
    assert found["addendum_sha256"] == mark
    assert any(mark in line for line in verify.in_words(found))


def test_prompts_that_may_be_shown_are_answered_by_base_and_exported_adapter_in_file_and_report(world, polished):
    folder, made, told = polished
    kept = json.loads((made / report.EXAMPLES_FILE).read_bytes())
    assert kept["adapter_sha256"] == told["adapter_sha256"]
    assert [one["prompt"] for one in kept["examples"]] == ["What is <b>?", "Which word?"]
    assert {text for one in kept["examples"] for text in (one["base"], one["adapter"])} != {""}
    assert kept["examples"][0]["base"] != kept["examples"][0]["adapter"]
    page = (made / report.REPORT_FILE).read_text()
    assert "<b>prompt</b>What is &lt;b&gt;?</p>" in page
    assert "What is <b>" not in page
    assert not (folder / report.EXAMPLES_FILE).exists()  # its gate let nothing pass
    assert "Which word" not in (made / events.FILE).read_text()


@pytest.mark.parametrize(
    ("rows", "reason"), [([{"text": "a"}], "no column 'prompt'"), ([{"prompt": "a " * 400}], "takes 256")]
)
def test_prompts_that_cannot_be_asked_are_found_before_the_first_round(world, shared_engine, tmp_path, rows, reason):
    settings = run_files.stored_settings(world.folder / "whole")
    output = settings.output.model_copy(update={"example_prompts": stage_data.write(tmp_path / "p.jsonl", rows)})
    log = run_files.prepare(settings.model_copy(update={"output": output}), tmp_path / "run")
    with pytest.raises(DataError, match=reason):
        run.execute(
            run_files.stored_settings(tmp_path / "run"),
            fleet=tiny.fleet({}),
            engine=shared_engine,
            folder=tmp_path / "run",
            log=log,
        )
    assert not log.path.exists()


def test_the_run_s_own_gate_still_refuses_what_it_refused(polished):
    folder, made, _ = polished
    assert [event["is_passed"] for event in of(folder, "gated")] == [False, False, False]
    with pytest.raises(GateRefused):
        finish.stored(folder, num_rounds=0)
    assert [event["definition_sha256"] for event in of(made, "gated")] == [addendum.read(made).sha256]
    with pytest.raises(GateRefused, match="has not judged"):
        finish.stored(made, num_rounds=1)  # the run's round, which these rules were not asked about


def test_stages_that_were_interrupted_end_with_the_same_adapter(world, polished, monkeypatch):
    folder = world.copy("cut")
    show = Screen.__call__

    def stop(self, event):
        show(self, event)
        if event["kind"] == "polish_step":
            raise KeyboardInterrupt

    asked = world.file(world.table("align", "dpo"))
    monkeypatch.setattr(Screen, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        world.polish(folder, asked, num_kept=1)
    monkeypatch.undo()
    made = folder / addendum.FOLDER / "01"
    path = made / events.FILE
    path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b'{"kind": "run_failed"')])  # as after a kill
    assert (
        "interrupted, 1 of 1 rounds, polish stage 2 of 2; go on with silotune-server polish"
        in (status.read(made)["status"])
    )
    told = world.polish(folder, asked, num_kept=1)
    assert told["folder"] == str(made)
    assert told["adapter_sha256"] == polished[2]["adapter_sha256"]
    assert len(of(folder, "later_started")) == len(of(folder, "later_finished")) == 1
    with pytest.raises(ConfigError, match="these very stages are done"):
        world.polish(folder, asked, num_kept=1)


def test_what_is_added_can_be_added_to_and_a_gate_of_its_own_can_refuse_it(world, polished):
    _, made, _ = polished
    with pytest.raises(GateRefused, match=r"refuses polish-03-again: server-data\.exact_match not met"):
        world.polish(made, world.file(world.table("again", "sft"), gate=STRICT))
    deeper = made / addendum.FOLDER / "01"
    assert not (deeper / run_files.EXPORT_FOLDER).exists()
    assert status.read(deeper)["status"].startswith("failed: the gate refuses")
    assert [event["stage"] for event in of(deeper, "gated")] == ["polish-03-again"]  # and not what it began with
    assert len(of(made, "later_started")) == 1
    with pytest.raises(GateRefused):
        finish.stored(deeper, num_rounds=0)


def test_rules_that_come_later_refuse_and_let_pass_but_lift_no_refusal(world, polished):
    folder, made, _ = polished
    assert finish.gate_by(made, world.file(gate=STRICT, name="strict.toml"))["passed"] == ""
    with pytest.raises(GateRefused, match="exact_match not met"):
        finish.stored(made, num_rounds=0)
    rules = [path.name for path in (made / "rules").iterdir()]
    assert rules == [f"{of(made, 'gated_later')[-1]['definition_sha256']}.json"]
    assert "refused by rules given after the end" in str(status.read(made)["in_words"]["gate"])
    assert finish.gate_by(made, world.file(gate=LENIENT, name="lenient.toml"))["passed"] == "polish-02-align"
    assert finish.stored(made, num_rounds=0).num_rounds == 1
    with pytest.raises(GateRefused):  # its own gate has refused all that the run has
        finish.gate_by(folder, world.folder / "lenient.toml")


@pytest.mark.parametrize(
    ("tables", "gate", "reason"),
    [
        ([("align", "dpo", {"beta": -1.0})], LENIENT, r"polish.*beta"),
        ([("align", "dpo", {"bata": 1.0})], LENIENT, r"bata"),
        ([("teach", "dpo", {})], LENIENT, r"two stages are called 'teach'"),
        ([], LENIENT, r"no table \[\[polish\]\] of a kind that trains the adapter"),
        ([("judge", "reward", {})], LENIENT, r"no table \[\[polish\]\] of a kind that trains the adapter"),
        ([("align", "dpo", {})], None, r"the run's own gate names the rules loss, which need the sites' figures"),
        ([("align", "dpo", {})], {"rules": [{"kind": "sites"}]}, r"more\.toml: \[gate\] names the rules sites"),
        (
            [("align", "dpo", {})],
            {"rules": [{"kind": "probes"}]},
            r"more\.toml: does not fit the run: .*needs a task of kind probe",
        ),
        ([("align", "dpo", {"overlap": "error"})], LENIENT, r"10 of 10 rows of task server-data"),
        ([("align", "dpo", {"data": "nowhere.jsonl"})], LENIENT, r"nowhere\.jsonl"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(world, tables, gate, reason):
    folder = world.folder / "whole"
    before = hashes(folder)
    asked = world.file(*(world.table(name, kind, **more) for name, kind, more in tables), gate=gate)
    with pytest.raises((ConfigError, DataError), match=reason):
        world.polish(folder, asked)
    assert hashes(folder) == before
    assert not (folder / addendum.FOLDER).exists()


def test_the_stages_file_of_the_documentation_loads(tmp_path):
    text = Path("docs/polish.md").read_text().partition("with such a file:\n")[2].partition("\nThe stages file")[0]
    (tmp_path / "more.toml").write_text(textwrap.dedent(text))
    found = config_later.load_stages(tmp_path / "more.toml")
    assert [stage.name for stage in found.polish] == ["align-2"]
    assert found.gate.rules
    (tmp_path / "none.toml").write_text("version = 1\n")
    with pytest.raises(ConfigError, match="has no rules"):
        config_later.load_rules(tmp_path / "none.toml")


def test_nobody_adds_to_a_run_that_is_at_work_or_not_done(world):
    folder = world.copy("busy")
    asked = world.file(world.table("align", "dpo"))
    with pytest.raises(ConfigError, match="--keep-stages 3: the run has 2 stages"):
        world.polish(folder, asked, num_kept=3)
    with pytest.raises(ConfigError, match="--keep-stages is for new stages"):
        world.polish(folder, num_kept=0)
    (folder / "polish" / "02-drill" / stages.RECORD_FILE).unlink()
    with pytest.raises(DataError, match="stage 2 of its own 2 is not done"):
        world.polish(folder, asked)
    with lock.hold(folder):
        import threading

        caught = []

        def try_it():
            try:
                world.polish(folder, asked)
            except RunBusyError as error:
                caught.append(error.exit_code)

        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert caught == [RunBusyError.exit_code]


def test_what_was_added_is_finished_in_its_run_and_nowhere_else(world, polished, tmp_path):
    moved = Path(shutil.copytree(polished[1], tmp_path / "moved"))
    with pytest.raises(DataError, match="put it back there"):
        world.polish(moved)
    (moved / addendum.FILE).write_bytes((moved / addendum.FILE).read_bytes().replace(b'"seed":0', b'"seed":1'))
    with pytest.raises(DataError, match=r"is not the one that events\.jsonl beside it names"):
        finish.stored(moved, num_rounds=0)


def test_watching_a_run_ends_as_the_run_did_whatever_was_added_since(world):
    folder = world.copy("watched")
    with pytest.raises(GateRefused):
        launch.watch(folder, is_quiet=True)
    EventLog(folder / events.FILE).append(
        samples.event("later_started", folder="later/01", start_stage="final", addendum_sha256="ab")
    )
    with pytest.raises(GateRefused):
        launch.watch(folder, is_quiet=True)
    assert later.last_round(folder, 1) == 1
