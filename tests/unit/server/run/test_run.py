"""Whole runs: from the run file to the exported adapter, interrupted and resumed, and with a disk that fills up."""

import errno
import json
import os

import pytest
import torch

from client.policy import rules
from common import events, storage
from common.errors import ConfigError, DataError, ModelError, PolicyRefusedError, StorageError, TooFewSitesError
from common.event_kinds import RoundFinished
from common.frame.records import TensorSpec
from common.run import config
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from common.run.schema.section import MAX_MESSAGE_MIB
from server.folder import checkpoint, run_files
from server.run import run
from tests import tiny
from tests.samples import events as samples

CHANGES = {"evaluation.exact_match_rows": "1", "evaluation.max_new_tokens": "2", "training.batch_size": "12"}


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """Run in a folder of the test's; gives the outcome and the events."""

    def execute(nodes, changes=None, *, name: str = "run", resume: bool = False):
        settings = tiny.settings(tiny_base, {**CHANGES, **(changes or {})})
        folder = tmp_path / name
        log = run_files.prepare(settings, folder, resume=resume)
        outcome = run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=folder, log=log, resume=resume)
        return outcome, events.read(log.path)

    return execute


def interrupted(answer, *, after: int, error: BaseException, kind: str = "train"):
    """A node that stops the whole process when it is asked for the so-manieth time."""
    asked = []

    def change(frame: bytes) -> bytes:
        asked.append(frame)
        if len(asked) > after:
            raise error
        return frame

    return tiny.spoilt(answer, kind, change)


def kinds(log) -> list[str]:
    return [event["kind"] for event in log]


def is_same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_lowers_the_held_out_loss_and_leaves_everything_that_the_issue_names(play, nodes):
    outcome, log = play(nodes, {"training.local_epochs": "4", "training.batch_size": "4"})
    losses = [event["loss"] for event in log if event["kind"] == "evaluated"]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    assert outcome.sites == {"north": 12, "south": 9, "west": 6}
    assert run_files.finished(outcome.folder) == [1, 2]
    files = {path.name for path in outcome.folder.iterdir()}
    assert files == {"run.json", "manifest.json", "events.jsonl", "rounds", "adapter"}
    assert kinds(log)[0] == "run_started"
    assert kinds(log)[-1] == "run_finished"


def test_exact_matches_are_counted_at_the_end_only(play, nodes):
    _, log = play(nodes)
    assert [event["exact_match"] is not None for event in log if event["kind"] == "evaluated"] == [False, False, True]


def test_the_plan_is_told_in_figures(play, nodes, engine):
    _, log = play(nodes)
    plan = log[0]
    assert plan["num_trained_parameters"] == sum(t.numel() for t in engine.initial.values())
    assert plan["bytes_down_per_site"] == plan["bytes_up_per_site"] == 4 * plan["num_trained_parameters"]
    assert (plan["privacy"], plan["method"], plan["num_rounds"]) == ("none", "fedavg", 2)


def test_two_runs_of_one_seed_are_the_same_to_the_bit(play, nodes):
    first, _ = play(nodes, name="first")
    second, _ = play(nodes, name="second")
    other, _ = play(nodes, {"seed": "6"}, name="other")
    assert is_same(first.tensors, second.tensors)
    assert not is_same(first.tensors, other.tensors)


@pytest.mark.parametrize(
    ("kind", "after", "finished"), [("train", 0, []), ("train", 1, [1]), ("evaluate", 1, [1]), ("evaluate", 2, [1, 2])]
)
def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(play, nodes, tmp_path, kind, after, finished):
    expected, _ = play(nodes, name="whole")
    broken = {**nodes, 2: interrupted(nodes[2], after=after, error=KeyboardInterrupt(), kind=kind)}
    with pytest.raises(KeyboardInterrupt):
        play(broken)
    assert run_files.finished(tmp_path / "run") == finished
    found, log = play(nodes, resume=True)
    assert is_same(found.tensors, expected.tensors)
    assert kinds(log).count("run_started") == 2
    assert [event["first_round"] for event in log if event["kind"] == "run_started"] == [0, len(finished)]
    evaluated = {event["num_rounds"]: event["loss"] for event in log if event["kind"] == "evaluated"}
    assert sorted(evaluated) == [0, 1, 2]
    assert [event for event in log if event["kind"] == "evaluated"][-1]["exact_match"] is not None


