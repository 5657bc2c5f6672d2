"""Rows in one sequence: each attends to itself alone."""

import pytest
import torch

from common.model import varlen

LENGTHS = (9, 1, 17, 5)


def _rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (length,), generator=generator) for length in LENGTHS]


def _packed(engine, rows):
    """Logits of rows that lie in one sequence, cut apart again."""
    lengths = tuple(map(len, rows))
    places = torch.cat([torch.arange(length) for length in lengths])
    with varlen.packed(engine.model, varlen.Rows.of(lengths, engine.device)):
        logits = engine.model(input_ids=torch.cat(rows)[None], position_ids=places[None]).logits[0]
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
    token = varlen._ROWS.set(varlen.Rows.of((12,), query.device))
    try:
        near, _ = varlen.attention(torch.nn.Module(), query, key, value, None, sliding_window=3)
        value[:, :, 0] += 5
        moved, _ = varlen.attention(torch.nn.Module(), query, key, value, None, sliding_window=3)
    finally:
        varlen._ROWS.reset(token)
    assert [torch.equal(near[0, place], moved[0, place]) for place in range(4)] == [False, False, False, True]


def test_outside_of_packed_it_is_refused():
    one = torch.zeros(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="lengths"):
        varlen.attention(torch.nn.Module(), one, one, one, None)
