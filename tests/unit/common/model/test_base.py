import contextlib
import copy
import json
import os
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file

from client.train import loop
from common.adapter import adapter
from common.data.rows import Message
from common.errors import ModelError
from common.loss import likelihood
from common.model import base as model
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.schema.privacy import NoPrivacy
from common.text import chat, prompts
from tests import tiny


@pytest.fixture(scope="module")
def encoded(shared_engine):
    return prompts.encode_all(tiny.rows(16), shared_engine.tokenizer, max_length_tokens=64, too_long="error")[0]


def gradients(engine, rows) -> dict[str, torch.Tensor]:
    """Of the summed loss on some rows, in training mode."""
    engine.model.train()
    engine.model.zero_grad()
    nll, _ = likelihood.answer_nll(engine.model, prompts.collate(rows, pad_id=engine.pad_id))
    nll.backward()
    return {name: p.grad.clone() for name, p in adapter.parameters(engine.model).items()}


def evaluate(engine, rows) -> float:
    engine.model.eval()
    with torch.no_grad():
        return float(likelihood.answer_nll(engine.model, prompts.collate(rows, pad_id=engine.pad_id))[0])


def stirred(engine) -> dict[str, torch.Tensor]:
    """An adapter with B other than zero, so that gradients reach A too."""
    return {name: tensor + 0.01 * (number + 1) for number, (name, tensor) in enumerate(engine.initial.items())}


def train(engine, rows, **changes):
    training = config.TrainingConfig(local_steps=10, learning_rate=2e-2, schedule="constant", batch_size=4, **changes)
    privacy = NoPrivacy()
    return loop.train(
        engine, rows, training=training, privacy=privacy, round_index=0, num_rounds=1, seed=1, source=SeededNoise(0)
    )


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_loss_falls_on_the_cpu_whatever_the_base_is_stored_in(load_tiny, encoded, quantization):
    engine = load_tiny({"model.quantization": quantization})
    before = evaluate(engine, encoded)
    result = train(engine, encoded)
    assert result.num_steps == 10
    assert evaluate(engine, encoded) < 0.9 * before


def test_only_the_adapter_is_trained(load_tiny, encoded):
    engine = load_tiny()
    frozen = {n: p.detach().clone() for n, p in engine.model.named_parameters() if not p.requires_grad}
    train(engine, encoded)
    assert all(torch.equal(p, frozen[n]) for n, p in engine.model.named_parameters() if n in frozen)
    assert {name.split(".")[-2] for name in adapter.parameters(engine.model)} == {"lora_A", "lora_B"}


def test_quantised_weights_are_what_was_asked_for(load_tiny):
    kinds = {}
    for quantization in ("none", "int8", "nf4"):
        engine = load_tiny({"model.quantization": quantization})
        weight = engine.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
        kinds[quantization] = weight.dtype
    assert kinds == {"none": torch.float32, "int8": torch.int8, "nf4": torch.uint8}


def test_a_quantised_base_counts_the_parameters_that_it_stands_for(load_tiny, engine):
    assert load_tiny({"model.quantization": "nf4"}).num_base_parameters == engine.num_base_parameters


def test_an_evaluation_does_not_change_the_gradients_that_follow_it(load_tiny, encoded):
    fresh, used = (load_tiny({"model.quantization": "nf4"}) for _ in range(2))
    evaluate(used, encoded)
    model.answer(used, [encoded[0].input_ids[:5]], max_new_tokens=2)
    for engine in (fresh, used):
        adapter.write(engine.model, stirred(engine))
    expected, found = gradients(fresh, encoded[:4]), gradients(used, encoded[:4])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(bool(expected[name].any()) for name in expected)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on processors with AVX512-BF16 only")
def test_control_without_the_fixed_layout_an_evaluation_stops_gradients(load_tiny, encoded):
    fresh, used = (load_tiny({"model.quantization": "nf4"}) for _ in range(2))
    for module in used.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    evaluate(used, encoded)
    for engine in (fresh, used):
        adapter.write(engine.model, stirred(engine))
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        found = gradients(used, encoded[:4])
    expected = gradients(fresh, encoded[:4])
    assert not all(torch.allclose(found[name], expected[name], rtol=0.05) for name in expected)


@pytest.mark.parametrize("targets", ['"no_such"', '"q_proj", "v_prj"', '"layers.9.self_attn.q_proj"'])
def test_targets_that_match_nothing_are_refused_and_what_exists_is_named(load_tiny, targets):
    with pytest.raises(ModelError, match=r"adapter\.targets.*gate_proj.*q_proj") as caught:
        load_tiny({"adapter.targets": f"[{targets}]"})
    assert targets.split(", ")[-1].strip('"') in str(caught.value)