def test_resuming_a_finished_run_gives_it_again(play, nodes):
    first, _ = play(nodes)
    again, log = play(nodes, resume=True)
    assert is_same(first.tensors, again.tensors)
    assert kinds(log)[-1] == "run_finished"


def test_a_folder_with_a_run_is_refused(play, nodes, tmp_path):
    play(nodes)
    with pytest.raises(ConfigError, match="holds a run already; give another output folder, or --resume"):
        play(nodes)


def test_resuming_with_other_settings_is_refused(play, nodes):
    play(nodes)
    with pytest.raises(ConfigError, match="other settings"):
        play(nodes, {"training.learning_rate": "1e-3"}, resume=True)


def test_there_must_be_something_to_resume(play, nodes):
    with pytest.raises(DataError, match="no run to resume"):
        play(nodes, resume=True)


def damage(folder, num_rounds: int):
    """Spoil one checkpoint; gives its folder."""
    path = checkpoint.folder_of(folder, num_rounds) / checkpoint.ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    return path.parent


def test_a_damaged_checkpoint_is_not_gone_on_from_but_from_the_one_before_it(play, nodes, tmp_path, engine):
    whole, _ = play(nodes, {"output.keep_checkpoints": "2"})
    bad = damage(tmp_path / "run", 2)
    record = json.loads((bad / run_files.RECORD_FILE).read_bytes())
    with pytest.raises(ModelError, match="use an earlier round"):
        checkpoint.load(tmp_path / "run", engine.tensor_specs, num_rounds=2, run_sha256=record["run_sha256"])
    again, log = play(nodes, {"output.keep_checkpoints": "2"}, resume=True)
    assert is_same(again.tensors, whole.tensors)
    assert [event["first_round"] for event in log if event["kind"] == "run_started"] == [0, 1]
    (warned,) = [event for event in log if event["kind"] == "warned"]
    assert str(bad) in warned["reason"]
    assert "going on after round 1" in warned["reason"]
    assert (run_files.finished(tmp_path / "run"), bad.with_name("00002.damaged").is_dir()) == ([1, 2], True)


def test_a_checkpoint_of_another_run_is_no_damaged_one(play, nodes, tmp_path, engine):
    play(nodes)
    with pytest.raises(ModelError, match="belongs to another run"):
        checkpoint.newest(tmp_path / "run", engine.tensor_specs, run_sha256="ab" * 32)


def test_a_disk_that_fills_up_in_round_two_leaves_round_one_usable(play, nodes, tmp_path, monkeypatch):
    expected, _ = play(nodes, name="whole")
    real = os.replace

    def replace(source, target):
        if "00002" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", replace)
        with pytest.raises(StorageError, match=r"00002.*No space left"):
            play(nodes)
    assert run_files.finished(tmp_path / "run") == [1]
    found, _ = play(nodes, resume=True)
    assert is_same(found.tensors, expected.tensors)


def test_an_events_file_that_cannot_grow_ends_the_run_and_leaves_finished_rounds(play, nodes, tmp_path, monkeypatch):
    from common.events import EventLog

    real = EventLog.append

    def append(log, event):
        if isinstance(event, RoundFinished) and event.round == 1:
            raise storage.storage_error(log.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return real(log, event)

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "append", append)
        with pytest.raises(StorageError) as caught:
            play(nodes)
    assert caught.value.exit_code == 8
    assert run_files.finished(tmp_path / "run") == [1, 2]
    play(nodes, resume=True)


def test_only_the_newest_checkpoints_are_kept_where_asked(play, nodes, tmp_path):
    play(nodes, {"federation.num_rounds": "3", "output.keep_checkpoints": "1"})
    assert run_files.finished(tmp_path / "run") == [3]


