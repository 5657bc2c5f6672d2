import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from common.adapter import adapter
from common.errors import ModelError
from common.model import base as model
from common.model import loading, probe
from common.run import config
from server.doctor import run as doctor
from server.serve.engine import Models
from tests import tiny
from tests.samples import architectures

ATTENTION = "k_proj, o_proj, q_proj, v_proj"


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """A tiny base of an architecture, made once."""
    place = tmp_path_factory.mktemp("bases")

    @functools.cache
    def made(name: str) -> Path:
        return architectures.make(name, place / name)

    return made


def trial(folder: Path, quantization: str = "none"):
    """A base and the rows that it is tried on."""
    settings = config.ModelConfig(base=str(folder), quantization=quantization)
    base = model.load_base(folder, settings, torch.device("cpu"))
    return base, probe.trial_rows(model.load_tokenizer(folder), base)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_refused_with_the_targets_that_can_be_exported(base_of, load_tiny, name):
    with pytest.raises(ModelError, match=rf"'all-linear' would train 6 tensors .*experts.*no export.*: {ATTENTION}$"):
        load_tiny(folder=base_of(name))
    engine = load_tiny({"adapter.targets": json.dumps(ATTENTION.split(", "))}, folder=base_of(name))
    assert {one.rpartition(".")[2] for one in adapter.module_names(engine.tensor_specs)} == set(ATTENTION.split(", "))


@pytest.mark.parametrize(("name", "targets"), [("qwen3_moe", "gate_proj,up_proj,down_proj"), ("mixtral", "w1,w2,w3")])
def test_experts_by_the_names_of_older_releases_are_refused_too(base_of, load_tiny, name, targets):
    with pytest.raises(ModelError, match=rf"no linear layers, such as .*experts.*: {ATTENTION}$"):
        load_tiny({"adapter.targets": json.dumps(targets.split(","))}, folder=base_of(name))


