"""Cores between frozen factors: against dense sums over heads, on every base, and what of them leaves a site."""

import pytest
import torch

from client.train import private
from common.adapter import adapter, cores, start
from common.errors import ModelError
from common.loss import likelihood
from common.model import base
from common.privacy import noise
from common.run import config
from common.run.manifest import RunManifest
from common.run.trainable import factor_of
from common.text import prompts
from server.aggregate import factored
from tests import tiny

CORED = {"aggregation.method": '"ravan"', "aggregation.num_heads": "2"}
IDS_BT = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def load_begun(load_tiny):
    """An engine at the start of a run: A and B orthonormal, cores of zero."""

    def load(**changes: str):
        engine = load_tiny({**CORED, **changes})
        manifest = RunManifest(tiny.settings("tiny", {**CORED, **changes}), engine.base_sha256, engine.tensor_specs)
        adapter.write(engine.model, start.initial(manifest, engine.initial))
        return engine

    return load


@pytest.fixture(scope="module")
def loaded(load_begun):
    return load_begun()


@pytest.fixture
def begun(loaded):
    """The same one for all tests, cores back at zero."""
    adapter.write(loaded.model, {n: t * (factor_of(n) != "H") for n, t in adapter.read(loaded.model).items()})
    loaded.model.zero_grad(set_to_none=True)
    return loaded


def stirred(engine, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Cores at work, and scales that a site has trained away from one."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapter.parameters(engine.model).items():
        if factor_of(name) == "H":
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = scale + 0.5 * drawn if cores.is_scale(name) else 0.5 * drawn
    return adapter.read(engine.model)


@torch.no_grad()
def logits(engine) -> torch.Tensor:
    return engine.model.eval()(IDS_BT).logits.float()


def gradients(engine) -> dict[str, torch.Tensor]:
    """Of the mean log-likelihood, by the parameters' names."""
    engine.model.zero_grad(set_to_none=True)
    engine.model.train()
    engine.model(IDS_BT, labels=IDS_BT).loss.backward()
    return {name: p.grad.clone() for name, p in adapter.parameters(engine.model).items() if factor_of(name) == "H"}


def test_a_head_is_what_the_paper_writes():
    """sum_h B_h (s_h H_h) A_h by one product a head, float64."""
    generator = torch.Generator().manual_seed(1)
    core, scale = torch.randn(6, 2, generator=generator).double(), torch.tensor([2.0, -1.0, 0.5]).double()
    a_rk, b_dr = (torch.randn(shape, generator=generator).double() for shape in ((6, 9), (7, 6)))
    parts = [slice(2 * head, 2 * head + 2) for head in range(3)]
    wanted = sum(s * b_dr[:, part] @ core[part] @ a_rk[part] for s, part in zip(scale, parts, strict=True))
    parameters = {"q.lora_A.weight": a_rk, "q.lora_B.weight": b_dr, "q.lora_H.weight": core, "q.lora_H.scale": scale}
    stored = cores.folded(parameters)
    assert sorted(stored) == ["q.lora_A.weight", "q.lora_B.weight", "q.lora_H.weight"]
    b_found, a_found = factored.modules(stored)["q"]
    assert torch.allclose(b_found @ a_found, wanted)
    assert not torch.allclose(b_found @ cores.down(core, a_rk), wanted)  # control: without the scales


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("more", [{}, {"adapter.r": "6", "aggregation.num_heads": "3"}], ids=["2 heads", "3 heads"])
def test_the_model_computes_what_its_plain_pair_does(load_begun, load_tiny, quantization, more):
    engine = load_begun(**{"model.quantization": quantization, **more})
    before = logits(engine)
    stored = stirred(engine)
    plain = load_tiny({"model.quantization": quantization, "adapter.r": more.get("adapter.r", "4")})
    assert engine.num_base_parameters == plain.num_base_parameters
    adapter.write(plain.model, cores.plain(stored))
    if quantization == "none":
        gap = tiny.exact_logits(engine.model, IDS_BT) - tiny.exact_logits(plain.model, IDS_BT)
        assert float(gap.abs().max()) < 1e-5
    else:  # whose kernels know no float64; 8-bit activations may fall on either side of a step
        gap = logits(engine) - logits(plain)
        assert float(gap.norm() / logits(plain).norm()) < {"nf4": 1e-5, "int8": 1e-3}[quantization]
    assert float((logits(engine) - before).abs().max()) > 1e-2  # control


def test_a_run_begins_without_a_change_and_with_a_gradient_for_every_core(begun):
    with torch.no_grad(), begun.model.disable_adapter():
        off = begun.model.eval()(IDS_BT).logits
    assert torch.equal(logits(begun), off)
    for name, gradient in gradients(begun).items():
        assert bool(gradient.any()) != cores.is_scale(name)
    state = adapter.read(begun.model)
    for b_dr, a_rk in ((state[n.replace("_H.", "_B.")], state[n.replace("_H.", "_A.")]) for n in state if "_H." in n):
        for rows in (b_dr.T, a_rk):
            assert float((rows.double() @ rows.double().T - torch.eye(len(rows))).abs().max()) < 1e-6


def test_both_ends_make_the_same_factors_and_the_first_ones_are_those_of_ffa(begun):
    both = start.factors(begun.tensor_specs, seed=5, which="AB")
    downs = start.factors(begun.tensor_specs, seed=5)
    assert {factor_of(name) for name in both} == {"A", "B"}
    assert all(torch.equal(both[name], tensor) for name, tensor in downs.items())
    assert len(both) == 2 * len(downs)


def test_what_leaves_is_the_product_and_the_scales_begin_at_one_again(begun):
    stored = stirred(begun, scale=3.0)
    assert adapter.specs(stored) == begun.tensor_specs
    assert not any(map(cores.is_scale, stored))
    expected = logits(begun)
    adapter.write(begun.model, stored)
    own = adapter.parameters(begun.model)
    assert all(bool((own[name] == 1).all()) for name in own if cores.is_scale(name))
    assert torch.equal(logits(begun), expected)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter.read(begun.model).items())


