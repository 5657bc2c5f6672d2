"""Estimates of a base's memory, against numbers that others published and against what torch keeps."""

import json
import shutil

import pytest
import torch

from common.adapter import adapter
from common.errors import ModelError
from common.loss.likelihood import answer_nll
from common.model import size as base_size
from common.model.size import BaseShape, Work
from common.text import prompts

LLAMA_LAYER = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
WORK = Work("nf4", True, "bfloat16", ("all-linear",), r=64, num_rows=1, num_tokens=512, is_checkpointing=False)


def llama_7b() -> BaseShape:
    """Touvron et al. 2023, arXiv:2302.13971: 32 layers, two norms a layer and one at the end, untied embeddings."""
    linears = {f"layers.{n}.{name}": shape for n in range(32) for name, shape in LLAMA_LAYER.items()}
    return BaseShape(linears, 2 * 32_000 * 4096 + 65 * 4096, 32, 4096, 32_000, 0)


def test_llama_7b_has_the_parameters_that_are_printed_for_it_elsewhere():
    """alpaca-lora prints 4,194,304 for r = 8 on q and v; qlora.py 159,907,840 for r = 64 on all, of 3,660,320,768 with
    two 4-bit weights counted as one."""
    shape = llama_7b()
    assert shape.num_linear + shape.num_other == 6_738_415_616
    assert shape.num_adapter_parameters(("q_proj", "v_proj"), r=8) == 4_194_304
    on_all = shape.num_adapter_parameters(("all-linear",), r=64)
    assert on_all == 159_907_840
    assert shape.num_linear // 2 + shape.num_other + on_all == 3_660_320_768


def test_a_weight_costs_the_bits_of_qlora():
    """Section 3: 0.5 bits a weight for scales, 0.127 with double quantisation."""
    linear_only = BaseShape({"layers.0.q": (4096, 4096)}, 0, 1, 4096, 1, 0)

    def bits(**changes) -> float:
        return 8 * base_size.weight_bytes(linear_only, Work(**{**vars(WORK), **changes})) / 4096**2

    assert bits() == pytest.approx(4.127, abs=5e-4)
    assert bits(double_quantization=False) == 4.5
    assert (bits(quantization="none"), bits(quantization="none", dtype="float32")) == (16, 32)
    assert bits(quantization="int8") == pytest.approx(8, abs=0.01)


def test_headers_tell_what_peft_attaches(engine, tiny_base):
    shape = base_size.read(tiny_base)
    attached = adapter.num_parameters(engine.tensor_specs)
    assert shape.num_adapter_parameters(("all-linear",), r=4) == attached
    assert shape.num_adapter_parameters(("q_proj",), r=4) < attached
    assert shape.num_adapter_parameters(("proj",), r=4) == 0
    assert shape.num_linear + shape.num_other == engine.num_base_parameters


@pytest.mark.parametrize("length", [16, 48])
def test_activations_are_within_a_factor_of_two_of_what_torch_keeps(engine, tiny_base, length):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    ids = torch.randint(3, 200, (8, length), generator=torch.Generator().manual_seed(1)).tolist()
    batch = prompts.collate([prompts.Encoded(tuple(row), (True,) * length, "a") for row in ids], pad_id=0)
    engine.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = answer_nll(engine.model, batch)
    found = sum(size for place, size in kept.items() if place not in weights)
    assert loss.requires_grad
    work = Work("none", False, "float32", ("all-linear",), 4, num_rows=8, num_tokens=length, is_checkpointing=False)
    ratio = base_size.estimate(base_size.read(tiny_base), work).activations / found
    assert 0.5 < ratio < 2, ratio


def test_checkpointing_and_fewer_rows_need_less():
    shape = llama_7b()
    plain = base_size.estimate(shape, WORK)
    saved = base_size.estimate(shape, Work(**{**vars(WORK), "is_checkpointing": True}))
    assert saved.activations < plain.activations / 4
    assert (saved.base, saved.adapter) == (plain.base, plain.adapter)
    assert base_size.estimate(shape, Work(**{**vars(WORK), "num_rows": 3})).activations == 3 * plain.activations
    assert plain.total == plain.base + plain.adapter + plain.activations


@pytest.mark.parametrize("broken", ["header", "config", "keys", "list"])
def test_a_damaged_base_is_named(tiny_base, tmp_path, broken):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    text = {"config": "{", "keys": json.dumps({"hidden_size": 1}), "list": "[]"}.get(broken)
    if text is None:
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    else:
        (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="fetch the base again"):
        base_size.read(folder)
