"""The ONNX graph in ONNX Runtime is the merged checkpoint; what is not is found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from common.adapter import adapter  # noqa: E402
from common.errors import ModelError  # noqa: E402
from server.export import folder as export_folder  # noqa: E402
from server.export import onnx as export_onnx  # noqa: E402
from server.export import seal  # noqa: E402
from server.verify import verify  # noqa: E402
from tests import tiny  # noqa: E402

FORMATS = ("peft", "merged", "onnx")
pytestmark = pytest.mark.slow  # torch traces for half a minute where cores are shared


@pytest.fixture(scope="module")
def whole(source, tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "export"
    export_folder.write(folder, source, formats=FORMATS, base=tiny_base, llama_cpp=None, key=None)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "export"))


def reseal(folder, source, base):
    probe = seal.read(folder).facts.probe
    (folder / seal.FILE).unlink()
    content = export_folder.content_of(source, formats=FORMATS, base=base)
    seal.write(folder, replace(content.facts, probe=probe), specs=adapter.specs(content.adapter), key=None)


def test_onnx_runtime_gives_the_logits_of_the_merged_checkpoint(whole):
    merged = AutoModelForCausalLM.from_pretrained(whole / "merged", dtype=torch.float32).eval()
    session = onnxruntime.InferenceSession(str(whole / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    for shape_bt, num_pads in (((1, 1), 0), ((3, 21), 0), ((2, 40), 7)):  # neither axis is that of the exporter's trial
        ids_bt = torch.randint(3, 300, shape_bt, generator=torch.Generator().manual_seed(1))
        mask_bt = torch.ones_like(ids_bt)
        mask_bt[0, :num_pads] = 0
        given = session.run(None, {"input_ids": ids_bt.numpy(), "attention_mask": mask_bt.numpy()})[0]
        with torch.no_grad():
            wanted = merged(input_ids=ids_bt, attention_mask=mask_bt).logits.numpy()
        assert np.abs(given - wanted)[:, num_pads:].max() < 1e-4 * np.abs(wanted).max()


def test_a_whole_export_passes(whole, tiny_base):
    figures = verify.verify(whole, base=tiny_base)["logits"]
    assert figures["onnx"]["from_rounded"] < 1e-5
    assert figures["onnx"]["difference"] < 0.02 < figures["base"]["difference"]


def test_the_folder_has_the_tokenizer_and_no_path_of_this_machine(whole, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(whole / "onnx")
    assert tokenizer.chat_template == tiny.make_tokenizer().chat_template
    root = str(Path(export_onnx.__file__).parents[2]).encode()
    for path in (whole / "onnx").iterdir():
        assert root not in path.read_bytes(), path
        assert str(tiny_base).encode() not in path.read_bytes(), path


def without_adapter(weights, base):
    return base


def wrong_alpha(weights, base):
    return {name: base[name] + 4 * (weights[name] - base[name]) for name in weights}


def missing_modules(weights, base):
    return {name: base[name] if "mlp" in name else weights[name] for name in weights}


def swapped_tensors(weights, base):
    return {name: weights[name.translate(str.maketrans("01", "10"))] for name in weights}


def other_base(weights, base):
    name = "model.layers.0.mlp.down_proj.weight"
    return {**weights, name: weights[name] + (base[name].flip(0) - base[name])}


def rewrite(path, old, new):
    """Other weights into a graph, for those whose values it has, transposed or not; how many those are."""
    graph_model = onnx.load(str(path))
    found = 0
    for tensor in graph_model.graph.initializer:
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for name, is_turned in ((name, turned) for name in old for turned in (False, True)):
            wanted = old[name].mT if is_turned and old[name].ndim == 2 else old[name]
            if torch.equal(values, wanted) and new[name] is not old[name]:
                changed = (new[name].mT if is_turned and new[name].ndim == 2 else new[name]).contiguous().numpy()
                tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
                found += 1
                break
    (path.parent / export_onnx.WEIGHTS_FILE).unlink()
    onnx.save(
        graph_model, str(path), save_as_external_data=True, location=export_onnx.WEIGHTS_FILE, size_threshold=1024
    )
    return found


@pytest.mark.parametrize("fault", [without_adapter, wrong_alpha, missing_modules, swapped_tensors, other_base])
def test_other_weights_are_found_on_the_base(folder, source, tiny_base, fault):
    base = {name: tensor.float() for name, tensor in load_file(tiny_base / "model.safetensors").items()}
    weights = {name: tensor.float() for name, tensor in load_file(folder / "merged/model.safetensors").items()}
    path = folder / "onnx" / export_onnx.MODEL_FILE
    rewrite(path, weights, weights)
    reseal(folder, source, tiny_base)
    verify.verify(folder, base=tiny_base)  # control: the same weights written anew
    assert rewrite(path, weights, fault(weights, base)) >= 1
    reseal(folder, source, tiny_base)
    verify.verify(folder)
    with pytest.raises(ModelError, match=r"onnx: (logits differ|is not base plus|is nearer to)"):
        verify.verify(folder, base=tiny_base)


def edit(change):
    def spoil(path):
        graph_model = onnx.load(str(path), load_external_data=False)
        change(graph_model)
        path.write_bytes(graph_model.SerializeToString())

    return spoil


def foreign(graph_model):
    graph_model.graph.node[0].domain = "com.example"


def elsewhere(graph_model):
    tensor = next(tensor for tensor in graph_model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../../secrets"


def longer(path):
    file = path.with_name(export_onnx.WEIGHTS_FILE)
    file.write_bytes(file.read_bytes() + b"more")


def infinite(path):
    weights = {n: tensor.float() for n, tensor in load_file(path.parents[1] / "merged/model.safetensors").items()}
    rewrite(path, weights, {name: torch.full_like(tensor, float("inf")) for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (edit(foreign), "operators or functions beyond"),
        (edit(elsewhere), r"reads a file other than model\.onnx\.data"),
        (longer, "does not end where"),
        (infinite, "NaN or infinity"),
        (lambda path: path.write_bytes(b"not a graph"), "not a sound ONNX file"),
        (lambda path: path.rename(path.with_name("other.onnx")), r"other.onnx|onnx/model\.onnx"),
    ],
)
def test_a_graph_that_is_not_sound_is_refused(folder, source, tiny_base, spoil, told):
    spoil(folder / "onnx" / export_onnx.MODEL_FILE)
    reseal(folder, source, tiny_base)
    with pytest.raises(ModelError, match=told):
        verify.verify(folder)


def test_another_chat_template_is_found(folder, source, tiny_base):
    (folder / "onnx" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    reseal(folder, source, tiny_base)
    with pytest.raises(ModelError, match="onnx: its chat template has hash"):
        verify.verify(folder)


def test_a_checkpoint_that_cannot_be_loaded_is_refused(tiny_base, tmp_path):
    config = json.loads((tiny_base / "config.json").read_text())
    merged = Path(shutil.copytree(tiny_base, tmp_path / "merged"))
    (merged / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model", "architectures": ["No"]}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        export_onnx.convert(merged, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
