"""What `[export]` lets pass before round 1 works after the last: a table of bases, each exported in earnest."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from common.errors import ConfigError, DataError, ModelError
from common.events import EventLog
from server.export import gguf
from server.export.folder import Exported
from server.run import export, run
from server.verify import rehearsal, verify
from tests import tiny
from tests.samples import architectures, exports

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
OLD = {"rope_parameters": None, "rope_theta": 5e5, "dtype": None, "torch_dtype": "float32"}  # as transformers 4 writes
DIGITS = {"type": "Digits", "individual_digits": True}
CHUNKS = {"type": "Digits", "individual_digits": False}


def cut(*steps):
    """A change of tokenizer.json: these steps before the last."""
    return lambda stored: (
        stored | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, stored["pre_tokenizer"]]}}
    )


# base: architecture, its settings, changes of config.json as a maker may have written it, change of tokenizer.json;
# "" if it passes, otherwise what the refusal names
TABLE = {
    "plain": ("llama", {}, {}, None, ""),
    "tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 32}, {}, None, ""),
    "of transformers 4, single digits": ("llama", {}, {**OLD, "architectures": None}, cut(DIGITS), ""),
    "rotary scaling of transformers 4": ("llama", {}, {**OLD, "rope_scaling": LLAMA3}, None, "rotary scaling 'llama3'"),
    "its older key": ("llama", {}, {**OLD, "rope_scaling": {"type": "linear", "factor": 2.0}}, None, "'linear'"),
    "rotary scaling": ("llama", {}, {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, None, "rotary scaling 'llama3'"),
    "biases": ("llama", {"attention_bias": True}, {}, None, "attention_bias = True"),
    "biases between": ("llama", {"mlp_bias": True}, {}, None, "mlp_bias = True"),
    "another activation": ("llama", {"hidden_act": "gelu"}, {}, None, "hidden_act = gelu"),
    "another architecture": ("qwen2", {}, {}, None, "Qwen2ForCausalLM"),
    "digits in chunks": ("llama", {}, {}, cut(CHUNKS), "cuts text in a way"),
    "a normal form": ("llama", {}, {}, lambda stored: stored | {"normalizer": {"type": "NFC"}}, "cuts text in a way"),
}


def make(case, folder):
    name, settings, changes, change, _ = TABLE[case]
    base = architectures.make(name, folder, **settings)
    if changes:
        found = {**json.loads((base / "config.json").read_text()), **changes}
        (base / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    if change:
        stored = json.loads((base / "tokenizer.json").read_text())
        (base / "tokenizer.json").write_text(json.dumps(change(stored)))
    return base


@pytest.mark.parametrize("case", TABLE)
def test_what_passes_before_the_first_round_is_written_and_sound_after_the_last(case, tmp_path, shared_engine):
    told = TABLE[case][-1]
    base = make(case, tmp_path / "base")
    settings = tiny.settings(base, {"export.formats": '["peft", "gguf"]'})
    if told:
        engine = dataclasses.replace(shared_engine, folder=base)  # no weight is looked at
        source = Exported(engine.initial, run.manifest_of(settings, engine), 0, {}, [])
        with pytest.raises(ConfigError, match=f"gguf: .*{told}.*; give --llama-cpp DIR"):
            export.check(source.run_manifest, engine)
        with pytest.raises(ConfigError, match=told):  # and it could not have been written
            gguf.convert(base, tmp_path / "model.gguf", name="x")
        return
    engine, source = exports.drawn(settings, base)
    export.check(source.run_manifest, engine)
    log = EventLog(tmp_path / "events.jsonl")
    export.write(tmp_path, source, base=base, log=log)
    found = verify.verify(tmp_path / export.FOLDER, base=base)["logits"]
    assert found["gguf"]["from_rounded"] < 1e-5
    assert found["base"]["difference"] > 0.1  # control: another model would show


def test_what_a_converter_cannot_do_is_known_before_the_first_round(tmp_path, tiny_base):
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text("import sys; sys.exit('no such architecture')")
    changes = {"export.formats": '["gguf"]', "export.llama_cpp": str(checkout)}
    engine, source = exports.drawn(tiny.settings(tiny_base, changes), tiny_base)
    with pytest.raises(ModelError, match=r"tried on a small random model of this base's form: .*could not convert"):
        export.check(source.run_manifest, engine)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("name", ["mixtral", pytest.param("falcon", marks=pytest.mark.slow)])
def test_a_4_bit_export_of_which_little_is_4_bit_is_refused_before_the_first_round(tmp_path, name):
    base = architectures.make(name, tmp_path / "base")
    targets = {"mixtral": '["q_proj", "v_proj"]', "falcon": '["query_key_value"]'}[name]
    changes = {"export.formats": '["merged", "nf4"]', "adapter.targets": targets}
    engine, source = exports.drawn(tiny.settings(base, changes), base)
    with pytest.raises(ModelError, match=r"model\.quantization = 'nf4' reaches \d+ % of the weights"):
        export.check(source.run_manifest, engine)
    control = tiny.settings(base, {**changes, "export.formats": '["merged"]'})
    order = rehearsal.Order(("merged",))
    rehearsal.rehearse(control, base, base_sha256=engine.base_sha256, order=order)


def test_rows_of_the_export_are_read_as_it_will_read_them(tmp_path, tiny_base):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    asked = {"export.formats": '["merged"]', "evaluation.server_data": str(rows)}
    engine, source = exports.drawn(tiny.settings(tiny_base, asked), tiny_base)
    export.check(source.run_manifest, engine)  # control
    rows.write_text(json.dumps({"text": "no answer"}))
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        export.check(source.run_manifest, engine)


@pytest.mark.parametrize(
    ("name", "changes", "targets", "depth"),
    [
        ("llama", {"num_hidden_layers": 9}, (), 2),
        ("llama", {"num_hidden_layers": 9}, ("layers.5.self_attn.q_proj",), 6),
        ("gemma3", {"num_hidden_layers": 9}, (), 6),  # the sixth is the first that attends to everything
        ("gpt2", {"n_layer": 5}, (), 2),
    ],
)
def test_the_small_model_has_every_kind_of_layer_and_those_that_are_named(tmp_path, name, changes, targets, depth):
    base = architectures.make(name, tmp_path / "base", **changes)
    small = rehearsal.make_small(base, tmp_path / "small", targets=targets)
    assert AutoConfig.from_pretrained(small).num_hidden_layers == depth
    assert (small / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
