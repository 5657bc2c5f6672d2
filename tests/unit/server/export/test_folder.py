"""Every format of an export, read back by what its users read it with."""

import json
import re
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from common.errors import ConfigError, ModelError
from common.model.base import hash_base
from common.run.manifest import RunManifest
from common.text import templates
from server.export import folder as export_folder
from server.export import gguf as export_gguf
from server.export.folder import Exported
from server.run import finish
from server.verify import verify
from simulations.world.world import EMBEDDED_BASE
from tests import tiny
from tests.samples.events import evaluated, whole

IDS_BT = torch.arange(3, 43).reshape(2, 20)


def make_source(engine, settings, *, size=0.05):
    generator = torch.Generator().manual_seed(8)
    state = {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    manifest = RunManifest(settings, engine.base_sha256, engine.tensor_specs)
    log = [
        whole(evaluated(0, 3.5, north=3.5, south=3.5)),
        whole({**evaluated(2, 1.25, north=1.5, south=1.0), "exact_match": 0.5}),
    ]
    return Exported(state, manifest, 2, {"north": 12, "south": 9}, log)


@pytest.fixture(scope="module")
def source(load_tiny, tiny_base):
    return make_source(load_tiny(), tiny.settings(tiny_base))


def write(folder, source, base, *formats, llama_cpp=None):
    export_folder.write(folder, source, formats=formats, base=base, llama_cpp=llama_cpp, key=None)
    return folder


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return network.eval()(IDS_BT).logits


def from_gguf(folder, name="model.gguf"):
    options = {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_gguf_read_back_by_transformers_is_the_merged_checkpoint(source, tiny_base, tmp_path):
    folder = write(tmp_path / "export", source, tiny_base, "merged", "gguf")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    read_back = from_gguf(folder / "gguf")
    found = dict(read_back.named_parameters())
    for name, tensor in merged.named_parameters():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(logits(read_back), logits(merged))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert float((logits(plain) - logits(read_back)).abs().max()) > 1e-2  # control


def test_gguf_of_the_embedded_base_keeps_its_shape_and_tokens(tmp_path):
    export_gguf.convert(EMBEDDED_BASE, tmp_path / "model.gguf", name="embedded")
    facts = {field.name: field.contents() for field in gguf.GGUFReader(tmp_path / "model.gguf").fields.values()}
    wanted = json.loads((EMBEDDED_BASE / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    assert facts["general.architecture"] == "llama"
    assert facts["llama.block_count"] == wanted["num_hidden_layers"]
    assert facts["llama.attention.head_count_kv"] == wanted["num_key_value_heads"]
    assert facts["llama.rope.dimension_count"] == wanted["head_dim"]
    assert facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(wanted["rms_norm_eps"])
    assert facts["tokenizer.ggml.pre"] == "smollm"
    assert facts["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(wanted["vocab_size"]))
    assert facts["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert facts["tokenizer.ggml.add_bos_token"] is False
    assert facts["tokenizer.chat_template"] == tokenizer.chat_template
    assert facts["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control tokens, then plain ones


def test_heads_are_interleaved_as_llama_cpp_does():
    weight_dk = np.arange(8)[:, None]  # two heads of four rows: a head's halves are 0 1 and 2 3
    assert export_gguf.interleave(weight_dk, num_heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
OTHERS = {
    "architecture": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "bias": {"attention_bias": True},
    "rope": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "rope of transformers 4": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": LLAMA3},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_a_base_that_is_not_written_here_is_refused_with_the_remedy(tmp_path, changes):
    folder = tiny.make_base(tmp_path / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(ConfigError, match="--llama-cpp DIR"):
        export_gguf.convert(folder, tmp_path / "model.gguf", name="other")
    assert not (tmp_path / "model.gguf").exists()


def test_such_a_base_is_refused_before_anything_is_merged(source, tmp_path):
    base = tiny.make_base(tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "attention_bias": True}))
    (base / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="attention_bias"):
        write(tmp_path / "export", source, base, "merged", "gguf")


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    folder = tiny.make_base(tmp_path / "base")
    stored = json.loads((folder / "tokenizer.json").read_text())
    export_gguf.pre_tokenizer_name(stored)  # control
    for changes in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Metaspace"}}, {"pre_tokenizer": None}):
        with pytest.raises(ConfigError, match="--llama-cpp DIR"):
            export_gguf.pre_tokenizer_name({**stored, **changes})


def test_a_modelfile_has_a_template_only_where_it_is_chatml(tmp_path):
    folder = tiny.make_base(tmp_path / "base")
    text = export_gguf.modelfile(folder)
    assert text.startswith("FROM ./model.gguf\nTEMPLATE")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    (folder / "chat_template.jinja").write_text("{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}" + templates.CHATML)
    assert 'TEMPLATE """' not in export_gguf.modelfile(folder)


def commands(text: str) -> list[tuple[str, str]]:
    """A Modelfile by the grammar of Ollama's docs (`INSTRUCTION arguments`, comments from `#`, texts over several lines
    in three quotes); what is none of it is an error."""
    known = "FROM|PARAMETER|TEMPLATE|SYSTEM|ADAPTER|LICENSE|MESSAGE|REQUIRES"
    line = re.compile(rf'(?:#[^\n]*|(?P<name>{known})[ ]+(?P<value>"""(?:.|\n)*?"""|[^\n]+)|)\n')
    found, place = [], 0
    while place < len(text):
        one = line.match(text, place)
        if one is None:
            raise ValueError(f"no command: {text[place:].splitlines()[0]}")
        found += [(one["name"], one["value"])] if one["name"] else []
        place = one.end()
    return found


def test_a_modelfile_is_one_by_ollama_s_grammar(tmp_path):
    folder = tiny.make_base(tmp_path / "base")
    plain, own = export_gguf.modelfile(folder), templates.CHATML
    (folder / "chat_template.jinja").write_text("{{ 'be kind' }}" + own)
    for text, names in (
        (plain, ["FROM", "TEMPLATE", "PARAMETER"]),
        (export_gguf.modelfile(folder), ["FROM", "PARAMETER"]),
    ):
        found = commands(text)
        assert [name for name, _ in found] == names
        assert found[0] == ("FROM", "./model.gguf")
        key, _, value = found[-1][1].partition(" ")
        assert (key, json.loads(value)) == ("stop", "<|im_end|>")
    template = dict(commands(plain))["TEMPLATE"]
    assert template.count("{{") == template.count("}}") == 4
    assert all(name in template for name in (".Messages", ".Role", ".Content"))
    for broken in (plain.replace('"""', '"'), plain.replace("FROM", "BASE"), plain.rstrip("\n")):  # controls
        with pytest.raises(ValueError, match="no command"):
            commands(broken)


CONVERTER = """
import pathlib, sys
merged, _, outfile, _, outtype, _, name = sys.argv[1:]
assert name and outtype == "bf16" and (pathlib.Path(merged) / "config.json").is_file()
{body}
"""


def checkout(folder, body):
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(body=body))
    return folder


def test_a_llama_cpp_checkout_converts_what_is_not_written_here(source, tiny_base, tmp_path):
    export_gguf.convert(tiny_base, tmp_path / "made.gguf", name="by a checkout")
    body = f"pathlib.Path(outfile).write_bytes(pathlib.Path({str(tmp_path / 'made.gguf')!r}).read_bytes())"
    folder = write(tmp_path / "export", source, tiny_base, "gguf", llama_cpp=checkout(tmp_path / "llama.cpp", body))
    assert (folder / "gguf" / "model.gguf").read_bytes() == (tmp_path / "made.gguf").read_bytes()


@pytest.mark.parametrize("body", ["sys.exit(3)", "pass"], ids=["fails", "writes nothing"])
def test_a_checkout_that_cannot_convert_leaves_nothing(source, tiny_base, tmp_path, body):
    with pytest.raises(ModelError, match="could not convert"):
        write(tmp_path / "export", source, tiny_base, "gguf", llama_cpp=checkout(tmp_path / "llama.cpp", body))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_a_package_that_the_converter_needs_is_named_before_anything_is_merged(source, tiny_base, tmp_path):
    found = checkout(tmp_path / "llama.cpp", "sys.exit(3)")
    (found / "requirements").mkdir()
    (found / "requirements" / "other.txt").write_text("numpy~=1.0  # any\nno-such-package-here>=0.1,<1\n")
    named = found / "requirements" / "requirements-convert_hf_to_gguf.txt"
    named.write_text("-r ./other.txt\n--extra-index-url somewhere\n\n## why\ntorch==1.0\n")
    with pytest.raises(ConfigError, match="needs no-such-package-here, which"):
        write(tmp_path / "export", source, tiny_base, "gguf", llama_cpp=found)
    named.write_text("torch==1.0\n")
    with pytest.raises(ModelError, match="could not convert"):  # the control: the converter was asked
        write(tmp_path / "export", source, tiny_base, "gguf", llama_cpp=found)


def test_a_folder_that_is_no_checkout_is_refused(source, tiny_base, tmp_path):
    with pytest.raises(ConfigError, match=r"no convert_hf_to_gguf\.py"):
        write(tmp_path / "export", source, tiny_base, "gguf", llama_cpp=tmp_path)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_checkpoint_loads_as_plain_transformers_and_is_near_the_adapter(source, tiny_base, tmp_path, kind):
    folder = write(tmp_path / "export", source, tiny_base, "peft", kind)
    loaded = AutoModelForCausalLM.from_pretrained(folder / kind)
    assert loaded.config.quantization_config.quant_method == "bitsandbytes"
    stored = load_file(folder / kind / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype in (torch.uint8, torch.int8)
    figures = verify.verify(folder, base=tiny_base)["logits"]
    assert 1e-3 < figures[kind]["difference"] < figures["base"]["difference"]


def test_vllm_gets_a_folder_an_adapter_under_the_runs_name(source, tmp_path):
    folder = write(tmp_path / "export", source, None, "vllm")
    assert {path.name for path in (folder / "vllm" / "tiny").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "--max-lora-rank 8 --lora-modules tiny=vllm/tiny" in (folder / "README.md").read_text()


def test_a_rank_that_vllm_does_not_take_is_refused(load_tiny, tiny_base, tmp_path):
    changes = {"adapter.r": "512", "aggregation.method": '"flora"', "aggregation.residual_rank": "8"}
    wide = make_source(load_tiny(changes), tiny.settings(tiny_base, changes))
    with pytest.raises(ConfigError, match="rank 520, vLLM takes up to 512"):
        write(tmp_path / "export", wide, None, "vllm")
    write(tmp_path / "export", wide, None, "peft")  # control


def test_the_card_tells_data_evaluation_privacy_and_licences(source, tmp_path):
    base = tiny.make_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: other\n")

    found = replace(source, run_manifest=replace(source.run_manifest, base_sha256=hash_base(base)))
    text = (write(tmp_path / "export", found, base, "merged") / "README.md").read_text()
    for told in (
        "| 3.5000 | 1.2500 |",
        "| - | 50.0 % |",
        "north 12",
        "`apache-2.0`",
        "fedavg",
        "This folder holds: merged.",
    ):
        assert told in text
    for part in ("## Data", "## Evaluation", "## Privacy", "## Licences", found.run_manifest.sha256):
        assert part in text
    assert "without differential privacy" in text


def test_the_card_says_of_the_data_what_the_coordinator_states_and_else_that_nobody_has(load_tiny, tiny_base, tmp_path):
    changes = {"export.data_statement": "German discharge letters of 2019.", "export.data_licence": "CC-BY-4.0"}
    cards = []
    for name, made in (("stated", changes), ("silent", {})):
        found = make_source(load_tiny(), tiny.settings(tiny_base, made))
        cards.append((write(tmp_path / name, found, None, "peft") / "README.md").read_text())
    assert "German discharge letters of 2019." in cards[0].split("## Data")[1].split("\n## ")[0]
    assert "Data of the sites: CC-BY-4.0" in cards[0].split("## Licences")[1]
    assert "it cannot say what the text is" in cards[1]  # control
    assert "Data of the sites" not in cards[1]


def test_a_base_without_a_licence_is_told_so(source, tmp_path):
    assert "its files name no licence" in (write(tmp_path / "export", source, None, "peft") / "README.md").read_text()


def test_no_format_writes_a_pickle_or_a_path_of_this_machine(source, tiny_base, tmp_path):
    folder = write(tmp_path / "export", source, tiny_base, "peft", "vllm", "merged", "nf4", "int8", "gguf")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert path.suffix in verify.KINDS or path.name in verify.KINDS, path
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert str(tiny_base).encode() not in path.read_bytes(), path
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_with_files_is_refused_and_kept(source, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="another folder"):
        write(tmp_path, source, None, "peft")
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_what_needs_a_base_says_so(source, tmp_path):
    with pytest.raises(ConfigError, match="--formats gguf needs the base"):
        write(tmp_path / "export", source, None, "peft", "gguf")


def test_a_format_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="'ggml' is none of peft, vllm"):
        export_folder.parse_formats("peft,ggml")


def test_options_of_a_sealed_folder_need_one():
    with pytest.raises(ConfigError, match="--operator-key is for a sealed folder"):
        finish.refuse_without_to(formats="", operator_key="op.pem")
    with pytest.raises(ConfigError, match="leave --merged out"):
        finish.refuse_beside_to(output=None, merged="folder")
    finish.refuse_without_to(formats="", operator_key=None)  # control


def test_the_merged_checkpoint_has_the_template_that_was_trained_on(load_tiny, tiny_base, tmp_path):
    changes = {"model.chat_template": '"alpaca"'}
    trained = make_source(load_tiny(changes), tiny.settings(tiny_base, changes))
    folder = write(tmp_path / "export", trained, tiny_base, "merged")
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template == templates.ALPACA
