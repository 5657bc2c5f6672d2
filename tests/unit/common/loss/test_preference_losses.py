"""The losses of preferences against those of TRL 1.16, on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from common.loss import objectives
from common.loss.objectives import Pair, Rated
from common.run.schema.training import Dpo, Kto
from common.text.prompts import Encoded

NUM_TOKENS = 5
ROW = Encoded((1, 2), (False, True), "unit")


@pytest.fixture(scope="module")
def trl():
    import trl

    return trl


@pytest.fixture
def log_probs():
    """Of six rows now and at the start: (2, 6), from hardly to very different."""
    generator = torch.Generator().manual_seed(3)
    start = -20 * torch.rand(6, generator=generator) - 5
    return torch.stack([start + torch.tensor([0.0, 0.3, -4.0, 9.0, 40.0, -60.0]), start])


def loss_of_trl(trainer, settings, *, now_b, **inputs) -> float:
    """What TRL's own `_compute_loss` makes of rows with these log-probabilities.

    The model is the edge: it hands out what the test has set, spread over the tokens of each row.
    """
    told = {}

    def model(input_ids, **_):
        values_b = told["kl"] if len(told) and bool((input_ids == 7).all()) else now_b
        spread = values_b[:, None].expand(-1, NUM_TOKENS) / NUM_TOKENS
        return SimpleNamespace(log_probs=spread, entropy=spread, mean_logits=spread, is_top1=spread > 0)

    def identity(value):
        return value

    if "kl_now_b" in inputs:
        told["kl"] = inputs.pop("kl_now_b")
        ids = torch.full((len(now_b), NUM_TOKENS + 1), 7)
        inputs |= {"KL_input_ids": ids, "KL_attention_mask": ids, "KL_completion_mask": torch.ones_like(ids)}
    shape = (len(now_b), NUM_TOKENS + 1)
    given = {"input_ids": torch.ones(shape, dtype=torch.int64), "attention_mask": torch.ones(shape)}
    given |= {"completion_mask": torch.ones(shape, dtype=torch.int64), **inputs}
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=identity, gather=identity)
    stand = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    stand._compute_kl_logps = lambda *args: trainer._compute_kl_logps(stand, *args)
    return float(trainer._compute_loss(stand, model, given, return_outputs=False))


def dpo_of_trl(trl, values, *, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> float:
    (now, start), settings = values, {"beta": beta, "loss_types": [loss_type], "label_smoothing": label_smoothing}
    chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    return loss_of_trl(
        trl.DPOTrainer,
        settings,
        now_b=torch.cat([now[chosen], now[rejected]]),
        ref_chosen_logps=start[chosen],
        ref_rejected_logps=start[rejected],
    )


def dpo_of_ours(values, **settings) -> torch.Tensor:
    now, start = values
    pairs = [Pair(ROW, ROW, (float(start[2 * i]), float(start[2 * i + 1]))) for i in range(len(now) // 2)]
    return objectives.losses(pairs, now, Dpo(**settings), origin=0.0)[0]


def kto_of_ours(values, labels, *, origin: float, **settings) -> torch.Tensor:
    now, start = values
    rated = [Rated(ROW, label, None, (float(known),)) for label, known in zip(labels, start, strict=True)]
    return objectives.losses(rated, now, Kto(**settings), origin=origin)[0]


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_dpo_is_that_of_trl(trl, log_probs, beta):
    expected = dpo_of_trl(trl, log_probs, beta=beta)
    assert float(dpo_of_ours(log_probs, beta=beta).mean()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
def test_smoothed_labels_are_those_of_trl(trl, log_probs, label_smoothing):
    """Of TRL's losses the sorting one has the conservative form; over a single pair there is nothing to sort."""
    for number in range(3):
        one = log_probs[:, 2 * number : 2 * number + 2]
        expected = dpo_of_trl(trl, one, beta=0.1, loss_type="aot", label_smoothing=label_smoothing)
        assert float(dpo_of_ours(one, label_smoothing=label_smoothing)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labels", [[True, False, True, True, False, False], [True] * 6, [False] * 6])
@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_kto_and_its_reference_point_are_those_of_trl(trl, log_probs, labels, shift):
    now, start = log_probs
    kl_start = start - 1
    kl_now = kl_start + shift + torch.arange(6)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.7}
    expected = loss_of_trl(
        trl.KTOTrainer,
        {"beta": 0.1, "loss_type": "kto", "calculate_KL": True, **weights},
        now_b=now,
        label=torch.tensor(labels),
        ref_logps=start,
        ref_KL_logps=kl_start,
        kl_now_b=kl_now,
    )
    origin = max(float((kl_now - kl_start).mean()), 0.0)
    found = kto_of_ours(log_probs, labels, origin=origin, **weights)
    assert float(found.mean()) == pytest.approx(expected, rel=1e-6)
    if shift > 0:  # the control: the point matters
        without = kto_of_ours(log_probs, labels, origin=0.0, **weights)
        assert float(without.mean()) != pytest.approx(expected, rel=1e-3)


def test_kto_without_a_reference_point_is_trls_apo_zero_for_single_answers(trl, log_probs):
    now, start = log_probs
    labels = [True, False, True, True, False, False]
    expected = loss_of_trl(
        trl.KTOTrainer,
        {
            "beta": 0.1,
            "loss_type": "apo_zero_unpaired",
            "calculate_KL": False,
            "desirable_weight": 1.3,
            "undesirable_weight": 1.0,
        },
        now_b=now,
        label=torch.tensor(labels),
        ref_logps=start,
    )
    found = kto_of_ours(log_probs, labels, origin=0.0, desirable_weight=1.3, reference_point="zero")
    assert float(found.mean()) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_pair_is_log_2_where_nothing_moved_and_falls_as_the_margin_grows():
    margins = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0])
    now = torch.stack([margins, torch.zeros(5)], dim=1).flatten()
    found = dpo_of_ours(torch.stack([now, torch.zeros(10)]), beta=1.0)
    assert float(found[2]) == pytest.approx(0.6931472)
    assert bool((found[:-1] > found[1:]).all())


def test_an_example_without_its_reference_is_a_callers_mistake():
    with pytest.raises(ValueError, match="no log-probabilities"):
        objectives.losses([Pair(ROW, ROW)], torch.zeros(2), Dpo(), origin=0.0)