@pytest.mark.parametrize("targets", ['"embed_tokens"', '"mlp"', '"q_proj", "input_layernorm"'])
def test_targets_that_are_no_linear_layers_are_refused(load_tiny, targets):
    with pytest.raises(ModelError, match=r"adapter\.targets"):
        load_tiny({"adapter.targets": f"[{targets}]"})


def test_chosen_targets_are_the_only_ones(load_tiny):
    engine = load_tiny({"adapter.targets": '["q_proj", "v_proj"]'})
    assert {name.split(".")[-1] for name in adapter.module_names(engine.tensor_specs)} == {"q_proj", "v_proj"}


def test_one_layer_can_be_chosen(load_tiny):
    engine = load_tiny({"adapter.targets": '["layers.1.self_attn.q_proj"]'})
    assert adapter.module_names(engine.tensor_specs) == ["base_model.model.model.layers.1.self_attn.q_proj"]


def test_all_linear_leaves_the_output_head_out(engine):
    names = {name.split(".")[-1] for name in adapter.module_names(engine.tensor_specs)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_another_hash_is_refused_and_both_are_named(load_tiny):
    with pytest.raises(ModelError, match=r"abab.*fetch that base"):
        load_tiny({"model.sha256": f'"{"ab" * 32}"'})


def test_the_right_hash_is_taken(load_tiny, engine):
    assert load_tiny({"model.sha256": f'"{engine.base_sha256}"'}).base_sha256 == engine.base_sha256


@pytest.mark.parametrize(("use_rslora", "scale"), [("false", 8 / 4), ("true", 8 / 4**0.5)])
def test_the_scale_is_that_of_lora_or_rslora(load_tiny, use_rslora, scale):
    engine = load_tiny({"adapter.use_rslora": use_rslora})
    layer = engine.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scale
    adapter.write(engine.model, stirred(engine))
    x_bk = torch.ones(1, 64)
    b_dr, a_rk = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = layer.base_layer(x_bk) + scale * x_bk @ a_rk.T @ b_dr.T
    assert torch.allclose(layer(x_bk), expected, atol=1e-5)


def test_the_initial_adapter_is_a_function_of_the_seed_alone(load_tiny):
    first = load_tiny()
    torch.manual_seed(99)
    torch.randn(7)
    again = load_tiny({"model.quantization": "nf4", "training.gradient_checkpointing": "true"})
    other = load_tiny({"seed": "6"})
    assert all(torch.equal(first.initial[name], again.initial[name]) for name in first.initial)
    assert not all(torch.equal(first.initial[name], other.initial[name]) for name in first.initial)


def test_a_fresh_adapter_changes_nothing(engine, tiny_base):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids_bt = torch.arange(5, 25).reshape(2, 10)
    engine.model.eval()
    assert torch.equal(engine.model(ids_bt).logits, base(ids_bt).logits)


def test_loading_leaves_the_callers_random_state_alone(load_tiny):
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    load_tiny()
    assert torch.equal(torch.randn(3), expected)


def test_dropout_is_a_function_of_the_seed(load_tiny, encoded):
    engine = load_tiny({"adapter.dropout": "0.5"})
    found = []
    for seed in (1, 1, 2):
        adapter.write(engine.model, stirred(engine))
        torch.manual_seed(seed)
        found.append(gradients(engine, encoded[:4]))
    same, other = (all(torch.equal(found[0][n], found[k][n]) for n in found[0]) for k in (1, 2))
    assert same
    assert not other


def test_evaluation_knows_no_dropout(load_tiny, encoded):
    engine = load_tiny({"adapter.dropout": "0.5"})
    adapter.write(engine.model, stirred(engine))
    engine.model.train()
    assert evaluate(engine, encoded) == evaluate(engine, encoded)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_gives_the_same_gradients(load_tiny, encoded, quantization):
    plain = load_tiny({"model.quantization": quantization})
    saving = load_tiny({"model.quantization": quantization, "training.gradient_checkpointing": "true"})
    for engine in (plain, saving):
        adapter.write(engine.model, stirred(engine))
    expected, found = gradients(plain, encoded[:4]), gradients(saving, encoded[:4])
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert saving.model.base_model.model.model.gradient_checkpointing


def test_a_bfloat16_base_has_a_float32_adapter_that_learns(load_tiny, encoded):
    engine = load_tiny({"model.dtype": '"bfloat16"'})
    kinds = {parameter.dtype for parameter in adapter.parameters(engine.model).values()}
    assert kinds == {torch.float32}
    assert engine.model.base_model.model.lm_head.weight.dtype == torch.bfloat16
    before = evaluate(engine, encoded)
    train(engine, encoded)
    assert evaluate(engine, encoded) < before


def test_the_loss_is_that_of_the_answer_tokens(engine, encoded):
    row = encoded[0]
    ids_1t = torch.tensor([row.input_ids])
    engine.model.eval()
    with torch.no_grad():
        log_probs_tv = engine.model(ids_1t).logits[0].log_softmax(-1)
    expected = -sum(
        float(log_probs_tv[t - 1, row.input_ids[t]]) for t in range(1, len(row.input_ids)) if row.is_answer[t]
    )
    assert evaluate(engine, [row]) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_loss(engine, encoded):
    by_length = sorted(encoded, key=lambda row: len(row.input_ids))
    pair = [by_length[0], by_length[-1]]
    assert len(pair[0].input_ids) < len(pair[1].input_ids)
    assert evaluate(engine, pair) == pytest.approx(sum(evaluate(engine, [row]) for row in pair), rel=1e-5)


def test_greedy_answers_do_not_depend_on_who_is_in_the_batch(load_tiny, encoded):
    engine = load_tiny()
    train(engine, encoded)
    asked = [prompts.prompt_ids(row, engine.tokenizer)[0] for row in tiny.rows(6)]
    together = model.answer(engine, asked, max_new_tokens=6)
    assert together == [model.answer(engine, [ids], max_new_tokens=6)[0] for ids in asked]


def test_cuda_that_is_not_there_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="use 'cpu'"):
        model.choose_device("cuda")
    assert model.choose_device("auto") == model.choose_device("cpu") == torch.device("cpu")


