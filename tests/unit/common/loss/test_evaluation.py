from dataclasses import replace

import pytest
import torch

from common.adapter import adapter
from common.data.rows import Message
from common.errors import ModelError
from common.loss import evaluation, likelihood
from common.model import base
from common.text import prompts
from tests import tiny

ROWS = tiny.rows(11)


@pytest.fixture(scope="module")
def encoded(shared_engine):
    return prompts.encode_all(ROWS, shared_engine.tokenizer, max_length_tokens=64, too_long="error")[0]


def score(engine, encoded, generated=(), *, batch_size=4):
    return evaluation.score(engine, encoded, generated, batch_size=batch_size, max_new_tokens=4, system_prompt="")


def test_the_sum_is_that_over_single_rows(engine, encoded):
    engine.model.eval()
    with torch.no_grad():
        single = [likelihood.answer_nll(engine.model, prompts.collate([row], pad_id=engine.pad_id)) for row in encoded]
    found = score(engine, encoded)
    assert found.nll_sum == pytest.approx(sum(float(nll) for nll, _ in single), rel=1e-5)
    assert found.num_answer_tokens == sum(count for _, count in single)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_figures_do_not_depend_on_the_batch_size(engine, encoded, batch_size):
    found, expected = score(engine, encoded, batch_size=batch_size), score(engine, encoded)
    assert found.nll_sum == pytest.approx(expected.nll_sum, rel=1e-5)
    assert found.num_answer_tokens == expected.num_answer_tokens


def test_nothing_is_generated_unless_asked(engine, encoded):
    found = score(engine, encoded)
    assert (found.num_generated, found.num_exact) == (0, 0)


def test_an_answer_counts_if_it_equals_the_reference_but_for_white_space(engine, encoded):
    asked = [prompts.prompt_ids(row, engine.tokenizer)[0] for row in ROWS[:5]]
    given = base.answer(engine, asked, max_new_tokens=4)
    right = [
        replace(row, messages=(row.messages[0], Message("assistant", f"  {text}\n")))
        for row, text in zip(ROWS[:5], given, strict=True)
    ]
    found = score(engine, encoded, [*right, *ROWS[5:7]])
    assert (found.num_generated, found.num_exact) == (7, 5)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_answers_come_in_the_order_of_the_rows(engine, batch_size):
    rows = sorted(ROWS[:7], key=lambda row: -len(row.messages[0].content))
    expected = [
        base.answer(engine, [prompts.prompt_ids(row, engine.tokenizer)[0]], max_new_tokens=4)[0] for row in rows
    ]
    found = evaluation.generate(engine, rows, batch_size=batch_size, max_new_tokens=4, system_prompt="")
    assert found == [(text, row.messages[-1].content) for text, row in zip(expected, rows, strict=True)]
    assert len(set(expected)) > 1


def test_scoring_leaves_no_gradients_and_no_other_adapter(engine, encoded):
    score(engine, encoded, ROWS[:2])
    assert all(p.grad is None for p in adapter.parameters(engine.model).values())
    found = adapter.read(engine.model)
    assert all(torch.equal(found[name], engine.initial[name]) for name in found)


def test_a_loss_that_is_not_finite_is_an_error(engine, encoded):
    adapter.write(engine.model, {name: torch.full_like(t, float("nan")) for name, t in engine.initial.items()})
    with pytest.raises(ModelError, match="held-out loss"):
        score(engine, encoded)
