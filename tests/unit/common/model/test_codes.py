import hashlib
import json

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file

from common.model import base as model
from common.model import codes
from tests import tiny


def test_the_hash_is_of_names_shapes_and_codes_of_the_files_own_weights(tiny_base, load_tiny):
    """Made here from the files and bitsandbytes' function, without the loaded model."""
    weights = load_file(tiny_base / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")):
        weight = weights[f"{name}.weight"]
        packed, _ = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        head = {"name": name, "num_bytes": packed.numel(), "shape": list(weight.shape)}
        digest.update(json.dumps(head, separators=(",", ":")).encode() + b"\n" + packed.numpy().tobytes())
    assert load_tiny({"model.quantization": "nf4"}).codes_sha256 == digest.hexdigest()


def test_only_4_bit_codes_are_hashed(load_tiny):
    assert [load_tiny({"model.quantization": kind}).codes_sha256 for kind in ("none", "int8")] == ["", ""]


def test_double_quantisation_and_the_adapter_leave_the_codes_alone(load_tiny):
    nf4 = {"model.quantization": "nf4"}
    plain = load_tiny(nf4).codes_sha256
    assert load_tiny({**nf4, "model.double_quantization": "false", "adapter.r": "2"}).codes_sha256 == plain
    assert load_tiny({**nf4, "model.dtype": "bfloat16"}).codes_sha256 != plain  # control: a file of float32


def test_a_file_of_bfloat16_gives_the_same_codes_whatever_it_is_read_as(tmp_path):
    folder = tiny.make_base(tmp_path / "base")
    base = model.load_base(folder, tiny.settings(folder).model, torch.device("cpu"))
    base.to(torch.bfloat16).save_pretrained(folder)
    settings = tiny.settings(folder, {"model.quantization": "nf4"}).model
    found = {
        codes.sha256_of(model.load_base(folder, settings.model_copy(update={"dtype": dtype}), torch.device("cpu")))
        for dtype in ("float32", "bfloat16")
    }
    assert len(found) == 1
