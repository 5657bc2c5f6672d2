"""Adapters merged are what peft makes of the products, and what the papers say; the result is a sealed export."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common import storage
from common.errors import AuthError, ConfigError, ModelError
from common.model import base as model
from common.run.manifest import RunManifest
from common.trust import identity
from server.aggregate import factored
from server.export import folder as export_folder
from server.export import seal
from server.export.folder import Exported
from server.merge import adapters as merge_adapters
from server.merge import folder as merge_folder
from server.merge.adapters import Recipe
from server.verify import verify
from tests import tiny

KEY = identity.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = identity.public_hex(KEY)
WEIGHTS = (0.7, -0.4)


def write_input(folder, engine, base, *, seed, name, key=KEY, changes=None):
    generator = torch.Generator().manual_seed(seed)
    state = {n: 0.1 * torch.randn(tensor.shape, generator=generator) for n, tensor in engine.initial.items()}
    settings = tiny.settings(base, {"name": f'"{name}"', **(changes or {})})
    source = Exported(state, RunManifest(settings, engine.base_sha256, engine.tensor_specs), 3, {"north": 5}, [])
    export_folder.write(folder, source, formats=("peft",), base=base, llama_cpp=None, key=key)
    return folder


@pytest.fixture(scope="module")
def inputs(load_tiny, tiny_base, tmp_path_factory):
    """Two signed exports of one base."""
    engine, folder = load_tiny(), tmp_path_factory.mktemp("inputs")
    return [
        write_input(folder / name, engine, tiny_base, seed=seed, name=name) for seed, name in ((1, "one"), (2, "two"))
    ]


@pytest.fixture(scope="module")
def adapters(inputs):
    return [merge_folder.read(folder).tensors for folder in inputs]


def products(tensors):
    return {name: b_dr @ a_rk for name, (b_dr, a_rk) in factored.modules(tensors).items()}


def loaded(base, folder):
    with model.quiet_peft():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder), "one")


def by_peft(inputs, base, how, **options):
    """Products of what peft's own add_weighted_adapter makes of the same folders."""
    network = loaded(base, inputs[0] / "peft").double()
    network.load_adapter(str(inputs[1] / "peft"), "two")
    torch.manual_seed(0)
    network.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type=how, **options)
    layers = {name: part for name, part in network.named_modules() if hasattr(part, "lora_A") and "both" in part.lora_A}
    return {name: layer.get_delta_weight("both").double() for name, layer in layers.items()}


def distance(found, wanted):
    """Largest difference over the largest value, over all modules, which must be the same."""
    assert found.keys() == wanted.keys()
    worst = max(float((found[name] - wanted[name]).abs().max()) for name in found)
    return worst / max(float(tensor.abs().max()) for tensor in wanted.values())


@pytest.mark.parametrize(
    ("recipe", "how", "options"),
    [
        (Recipe("linear", WEIGHTS), "cat", {}),
        (Recipe("svd", WEIGHTS, rank=3), "svd", {"svd_rank": 3}),
        (Recipe("ties", WEIGHTS, density=0.4), "ties_svd", {"density": 0.4}),
    ],
    ids=lambda value: value.how if isinstance(value, Recipe) else None,
)
def test_it_is_what_peft_makes_of_the_products(inputs, adapters, tiny_base, recipe, how, options):
    merged, _ = merge_adapters.merge(adapters, recipe)
    assert distance(products(merged), by_peft(inputs, tiny_base, how, **options)) < 1e-5


def test_linear_of_the_products_is_not_what_peft_calls_linear(inputs, adapters, tiny_base):
    """Why the factors are never averaged apart."""
    merged, lost = merge_adapters.merge(adapters, Recipe("linear", WEIGHTS))
    one, two = (products(tensors) for tensors in adapters)
    exact = {name: WEIGHTS[0] * one[name] + WEIGHTS[1] * two[name] for name in one}
    assert distance(products(merged), exact) < 1e-6
    assert lost == 0
    assert distance(by_peft(inputs, tiny_base, "linear"), exact) > 0.1


