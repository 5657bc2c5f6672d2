"""The gradient of a unit against a naive loop: every way, precision, checkpointing variant, adapter and layout."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from client.train import private
from common.adapter import adapter
from common.errors import ModelError
from common.model import base as model
from common.model import varlen
from common.privacy import noise
from common.run import config
from common.run.schema.model import LoraAdapter
from common.text import prompts
from tests import tiny

TOLERANCE = 1e-5  # relative; two orders of summation in float32 differ by a tenth of it
WAYS = ("stacked", "microbatch", "opacus")
PRECISIONS = {
    "float32": {"quantization": "none", "dtype": "float32"},
    "bfloat16": {"quantization": "none", "dtype": "bfloat16"},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
}


def load(tiny_base, *, checkpointing: bool = False, dropout: float = 0.0, **settings):
    """An engine in training mode, with a B other than zero so that gradients reach A."""
    adapter_settings = {key: settings.pop(key) for key in ("use_rslora", "targets") if key in settings}
    engine = model.load(
        tiny_base,
        model=config.ModelConfig(base="tiny", **settings),
        adapter_settings=LoraAdapter(r=4, alpha=8, dropout=dropout, **adapter_settings),
        seed=5,
        device_name="cpu",
        num_threads=1,
        gradient_checkpointing=checkpointing,
    )
    generator = torch.Generator().manual_seed(1)
    moved = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in engine.initial.items()}
    adapter.write(engine.model, moved)
    engine.model.train()
    return engine


def some_units(engine, counts=(1, 2, 1, 3)):
    """Units of unequal numbers of rows of unequal length."""
    rows = prompts.encode_all(tiny.rows(sum(counts)), engine.tokenizer, max_length_tokens=64, too_long="error")[0]
    assert len({len(row.input_ids) for row in rows}) > 1
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def naive(engine, units, *, together="row", layout="packed"):
    """Unit by unit, by autograd of one sum, as a unit would be trained that is alone.

    A row is by itself and without padding; or beside the rows that are `together` with it in one pass, whose losses
    are left out: in bfloat16 that decides how activations are rounded.
    """
    found = []
    everyone = [row for unit in units for row in unit]
    for unit in units:
        engine.model.zero_grad()
        passes = {"row": [[row] for row in unit], "unit": [unit], "batch": [everyone]}[together]
        for rows in passes:
            logits = logits_of(engine, rows, layout=layout)
            own = [nll(logits_tv, row) for logits_tv, row in zip(logits, rows, strict=True) if row in unit]
            sum(own).backward()
        found.append(flat({name: p.grad.clone() for name, p in adapter.parameters(engine.model).items()}))
    engine.model.zero_grad(set_to_none=True)
    return torch.stack(found)


def logits_of(engine, rows, *, layout):
    """The logits of each row's own tokens, from one pass over all of them."""
    is_left, lengths = layout == "left", tuple(len(row.input_ids) for row in rows)
    if layout == "packed":
        ids = torch.tensor([[token for row in rows for token in row.input_ids]])
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        given = {"position_ids": positions, "attention_mask": varlen.mask_of(lengths, engine.device)}
        return engine.model(input_ids=ids, **given).logits[0].float().split(lengths)
    length = max(len(row.input_ids) for row in rows)
    starts = [length - len(row.input_ids) if is_left else 0 for row in rows]
    ids, mask = torch.full((len(rows), length), engine.pad_id), torch.zeros(len(rows), length, dtype=torch.long)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[number, start : start + len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[number, start : start + len(row.input_ids)] = 1
    logits_btv = engine.model(input_ids=ids, attention_mask=mask).logits.float()
    return [
        logits_tv[start : start + len(row.input_ids)]
        for logits_tv, row, start in zip(logits_btv, rows, starts, strict=True)
    ]


def nll(logits_tv, row):
    """Sum over a row's answer tokens."""
    targets = torch.tensor([i for i, is_answer in enumerate(row.is_answer) if is_answer and i])
    ids = torch.tensor(row.input_ids)[targets]
    return -logits_tv[targets - 1].log_softmax(-1)[torch.arange(len(ids)), ids].sum()


@contextmanager
def laid_out(model, layout):
    """Batches reach the model packed, or padded at the right, or with that padding moved to the left and back again."""
    traits, moved = varlen.traits_of(model), {}
    varlen._traits[model] = replace(traits, can_pack=traits.can_pack and layout == "packed")

    def before(module, args, kwargs):
        moved["shifts"] = (1 - kwargs["attention_mask"]).sum(1).tolist()
        both = {name: rolled(kwargs[name], moved["shifts"]) for name in ("input_ids", "attention_mask")}
        return args, {**kwargs, **both}

    def after(module, args, kwargs, output):
        output.last_hidden_state = rolled(output.last_hidden_state, [-shift for shift in moved["shifts"]])
        return output

    body = varlen.base_of(model).base_model
    hooks = [
        body.register_forward_pre_hook(before, with_kwargs=True),
        body.register_forward_hook(after, with_kwargs=True),
    ]
    for hook in hooks if layout != "left" else ():
        hook.remove()
    yield moved
    for hook in hooks:
        hook.remove()
    varlen._traits[model] = traits


def rolled(tensor, shifts):
    return torch.stack([torch.roll(row, shift, 0) for row, shift in zip(tensor, shifts, strict=True)])


def taken(engine, units, way):
    """The same by one of the three ways."""
    with private.prepared(engine, method=way) as (take, is_many):
        return take(units) if is_many else torch.cat([take([unit]) for unit in units])


def flat(gradient):
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def apart(found, expected):
    """Largest relative difference of a unit's gradient."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def check(engine, units, way, *, layout="packed", together="row"):
    """Norms and clipped sums within the tolerance, at a clip norm that clips some units and not others."""
    assert varlen.traits_of(engine.model).can_pack
    expected = naive(engine, units, together=together, layout=layout)
    with laid_out(engine.model, layout) as moved:
        found = taken(engine, units, way)
    assert any(moved.get("shifts", [])) == (layout == "left")
    norms = expected.norm(dim=1)
    assert ((found.norm(dim=1) - norms).abs() / norms).max() < TOLERANCE
    clip_norm = float(norms.median())
    scale = (clip_norm / (norms + private.TINY)).clamp(max=1)
    wanted = sum(s * gradient for s, gradient in zip(scale, expected, strict=True))
    total = noise.grid_step(clip_norm) * private.clip(found, clip_norm=clip_norm)[0]
    assert (total - wanted).norm() / wanted.norm() < TOLERANCE


CHECKPOINTING = ("none", "without reentry", "with reentry")


@pytest.fixture(
    scope="module", params=[(precision, variant) for precision in PRECISIONS for variant in CHECKPOINTING], ids="-".join
)
def cell(request, tiny_base):
    """An engine of each precision and checkpointing variant."""
    precision, variant = request.param
    engine = load(tiny_base, checkpointing=variant == "without reentry", **PRECISIONS[precision])
    if variant == "with reentry":
        base = engine.model.base_model.model
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        base.enable_input_require_grads()
    return engine, precision, variant


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
@pytest.mark.parametrize("way", WAYS)
def test_norms_and_clipped_sums_are_those_of_a_naive_loop(cell, way, layout):
    """Every engine, precision of the base, checkpointing variant and layout of the rows."""
    engine, precision, variant = cell
    if way == "opacus" and variant == "without reentry":  # fails rather than be wrong
        with pytest.raises(ModelError, match=r"privacy\.clipping"):
            taken(engine, some_units(engine), way)
        return
    together = "row" if precision != "bfloat16" else "unit" if way == "microbatch" else "batch"
    layout = "right" if layout == "packed" and way == "opacus" else layout  # it takes a line for a row
    check(engine, some_units(engine), way, layout=layout, together=together)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",)])
def test_rslora_and_any_choice_of_layers_hold(tiny_base, way, targets):
    engine = load(tiny_base, use_rslora=True, targets=targets, **PRECISIONS["float32"])
    check(engine, some_units(engine), way)


def test_no_unit_meets_the_adapters_dropout_and_the_modes_are_as_before(tiny_base):
    engine = load(tiny_base, dropout=0.3, checkpointing=True, **PRECISIONS["float32"])
    units = some_units(engine)
    modes = [module.training for module in engine.model.modules()]
    found = [taken(engine, units, way) for way in ("stacked", "microbatch", "microbatch")]
    assert [module.training for module in engine.model.modules()] == modes
    assert all("forward" not in vars(module) for module in engine.model.modules())
    assert torch.equal(found[1], found[2])
    assert apart(found[0], found[1]) < TOLERANCE
    assert apart(naive(engine, units), found[1]) > 0.1  # control: in training mode there are masks


def test_how_a_logical_batch_is_cut_does_not_matter(tiny_base):
    engine = load(tiny_base, **PRECISIONS["float32"])
    units = some_units(engine)
    parts = torch.cat([taken(engine, [unit], "stacked") for unit in units])
    assert apart(parts, taken(engine, units, "stacked")) < TOLERANCE


def test_control_clipping_rows_instead_of_units_is_another_sum(tiny_base):
    engine = load(tiny_base, **PRECISIONS["float32"])
    units = some_units(engine)
    rows = [[row] for unit in units for row in unit]
    by_unit, by_row = (private_sum(engine, found) for found in (units, rows))
    assert (by_unit - by_row).norm() / by_unit.norm() > 1000 * TOLERANCE


def private_sum(engine, units):
    return private.clip(taken(engine, units, "stacked"), clip_norm=0.1)[0]


def test_a_factor_that_is_used_twice_in_a_pass_fails_the_step_and_one_by_one_is_right(tiny_base):
    engine = load(tiny_base, targets=("q_proj",), **PRECISIONS["float32"])
    layers = engine.model.base_model.model.model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    with pytest.raises(ModelError, match="twice"):
        taken(engine, some_units(engine), "stacked")
    check(engine, some_units(engine), "microbatch")


def test_a_layer_whose_input_has_lost_the_rows_fails_the_step(tiny_base):
    engine = load(tiny_base, targets=("down_proj",), **PRECISIONS["float32"])
    module = engine.model.base_model.model.model.layers[0].mlp.down_proj
    whole = module.forward
    module.forward = lambda x: whole(x.flatten(0, 1)[:, None]).view(*x.shape[:2], -1)
    with pytest.raises(ModelError, match="tokens of the batch"):
        taken(engine, some_units(engine), "stacked")


def test_a_factor_that_is_not_used_fails_the_step(tiny_base):
    engine = load(tiny_base, targets=("q_proj",), **PRECISIONS["float32"])
    layers = engine.model.base_model.model.model.layers
    layers[1].self_attn.q_proj.forward = layers[1].self_attn.q_proj.base_layer.forward
    for way in ("stacked", "microbatch", "opacus"):
        with pytest.raises(ModelError, match=r"lora_A|lora_B"):
            taken(engine, some_units(engine, (1,) * 7), way)


def test_whatever_else_is_trained_makes_auto_take_one_unit_at_a_time(tiny_base):
    engine = load(tiny_base, **PRECISIONS["float32"])
    norm = engine.model.base_model.model.model.norm.weight
    with private.prepared(engine, method="stacked") as (_, is_many):
        assert is_many
    norm.requires_grad_(True)
    with private.prepared(engine, method="auto") as (_, is_many):
        assert not is_many
    with (
        pytest.raises(ModelError, match=r"privacy\.clipping = 'stacked'"),
        private.prepared(engine, method="stacked"),
    ):
        pass
    check(engine, some_units(engine), "microbatch")


def test_the_layers_are_as_before_once_it_is_over(tiny_base):
    engine = load(tiny_base, **PRECISIONS["float32"])
    units = some_units(engine)
    before = naive(engine, units)
    taken(engine, units, "stacked")
    assert all("forward" not in vars(module) for module in engine.model.modules())
    after = naive(engine, units)
    assert torch.equal(before, after)


@pytest.mark.parametrize("way", ["stacked", "microbatch"])
def test_units_that_are_packed_side_by_side_do_not_touch(tiny_base, way):
    """Another neighbour changes no bit of a unit's gradient, and beside it that is what it is alone."""
    engine = load(tiny_base, **PRECISIONS["float32"])
    first, second, third = some_units(engine, (2, 1, 3))
    others = [[prompts.Encoded(row.input_ids[::-1], row.is_answer, row.unit) for row in first], second, third]
    with private.prepared(engine, method="stacked") as (take, _):
        together, beside_others = take([first, second, third])[1:], take(others)[1:]
    assert torch.equal(together, beside_others)
    assert apart(together, taken(engine, [second, third], way)) < TOLERANCE


def test_control_packed_units_touch_where_rows_of_a_line_see_each_other(tiny_base, monkeypatch):
    engine = load(tiny_base, **PRECISIONS["float32"])
    first, second = some_units(engine, (2, 3))
    alone = taken(engine, [second], "stacked")
    whole = varlen.mask_of
    monkeypatch.setattr(varlen, "mask_of", lambda lengths, device: whole((sum(lengths),), device))  # the mask is off
    with private.prepared(engine, method="stacked") as (take, _):
        together = take([first, second])[1:]
    assert apart(together, alone) > 100 * TOLERANCE


def test_a_units_gradient_does_not_depend_on_how_many_of_its_rows_are_in_memory_at_once(tiny_base):
    engine = load(tiny_base, **PRECISIONS["float32"])
    [unit] = some_units(engine, (5,))
    passes = []
    handle = engine.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    whole = taken(engine, [unit], "microbatch")
    longest = max(len(row.input_ids) for row in unit)
    with private.prepared(engine, method="microbatch", max_tokens=longest) as (take, _):
        assert apart(take([unit]), whole) < TOLERANCE
    handle.remove()
    assert len(passes) == 1 + 5
