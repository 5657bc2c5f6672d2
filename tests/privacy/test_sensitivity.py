"""One unit more or less moves the clipped sum by at most C, over random and adversarial data sets."""

import pytest
import torch

from client.train import private
from common.adapter import adapter
from common.privacy import noise
from common.text import prompts
from common.text.prompts import Encoded
from tests import tiny

TOLERANCE = 1e-6


@pytest.fixture
def ready(engine):
    """In training mode, with a B other than zero."""
    adapter.write(engine.model, {name: tensor + 0.02 for name, tensor in engine.initial.items()})
    engine.model.train()
    return engine


def note(engine, text: str, *, unit: str) -> Encoded:
    """A row whose every token but the first is learned."""
    ids = tuple(engine.tokenizer(text)["input_ids"])
    return Encoded(ids, (False,) + (True,) * (len(ids) - 1), unit)


def ours(engine, population, clip_norm: float) -> torch.Tensor:
    """The clipped sum as training takes it."""
    with private.prepared(engine, method="stacked") as (take, _):
        batches = ([unit] for unit in population)
        size = adapter.num_parameters(engine.tensor_specs)
        given = {"take": take, "clip_norm": clip_norm, "num_parameters": size, "device": engine.device}
        return private.clipped_sum(batches, **given)[0] * noise.grid_step(clip_norm)


def by_own_loss(engine, population, clip_norm: float) -> torch.Tensor:
    """The control: each row's share of the model's own `.loss` times the batch, which is what Opacus would clip."""
    rows = [row for unit in population for row in unit]
    num_tokens = sum(sum(row.is_answer[1:]) for row in rows)
    with private.prepared(engine, method="stacked") as (take, _):
        found = take([[row] for row in rows])
    return private.clip(found * len(rows) / num_tokens, clip_norm=clip_norm)[0] * noise.grid_step(clip_norm)


def neighbours(engine):
    """Data sets and one unit more: random notes, and the worst found, short equal notes beside a long one."""
    rows = prompts.encode_all(tiny.rows(14), engine.tokenizer, max_length_tokens=64, too_long="error")[0]
    grouped = private.group(rows)
    yield from ((grouped[:number], grouped[number]) for number in (1, 3, 5))
    short = [[note(engine, "a cold", unit=f"short-{number}")] for number in range(15)]
    long = [note(engine, "gut knee jaw lung " * 12, unit="long")]
    yield short, long
    yield short, [*long, *(note(engine, "heart burn " * 20, unit="long") for _ in range(2))]
    yield [], long


def largest(engine, clipped_sum, clip_norm: float) -> float:
    """Largest move over all neighbours, in units of C."""
    moves = [
        (clipped_sum(engine, [*population, unit], clip_norm) - clipped_sum(engine, population, clip_norm)).norm()
        for population, unit in neighbours(engine)
        if population or clipped_sum is ours
    ]
    return float(max(moves)) / clip_norm


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1.0, 3.0, 1e3])
def test_one_unit_moves_the_clipped_sum_by_at_most_the_clip_norm(ready, clip_norm):
    assert largest(ready, ours, clip_norm) <= 1 + TOLERANCE


def test_control_the_models_own_loss_couples_the_rows_and_exceeds_it(ready):
    found = max(largest(ready, by_own_loss, clip_norm) for clip_norm in (0.1, 0.3, 1.0, 3.0))
    assert found > 1.5


def test_control_rows_of_a_unit_that_are_clipped_apart_exceed_it(ready):
    def apart(engine, population, clip_norm):
        return ours(engine, [[row] for unit in population for row in unit], clip_norm)

    assert largest(ready, apart, 0.1) > 1.5
