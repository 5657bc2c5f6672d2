"""Plain peft and transformers load what a run leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.adapter import adapter
from common.errors import ConfigError, DataError, ModelError, StorageError
from common.model import base as model
from common.run.manifest import RunManifest
from server.aggregate import factored
from server.export import adapter as export
from server.export import probe
from server.folder import run_files
from server.run import finish, run
from tests import tiny
from tests.samples.events import evaluated, whole

IDS_BT = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def stirred(load_tiny):
    """An engine of a run file, with an adapter that changes something."""

    def make(changes=None):
        engine = load_tiny(changes)
        generator = torch.Generator().manual_seed(8)
        state = {name: 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
        adapter.write(engine.model, state)
        engine.model.eval()
        return engine, state

    return make


def save(folder, engine, state, settings, **changes):
    manifest = RunManifest(settings, engine.base_sha256, engine.tensor_specs)
    given = {"num_rounds": 2, "sites": {"north": 12, "south": 9}, **changes}
    export.save_adapter(folder, state, run_manifest=manifest, **given)
    return folder


def load_plain(folder, base):
    """As a user would; peft warns of keys that it does not find, and the warning is an error here."""
    with model.quiet_peft():
        return PeftModel.from_pretrained(load_base(base), str(folder))


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return tiny.exact_logits(network, IDS_BT)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter.use_rslora": "true"},
        {"adapter.targets": '["q_proj", "v_proj"]'},
        {"adapter.targets": '["layers.1.self_attn.q_proj"]'},
        {"adapter.r": "3", "adapter.alpha": "7.5", "adapter.dropout": "0.1"},
    ],
    ids=["all-linear", "rslora", "chosen", "one layer", "odd"],
)
def test_plain_peft_gives_the_same_logits(stirred, tiny_base, tmp_path, changes):
    engine, state = stirred(changes)
    folder = save(tmp_path / "adapter", engine, state, tiny.settings(tiny_base, changes))
    plain = load_plain(folder, tiny_base)
    assert float((logits(plain) - logits(engine.model)).abs().max()) < 1e-5
    assert len([name for name, _ in plain.named_parameters() if "lora_" in name]) == len(state)
    assert float((logits(plain) - logits(load_base(tiny_base))).abs().max()) > 1e-3  # control


def test_merged_weights_are_the_same_in_every_order_of_summation(stirred, tiny_base, tmp_path):
    """As another processor adds: the same products with their columns the other way round."""
    changes = {"adapter.r": "256", "adapter.alpha": "2048"}
    engine, state = stirred(changes)
    folder = save(tmp_path / "adapter", engine, state, tiny.settings(tiny_base, changes))
    found = {"ours": [], "float32": []}
    for turned in (False, True):
        for name, merged in (("ours", probe.add_up), ("float32", lambda network: network.merge_and_unload())):
            plain = load_plain(folder, tiny_base)
            if turned:
                for key, value in plain.named_parameters():
                    if "lora_" in key:
                        value.data = value.data.flip(0 if "lora_A" in key else 1)
            summed = merged(plain)
            found[name].append(torch.cat([p.to(torch.bfloat16).flatten() for p in summed.parameters()]))
    assert torch.equal(*found["ours"])
    assert int((found["float32"][0] != found["float32"][1]).sum()) > 0  # control


def test_a_merged_checkpoint_is_the_base_with_the_adapter_in_bf16(stirred, tiny_base, tmp_path):
    engine, state = stirred()
    folder = save(tmp_path / "adapter", engine, state, tiny.settings(tiny_base))
    export.merge(folder, tiny_base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    difference = (logits(merged.float()) - logits(engine.model)).abs().max()
    change = (logits(load_base(tiny_base)) - logits(engine.model)).abs().max()
    assert difference < 0.1 * change
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokens.chat_template == engine.tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_the_card_tells_base_rows_rounds_method_and_privacy(stirred, tiny_base, tmp_path):
    engine, state = stirred()
    folder = save(tmp_path / "adapter", engine, state, tiny.settings("org/base"), num_rounds=7)
    card = (folder / "README.md").read_text()
    for told in ("org/base", engine.base_sha256, "north 12", "south 9", "21 at 2 sites", "| rounds | 7 |", "fedavg"):
        assert told in card
    assert "without differential privacy and without secure aggregation" in card
    assert card.startswith("---\n")
    assert "base_model: org/base" in card


def test_the_card_tells_which_figures_are_of_rows_that_were_trained_on(stirred, tmp_path):
    engine, _ = stirred()
    manifest = RunManifest(tiny.settings("org/base"), engine.base_sha256, engine.tensor_specs)
    counts = {"num_rows": 32, "num_exact": 12, "num_near": 4}
    stage = {"stage": "align", "trainer": "dpo", "number": 1, "before": {}, "after": {}, "num_steps": 1, "num_rows": 9}
    log = [
        *(evaluated(number, 2.5, north=2.5) | {"answer_loss": None} for number in (0, 2)),
        {"kind": "overlap", "num_held_out": 30, "num_exact": 2, "num_near": 1},
        {"kind": "tasks_overlap", "reasons": ["5 of 9 rows of task codes (codes.jsonl) are trained on at the sites"]},
        {"kind": "polish_finished", **stage, "overlaps": {"task notes": counts}},
    ]
    told = (
        "3 of 30 held-out rows stand in rows that are trained on (2 word for word, 1 nearly): figures are too good",
        "- 5 of 9 rows of task codes (codes.jsonl) are trained on at the sites.",
        "- align trained on 16 of 32 rows of task notes (12 word for word, 4 nearly)",
    )
    log = [whole(event) for event in log]
    card = export.card(manifest, num_rounds=2, sites={"north": 12}, log=log, kind="adapter")
    plain = export.card(manifest, num_rounds=2, sites={"north": 12}, log=log[:2], kind="adapter")
    for line in told:
        assert line in card
        assert line not in plain


@pytest.mark.parametrize("base", ["{tiny}", "./models/base", "../base", "~/models/base"])
def test_no_path_of_this_machine_is_in_any_exported_file(stirred, tiny_base, tmp_path, base):
    engine, state = stirred()
    settings = tiny.settings(base.format(tiny=tiny_base))
    folder = save(tmp_path / "adapter", engine, state, settings)
    for path in folder.iterdir():
        data = path.read_bytes()
        assert b"/base" not in data, path.name
        assert str(tmp_path).encode() not in data
        assert b"/tmp" not in data


def test_peft_is_told_the_hub_id_of_the_base(stirred, tmp_path):
    engine, state = stirred()
    folder = save(tmp_path / "adapter", engine, state, tiny.settings("org/base"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_there_is_no_pickle(stirred, tiny_base, tmp_path):
    engine, state = stirred()
    folder = save(tmp_path / "adapter", engine, state, tiny.settings(tiny_base))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_folder_that_cannot_be_written_is_a_storage_error(stirred, tiny_base, tmp_path):
    engine, state = stirred()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        save(tmp_path / "taken", engine, state, tiny.settings(tiny_base))


def test_merging_into_a_folder_with_files_is_refused_before_anything_is_loaded(tiny_base, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"merged.*another folder"):
        export.merge(tmp_path / "no-adapter", tiny_base, tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "keep"


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(stirred, load_tiny, tiny_base, tmp_path):
    engine, state = stirred()
    folder = save(tmp_path / "adapter", engine, state, tiny.settings(tiny_base))
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not safetensors at all")
    with pytest.raises(ModelError, match="does not fit"):
        export.merge(folder, tiny_base, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.fixture(scope="module")
def played(shared_engine, tiny_base, tmp_path_factory):
    """A run folder with three rounds."""
    settings = tiny.settings(tiny_base, {"federation.num_rounds": "3"})
    folder = tmp_path_factory.mktemp("played") / "run"
    log = run_files.prepare(settings, folder)
    agents = {n: tiny.make_agent(site, shared_engine) for n, site in enumerate(tiny.SITES, start=1)}
    fleet = tiny.fleet({number: agent.answer for number, agent in agents.items()})
    run.execute(settings, fleet=fleet, engine=shared_engine, folder=folder, log=log)
    return folder


@pytest.fixture
def finished(played, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(played, tmp_path / "run"))


def export_run(folder, **changes):
    given = {"num_rounds": 0, "output": None, "merged": None, "base": None, **changes}
    return finish.export_run(folder, **given)


def same_function(exported, checkpoint) -> bool:
    """Whether both change every module alike; the checkpoint's scale is 2, an export's is 1."""
    pairs, stored = (
        factored.modules(load_file(folder / "adapter_model.safetensors")) for folder in (exported, checkpoint)
    )
    return pairs.keys() == stored.keys() and all(
        torch.allclose(b @ a, 2.0 * stored[module][0] @ stored[module][1], atol=1e-6)
        for module, (b, a) in pairs.items()
    )


def test_any_checkpoint_of_a_run_can_be_exported(finished, tmp_path):
    written = export_run(finished, num_rounds=2, output=tmp_path / "second")
    assert written == {"adapter": str(tmp_path / "second")}
    assert same_function(tmp_path / "second", finished / "rounds" / "00002")
    assert not same_function(tmp_path / "second", finished / "rounds" / "00003")
    assert "| rounds | 2 |" in (tmp_path / "second" / "README.md").read_text()


def test_the_newest_checkpoint_is_the_default(finished):
    shutil.rmtree(finished / "adapter")
    export_run(finished)
    assert same_function(finished / "adapter", finished / "rounds" / "00003")


def test_a_round_that_is_not_there_is_an_error_that_names_those_that_are(finished):
    with pytest.raises(DataError, match=r"\[1, 2, 3\]"):
        export_run(finished, num_rounds=9)


def test_export_merges_into_the_runs_base(finished, tmp_path, tiny_base):
    written = export_run(finished, merged=tmp_path / "merged")
    assert written["merged"] == str(tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_export_refuses_to_merge_into_another_base(finished, tmp_path):
    other = tiny.make_base(tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match="hash"):
        export_run(finished, merged=tmp_path / "merged", base=other)
    assert not (tmp_path / "merged").exists()


def test_a_run_without_a_finished_round_cannot_be_exported(tmp_path, tiny_base):
    run_files.prepare(tiny.settings(tiny_base), tmp_path / "run")
    with pytest.raises(DataError):
        export_run(tmp_path / "run")
