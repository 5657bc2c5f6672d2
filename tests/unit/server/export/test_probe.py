"""Merged weights are the base plus the adapter, whatever the adapter trains: held to what the adapter does."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.adapter import adapter
from common.errors import ModelError
from common.model import base as model
from server.export import adapter as export
from server.export import folder as export_folder
from server.export import onnx, probe, seal
from server.verify import verify
from tests import tiny
from tests.samples import architectures, exports

HEAD = {"adapter.targets": '["lm_head", "q_proj"]'}
FORMATS = ("peft", "merged", "gguf")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A base whose head is its embedding."""
    return architectures.make("llama", tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def whole(tied, tmp_path_factory):
    """An adapter of that head, in every form."""
    engine, source = exports.drawn(tiny.settings(tied, HEAD), tied)
    folder = tmp_path_factory.mktemp("head") / "export"
    export_folder.write(folder, source, formats=FORMATS, base=tied, llama_cpp=None, key=None)
    adapter.write(engine.model, source.tensors)
    return folder, source, probe.logits(engine.model)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def as_peft_merges(base, place):
    """What peft's own merge makes of a tied base: the embedding is changed with the head."""
    with model.quiet_peft():
        warnings.filterwarnings("ignore", message="Model with ", category=UserWarning)  # it says so itself
        return PeftModel.from_pretrained(plain(base), str(place)).merge_and_unload()


def test_a_trained_head_of_a_tied_base_is_untied_in_what_is_merged(tied, whole):
    folder, _, beside = whole
    found = verify.verify(folder, base=tied)
    assert found["probe"]["effect"] > 0.1
    assert found["probe"]["summed"] < 1e-5
    assert found["logits"]["gguf"]["from_rounded"] < 1e-5
    merged, base = plain(folder / "merged"), plain(tied)
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight.bfloat16().float())
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert probe.difference(probe.logits(merged), beside) == pytest.approx(found["probe"]["rounding"], rel=0.05)
    assert any("where the adapter moves them by" in line for line in verify.in_words(found))


def test_control_a_merge_that_moves_the_embedding_too_is_noticed_by_export_and_verify(tied, whole, tmp_path):
    folder, source, beside = whole
    wrong = as_peft_merges(tied, folder / "peft")
    off = probe.difference(probe.logits(wrong), beside)
    effect = seal.read(folder).facts.probe["effect"]
    assert off > effect  # as it was: off by more than the adapter does
    with pytest.raises(ModelError, match="the sum of base and adapter are off"):
        probe.Probe(effect, off, 0.001, 0.0).check("x")
    content = export_folder.content_of(source, formats=("peft", "merged"), base=tied)
    export_folder._save_adapter(tmp_path / "x/peft", content)
    (tmp_path / "x/peft/chat_template.jinja").write_text((folder / "peft/chat_template.jinja").read_text())
    wrong.to(torch.bfloat16).save_pretrained(tmp_path / "x/merged")
    AutoTokenizer.from_pretrained(folder / "merged").save_pretrained(tmp_path / "x/merged")
    (tmp_path / "x/README.md").write_text((folder / "README.md").read_text())
    facts = replace(content.facts, probe=seal.read(folder).facts.probe)
    seal.write(tmp_path / "x", facts, specs=adapter.specs(content.adapter), key=None)
    with pytest.raises(ModelError, match=r"merged: (logits differ|is not base plus)"):
        verify.verify(tmp_path / "x", base=tied)


def test_an_adapter_that_does_next_to_nothing_is_held_to_what_it_does(tied, tmp_path):
    settings = tiny.settings(tied, HEAD)
    _, source = exports.drawn(settings, tied, size=0.01)
    export.save_adapter(tmp_path / "peft", source.tensors, run_manifest=source.run_manifest, num_rounds=1, sites={})
    found = export.merge(tmp_path / "peft", tied, tmp_path / "merged")
    assert 2e-4 < found.effect < 0.02
    assert found.effect > 10 * found.summed
    found.check("x")
    for share in (1.0, -1.0):  # the adapter left out, and added twice
        with pytest.raises(ModelError, match="off by"):
            replace(found, summed=abs(share) * found.effect).check("x")


def test_every_export_of_merged_weights_has_the_probe_and_verify_wants_it(tied, whole):
    folder, _, _ = whole
    facts = seal.read(folder).facts
    assert probe.stored(probe.Probe, facts.probe, what="merged logits").effect > 0.1
    for broken in ({}, {**facts.probe, "saved": float("nan")}, {**facts.probe, "more": 1.0}):
        with pytest.raises(ModelError, match="malformed"):
            verify.check_probe(folder, replace(facts, probe=broken))
    with pytest.raises(ModelError, match="are off by"):
        verify.check_probe(folder, replace(facts, probe={**facts.probe, "saved": facts.probe["effect"]}))
    with pytest.raises(ModelError, match="does not tell of merged logits"):
        verify.check_probe(folder, replace(facts, probe={**facts.probe, "effect": 2 * facts.probe["effect"]}))


def test_an_embedding_as_target_is_refused_at_load_with_what_can_be(tied):
    with pytest.raises(ModelError, match=r"embed_tokens.*choose among the linear layers of this base: "):
        exports.drawn(tiny.settings(tied, {"adapter.targets": '["embed_tokens"]'}), tied)


@pytest.mark.slow
def test_a_trained_head_of_a_tied_base_reaches_an_onnx_graph(tied, tmp_path):
    pytest.importorskip("onnxruntime")
    _, source = exports.drawn(tiny.settings(tied, HEAD), tied)
    export_folder.write(tmp_path / "x", source, formats=("peft", "onnx"), base=tied, llama_cpp=None, key=None)
    assert verify.verify(tmp_path / "x", base=tied)["logits"]["onnx"]["from_rounded"] < 1e-4
    assert onnx.check(tmp_path / "x/onnx/model.onnx") > 0
