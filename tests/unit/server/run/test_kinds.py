"""Every kind of adapter plays a small federation, moves, is exported and loads in plain peft with the same logits."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common import events
from common.adapter import adapter
from common.errors import ConfigError
from common.model import base as model
from common.run import config
from common.run.catalogue.kinds import KINDS
from common.run.rules import kinds
from common.run.schema import shape
from server.aggregate import adalora
from server.folder import run_files
from server.run import finish, run
from server.verify import verify
from tests import tiny

IDS_BT = torch.arange(3, 43).reshape(2, 20)
RATES = {
    "full": "2e-3",
    "ln_tuning": "2e-2",
    "adalora": "5e-2",
}
CASES = [(kind, base) for kind in KINDS if kind != "lora" for base in ("none", "nf4") if base in KINDS[kind].bases]


def changes(kind: str, **more: str) -> dict[str, str]:
    """What turns the tiny run into one of this kind."""
    own = {"federation.num_sites": "2", "training.learning_rate": RATES.get(kind, "5e-2")}
    own |= {"wire.dtype": "int8", "wire.down": "float32" if kinds.STEPS.why_not(KINDS[kind]) else "int4"}
    if "targets" in shape.tables_of(config.RunConfig)["adapter"].variants[kind].model_fields:
        own["adapter.targets"] = '["q_proj", "down_proj"]'
    return {**tiny.of_kind(kind), **own, **more}


@pytest.fixture(scope="module")
def play(load_tiny, tiny_base, tmp_path_factory):
    """A whole run on the in-process grid: its outcome, its engine and its settings."""

    def whole(given):
        settings, engine = tiny.settings(tiny_base, given), load_tiny(given)
        folder = tmp_path_factory.mktemp("run")
        log = run_files.prepare(settings, folder)
        nodes = {number: tiny.make_agent(site, engine).answer for number, site in enumerate(("north", "south"), 1)}
        return run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=folder, log=log), engine

    return whole


def plain(folder, base):
    """As a user would load it, in float32."""
    with model.quiet_peft():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))


def logits(network) -> torch.Tensor:
    return tiny.exact_logits(network, IDS_BT)


def losses(folder) -> list[float]:
    """Held-out losses before, after each round."""
    return [event["loss"] for event in events.read(folder / events.FILE) if event["kind"] == "evaluated"]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_every_kind_trains_in_a_federation_and_loads_in_plain_peft(play, load_tiny, tiny_base, kind, base):
    outcome, engine = play(changes(kind, **{"model.quantization": base}))
    told = losses(outcome.folder)
    assert told[-1] < told[0], told
    assert any(not torch.equal(outcome.tensors[name], engine.initial[name]) for name in engine.initial)
    same_base = load_tiny(changes(kind)) if base != "none" else engine
    adapter.write(same_base.model, outcome.tensors)
    wanted = logits(same_base.model)
    loaded = plain(outcome.folder / run_files.EXPORT_FOLDER, tiny_base)
    assert (logits(loaded) - wanted).abs().max() < 1e-5
    if KINDS[kind].is_mergeable and base == "none":
        merged = finish.export_run(
            outcome.folder, num_rounds=0, output=None, merged=outcome.folder / "merged", base=tiny_base
        )["merged"]
        found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_an_export_refuses_what_a_kind_cannot_become_and_writes_what_it_can(play, tiny_base, tmp_path):
    given = {"base": tiny_base, "num_rounds": 0, "llama_cpp": None, "sign_with": None}
    lengths, _ = play(changes("dora", **{"federation.num_rounds": "1"}))
    with pytest.raises(ConfigError, match="a sealed adapter is plain LoRA"):
        finish.export_to(lengths.folder, tmp_path / "a", formats="peft,merged", **given)
    finish.export_to(lengths.folder, tmp_path / "b", formats="merged,gguf", **given)
    assert verify.verify(tmp_path / "b")["formats"] == ["merged", "gguf"]
    card = (lengths.folder / run_files.EXPORT_FOLDER / "README.md").read_text()
    assert "tags: [dora, federated" in card
    assert "| trained | DoRA, r = 4, alpha = 8.0, dropout = 0.0, targets = q_proj,down_proj" in card
    tokens, _ = play(changes("prompt_tuning", **{"federation.num_rounds": "1"}))
    for formats, message in (("merged", "virtual tokens"), ("peft", "plain LoRA"), ("gguf", "virtual tokens")):
        with pytest.raises(ConfigError, match=message):
            finish.export_to(tokens.folder, tmp_path / formats, formats=formats, **given)
    with pytest.raises(ConfigError, match="virtual tokens"):
        finish.export_run(tokens.folder, num_rounds=0, output=None, merged=tmp_path / "m", base=tiny_base)


def test_ranks_fall_in_every_round_and_a_resumed_run_ends_with_the_same_adapter(play, load_tiny, tiny_base, tmp_path):
    given = changes("adalora", **{"adapter.target_r": "1", "federation.num_rounds": "3"})
    whole, engine = play(given)
    told = [event["rank"] for event in events.read(whole.folder / events.FILE) if event["kind"] == "round_finished"]
    assert told == sorted(told, reverse=True)
    assert told[-1] <= 4  # two modules in each of two layers, rank 1 on average
    assert adalora.left(whole.tensors) == told[-1]
    shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("00002", "00003"))
    settings = tiny.settings(tiny_base, given)
    log = run_files.prepare(settings, tmp_path / "run", resume=True)
    nodes = {number: tiny.make_agent(site, engine).answer for number, site in enumerate(("north", "south"), 1)}
    again = run.execute(settings, fleet=tiny.fleet(nodes), engine=engine, folder=tmp_path / "run", log=log, resume=True)
    assert all(torch.equal(again.tensors[name], whole.tensors[name]) for name in whole.tensors)
