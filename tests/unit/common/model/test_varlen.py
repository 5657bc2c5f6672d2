"""Rows in one sequence: each attends to itself alone."""

import pytest
import torch

from common.model import varlen
from tests import tiny

LENGTHS = (9, 1, 17, 5)


def _rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (length,), generator=generator) for length in LENGTHS]


def _packed(engine, rows):
    """Logits of rows that lie in one sequence, cut apart again."""
    lengths = tuple(map(len, rows))
    places = torch.cat([torch.arange(length) for length in lengths])
    assert varlen.traits_of(engine.model).can_pack
    mask = varlen.mask_of(lengths, engine.device)
    logits = engine.model(input_ids=torch.cat(rows)[None], position_ids=places[None], attention_mask=mask).logits[0]
    return logits.split(lengths)


@torch.no_grad()
def test_packed_rows_have_the_logits_that_they_have_alone(engine):
    engine.model.eval()
    rows = _rows()
    for row, logits in zip(rows, _packed(engine, rows), strict=True):
        assert torch.allclose(logits, engine.model(input_ids=row[None]).logits[0], atol=1e-5)


@torch.no_grad()
def test_no_row_reaches_another(engine):
    engine.model.eval()
    rows = _rows()
    before = _packed(engine, rows)
    rows[1] = (rows[1] + 1) % 50
    after = _packed(engine, rows)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]


@torch.no_grad()
def test_as_one_row_they_do_reach_each_other(engine):
    """The control: the same tokens, called one row."""
    engine.model.eval()
    rows = _rows()

    [before] = _packed(engine, [torch.cat(rows)])
    rows[1] = (rows[1] + 1) % 50
    [after] = _packed(engine, [torch.cat(rows)])
    assert not torch.equal(before.split(LENGTHS)[2], after.split(LENGTHS)[2])


def test_a_window_ends_what_a_token_sees():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 4) for _ in range(3))
    mask = varlen.mask_of((12,), query.device)
    near, _ = varlen.attention(torch.nn.Module(), query, key, value, mask, sliding_window=3)
    value[:, :, 0] += 5
    moved, _ = varlen.attention(torch.nn.Module(), query, key, value, mask, sliding_window=3)
    assert [torch.equal(near[0, place], moved[0, place]) for place in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("option", ["position_bias", "softcap", "s_aux"])
def test_a_layer_that_wants_more_than_packed_rows_know_is_refused(option):
    one = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="packed rows"):
        varlen.attention(torch.nn.Module(), one, one, one, varlen.mask_of((2,), one.device), **{option: one})


def test_without_lengths_it_is_sdpa_as_generation_needs(engine):
    """Two prompts padded at the left, answered with a cache by a model whose attention was set for packed rows."""
    engine.model.eval()
    assert varlen.traits_of(engine.model).can_pack
    ids = torch.tensor([[0, 0, 5, 9], [7, 3, 5, 9]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    found = engine.model.generate(input_ids=ids, **given)
    varlen.base_of(engine.model).set_attn_implementation("sdpa")
    expected = engine.model.generate(input_ids=ids, **given)
    varlen.base_of(engine.model).set_attn_implementation(varlen.NAME)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("change", ["virtual tokens", "eager attention", "a state along the line"])
def test_a_model_in_which_rows_of_a_line_would_touch_is_not_packed(load_tiny, change):
    engine = load_tiny(tiny.of_kind("prompt_tuning") if change == "virtual tokens" else None)
    base = varlen.base_of(engine.model)
    if change == "eager attention":
        base.set_attn_implementation("eager")
    if change == "a state along the line":
        layer = base.base_model.layers[0]
        layer.register_forward_hook(lambda module, args, output: output + 1e-6 * output.cumsum(1))
    before = base.config._attn_implementation
    varlen._traits.pop(engine.model)
    assert not varlen.traits_of(engine.model).can_pack
    assert base.config._attn_implementation == before


def test_a_head_is_plain_unless_something_is_done_to_its_logits_or_it_is_trained(load_tiny):
    assert varlen.traits_of(load_tiny().model).head is not None
    capped, trained = load_tiny(), load_tiny()
    varlen._traits.clear()
    head = varlen.base_of(capped.model).get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: 30 * (logits / 30).tanh())
    assert varlen.traits_of(capped.model).head is None
    varlen.base_of(trained.model).get_output_embeddings().weight.requires_grad_(True)
    assert varlen.traits_of(trained.model).head is None