def test_dare_keeps_its_share_and_rescales_it():
    torch.manual_seed(5)
    full = {"q.lora_A.weight": torch.eye(16), "q.lora_B.weight": torch.ones(16, 16)}
    zero = {name: 0 * tensor for name, tensor in full.items()}
    recipe = Recipe("dare_linear", (1.0, 1.0), rank=16, density=0.25, seed=4)
    values = products(merge_adapters.merge([full, zero], recipe)[0])["q"]
    kept = values.abs() > 1e-4
    assert 30 < int(kept.sum()) < 100  # of 256, mean 64, six standard deviations are 42
    assert torch.allclose(values[kept], torch.tensor(4.0), atol=1e-4)
    again, other = (products(merge_adapters.merge([full, zero], replace(recipe, seed=seed))[0])["q"] for seed in (4, 5))
    assert torch.equal(values, again)
    assert not torch.allclose(values, other)


def one_module(values):
    return {"q.lora_A.weight": torch.eye(2), "q.lora_B.weight": torch.tensor(values)}


def test_ties_by_hand():
    """The smaller half of each is trimmed; where signs disagree the larger sum wins; the mean is over who agrees."""
    one, two = one_module([[4.0, 0.1], [-0.2, 3.0]]), one_module([[2.0, 0.3], [-0.1, -5.0]])
    merged, lost = merge_adapters.merge([one, two], Recipe("ties", (1.0, 1.0), rank=2, density=0.5))
    assert torch.allclose(products(merged)["q"], torch.tensor([[3.0, 0.0], [0.0, -5.0]]), atol=1e-5)
    assert lost < 1e-6


def test_dare_ties_without_a_drop_is_ties_without_a_trim():
    one, two = one_module([[4.0, 1.0], [-2.0, 3.0]]), one_module([[2.0, -3.0], [-1.0, -5.0]])
    merged, _ = merge_adapters.merge([one, two], Recipe("dare_ties", (1.0, 1.0), rank=2, density=1.0))
    assert torch.allclose(products(merged)["q"], torch.tensor([[3.0, -3.0], [-1.5, -5.0]]), atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_perpendicular_ones_stays_on_the_circle(t):
    one, two = one_module([[3.0, 0.0], [0.0, 0.0]]), one_module([[0.0, 0.0], [0.0, 3.0]])
    merged, _ = merge_adapters.merge([one, two], Recipe("slerp", (1 - t, t)))
    wanted = torch.diag(3 * torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]))
    assert torch.allclose(products(merged)["q"], wanted, atol=1e-6)
    straight, _ = merge_adapters.merge([one, two], Recipe("linear", (1 - t, t)))
    assert torch.allclose(products(straight)["q"], wanted, atol=1e-6) == (t in (0.0, 1.0))  # control


def test_slerp_of_parallel_ones_is_the_straight_line():
    one, two = one_module([[1.0, 2.0], [3.0, 4.0]]), one_module([[2.0, 4.0], [6.0, 8.0]])
    merged, _ = merge_adapters.merge([one, two], Recipe("slerp", (0.5, 0.5)))
    assert torch.allclose(products(merged)["q"], torch.tensor([[1.5, 3.0], [4.5, 6.0]]))


def test_a_module_that_one_adapter_lacks_counts_as_zero(adapters):
    part = {name: tensor for name, tensor in adapters[1].items() if "mlp" not in name}
    merged, _ = merge_adapters.merge([adapters[0], part], Recipe("linear", WEIGHTS))
    one = products(adapters[0])
    found = products(merged)
    name = next(name for name in one if "mlp" in name)
    assert torch.allclose(found[name], WEIGHTS[0] * one[name], atol=1e-6)


def test_what_the_cut_loses_is_told(adapters):
    exact = products(merge_adapters.merge(adapters, Recipe("linear", WEIGHTS))[0])
    cut, lost = merge_adapters.merge(adapters, Recipe("svd", WEIGHTS, rank=2))
    found = products(cut)
    rest = math.sqrt(sum(float((exact[n] - found[n]).norm()) ** 2 for n in exact))
    assert lost == pytest.approx(rest / math.sqrt(sum(float(t.norm()) ** 2 for t in exact.values())), rel=1e-4)
    assert lost > 0.1