@pytest.mark.parametrize(
    ("name", "share", "layers"),
    [
        ("falcon", "0 %", r"transformer\.h\.\*\.mlp\.dense_4h_to_h\.weight"),
        ("mixtral", "11 %", r"model\.layers\.\*\.mlp\.experts\.down_proj"),
        ("qwen3_moe", "20 %", r"model\.layers\.\*\.mlp\.experts\.down_proj"),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_precision_that_reaches_few_weights_is_refused_and_they_are_named(
    base_of, load_tiny, name, share, layers, quantization
):
    changes = {"model.quantization": quantization, "adapter.targets": '["all-linear"]'}
    wanted = rf"'{quantization}' reaches {share} of the weights .*{layers}.*set model\.quantization = 'none'"
    with pytest.raises(ModelError, match=wanted):
        load_tiny(changes, folder=base_of(name))
    with pytest.raises(ModelError, match=wanted):  # and before a weight is read
        loading.check(tiny.settings(base_of(name), changes), base_of(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_share_that_is_quantised_is_the_same_with_weights_and_without(base_of, load_tiny, name):
    changes = {"model.quantization": "nf4"}
    engine = load_tiny(changes, folder=base_of(name))
    assert engine.quantised_share == loading.check(tiny.settings(base_of(name), changes), base_of(name)) == 1.0
    assert load_tiny(folder=base_of(name)).quantised_share == 0.0


def test_the_share_counts_values_of_matrices_and_neither_embeddings_nor_head(base_of):
    base, _ = trial(base_of("mixtral"))
    layer, experts = 64 * 64 * 2 + 64 * 32 * 2, 4 * (64 * 256 + 128 * 64) + 4 * 64
    found = probe.precision_of(base)
    assert (found.num_quantised, found.num_body) == (0, 2 * (layer + experts))


@pytest.mark.parametrize("name", architectures.NAMES)
def test_no_causal_architecture_sees_later_tokens_nor_do_its_logits_move(base_of, name):
    base, ids_bt = trial(base_of(name))
    logits_btv, gradient_bth = probe._with_gradient(base, ids_bt)
    half = ids_bt.shape[1] // 2
    assert (ids_bt[0] == ids_bt[1]).tolist() == [True] * half + [False] * half
    assert not bool(gradient_bth[0, half:].any())
    assert bool(gradient_bth[0, :half].any())
    assert torch.allclose(logits_btv[0, :half], logits_btv[1, :half], atol=1e-5 * float(logits_btv.std()))
    assert probe.check_function(base, ids_bt).shape == logits_btv.shape


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_an_encoder_is_refused_however_weak_its_attention(load_tiny, tmp_path, spread, quantization):
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    settings = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, initializer_range=spread, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BertLMHeadModel(settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"depend on later tokens .* is an encoder.* choose a causal language model"):
        load_tiny({"model.quantization": quantization}, folder=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("model.embed_tokens.weight", "none"),  # of a token that no probe has
        ("model.layers.1.mlp.up_proj.weight", "nf4"),
        ("model.layers.1.mlp.up_proj.weight", "int8"),
        ("model.norm.weight", "nf4"),
    ],
)
def test_weights_that_are_not_finite_are_named_before_training(
    tiny_base, load_tiny, tmp_path, name, quantization, value
):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"the base's tensor {name} holds NaN or infinity; fetch the base again"):
        load_tiny({"model.quantization": quantization}, folder=folder)


def test_a_base_whose_numbers_overflow_is_told_apart_from_one_with_broken_weights(base_of):
    base, ids_bt = trial(base_of("llama"))
    base.lm_head.weight.data.fill_(1e38)
    probe.check_finite(base)
    with pytest.raises(ModelError, match=r"not finite, though its weights are: .*set model\.dtype"):
        probe.check_function(base, ids_bt)


def test_plain_peft_must_make_the_same_function_of_the_adapter(base_of):
    base, ids_bt = trial(base_of("llama"))
    settings = tiny.settings(base_of("llama")).adapter
    other = settings.model_copy(update={"alpha": 2 * settings.alpha})
    fresh = functools.partial(model.attach, settings=settings, seed=1)
    attach = functools.partial(probe.attach, ids_bt=ids_bt, fresh=fresh, dtype=torch.float32)
    with model.quiet_peft():
        attached = attach(base, settings=settings, key="right")
        assert not any(bool(p.any()) for name, p in adapter.parameters(attached).items() if "lora_B" in name)
        with pytest.raises(ModelError, match="another function of this adapter"):
            attach(attached.unload(), settings=other, key="control: a scale that the export does not say")


def test_what_passed_is_not_tried_again(base_of):
    base, ids_bt = trial(base_of("llama"))
    settings, made = tiny.settings(base_of("llama")).adapter, []

    def fresh(loaded):
        made.append(1)
        return model.attach(loaded, settings, seed=1)

    with model.quiet_peft():
        for number in (2, 3):
            attached = probe.attach(
                base, ids_bt, fresh=fresh, settings=settings, dtype=torch.float32, key="tried twice"
            )
            base = attached.unload()
            assert len(made) == number


def test_a_probe_leaves_a_base_as_it_was(base_of, load_tiny):
    plain = AutoModelForCausalLM.from_pretrained(base_of("gpt2"), dtype=torch.float32).eval()
    engine = load_tiny({"adapter.alpha": "9.0"}, folder=base_of("gpt2"))
    ids_bt = torch.arange(5, 25).reshape(2, 10)
    engine.model.eval()
    assert torch.equal(engine.model(ids_bt).logits, plain(ids_bt).logits)


def test_targets_that_do_not_exist_name_those_of_other_kinds_of_layers(base_of, load_tiny):
    with pytest.raises(ModelError, match=r"choose among the linear layers of this base: c_attn, c_fc, c_proj$"):
        load_tiny({"adapter.targets": '["q_proj"]'}, folder=base_of("gpt2"))


def test_precisions_of_sites_are_held_against_the_base_before_it_is_offered(base_of, load_tiny):
    changes = {"model.quantization": "none", "model.site_quantization.south": "nf4"}
    with pytest.raises(ModelError, match=r"'nf4' reaches 0 % of the weights"):
        load_tiny(changes, folder=base_of("falcon"))


def test_a_server_probes_its_base_too_and_takes_one_whose_positions_have_no_end(base_of, tmp_path):
    settings = config.ModelConfig(base="b", quantization="none")
    assert Models(base_of("bloom"), [], settings=settings, device_name="cpu").max_tokens == 1 << 20
    assert Models(base_of("gpt2"), [], settings=settings, device_name="cpu").max_tokens == 256
    folder = Path(shutil.copytree(base_of("gpt2"), tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"transformer\.ln_f\.bias holds NaN"):
        Models(folder, [], settings=settings, device_name="cpu")


def test_the_coordinators_doctor_knows_what_the_run_would_be_refused_for(base_of):
    falcon, llama = (tiny.settings(base_of(name), {"model.quantization": "nf4"}) for name in ("falcon", "llama"))
    found = doctor.base(falcon, base_of("falcon"))
    assert (found.status, found.remedy[:30]) == ("failed", "set model.quantization = 'none'"[:30])
    assert "nf4, 100 % of its body" in doctor.base(llama, base_of("llama")).found
    experts = doctor.base(tiny.settings(base_of("mixtral")), base_of("mixtral"))
    assert (experts.status, ATTENTION in experts.remedy) == ("failed", True)