@pytest.fixture
def own_base(tiny_base, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_broken_weights_are_an_error_that_names_the_folder(load_tiny, own_base):
    (own_base / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not safetensors at all")
    with pytest.raises(ModelError, match=str(own_base)):
        load_tiny(folder=own_base)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_without_some_of_its_weights_is_refused_and_one_is_named(load_tiny, own_base, quantization):
    weights = load_file(own_base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_tiny({"model.quantization": quantization}, folder=own_base)


def test_a_weight_of_another_shape_is_refused(load_tiny, own_base):
    weights = load_file(own_base / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, own_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=str(own_base)):
        load_tiny(folder=own_base)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_base_with_a_broken_file_is_an_error_that_names_the_folder(load_tiny, own_base, name):
    (own_base / name).write_text("{ not json")
    with pytest.raises(ModelError, match=str(own_base)):
        load_tiny(folder=own_base)


def test_code_that_comes_with_a_base_never_runs(load_tiny, own_base):
    settings = json.loads((own_base / "config.json").read_text())
    settings |= {"model_type": "planted", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (own_base / "config.json").write_text(json.dumps(settings))
    (own_base / "code.py").write_text(f"open({str(own_base / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        load_tiny(folder=own_base)
    assert not (own_base / "ran").exists()


def test_code_that_comes_with_a_tokenizer_never_runs_nor_does_a_pickle(load_tiny, own_base):
    settings = json.loads((own_base / "tokenizer_config.json").read_text())
    planted = settings | {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (own_base / "code.py").write_text(f"open({str(own_base / 'ran')!r}, 'w')")
    (own_base / "tokenizer_config.json").write_text(json.dumps(planted))
    with contextlib.suppress(ModelError):  # that it is read as the plain tokenizer that it also holds is as good
        load_tiny(folder=own_base)
    assert not (own_base / "ran").exists()
    (own_base / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = load_file(own_base / "model.safetensors")
    (own_base / "model.safetensors").unlink()
    torch.save(weights, own_base / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_tiny(folder=own_base)


def test_a_bases_chat_template_reaches_nothing_of_python(engine):
    """Control: jinja2 as it comes runs it."""
    attack = "{{ cycler.__init__.__globals__.os.getpid() }}"
    assert jinja2.Template(attack).render() == str(os.getpid())
    own = copy.deepcopy(engine.tokenizer)
    own.chat_template = attack
    with pytest.raises(ModelError, match="the chat template refuses"):
        chat._apply([Message("user", "hello")], own, where="row 1")
