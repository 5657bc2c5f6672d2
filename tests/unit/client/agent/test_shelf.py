"""What a site keeps of a personalised run, and the adapter that it takes home."""

import dataclasses
import json
import shutil

import pytest
import torch

from client.agent import outgoing
from client.agent.shelf import ADAPTER_FILE, Shelf
from client.cli.app import app
from common import cli
from common.adapter import adapter
from common.errors import ConfigError, DataError, ModelError, PolicyRefusedError, ProtocolError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.loss import evaluation
from common.model import base as model
from common.run import trainable
from common.run.manifest import RunManifest
from server.fleet import collect
from tests import tiny

MAX = 1 << 24
FEDSA = {"aggregation.method": "fedsa", "training.local_epochs": "2"}


@pytest.fixture
def manifest(engine, tiny_base):
    return RunManifest(tiny.settings(tiny_base, FEDSA), engine.base_sha256, engine.tensor_specs)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "personal")


def ask(agent, manifest, kind, state, round_index):
    head = to_head(RoundPlan(manifest.sha256, round_index))
    specs = trainable.received_specs("fedsa", manifest.tensor_specs)
    body = adapter.encode({spec.name: state[spec.name] for spec in specs}, dtype="float32")
    answer = wire.unpack(agent.answer(wire.pack(Frame(kind, head, body))), max_body_bytes=MAX)
    assert answer.kind == {"train": "update", "evaluate": "metrics"}[kind]
    return answer


def opened(engine, manifest, folder, *, errors=None):
    agent = tiny.make_agent("north", engine, folder=folder, errors=errors)
    kind = wire.unpack(agent.answer(wire.pack(Frame("open", {}, manifest.to_bytes()))), max_body_bytes=MAX).kind
    return agent, kind


def own(tensors):
    return {name: tensor for name, tensor in tensors.items() if trainable.factor_of(name) == "B"}


def drawn(engine, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}


def test_only_a_leaves_and_b_goes_on_after_a_restart(engine, manifest, tmp_path):
    agent, _ = opened(engine, manifest, tmp_path / "one")
    first = ask(agent, manifest, "train", engine.initial, 0)
    assert {spec.name for spec in trainable.sent_specs("fedsa", engine.tensor_specs, round_index=0)} == set(
        adapter.decode(first.body, trainable.sent_specs("fedsa", engine.tensor_specs, round_index=0), dtype="float32")
    )
    kept = Shelf(tmp_path / "one").before(manifest, 1)
    assert all(float(tensor.norm()) > 0 for tensor in kept.values())
    straight = ask(agent, manifest, "train", engine.initial, 1)
    restarted, _ = opened(engine, manifest, tmp_path / "one")
    assert ask(restarted, manifest, "train", engine.initial, 1).body == straight.body
    assert ask(restarted, manifest, "train", engine.initial, 0).body == first.body
    forgetful, _ = opened(engine, manifest, tmp_path / "two")  # the control: without its B it answers otherwise
    assert ask(forgetful, manifest, "train", engine.initial, 1).body != straight.body


def test_an_update_with_b_in_it_is_refused_by_the_coordinator_and_held_back_by_the_site(engine, manifest, tmp_path):
    agent, _ = opened(engine, manifest, tmp_path)
    update = ask(agent, manifest, "train", engine.initial, 0)
    plan = RoundPlan(manifest.sha256, 0)
    assert collect.read_update(update, plan, expected=manifest.plan.for_site("north"))[1]  # the control
    whole = dataclasses.replace(update, body=adapter.encode(engine.initial, dtype="float32"))
    with pytest.raises(ModelError, match=r"lora_B.*expected absent"):
        collect.read_update(whole, plan, expected=manifest.plan.for_site("north"))
    with pytest.raises(PolicyRefusedError, match=r"lora_B.*expected absent"):
        outgoing._check_body(manifest, whole)
    outgoing._check_body(manifest, update)


def test_a_site_is_scored_with_its_own_b(engine, manifest, tmp_path):
    agent, _ = opened(engine, manifest, tmp_path)
    before = ask(agent, manifest, "evaluate", engine.initial, 0).head["nll_sum"]
    ask(agent, manifest, "train", engine.initial, 0)
    after = ask(agent, manifest, "evaluate", engine.initial, 1).head["nll_sum"]
    assert after < before
    assert ask(agent, manifest, "evaluate", engine.initial, 0).head["nll_sum"] == before


