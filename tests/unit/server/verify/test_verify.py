"""`verify` passes a whole export, and names what is wrong with a broken one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.adapter import adapter
from common.errors import AuthError, ModelError
from common.run.manifest import RunManifest
from common.trust import identity
from server.cli import app
from server.export import canonical, seal
from server.export import folder as export_folder
from server.export.folder import Exported
from server.verify import verify
from tests import tiny

KEY = identity.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = identity.public_hex(KEY)
NONE = b"\x80\x04N."  # None, pickled: PROTO 4, NONE, STOP


@pytest.fixture(scope="module")
def source(load_tiny, tiny_base):
    """A checkpoint of an adapter that does something."""
    engine = load_tiny()
    generator = torch.Generator().manual_seed(8)
    state = {name: 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    manifest = RunManifest(tiny.settings(tiny_base), engine.base_sha256, engine.tensor_specs)
    return Exported(state, manifest, 2, {"north": 12, "south": 9}, [])


@pytest.fixture(scope="module")
def sealed(source, tiny_base, tmp_path_factory):
    """A whole and signed export of every format but the quantised ones."""
    folder = tmp_path_factory.mktemp("sealed") / "export"
    formats = ("peft", "vllm", "merged", "gguf")
    export_folder.write(folder, source, formats=formats, base=tiny_base, llama_cpp=None, key=KEY)
    return folder


@pytest.fixture
def folder(sealed, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(sealed, tmp_path / "export"))


def reseal(folder, source):
    """As an exporter with a fault would: hashes and signature are right, the content is not."""
    probe = seal.read(folder).facts.probe
    (folder / seal.FILE).unlink()
    (folder / seal.SIGNATURE_FILE).unlink()
    content = export_folder.content_of(source, formats=("peft", "vllm", "merged", "gguf"), base=source_base(source))
    seal.write(folder, replace(content.facts, probe=probe), specs=adapter.specs(content.adapter), key=KEY)


def source_base(source):
    return Path(source.run_manifest.run.model.base)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(path, change):
    save_file(change(load_file(path)), path)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_export_passes(folder, tiny_base):
    found = verify.verify(folder, signer=SIGNER, base=tiny_base)
    assert found["signer"] == SIGNER
    assert found["formats"] == ["peft", "vllm", "merged", "gguf"]
    figures = found["logits"]
    assert figures["base"]["difference"] > 0.1
    assert figures["peft"]["difference"] < 1e-6
    assert figures["merged"]["from_rounded"] < 1e-6
    assert figures["gguf"]["from_rounded"] < 1e-6
    assert 0 < figures["gguf"]["difference"] < 0.02


def test_an_export_resealed_after_nothing_was_changed_passes(folder, source):
    reseal(folder, source)  # control of the tests below
    verify.verify(folder, signer=SIGNER)


AFTER = {
    "a changed weight": (
        lambda f: flip(f / "peft/adapter_model.safetensors"),
        ModelError,
        "peft/adapter_model.*changed",
    ),
    "a changed byte of the GGUF file": (lambda f: flip(f / "gguf/model.gguf"), ModelError, "model.gguf was changed"),
    "a changed card": (lambda f: flip(f / "README.md"), ModelError, "README.md was changed"),
    "alpha": (
        lambda f: change_json(f / "peft/adapter_config.json", lora_alpha=16),
        ModelError,
        "adapter_config.*changed",
    ),
    "an extra file": (lambda f: (f / "peft/more.json").write_text("{}"), ModelError, "more.json was added"),
    "a missing file": (lambda f: (f / "merged/tokenizer.json").unlink(), ModelError, "tokenizer.json is missing"),
    "a pickle": (lambda f: (f / "training_args.bin").write_bytes(NONE), ModelError, "training_args.bin is, or may be"),
    "a pickle under another name": (
        lambda f: (f / "more.json").write_bytes(NONE),
        ModelError,
        "more.json is, or may be",
    ),
    "a saved module": (lambda f: torch.save({}, f / "more.safetensors"), ModelError, "more.safetensors is, or may be"),
    "a program": (lambda f: (f / "merged/modeling.py").write_text("0"), ModelError, "modeling.py is, or may be"),
    "a link": (lambda f: (f / "out.json").symlink_to("/etc/hostname"), ModelError, "out.json is a link"),
    "the seal": (lambda f: flip(f / seal.FILE, 40), AuthError, "not valid"),
    "no seal": (lambda f: (f / seal.FILE).unlink(), AuthError, "not a signature"),
    "no signature": (lambda f: (f / seal.SIGNATURE_FILE).unlink(), AuthError, "not signed"),
}


@pytest.mark.parametrize(("spoil", "kind", "told"), AFTER.values(), ids=AFTER)
def test_what_was_changed_after_sealing_is_found(folder, spoil, kind, told):
    spoil(folder)
    with pytest.raises(kind, match=told):
        verify.verify(folder, signer=SIGNER)


def without_a_module(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}


def with_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def in_half(tensors):
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


CONFIG = "peft/adapter_config.json"
WEIGHTS = "peft/adapter_model.safetensors"
BEFORE = {
    "alpha": (lambda f: change_json(f / CONFIG, lora_alpha=16), "lora_alpha is 16, of a canonical adapter 8"),
    "rank": (lambda f: change_json(f / CONFIG, r=16, lora_alpha=16), "lora_alpha is 16"),
    "rsLoRA": (lambda f: change_json(f / CONFIG, use_rslora=True), "use_rslora is True"),
    "DoRA": (lambda f: change_json(f / CONFIG, use_dora=True), "use_dora is True"),
    "a pattern": (lambda f: change_json(f / CONFIG, alpha_pattern={"q_proj": 4}), "alpha_pattern is"),
    "saved whole": (lambda f: change_json(f / CONFIG, modules_to_save=["lm_head"]), "modules_to_save is"),
    "an unknown key": (lambda f: change_json(f / CONFIG, surprise=1), "surprise is 1"),
    "fewer targets": (lambda f: change_json(f / CONFIG, target_modules=["q_proj"]), "target_modules and the run's"),
    "a missing module": (lambda f: change_tensors(f / WEIGHTS, without_a_module), "up_proj.*found absent"),
    "not finite": (lambda f: change_tensors(f / WEIGHTS, with_nan), "NaN"),
    "not finite when merged": (lambda f: change_tensors(f / "merged/model.safetensors", with_nan), "NaN or infinity"),
    "no card": (lambda f: (f / "README.md").write_text("A model."), "does not name the base"),
    "no adapter": (lambda f: shutil.rmtree(f / "peft"), "peft is promised and not there"),
    "no weights": (lambda f: (f / CONFIG).unlink(), "adapters promised"),
    "more than promised": (lambda f: shutil.copytree(f / "peft", f / "site-a"), "site-a is promised and not there, or"),
    "a pickle": (lambda f: (f / "merged/training_args.bin").write_bytes(NONE), "training_args.bin is, or may be"),
}


@pytest.mark.parametrize(("spoil", "told"), BEFORE.values(), ids=BEFORE)
def test_what_was_broken_before_sealing_is_found_as_well(folder, source, spoil, told):
    spoil(folder)
    reseal(folder, source)
    with pytest.raises(ModelError, match=told):
        verify.verify(folder, signer=SIGNER)


def test_an_adapter_of_another_type_is_refused(folder, source):
    change_tensors(folder / WEIGHTS, in_half)
    reseal(folder, source)
    with pytest.raises(Exception, match="float32") as raised:
        verify.verify(folder, signer=SIGNER)
    assert raised.value.exit_code == 6


def other_function(tensors):
    """One module of the adapter doubled: right names, shapes and values, another function."""
    name = next(name for name in sorted(tensors) if name.endswith("lora_B.weight"))
    return {**tensors, name: 2 * tensors[name]}


def test_an_adapter_that_is_another_function_is_found(folder, source):
    change_tensors(folder / WEIGHTS, other_function)
    reseal(folder, source)
    with pytest.raises(ModelError, match=r"peft.*other values than the adapter that was exported"):
        verify.verify(folder, signer=SIGNER)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_a_merge_without_the_adapter_is_found_however_little_it_does(source, tiny_base, tmp_path, scale):
    weak = Exported({n: scale * t for n, t in source.tensors.items()}, source.run_manifest, 2, source.sites, [])
    whole = tmp_path / "export"
    export_folder.write(whole, weak, formats=("peft", "merged"), base=tiny_base, llama_cpp=None, key=None)
    verify.verify(whole, base=tiny_base)
    base = load_file(tiny_base / "model.safetensors")
    save_file(in_half(base), whole / "merged/model.safetensors", metadata={"format": "pt"})
    facts = seal.read(whole).facts
    seal.write(whole, facts, specs=canonical.specs(source.run_manifest.tensor_specs), key=None)
    with pytest.raises(ModelError, match="merged"):
        verify.verify(whole, base=tiny_base)


def test_a_gguf_file_whose_heads_are_not_interleaved_is_found(folder, source, tiny_base):
    """The mistake that is easy to make: everything loads, and the rotary positions are wrong."""
    reader = gguf.GGUFReader(folder / "gguf" / "model.gguf", mode="r+")
    for tensor in reader.tensors:
        if "attn_q" in tensor.name:
            rows = np.arange(len(tensor.data)).reshape(4, -1, 2).swapaxes(1, 2).ravel()  # 4 heads
            tensor.data[:] = tensor.data[rows].copy()
    reader.data.flush()
    reseal(folder, source)
    verify.verify(folder, signer=SIGNER)
    with pytest.raises(ModelError, match=r"gguf.*logits"):
        verify.verify(folder, base=tiny_base)


def test_a_pickle_named_as_weights_is_not_read_as_weights(folder, source):
    (folder / "gguf" / "model.gguf").write_bytes(NONE * 100)
    reseal(folder, source)
    with pytest.raises(ModelError, match=r"model\.gguf: not a GGUF file"):
        verify.verify(folder)
    (folder / "merged" / "model.safetensors").write_bytes(NONE * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: not safetensors"):
        reseal(folder, source)


def test_another_signer_is_refused(folder):
    other = identity.public_hex(identity.Ed25519PrivateKey.from_private_bytes(bytes(32)))
    with pytest.raises(AuthError, match="demanded is"):
        verify.verify(folder, signer=other)


def test_an_unsigned_export_passes_where_nobody_demands_a_signer(folder):
    (folder / seal.SIGNATURE_FILE).unlink()
    found = verify.verify(folder)
    assert found["signer"] == ""
    assert "NOT SIGNED" in verify.in_words(found)[0]


def test_another_base_is_refused(folder, tmp_path):
    other = tiny.make_base(tmp_path / "other")
    change_json(other / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ModelError, match="hash"):
        verify.verify(folder, base=other)


@pytest.mark.parametrize(
    ("spoil", "exit_code"),
    [(lambda f: None, 0), (lambda f: flip(f / WEIGHTS), 4), (lambda f: flip(f / seal.SIGNATURE_FILE, 80), 6)],
    ids=["whole", "changed", "forged"],
)
def test_the_command_tells_by_its_exit_code(folder, capsys, spoil, exit_code):
    from common import cli as shared

    spoil(folder)
    with pytest.raises(SystemExit) as ended:
        shared.run(app.app, ["verify", str(folder), "--signer", SIGNER, "--json"])
    assert ended.value.code == exit_code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ("error" in found) == bool(exit_code)


def test_a_folder_that_export_did_not_write_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        verify.verify(tmp_path / "nowhere")
    (tmp_path / "seal").mkdir()
    with pytest.raises(ModelError, match="can be verified"):
        verify.verify(tmp_path / "seal")


def test_values_of_a_gguf_file_must_be_finite(folder, source):
    reader = gguf.GGUFReader(folder / "gguf" / "model.gguf", mode="r+")
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[0] = np.inf
    reader.data.flush()
    reseal(folder, source)
    with pytest.raises(ModelError, match=r"output_norm.weight holds NaN or infinity"):
        verify.verify(folder)
