"""Faults of an exporter, in every format: sealed and signed as if nothing were wrong, and found all the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.adapter import adapter
from common.errors import ModelError
from common.model.base import hash_base
from common.text import templates
from server.export import canonical, seal, tokenizer
from server.export import folder as export_folder
from server.verify import verify
from tests import tiny

ADAPTERS = ("peft", "vllm")
MERGED = ("merged", "nf4", "int8", "gguf")
FORMATS = (*ADAPTERS, *MERGED)  # of onnx: test_onnx.py
PLACES = {"peft": "peft", "vllm": "vllm/tiny"}
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def whole(source, tiny_base, tmp_path_factory):
    """Every format, as it should be."""
    folder = tmp_path_factory.mktemp("whole") / "export"
    export_folder.write(folder, source, formats=FORMATS, base=tiny_base, llama_cpp=None, key=None)
    return folder


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """The same shape and tokenizer, other weights."""
    folder = tiny.make_base(tmp_path_factory.mktemp("other") / "base")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name].flip(0)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def wrong_alpha(tensors):
    return {name: 4 * tensor if name.endswith(".lora_B.weight") else tensor for name, tensor in tensors.items()}


def missing_modules(tensors):
    return {name: 0 * tensor if "proj.lora_B" in name and "mlp" in name else tensor for name, tensor in tensors.items()}


def swapped_tensors(tensors):
    return {name.translate(str.maketrans("01", "10")): tensor for name, tensor in tensors.items()}


FAULTS = {"wrong alpha": wrong_alpha, "missing modules": missing_modules, "swapped tensors": swapped_tensors}


def assemble(folder, source, base, *, name, from_folder, whole):
    """An export of the adapter and one format, that format from elsewhere, sealed for what it should be."""
    formats = tuple(kind for kind in seal.FORMATS if kind in ("peft", name))
    content = export_folder.content_of(source, formats=formats, base=base)
    shutil.copytree(whole / "peft", folder / "peft")
    shutil.copytree(from_folder / name, folder / name, dirs_exist_ok=True)
    shutil.copy(whole / "README.md", folder / "README.md")
    facts = replace(content.facts, probe=seal.read(whole).facts.probe)
    seal.write(folder, facts, specs=adapter.specs(content.adapter), key=None)
    return folder


def broken(source, base, folder, *, fault):
    """What an exporter with a fault writes: everything from another adapter."""
    wrong = replace(source, tensors=fault(source.tensors))
    export_folder.write(folder, wrong, formats=FORMATS, base=base, llama_cpp=None, key=None)
    return folder


@pytest.fixture(scope="module")
def exports(source, tiny_base, other_base, tmp_path_factory):
    """Every fault in every format."""
    found = {}
    for name, fault in FAULTS.items():
        found[name] = broken(source, tiny_base, tmp_path_factory.mktemp("bad") / "export", fault=fault)
    manifest = replace(source.run_manifest, base_sha256=hash_base(other_base))
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "export"
    moved = replace(source, run_manifest=manifest)
    export_folder.write(elsewhere, moved, formats=FORMATS, base=other_base, llama_cpp=None, key=None)
    return {**found, "other base": elsewhere}


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_format_passes(source, whole, tiny_base, tmp_path, name):
    """The control of all that follows."""
    found = verify.verify(
        assemble(tmp_path / "export", source, tiny_base, name=name, from_folder=whole, whole=whole), base=tiny_base
    )
    figures = found["logits"]
    assert figures[name]["difference"] < figures["base"]["difference"]
    assert figures["base"]["difference"] > 0.3


def marked(name, fault):
    """Every case of a quantised format but one is slow: loading one takes a second, and the check is the same."""
    is_slow = name in ("nf4", "int8") and fault != "wrong alpha"
    return pytest.param(name, fault, marks=pytest.mark.slow) if is_slow else (name, fault)


@pytest.mark.parametrize(("name", "fault"), [marked(n, f) for n in MERGED for f in (*FAULTS, "other base")])
def test_a_fault_of_a_merged_format_is_found_on_the_base(source, whole, exports, tiny_base, tmp_path, name, fault):
    folder = assemble(tmp_path / "export", source, tiny_base, name=name, from_folder=exports[fault], whole=whole)
    verify.verify(folder)  # without the base nobody can tell
    with pytest.raises(ModelError, match=rf"{name}: (logits differ|is not base plus|is nearer to)"):
        verify.verify(folder, base=tiny_base)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fault_of_an_adapter_is_found_without_the_base(source, whole, exports, tiny_base, tmp_path, name, fault):
    folder = assemble(tmp_path / "export", source, tiny_base, name=name, from_folder=exports[fault], whole=whole)
    with pytest.raises(ModelError, match="other values than the adapter that was exported"):
        verify.verify(folder)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_for_another_base_is_found(source, whole, tiny_base, other_base, tmp_path, name):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    change_json(copy / PLACES[name] / "adapter_config.json", base_model_name_or_path="else/where")
    folder = assemble(tmp_path / "export", source, tiny_base, name=name, from_folder=copy, whole=whole)
    with pytest.raises(ModelError, match="base_model_name_or_path is else/where"):
        verify.verify(folder)
    with pytest.raises(ModelError, match="hash"):
        verify.verify(whole, base=other_base)


OTHER = "be kind " + templates.CHATML


def change_template(folder, name):
    """Another template, where its readers find it."""
    if name == "gguf":
        from server.export import gguf

        merged = folder / "merged"
        (merged / tokenizer.TEMPLATE_FILE).write_text(OTHER)
        (folder / "gguf" / gguf.MODEL_FILE).unlink()
        gguf.convert(merged, folder / "gguf" / gguf.MODEL_FILE, name="tiny")
    else:
        (folder / PLACES.get(name, name) / tokenizer.TEMPLATE_FILE).write_text(OTHER)


@pytest.mark.parametrize("name", FORMATS)
def test_another_chat_template_is_found_in_every_format(source, whole, tiny_base, tmp_path, name):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    change_template(copy, name)
    folder = assemble(tmp_path / "export", source, tiny_base, name=name, from_folder=copy, whole=whole)
    with pytest.raises(ModelError, match=rf"{PLACES.get(name, name)}: its chat template has hash"):
        verify.verify(folder)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_template_that_is_missing_is_found(source, whole, tiny_base, tmp_path, name):
    folder = assemble(tmp_path / "export", source, tiny_base, name=name, from_folder=whole, whole=whole)
    (folder / PLACES[name] / tokenizer.TEMPLATE_FILE).unlink()
    facts = seal.read(folder).facts
    (folder / seal.FILE).unlink()
    seal.write(folder, facts, specs=canonical.specs(source.run_manifest.tensor_specs), key=None)
    with pytest.raises(ModelError, match="its chat template has hash none"):
        verify.verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<|im_start|>assistant", "assistant:"),
        lambda text: text.replace("model.gguf", "../other.gguf"),
        lambda text: text + "SYSTEM be unkind\n",
        lambda text: "",
    ],
)
def test_another_modelfile_is_found(source, whole, tiny_base, tmp_path, change):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    file = copy / "gguf" / "Modelfile"
    file.write_text(change(file.read_text()))
    folder = assemble(tmp_path / "export", source, tiny_base, name="gguf", from_folder=copy, whole=whole)
    with pytest.raises(ModelError, match="is not the Modelfile of this model"):
        verify.verify(folder)


def test_a_template_that_the_setting_does_not_stand_for_is_found(source, tiny_base, tmp_path):
    content = export_folder.content_of(source, formats=("peft",), base=tiny_base)
    wrong = replace(content, facts=replace(content.facts, chat_template="alpaca"))
    canonical.save(tmp_path / "export/peft", wrong.adapter, base="", card="")
    (tmp_path / "export/peft" / tokenizer.TEMPLATE_FILE).write_text(tiny.make_tokenizer().chat_template)
    (tmp_path / "export/README.md").write_text(content.card)
    seal.write(tmp_path / "export", wrong.facts, specs=adapter.specs(wrong.adapter), key=None)
    with pytest.raises(ModelError, match="is not alpaca's"):
        verify.verify(tmp_path / "export")
