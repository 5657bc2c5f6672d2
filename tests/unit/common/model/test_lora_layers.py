"""LoRA's layers in few passes: the same outputs and gradients as peft's, or peft's own."""

import pytest
import torch

from common.adapter import adapter
from common.model import lora_layers
from tests import tiny

LENGTH = 2 * lora_layers.MIN_ROWS
ATOL = 2e-5  # of float32 sums over a few hundred values, in another order


@pytest.fixture
def engine_of(load_tiny):
    """A base of some precision whose adapter is not zero."""

    def load(changes):
        engine = load_tiny(changes)
        torch.manual_seed(3)
        for parameter in adapter.parameters(engine.model).values():
            parameter.data = torch.randn_like(parameter) * 0.05
            parameter.grad = None
        return engine

    return load


def _pass(engine):
    """Logits of one row and the adapter's gradients."""
    ids = torch.arange(LENGTH)[None] % 50
    engine.model.zero_grad()
    logits = engine.model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in adapter.parameters(engine.model).items()}


def _kernel_calls(monkeypatch):
    """A list that grows with each use of the short way."""
    calls, real = [], lora_layers.LoraProduct.apply
    monkeypatch.setattr(lora_layers.LoraProduct, "apply", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_outputs_and_gradients_are_those_of_peft(engine_of, monkeypatch, quantization):
    engine, other = (engine_of({"model.quantization": quantization, "adapter.use_rslora": "true"}) for _ in "ab")
    calls = _kernel_calls(monkeypatch)
    expected, expected_grads = _pass(other)
    assert not calls
    assert lora_layers.install(engine.model) > 0
    logits, grads = _pass(engine)
    assert calls
    assert torch.allclose(logits, expected, atol=ATOL)
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], atol=ATOL * expected_grads[name].abs().max()), name


@pytest.mark.parametrize("case", ["off", "dropout", "hooked", "few rows"])
def test_peft_computes_what_the_short_way_does_not(engine_of, monkeypatch, case):
    engine = engine_of({"adapter.dropout": "0.5"} if case == "dropout" else {})
    lora_layers.install(engine.model)
    engine.model.train()
    calls = _kernel_calls(monkeypatch)
    ids = torch.arange(8 if case == "few rows" else LENGTH)[None] % 50
    if case == "hooked":
        for module in engine.model.modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"].register_forward_pre_hook(lambda *_: None)
    if case == "off":
        with engine.model.disable_adapter():
            engine.model(input_ids=ids)
    else:
        engine.model(input_ids=ids)
    assert not calls
    engine.model.eval()
    if case in ("off", "dropout"):
        engine.model(input_ids=ids)
        assert calls


def test_cores_and_other_kinds_stay_with_peft(load_tiny):
    cored = load_tiny({"aggregation.method": "ravan"})
    assert lora_layers.install(cored.model) == 0
    for kind in ("ia3", "adalora", "dora"):
        assert lora_layers.install(load_tiny(tiny.of_kind(kind)).model) == 0, kind


def test_who_looks_at_what_a_gives_sees_the_same(engine_of, monkeypatch):
    engine, other = engine_of({}), engine_of({})
    lora_layers.install(engine.model)
    calls = _kernel_calls(monkeypatch)
    seen = {}
    for name, one in (("ours", engine), ("peft", other)):
        first = next(module for module in one.model.modules() if hasattr(module, "lora_A"))
        first.lora_A["default"].register_forward_hook(lambda _, args, down, name=name: seen.setdefault(name, down))
        one.model(input_ids=torch.arange(LENGTH)[None] % 50)
    assert calls
    assert seen["ours"].shape == seen["peft"].shape
    assert torch.allclose(seen["ours"], seen["peft"], atol=ATOL)


@pytest.mark.parametrize("kind", ["fused", "foreach", "data", "copied", "unseen"])
def test_factors_follow_their_masters(engine_of, kind):
    """What was cast for one step is not used in the next, however the masters were changed."""
    engine, other = engine_of({}), engine_of({})
    lora_layers.install(engine.model)
    for one in (engine, other):
        _pass(one)
        parameters = list(adapter.parameters(one.model).values())
        if kind in ("fused", "foreach"):
            torch.optim.AdamW(parameters, lr=0.1, **{kind: True}).step()
        for parameter in parameters:
            if kind == "data":
                parameter.data = parameter.data * 2
            elif kind == "unseen":  # as by a kernel that leaves the version as it was
                parameter.data.mul_(2)
            elif kind == "copied":
                with torch.no_grad():
                    parameter.copy_(parameter * 2)
    assert torch.allclose(_pass(engine)[0], _pass(other)[0], atol=1e-3)
    assert not torch.allclose(_pass(engine)[0], _pass(engine_of({}))[0], atol=1e-2)


def test_a_weight_is_dequantised_to_the_bits_of_bitsandbytes(load_tiny):
    engine = load_tiny({"model.quantization": "nf4"})
    weight = next(m for m in engine.model.modules() if hasattr(m, "lora_A")).get_base_layer().weight
    assert weight.quant_state.nested
    expected = lora_layers.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(lora_layers.Frozen.of(weight).whole(torch.float32), expected)


def test_a_pass_of_few_rows_casts_no_factor_and_a_long_one_casts_all_at_once(engine_of, monkeypatch):
    engine = engine_of({})
    count = lora_layers.install(engine.model)
    cast, real = [], lora_layers._cast
    monkeypatch.setattr(lora_layers, "_cast", lambda layers, dtype: cast.append(len(layers)) or real(layers, dtype))
    engine.model(input_ids=torch.arange(4)[None])
    assert cast == []
    engine.model(input_ids=torch.arange(LENGTH)[None] % 50)
    assert cast == [count]
