"""Whole runs with a gate: what is refused, how far back a run goes, and when its rounds end."""

import dataclasses
import json

import pytest
import torch

from common import events
from common.adapter import adapter
from common.errors import DataError, GateRefused
from common.run import config
from common.run.manifest import parse
from server.folder import checkpoint, run_files
from server.gate import decide
from server.report import report, status
from server.report import symptoms as troubleshooting
from server.run import finish, run
from tests import tiny
from tests.samples import events as samples
from tests.samples.events import view

ROWS = 40
LOUD = {"training.learning_rate": "5e-2", "training.local_epochs": "3"}  # forgets
SHY = {"training.learning_rate": "1e-7"}  # changes nothing that a probe could see


def played(engine, folder, base, changes, *, resume=False, nodes=None):
    """A run in a folder; raises what the run raises."""
    settings = tiny.settings(base, changes)
    log = run_files.prepare(settings, folder, resume=resume)
    nodes = nodes or tiny.make_nodes(engine)
    try:
        return run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=folder, log=log, resume=resume)
    except GateRefused as error:
        run_files.report_failure(log, error)
        raise


def told(folder, *kinds):
    return [event for event in events.read(folder / "events.jsonl") if event["kind"] in kinds]


def write_probe(path, answers):
    words = [word.upper() for word in tiny.WORDS]
    rows = [
        {"question": f"{n} of 12?", "choices": [words[n % 12], words[(n + 1 + n // 12) % 12]], "answer": answers[n]}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def probe_of(path):
    return {"evaluation.tasks": f"[{{name = 'known', kind = 'probe', data = {json.dumps(str(path))}}}]"}


@pytest.fixture(scope="module")
def known(shared_engine, tiny_base, tmp_path_factory):
    """A probe of what the base knows: the right answers are those that it gives; and which ones two rounds change."""
    folder = tmp_path_factory.mktemp("known")
    adapter.write(shared_engine.model, shared_engine.initial)
    write_probe(folder / "blank.jsonl", [0] * ROWS)
    asked = {**LOUD, **probe_of(folder / "blank.jsonl"), "evaluation.tasks_every_rounds": "1"}
    played(shared_engine, folder / "pilot", tiny_base, asked)
    adapter.write(shared_engine.model, shared_engine.initial)

    def answers(stage):
        scores = json.loads((folder / "pilot" / "scores" / f"{stage}.json").read_bytes())["scores"]["known.acc"]
        return [0 if row[0] else 1 for row in scores["rows"]]

    for stage in ("base", "round-00001", "final"):
        write_probe(folder / f"{stage}.jsonl", answers(stage))
    assert answers("base") != answers("round-00001") != answers("final")  # or these rows could show nothing
    return folder


PROBES = {"gate.rules": "[{kind = 'probes'}]"}


def test_a_run_that_forgets_is_blocked_by_the_rule_for_it_and_a_clean_one_passes(engine, tiny_base, known, tmp_path):
    probe = probe_of(known / "base.jsonl")
    with pytest.raises(GateRefused, match=r"gate refuses final \(round-00001 fail too\): probes not met by 0\.\d+"):
        played(engine, tmp_path / "loud", tiny_base, {**LOUD, **probe, **PROBES})
    gated = told(tmp_path / "loud", "gated")
    assert [event["stage"] for event in gated] == ["final", "round-00001"]
    assert [one["name"] for one in gated[0]["verdicts"]] == ["probes"]
    assert not (tmp_path / "loud" / "adapter").exists()
    assert told(tmp_path / "loud", "run_failed")[0]["exit_code"] == GateRefused.exit_code == 9
    symptoms = troubleshooting.symptoms(view(events.read(tmp_path / "loud" / "events.jsonl")))
    assert "forgetting" in [one.name for one in symptoms]

    outcome = played(engine, tmp_path / "shy", tiny_base, {**SHY, **probe, **PROBES})  # control
    assert [event["is_passed"] for event in told(outcome.folder, "gated")] == [True]
    assert (outcome.folder / "adapter" / "adapter_model.safetensors").is_file()
    card = (outcome.folder / "adapter" / "README.md").read_text()
    assert "## Gate" in card
    assert "probes met by 0.010: 0.000, limit -0.010" in card


def test_nothing_that_the_gate_refused_is_exported_later(engine, tiny_base, known, tmp_path):
    folder = tmp_path / "loud"
    with pytest.raises(GateRefused):
        played(engine, folder, tiny_base, {**LOUD, **probe_of(known / "base.jsonl"), **PROBES})
    for number in (0, 1, 2):
        with pytest.raises(GateRefused, match="known"):
            finish.export_run(folder, num_rounds=number, output=tmp_path / "out", merged=None, base=None)
    assert not (tmp_path / "out").exists()
    assert decide.judge_again(folder, run_files.stored_manifest(folder))[-1]["is_passed"] is False
    page = report.render(view(events.read(folder / "events.jsonl")))
    assert "no checkpoint passes; nothing is exported" in page
    assert status.read(folder)["in_words"]["gate"][0] == "final: refused"


def test_a_failed_gate_goes_back_to_the_newest_checkpoint_that_passes(engine, tiny_base, known, tmp_path):
    limit = {"gate.rules": "[{kind = 'figure', figure = 'known.acc', bound = 'min', limit = 1.0}]"}
    changes = {**LOUD, **probe_of(known / "round-00001.jsonl"), **limit}
    outcome = played(engine, tmp_path / "run", tiny_base, changes)
    log = events.read(outcome.folder / "events.jsonl")
    judged = [(event["stage"], event["is_passed"]) for event in log if event["kind"] == "gated"]
    assert judged == [("final", False), ("round-00001", True)]
    stages = [event["stage"] for event in log if event["kind"] == "measured"]
    assert stages == ["base", "final", "round-00001"]  # the last one on demand
    manifest = run_files.stored_manifest(outcome.folder)
    first = checkpoint.load(outcome.folder, manifest.tensor_specs, num_rounds=1, run_sha256=manifest.sha256)
    assert all(torch.equal(first.tensors[name], outcome.tensors[name]) for name in first.tensors)
    assert (log[-1]["kind"], log[-1]["num_rounds"], log[-1]["stage"]) == ("run_finished", 1, "round-00001")
    card = (outcome.folder / "adapter" / "README.md").read_text()
    assert "| rounds | 1 |" in card
    assert "refused before it: final" in card
    assert "rolled back: round-00001 is what is exported" in report.render(view(log))
    again = finish.stored(outcome.folder, num_rounds=0)
    assert (again.num_rounds, again.log[-1]["stage"]) == (1, "round-00001")
    with pytest.raises(GateRefused, match=r"gate refuses final: known\.acc not met"):
        finish.stored(outcome.folder, num_rounds=2)
    assert finish.stored(outcome.folder, num_rounds=1).num_rounds == 1  # control


def test_before_the_newest_round_the_best_is_judged_first(engine, tiny_base, tmp_path):
    changes = {
        "training.learning_rate": "0.2",
        "federation.num_rounds": "5",
        "gate.rules": "[{kind = 'loss', min_gain = 99.0}]",
    }
    with pytest.raises(GateRefused):
        played(engine, tmp_path / "run", tiny_base, changes)
    losses = {event["num_rounds"]: event["loss"] for event in told(tmp_path / "run", "evaluated")}
    best_first = sorted(range(1, 5), key=losses.__getitem__)
    assert best_first != [4, 3, 2, 1]  # or the newest first would do
    judged = [event["num_rounds"] for event in told(tmp_path / "run", "gated")]
    assert judged == [5, *best_first]

    path, best = tmp_path / "run" / events.FILE, f'"num_rounds": {best_first[0]}'
    silent = [
        line.replace('"stale": []', '"stale": ["north"]') if '"evaluated"' in line and best in line else line
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(silent) + "\n")
    again = [event["num_rounds"] for event in decide.judge_again(path.parent, run_files.stored_manifest(path.parent))]
    assert again == [5, *best_first[1:], best_first[0]]


def test_a_run_without_a_gate_is_exported_as_it_was(known):
    folder = known / "pilot"
    assert told(folder, "gated", "stopped") == []
    assert finish.stored(folder, num_rounds=0).num_rounds == 2
    assert finish.stored(folder, num_rounds=1).num_rounds == 1
    assert decide.judge_again(folder, run_files.stored_manifest(folder)) == []


def test_the_gate_is_fixed_before_training(engine, tiny_base, tmp_path):
    played(engine, tmp_path / "run", tiny_base, {"gate.rules": "[{kind = 'loss'}]"})
    first = run_files.stored_manifest(tmp_path / "run")
    assert first.evaluation_sha256
    assert parse(first.to_bytes()).run.gate == config.GateConfig()  # no site is told of it
    (tmp_path / "run" / "run.json").unlink()
    other = tiny.settings(tiny_base, {"gate.rules": "[{kind = 'loss', min_gain = 0.5}]"})
    log = run_files.prepare(other, tmp_path / "run")
    with pytest.raises(DataError, match="fixed before training"):
        run.execute(
            other,
            fleet=tiny.fleet(tiny.make_nodes(engine)),
            engine=engine,
            folder=tmp_path / "run",
            log=log,
            resume=True,
        )


def test_rounds_end_early_and_a_resumed_run_ends_them_where_it_did(engine, tiny_base, tmp_path):
    changes = {"training.learning_rate": "0.2", "gate.stop_after": "1", "federation.num_rounds": "4"}
    outcome = played(engine, tmp_path / "whole", tiny_base, changes)
    stopped = told(outcome.folder, "stopped")
    done = run_files.finished(outcome.folder)
    assert len(stopped) == 1
    assert done == list(range(1, stopped[0]["num_rounds"] + 1))
    assert 2 <= len(done) < 4
    assert told(outcome.folder, "run_finished")[0]["num_rounds"] == done[-1]

    nodes = tiny.make_nodes(engine)
    nodes[1] = interrupted(nodes[1], after=len(done) - 1)
    with pytest.raises(KeyboardInterrupt):
        played(engine, tmp_path / "cut", tiny_base, changes, nodes=nodes)
    assert run_files.finished(tmp_path / "cut") == done[:-1]
    for _ in range(2):  # the second time there is nothing left to do
        again = played(engine, tmp_path / "cut", tiny_base, changes, resume=True)
        assert run_files.finished(again.folder) == done
        assert all(torch.equal(outcome.tensors[name], again.tensors[name]) for name in again.tensors)
    control = played(engine, tmp_path / "control", tiny_base, {**changes, "gate.stop_after": "0"})
    assert run_files.finished(control.folder) == [1, 2, 3, 4]


def interrupted(answer, *, after):
    """A node at which the process is stopped when it is asked to train once more than `after` times."""
    asked = []

    def change(frame):
        asked.append(frame)
        if len(asked) > after:
            raise KeyboardInterrupt
        return frame

    return tiny.spoilt(answer, "train", change)


def test_commands_refuse_with_the_exit_code_of_the_gate(engine, tiny_base, known, tmp_path, capsys):
    folder = tmp_path / "loud"
    with pytest.raises(GateRefused):
        played(engine, folder, tiny_base, {**LOUD, **probe_of(known / "base.jsonl"), **PROBES})
    for arguments, code in (
        (["gate", str(folder)], 9),
        (["export", str(folder)], 9),
        (["export", str(folder), "--to", str(tmp_path / "to")], 9),
        (["gate", str(known / "pilot")], 2),
        (["export", str(known / "pilot"), "--output", str(tmp_path / "out")], 0),  # control
    ):
        assert (arguments[0], exit_code(arguments)) == (arguments[0], code)
    assert not (tmp_path / "to").exists()
    assert "probes not met by" in capsys.readouterr().err


def exit_code(arguments):
    """Of a command of the server."""
    from common import cli as commands
    from server.cli import app

    try:
        commands.run(app.app, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("rule", "poisoned", "clean"),
    [
        ("exposure", {"canaries/exposure": 9.0, "canaries/exposure_ceiling": 10.0},
         {"canaries/exposure": 1.0, "canaries/exposure_ceiling": 10.0}),
        ("pii", {"notes/emission": 0.2}, {"notes/emission": 0.0}),
    ],
)  # fmt: skip
def test_leaks_are_blocked_by_the_rule_for_them(rule, poisoned, clean, known, tmp_path):
    """On a real run's checkpoints; the figures are made by hand, as events tell them."""
    manifest = run_files.stored_manifest(known / "pilot")
    gate = config.GateConfig(rules=[{"kind": rule}])
    settings = manifest.run.model_copy(update={"gate": gate})
    passed = []
    for name, values in (("poisoned", poisoned), ("clean", clean)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rounds").symlink_to(known / "pilot" / "rounds")
        lines = [json.dumps(event) for event in with_figures(known / "pilot", values)]
        (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
        judged = decide.judge_again(folder, run_with(manifest, settings))
        passed.append([event["is_passed"] for event in judged])
        broken = [one["name"] for event in judged for one in event["verdicts"] if not one["is_met"]]
        assert broken == ([] if name == "clean" else [rule, rule])
    assert passed == [[False, False], [True]]


def run_with(manifest, settings):
    """The pilot's manifest with a gate, which is no part of its identity."""
    return dataclasses.replace(manifest, run=settings)


def with_figures(folder, values):
    """A run's events, each stage with other figures."""
    shared = {"num_rows": 64, "higher_is_better": False, "kind": "memorisation"}
    figures = {name: {**shared, "value": value, "low": value, "high": value} for name, value in values.items()}
    for event in samples.raw(folder / "events.jsonl"):
        yield {**event, "figures": figures} if event["kind"] == "measured" else event


def test_the_hash_in_a_verdict_is_that_of_the_checkpoint(known):
    (first, *_) = decide.of_run(known / "pilot", run_files.stored_manifest(known / "pilot"))
    digest = adapter.digest(first.tensors)
    finished = told(known / "pilot", "round_finished")
    assert (first.stage, digest) == ("final", finished[-1]["adapter_sha256"])