BAD = {
    "no such way": (Recipe("mean", (1.0, 1.0)), "is none of linear"),
    "too few weights": (Recipe("linear", (1.0,)), "give 2 finite numbers"),
    "not a number": (Recipe("linear", (1.0, math.nan)), "give 2 finite numbers"),
    "all zero": (Recipe("linear", (0.0, 0.0)), "all are zero"),
    "slerp beyond": (Recipe("slerp", (1.5, -0.5)), "1-t,t of 0 to 1"),
    "ties without density": (Recipe("ties", (1.0, 1.0)), "--density"),
    "linear with density": (Recipe("linear", (1.0, 1.0), density=0.5), "--density"),
    "ties with a seed": (Recipe("ties", (1.0, 1.0), density=0.5, seed=3), "--seed"),
    "linear with a rank": (Recipe("linear", (1.0, 1.0), rank=4), "use --how svd"),
}


@pytest.mark.parametrize(("recipe", "told"), BAD.values(), ids=BAD)
def test_a_recipe_that_means_nothing_is_refused(adapters, recipe, told):
    with pytest.raises(ConfigError, match=told):
        merge_adapters.merge(adapters, recipe)


def test_the_result_is_a_sealed_export_that_names_what_went_in(inputs, tiny_base, tmp_path):
    result = merge_folder.write(
        inputs, tmp_path / "both", Recipe("linear", (0.5, 0.5)), name="both", formats="peft,merged", base=tiny_base,
        signer=SIGNER,
    )  # fmt: skip
    assert result["rank"] == 16
    found = verify.verify(tmp_path / "both", base=tiny_base)
    assert found["name"] == "both"
    assert found["logits"]["merged"]["from_rounded"] < 1e-5
    text = (tmp_path / "both" / "README.md").read_text()
    for folder in inputs:
        facts = seal.read(folder).facts
        assert storage.sha256(folder / seal.FILE) in text
        assert facts.run_sha256 in text
    for part in ("### Of one", "### Of two", "their epsilons add up", "without differential privacy", SIGNER):
        assert part in text
    assert loaded(tiny_base, tmp_path / "both" / "peft").peft_config["one"].r == 16


def test_a_result_whose_card_forgets_an_input_is_found(inputs, tiny_base, tmp_path):
    merge_folder.write(inputs, tmp_path / "both", Recipe("linear", (0.5, 0.5)), name="both")
    verify.verify(tmp_path / "both")
    card = tmp_path / "both" / "README.md"
    card.write_text(card.read_text().replace(storage.sha256(inputs[1] / seal.FILE), "forgotten"))
    sealed = json.loads((tmp_path / "both" / seal.FILE).read_text())
    sealed["files"]["README.md"] = storage.sha256(card)
    (tmp_path / "both" / seal.FILE).write_bytes(merge_folder.wire.canonical_json(sealed))
    with pytest.raises(ModelError, match="does not name the input"):
        verify.verify(tmp_path / "both")


def test_inputs_that_do_not_belong_together_are_refused(load_tiny, inputs, tiny_base, tmp_path):
    base = tiny.make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    engine = load_tiny(folder=base)
    other = write_input(tmp_path / "other", engine, base, seed=3, name="other")
    with pytest.raises(ModelError, match="is of another base"):
        merge_folder.write([inputs[0], other], tmp_path / "both", Recipe("linear", (1.0, 1.0)), name="both")
    changes = {"model.chat_template": '"alpaca"'}
    engine = load_tiny()
    other = write_input(tmp_path / "alpaca", engine, tiny_base, seed=3, name="alpaca", changes=changes)
    with pytest.raises(ModelError, match="another chat template"):
        merge_folder.write([inputs[0], other], tmp_path / "both", Recipe("linear", (1.0, 1.0)), name="both")


def test_an_input_that_fails_verify_is_refused(inputs, tmp_path):
    broken = Path(shutil.copytree(inputs[0], tmp_path / "broken"))
    (broken / "README.md").write_text("changed")
    with pytest.raises(ModelError, match="was changed after sealing"):
        merge_folder.write([broken, inputs[1]], tmp_path / "both", Recipe("linear", (1.0, 1.0)), name="both")
    with pytest.raises(AuthError, match="demanded is"):
        merge_folder.write(inputs, tmp_path / "both", Recipe("linear", (1.0, 1.0)), name="both", signer="00" * 32)
    assert not (tmp_path / "both").exists()


def test_a_name_that_would_leave_the_folder_is_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match="--name"):
        merge_folder.write(inputs, tmp_path / "both", Recipe("linear", (1.0, 1.0)), name="../both")
