"""The canonical form is the same function, in the one shape that every reader takes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.adapter import adapter
from common.model import base as model
from common.run.manifest import RunManifest
from server.export import adapter as export
from server.export import canonical
from tests import tiny

IDS_BT = torch.arange(3, 43).reshape(2, 20)
CASES = {
    "r 4": {},
    "r 8": {"adapter.r": "8"},
    "r 11": {"adapter.r": "11", "adapter.alpha": "3.7"},
    "r 70": {"adapter.r": "70"},
    "rslora": {"adapter.use_rslora": "true", "adapter.r": "5"},
    "some modules": {"adapter.targets": '["q_proj", "down_proj"]'},
    "cores": {"aggregation.method": '"ravan"', "aggregation.num_heads": "3", "adapter.r": "6"},
    "one core": {"aggregation.method": '"ravan"', "aggregation.num_heads": "1", "adapter.use_rslora": "true"},
    "one layer": {"adapter.targets": '["layers.1.self_attn.q_proj"]'},
}


def logits(network) -> torch.Tensor:
    return tiny.exact_logits(network, IDS_BT)


def stirred(engine):
    generator = torch.Generator().manual_seed(8)
    size = 0.15 if any(".lora_H." in name for name in engine.initial) else 0.05  # products of three are smaller
    state = {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in engine.initial.items()}
    adapter.write(engine.model, state)
    return state


def saved(folder, engine, settings):
    state = stirred(engine)
    manifest = RunManifest(settings, engine.base_sha256, engine.tensor_specs)
    export.save_adapter(folder, state, run_manifest=manifest, num_rounds=1, sites={"north": 3})
    return folder


def loaded(folder, base):
    with model.quiet_peft():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_canonical_adapter_is_the_same_function_to_1e_5(load_tiny, tiny_base, tmp_path, changes):
    engine = load_tiny(changes)
    folder = saved(tmp_path / "adapter", engine, tiny.settings(tiny_base, changes))
    plain = loaded(folder, tiny_base)
    lora = plain.peft_config["default"]
    assert lora.r == lora.lora_alpha
    assert lora.r in canonical.RANKS
    odd = (lora.use_rslora, lora.use_dora, lora.rank_pattern, lora.alpha_pattern, lora.modules_to_save)
    assert not any(odd)
    assert {layer.scaling["default"] for layer in plain.modules() if hasattr(layer, "lora_A")} == {1.0}
    assert float((logits(plain) - logits(engine.model)).abs().max()) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert float((logits(base) - logits(engine.model)).abs().max()) > 1e-3  # control


@pytest.mark.parametrize("method", ["fedex", "flora"])
@pytest.mark.parametrize("beside", ["4", "9"])
def test_a_side_adapter_is_part_of_it(load_tiny, tiny_base, tmp_path, method, beside):
    changes = {"aggregation.method": f'"{method}"', "aggregation.residual_rank": beside}
    engine = load_tiny(changes)
    folder = saved(tmp_path / "adapter", engine, tiny.settings(tiny_base, changes))
    plain = loaded(folder, tiny_base)
    assert plain.peft_config["default"].r == {"4": 8, "9": 16}[beside]
    assert float((logits(plain) - logits(engine.model)).abs().max()) < 1e-5
    without = load_file(folder / "adapter_model.safetensors")
    for name, tensor in without.items():
        if name.endswith("lora_B.weight"):
            tensor[:, 4:] = 0
    save_file(without, folder / "adapter_model.safetensors")
    assert float((logits(loaded(folder, tiny_base)) - logits(engine.model)).abs().max()) > 1e-3  # control


def test_a_reader_that_ignores_rslora_and_patterns_reads_the_same_function(load_tiny, tiny_base, tmp_path):
    changes = CASES["rslora"]
    engine = load_tiny(changes)
    folder = saved(tmp_path / "adapter", engine, tiny.settings(tiny_base, changes))
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    names = loaded(folder, tiny_base).peft_config["default"].target_modules
    with model.quiet_peft():
        naive = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=sorted(names)))
    adapter.write(naive, load_file(folder / "adapter_model.safetensors"))
    assert float((logits(naive) - logits(engine.model)).abs().max()) < 1e-5


def test_declared_shapes_are_those_of_the_file(load_tiny, tiny_base, tmp_path):
    changes = {"aggregation.method": '"fedex"', "aggregation.residual_rank": "9"}
    engine = load_tiny(changes)
    folder = saved(tmp_path / "adapter", engine, tiny.settings(tiny_base, changes))
    found = load_file(folder / "adapter_model.safetensors")
    assert canonical.specs(engine.tensor_specs) == adapter.specs(found)


def test_a_rank_above_the_list_stays_as_it_is(load_tiny):
    engine = load_tiny({"adapter.r": "512", "aggregation.method": '"flora"', "aggregation.residual_rank": "1"})
    found = canonical.canonical(stirred(engine), tiny.settings("base", {"adapter.r": "512"}).adapter)
    assert canonical.rank_of(found) == 513