def test_evaluation_can_be_rarer_and_the_last_round_is_always_evaluated(play, nodes):
    _, log = play(nodes, {"federation.num_rounds": "5", "evaluation.every_rounds": "2"})
    assert [event["num_rounds"] for event in log if event["kind"] == "evaluated"] == [0, 2, 4, 5]


def test_a_site_that_fails_for_good_is_left_out_and_the_run_goes_on(play, nodes):
    outcome, log = play({**nodes, 3: tiny.spoilt(nodes[3], "train", lambda _: b"")})
    assert run_files.finished(outcome.folder) == [1, 2]
    assert {event["site"] for event in log if event["kind"] == "site_failed"} == {"west"}
    assert outcome.sites == {"north": 12, "south": 9}


def trains_once(answer):
    """A node that is gone after its first update."""
    trained = []

    def node(frame: bytes) -> bytes:
        if trained:
            return b""
        if b'"kind":"train"' in frame:
            trained.append(frame)
        return answer(frame)

    return node


def test_a_site_that_dropped_out_is_still_named_as_one_whose_rows_were_used(play, nodes):
    outcome, _ = play({**nodes, 3: trains_once(nodes[3])})
    assert outcome.sites == {"north": 12, "south": 9, "west": 6}
    assert "west 6" in (outcome.folder / "adapter" / "README.md").read_text()


def test_sites_that_are_too_few_end_the_run_and_finished_rounds_can_be_loaded(play, nodes, tmp_path):
    with pytest.raises(TooFewSitesError):
        play({1: nodes[1], 2: trains_once(nodes[2]), 3: trains_once(nodes[3])})
    manifest = run_files.stored_manifest(tmp_path / "run")
    assert run_files.finished(tmp_path / "run") == [1]
    checkpoint.load(tmp_path / "run", manifest.tensor_specs, num_rounds=1, run_sha256=manifest.sha256)


def test_a_run_folder_tells_its_settings_and_manifest(play, nodes, tmp_path, engine, tiny_base):
    play(nodes)
    assert run_files.stored_settings(tmp_path / "run") == tiny.settings(tiny_base, CHANGES)
    assert run_files.stored_manifest(tmp_path / "run").tensor_specs == engine.tensor_specs
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written == json.loads(config.resolved_json(tiny.settings(tiny_base, CHANGES)))


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", '{"version": 1}'])
def test_a_folder_that_is_no_run_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match="not a run folder"):
        run_files.stored_settings(tmp_path)


def own_file(folder):
    """Held-out rows of the coordinator's own."""
    lines = [
        {"instruction": row.messages[0].content, "output": row.messages[1].content} for row in tiny.rows(4, site="own")
    ]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_coordinators_own_rows_are_scored_every_round(play, nodes, tmp_path):
    _, log = play(nodes, {"evaluation.server_data": f'"{own_file(tmp_path)}"'})
    assert all(event["server_loss"] > 0 for event in log if event["kind"] == "evaluated")
    assert not [event for event in log if event["kind"] == "measured"]