def test_a_core_is_trained_together_with_its_scales_and_nothing_else(begun):
    names = [name for name in adapter.read(begun.model) if factor_of(name) == "H"]
    with adapter.training_only(begun.model, names):
        trained = set(adapter.parameters(begun.model))
    assert trained == {*names, *map(cores.scale_beside, names)}
    assert len(trained) == 2 * len(names)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_checkpointing_changes_no_gradient(load_begun, quantization):
    found = []
    for checkpointing in ("false", "true"):
        changes = {"model.quantization": quantization, "training.gradient_checkpointing": checkpointing}
        engine = load_begun(**changes)
        stirred(engine)
        found.append(gradients(engine))
    assert all(bool(gradient.any()) for gradient in found[0].values())
    assert all(torch.allclose(found[1][name], gradient, atol=1e-6) for name, gradient in found[0].items())


def test_a_unit_is_clipped_over_its_cores_and_scales_together(begun):
    """Against autograd of each unit by itself; the way that reads layers is not taken by itself."""
    stirred(begun)
    begun.model.train()
    rows = base.encode(begun, tiny.rows(6), tiny.settings("tiny").data)[0]
    units = [rows[start : start + 2] for start in range(0, 6, 2)]
    names = [spec.name for spec in begun.tensor_specs if factor_of(spec.name) == "H"]
    with adapter.training_only(begun.model, names), private.prepared(begun, method="auto") as (take, is_many):
        own = adapter.parameters(begun.model)
        found = torch.cat([take([unit]) for unit in units])
        losses = [likelihood.answer_nll(begun.model, prompts.collate(unit, pad_id=begun.pad_id))[0] for unit in units]
        wanted = [torch.autograd.grad(loss.sum(), [own[name] for name in sorted(own)]) for loss in losses]
    expected = torch.stack([torch.cat([part.flatten() for part in unit]) for unit in wanted])
    assert not is_many
    assert torch.allclose(found, expected, atol=1e-5)
    clip_norm = float(expected.norm(dim=1).median())
    summed, norms = private.clip(found, clip_norm=clip_norm)
    assert torch.allclose(norms.float(), expected.norm(dim=1), rtol=1e-5)
    assert noise.grid_step(clip_norm) * float(summed.norm()) < 0.95 * float(
        expected.sum(0).norm()
    )  # control: clipping does something here


def test_heads_are_the_runs_own_setting():
    assert config.AggregationConfig().num_core_heads == 0
    assert config.AggregationConfig(method="ravan", num_heads=2).num_core_heads == 2


def test_a_layer_that_is_narrower_than_the_rank_is_refused(load_begun):
    """The tiny base's values and keys have 32 outputs: 48 columns of B cannot be orthonormal, though A's rows can."""
    with pytest.raises(ModelError, match=r"k_proj\.lora_B\.weight: 48 rows of 32 values .* lower adapter\.r"):
        load_begun(**{"adapter.r": "48"})
