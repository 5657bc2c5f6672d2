import hashlib
import math
from collections import Counter

import pytest

from client.train import schedule
from common.run.config import TrainingConfig


def training(**changes) -> TrainingConfig:
    return TrainingConfig(**changes)


def rates(num_steps: int, **changes) -> list[float]:
    settings = training(learning_rate=0.1, **changes)
    return [schedule.learning_rate(step / num_steps, settings) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("num_rows", "epochs", "batch_size", "steps"),
    [(16, 1.0, 8, 2), (17, 1.0, 8, 3), (1, 1.0, 8, 1), (100, 0.5, 8, 7), (100, 0.01, 8, 1), (16, 2.5, 8, 5)],
)
def test_epochs_become_steps(num_rows, epochs, batch_size, steps):
    assert schedule.num_local_steps(num_rows, training(local_epochs=epochs, batch_size=batch_size)) == steps


def test_steps_are_steps_whatever_the_rows():
    assert schedule.num_local_steps(1000, training(local_steps=3)) == 3


def test_a_constant_rate():
    assert rates(4, schedule="constant") == [0.1] * 4


def test_a_linear_rate_falls_to_zero_at_the_end_of_the_run():
    assert rates(4, schedule="linear") == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_cosine_rate():
    expected = [0.1, 0.1 * (1 + math.sqrt(0.5)) / 2, 0.05, 0.1 * (1 - math.sqrt(0.5)) / 2]
    assert rates(4, schedule="cosine") == pytest.approx(expected)


def test_warm_up_rises_from_zero_and_the_schedule_follows_it():
    assert rates(8, schedule="constant", warmup_fraction=0.5) == pytest.approx([0, 0.025, 0.05, 0.075] + [0.1] * 4)
    assert rates(8, schedule="linear", warmup_fraction=0.5) == pytest.approx(
        [0, 0.025, 0.05, 0.075, 0.1, 0.075, 0.05, 0.025]
    )


def test_warm_up_belongs_to_the_run_and_not_to_each_round():
    """Two rounds of four steps are eight steps of one run."""
    whole = rates(8, schedule="cosine", warmup_fraction=0.25)
    assert whole[0] == 0
    assert all(rate > 0 for rate in whole[1:])
    assert max(whole) == whole[2] == pytest.approx(0.1)
    assert whole[2:] == sorted(whole[2:], reverse=True)


def indices(first_step: int, num_steps: int, *, num_rows: int = 10, batch_size: int = 3, seed: int = 1) -> list[int]:
    given = schedule.batches(
        num_rows=num_rows, batch_size=batch_size, first_step=first_step, num_steps=num_steps, seed=seed
    )
    return [index for batch in given for index in batch]


def test_batches_have_their_size_though_it_does_not_divide_the_rows():
    given = schedule.batches(num_rows=10, batch_size=3, first_step=2, num_steps=4, seed=1)
    assert [len(batch) for batch in given] == [3] * 4


def test_a_round_takes_up_where_the_one_before_stopped():
    assert indices(0, 3) + indices(3, 5) == indices(0, 8)


def test_each_pass_has_an_order_of_its_own():
    orders = [tuple(indices(k, 1, batch_size=10)) for k in range(20)]
    assert len(set(orders)) == 20
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(10))}


def test_sites_and_runs_differ():
    seeds = [schedule.derive_seed(5, "north"), schedule.derive_seed(5, "south"), schedule.derive_seed(6, "north")]
    assert len({tuple(indices(0, 10, seed=seed)) for seed in seeds}) == 3


def test_the_order_is_the_same_on_every_machine():
    """Stored from Python 3.11: another order would change resumed runs, and sites with another Python."""
    digest = hashlib.sha256(b"5\x1fnorth").digest()
    assert schedule.derive_seed(5, "north") == int.from_bytes(digest[:8], "little") // 2
    assert indices(0, 1, num_rows=5, batch_size=5, seed=1) == [2, 1, 4, 0, 3]


def test_seeds_of_parts_that_run_together_differ():
    assert schedule.derive_seed("a", "bc") != schedule.derive_seed("ab", "c")
    assert schedule.derive_seed(1, 23) != schedule.derive_seed(12, 3)


def test_more_rows_in_a_step_than_there_are():
    assert Counter(indices(0, 3, num_rows=2, batch_size=3)) in ({0: 5, 1: 4}, {0: 4, 1: 5})
