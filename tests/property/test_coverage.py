"""Every row of a site is used equally often over a run, whatever the number of local steps.

FlowerTune's default gives every round the same seed, so that a client trains on the same rows in every round:
that is the control.
"""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from client.train import schedule

SIZES = {
    "num_rows": st.integers(1, 60),
    "batch_size": st.integers(1, 12),
    "num_steps": st.integers(1, 6),
    "num_rounds": st.integers(1, 8),
    "seed": st.integers(0, 2**63 - 1),
}


def use(num_rows: int, batch_size: int, num_steps: int, num_rounds: int, seed: int) -> Counter[int]:
    """How often each row is trained on over a run."""
    used = Counter(dict.fromkeys(range(num_rows), 0))
    for round_index in range(num_rounds):
        first_step = round_index * num_steps
        chosen = schedule.batches(
            num_rows=num_rows, batch_size=batch_size, first_step=first_step, num_steps=num_steps, seed=seed
        )
        used.update(row for batch in chosen for row in batch)
    return used


def use_with_one_seed(num_rows: int, batch_size: int, num_steps: int, num_rounds: int, seed: int) -> Counter[int]:
    """The same with a data loader that is shuffled by the same seed in every round."""
    used = Counter(dict.fromkeys(range(num_rows), 0))
    for _ in range(num_rounds):
        order = list(range(num_rows))
        random.Random(seed).shuffle(order)
        used.update(order[: batch_size * num_steps])
    return used


def is_even(used: Counter[int]) -> bool:
    return max(used.values()) - min(used.values()) <= 1


@given(**SIZES)
def test_every_row_is_used_equally_often_up_to_one(num_rows, batch_size, num_steps, num_rounds, seed):
    used = use(num_rows, batch_size, num_steps, num_rounds, seed)
    assert is_even(used)
    assert sum(used.values()) == batch_size * num_steps * num_rounds


@given(**{**SIZES, "num_rows": st.integers(30, 60), "batch_size": st.integers(5, 8)})
def test_a_run_that_has_steps_for_all_rows_uses_all(num_rows, batch_size, num_steps, num_rounds, seed):
    used = use(num_rows, batch_size, num_steps, num_rounds, seed)
    assert (min(used.values()) > 0) == (batch_size * num_steps * num_rounds >= num_rows)


def test_control_one_seed_for_all_rounds_leaves_most_rows_unused():
    sizes = {"num_rows": 100, "batch_size": 4, "num_steps": 4, "num_rounds": 10, "seed": 1}
    assert is_even(use(**sizes))
    used = use_with_one_seed(**sizes)
    assert not is_even(used)
    assert sum(count == 0 for count in used.values()) == 84