def test_metrics_are_of_the_base_and_of_the_last_adapter_and_in_the_card(play, nodes, tmp_path):
    metrics = f"metrics = ['exact_match', 'f1', 'rougeL', 'json'], json_schema = '{tmp_path}/schema.json'"
    task = f"{{name = 'own', kind = 'answers', data = '{own_file(tmp_path)}', {metrics}}}"
    changes = {"evaluation.tasks": f"[{task}]", "evaluation.max_new_tokens": "6"}
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    outcome, log = play(nodes, changes)
    base, last = [event for event in log if event["kind"] == "measured"]
    assert (base["stage"], base["gains"], last["stage"], list(last["gains"])) == ("base", {}, "final", ["base"])
    names = [f"own.{name}" for name in ("exact_match", "f1", "rougeL", "json")]
    assert list(last["figures"]) == names
    assert last["figures"]["own.json"]["value"] == 0.0
    assert last["adapter_sha256"] == [event for event in log if event["kind"] == "round_finished"][-1]["adapter_sha256"]
    stored = [json.loads((outcome.folder / "scores" / f"{stage}.json").read_text()) for stage in ("base", "final")]
    for name in names:
        figure, gain = last["figures"][name], last["gains"]["base"][name]
        before, after = (sum(row[0] for row in one["scores"][name]["rows"]) / 4 for one in stored)
        assert gain["low"] <= gain["mean"] <= gain["high"]
        assert gain["mean"] == pytest.approx(after - before)
        assert figure["value"] == pytest.approx(after)
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert (figure["num_rows"], figure["kind"], figure["higher_is_better"]) == (4, "answers", True)
    card = (outcome.folder / "adapter" / "README.md").read_text()
    before, after = (event["figures"]["own.f1"]["value"] for event in (base, last))
    assert f"| own.f1 | 4 | {before:.3f} | {after:.3f} | " in card


def task_file(folder, wrong: bool = False):
    lines = [{"question": f"north sees {n}?", "choices": ["HEART", "KNEE"], "answer": n % 2} for n in range(6)]
    lines[0]["answer"] = int(wrong)
    path = folder / "choices.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tasks_are_measured_at_base_and_end_and_between_if_told(play, nodes, tmp_path):
    task = f'{{name = "know", kind = "probe", data = "{task_file(tmp_path)}", baseline_prompt = "Think."}}'
    outcome, log = play(nodes, {"evaluation.tasks": f"[{task}]", "evaluation.tasks_every_rounds": "1"})
    found = {event["stage"]: event for event in log if event["kind"] == "measured"}
    assert list(found) == ["base", "prompt-only", "round-00001", "final"]
    assert [list(event["gains"]) for event in found.values()] == [[], ["base"], *[["base", "prompt-only"]] * 2]
    assert len({event["definition_sha256"] for event in found.values()}) == 1
    frozen = run_files.stored_manifest(outcome.folder)
    assert frozen.evaluation_sha256 == found["base"]["definition_sha256"]
    assert str(tmp_path) not in (outcome.folder / "manifest.json").read_text()
    for path in (outcome.folder / "scores").iterdir():  # figures only
        assert "HEART" not in path.read_text()
        assert "north" not in path.read_text()


def test_a_resumed_run_measures_what_was_fixed_before_training(play, nodes, tmp_path):
    task = f'{{name = "know", kind = "choice", data = "{task_file(tmp_path)}"}}'
    changes = {"evaluation.tasks": f"[{task}]"}
    play(nodes, changes)
    again, _ = play(nodes, changes, resume=True)  # control
    assert again.folder.is_dir()
    task_file(tmp_path, wrong=True)
    with pytest.raises(DataError, match="fixed before training"):
        play(nodes, changes, resume=True)


def test_a_schema_that_is_missing_is_found_before_the_run_starts(play, nodes, tmp_path):
    task = f"name = 'own', kind = 'json', data = '{own_file(tmp_path)}', json_schema = '{tmp_path}/no-such.json'"
    with pytest.raises(DataError, match="no-such"):
        play(nodes, {"evaluation.tasks": f"[{{{task}}}]"})
    assert not run_files.finished(tmp_path / "run")


def test_metrics_without_rows_of_the_coordinators_own_are_refused(tiny_base):
    with pytest.raises(ConfigError, match="data  must be set"):
        tiny.settings(tiny_base, {"evaluation.tasks": "[{name = 'own', kind = 'answers', metrics = ['f1']}]"})
    with pytest.raises(ConfigError, match='"exact_match", "f1", "rouge1"'):
        tiny.settings(
            tiny_base, {"evaluation.tasks": "[{name = 'own', kind = 'answers', data = 'x', metrics = ['bleu']}]"}
        )


def test_own_rows_that_are_missing_are_found_before_the_run_starts(play, nodes, tmp_path):
    with pytest.raises(DataError, match="no-such"):
        play(nodes, {"evaluation.server_data": f'"{tmp_path}/no-such.jsonl"'})
    assert not run_files.finished(tmp_path / "run")