def test_an_agent_without_a_folder_does_not_take_part(engine, manifest):
    errors: list[Exception] = []
    assert opened(engine, manifest, None, errors=errors)[1] == "refused"
    assert isinstance(errors[0], ConfigError)


def test_a_round_starts_from_the_sites_last_round_before_it(engine, manifest, shelf):
    states = {number: drawn(engine, number) for number in (0, 2, 3)}
    assert not any(tensor.any() for tensor in shelf.before(manifest, 0).values())
    for number, tensors in states.items():
        shelf.keep(manifest, number, tensors)
    for asked, expected in ((3, 2), (4, 3), (9, 3)):
        found = shelf.before(manifest, asked)
        assert found.keys() == own(states[expected]).keys()
        assert all(torch.equal(found[name], states[expected][name]) for name in found)
    with pytest.raises(ProtocolError, match="round 1 goes back behind round 2"):
        shelf.before(manifest, 1)


def test_the_first_round_may_be_asked_again(engine, manifest, shelf):
    shelf.keep(manifest, 0, drawn(engine, 0))
    shelf.keep(manifest, 1, drawn(engine, 1))
    assert not any(tensor.any() for tensor in shelf.before(manifest, 0).values())


def test_runs_do_not_see_each_others_factors(engine, manifest, shelf, tiny_base):
    other = RunManifest(tiny.settings(tiny_base, {**FEDSA, "seed": "6"}), engine.base_sha256, engine.tensor_specs)
    shelf.keep(manifest, 0, drawn(engine, 1))
    assert not any(tensor.any() for tensor in shelf.before(other, 1).values())
    shutil.copytree(shelf.folder / manifest.sha256, shelf.folder / other.sha256)
    with pytest.raises(ModelError, match="another run"):
        shelf.before(other, 1)


def test_a_damaged_file_is_refused_and_the_folder_is_the_users_alone(engine, manifest, shelf):
    shelf.keep(manifest, 0, drawn(engine, 1))
    (file,) = (shelf.folder / manifest.sha256).glob("kept-*")
    assert (shelf.folder.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="not what was written"):
        shelf.before(manifest, 1)


def test_the_adapter_that_is_taken_home_scores_as_it_did_in_the_run(engine, manifest, tmp_path, tiny_base, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    log_folder = tmp_path / "logs"
    agent, _ = opened(engine, manifest, log_folder / "personal")
    ask(agent, manifest, "train", engine.initial, 0)
    scored = ask(agent, manifest, "evaluate", engine.initial, 1).head
    node = tmp_path / "node.toml"
    node.write_text(
        f'[site]\nname = "north"\n[data]\npath = "{tmp_path / "rows.jsonl"}"\n[agent]\nlog_folder = "{log_folder}"\n'
    )
    with pytest.raises(SystemExit) as end:
        cli.run(app, ["export-adapter", str(node), manifest.sha256[:12], str(tmp_path / "out"), "--json"])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["num_rounds"] == 1
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with model.quiet_peft():
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    alone = model.Engine(loaded, engine.tokenizer, engine.device, "", engine.tensor_specs, engine.initial)
    rows, _ = model.encode(alone, tiny.site_data("north", 12).held_out, manifest.run.data)
    nll_sum, _ = evaluation.held_out_nll(alone, rows, batch_size=manifest.run.evaluation.batch_size)
    assert nll_sum == pytest.approx(scored["nll_sum"], rel=1e-5)


def test_what_cannot_be_taken_home_is_said(engine, manifest, shelf, tmp_path):
    with pytest.raises(DataError, match="0 runs"):
        shelf.export(manifest.sha256, tmp_path / "out")
    shelf.note(manifest, 2, drawn(engine, 1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(ConfigError, match="holds something"):
        shelf.export(manifest.sha256, tmp_path / "full")
    assert shelf.export(manifest.sha256[:8], tmp_path / "out") == 2
    (shelf.folder / manifest.sha256 / ADAPTER_FILE).write_bytes(b"spoilt")
    with pytest.raises(ModelError, match="not what was written"):
        shelf.export(manifest.sha256, tmp_path / "again")