def of_llama(rank: int, *, hidden: int, keys: int, inner: int, num_layers: int) -> tuple[TensorSpec, ...]:
    """The adapter of a Llama on all linear layers."""
    modules = {"q": hidden, "k": keys, "v": keys, "o": hidden, "gate": inner, "up": inner, "down": inner}
    return tuple(
        TensorSpec(f"layers.{layer}.{module}.lora_{factor}.weight", shape)
        for layer in range(num_layers)
        for module, width in modules.items()
        for factor, shape in (("A", (rank, hidden)), ("B", (width, rank)))
    )


LLAMA_8B = {"hidden": 4096, "keys": 1024, "inner": 14336, "num_layers": 32}
LLAMA_70B = {"hidden": 8192, "keys": 1024, "inner": 28672, "num_layers": 80}


@pytest.mark.parametrize(
    ("rank", "shape", "size_mib"), [(64, LLAMA_8B, 642), (16, LLAMA_70B, 792), (64, LLAMA_70B, 3162)]
)
def test_a_request_that_no_site_takes_is_refused_before_anything_is_sent(engine, tiny_base, rank, shape, size_mib):
    settings = tiny.settings(tiny_base, {"wire.dtype": '"int3"'})
    found = RunManifest(settings, engine.base_sha256, of_llama(rank, **shape))
    assert found.plan.request_bytes >> 20 == size_mib  # the adapter in float32, its names, and a head of 2 MiB at most
    if size_mib <= MAX_MESSAGE_MIB:
        run._check_size(found)
        rules.check_message_size(found, max_mib=MAX_MESSAGE_MIB)
        with pytest.raises(PolicyRefusedError, match=r"agent\.max_message_mib: .* and this site takes 600"):
            rules.check_message_size(found, max_mib=600)
    else:
        with pytest.raises(ConfigError, match=r"whole has up to \d+\.\d MiB.* 2047 MiB .*lower adapter\.r"):
            run._check_size(found)


def test_an_adapter_that_no_update_could_carry_is_refused_at_once(load_tiny, nodes, tiny_base, tmp_path):
    changes = {"adapter.r": "512", "wire.max_update_mib": "1"}
    engine, settings = load_tiny(changes), tiny.settings(tiny_base, changes)
    log = run_files.prepare(settings, tmp_path / "run")
    remedy = r"max_update_mib = 1, .* 4\.\d MiB; raise it, send integers .*lower adapter\.r"
    with pytest.raises(ConfigError, match=remedy):
        run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=tmp_path / "run", log=log)


def test_a_node_is_called_as_it_was_registered_until_it_has_told_its_own_name(tmp_path):
    log = events.EventLog(tmp_path / events.FILE)
    assert run._names_of_nodes(tmp_path, log, resume=True) == {}  # a simulation
    (tmp_path / run_files.NODES_FILE).write_text('{"1": "alder", "2": "birch"}')
    log.append(samples.event("site_joined", node=2, site="cedar"))
    assert run._names_of_nodes(tmp_path, log, resume=False) == {1: "alder", 2: "birch"}
    assert run._names_of_nodes(tmp_path, log, resume=True) == {1: "alder", 2: "cedar"}


@pytest.mark.parametrize("method", ["ravan", "fedavg"])
def test_a_run_says_at_its_start_that_its_method_is_experimental(load_tiny, tiny_base, tmp_path, method):
    changes = {"aggregation.method": method, "federation.num_rounds": "1"}
    settings, engine = tiny.settings(tiny_base, changes), load_tiny(changes)
    log = run_files.prepare(settings, tmp_path)
    run.execute(settings, fleet=tiny.fleet(tiny.make_nodes(engine)), engine=engine, folder=tmp_path, log=log)
    told = [event["kind"] for event in events.read(log.path)]
    assert ("warned" in told) == FACTS[method].is_experimental
    assert told.index("run_started") == 0
