"""Robust aggregation: small cases by hand, agreement with Flower's strategies, and that a bad site does not decide."""

import itertools

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from common.privacy import clipping
from common.run import guarding
from common.run.schema.aggregation import AggregationConfig, Robust
from server.aggregate import mean, robust
from simulations.engines.grid import InProcessGrid

SHAPES = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (4, 2)}


def updates(count: int, *, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Sites that agree on ones, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: 1.0 + 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def bad(scale: float = -1000.0) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, scale) for name, shape in SHAPES.items()}


def combined(given, rule: str, *, num_bad: int = 1) -> dict[str, torch.Tensor]:
    total = robust.start(list(given[0]), rule=rule, num_bad=num_bad)
    for update in given:
        total.add(update, weight=1.0)
    return dict(total.result())


def vector(update) -> torch.Tensor:
    return torch.cat([update[name].flatten() for name in sorted(update)])


def line(*values: float) -> list[dict[str, torch.Tensor]]:
    """Updates of one value."""
    return [{"w": torch.tensor([value])} for value in values]


@pytest.mark.parametrize(
    ("rule", "values", "num_bad", "expected"),
    [
        ("median", (1.0, 2.0, 50.0), 1, 2.0),
        ("median", (1.0, 2.0, 4.0, 50.0), 1, 3.0),
        ("trimmed_mean", (1.0, 2.0, 4.0, 6.0, 50.0), 1, 4.0),
        ("trimmed_mean", (1.0, 2.0, 4.0, 6.0, 50.0), 2, 4.0),
        # The two nearest others: 1 has 1 + 9, 2 has 1 + 4, 4 has 4 + 9, 7 has 9 + 25, 50 has 43^2 + 46^2.
        ("krum", (1.0, 2.0, 4.0, 7.0, 50.0), 1, 2.0),
        ("multi_krum", (1.0, 2.0, 4.0, 7.0, 50.0), 1, 1.5),
        # The three nearest of six: the five best are 0, 1, 2, 3 and 4, their median 2, the three nearest to it 1, 2, 3.
        ("bulyan", (0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 50.0), 1, 2.0),
    ],
)
def test_small_cases_by_hand(rule, values, num_bad, expected):
    for order in itertools.islice(itertools.permutations(values), 0, 120, 7):
        assert combined(line(*order), rule, num_bad=num_bad)["w"].tolist() == [pytest.approx(expected)]


def reply(update) -> Message:
    arrays = ArrayRecord({name: Array(tensor.double().numpy()) for name, tensor in update.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    InProcessGrid({})  # names this process as the server's end, without which Flower makes no message
    return Message(content=content, reply_to=Message(RecordDict(), 1, "train"))


@pytest.mark.parametrize(
    ("rule", "strategy"),
    [
        ("median", FedMedian()),
        ("trimmed_mean", FedTrimmedAvg(beta=2.5 / 11)),
        ("krum", Krum(num_malicious_nodes=2)),
        ("multi_krum", MultiKrum(num_malicious_nodes=2, num_nodes_to_select=7)),
        ("bulyan", Bulyan(num_malicious_nodes=2)),
    ],
)
def test_figures_are_those_of_flowers_strategies(rule, strategy):
    given = [*updates(9), bad(), bad(30.0)]
    arrays, _ = strategy.aggregate_train(1, [reply(update) for update in given])
    found = combined(given, rule, num_bad=2)
    for name, array in arrays.items():
        assert np.allclose(array.numpy(), found[name].double().numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", sorted(robust.RULES))
def test_a_bad_site_does_not_decide_where_the_adapter_goes(rule):
    given = [*updates(10), bad()]
    assert float((vector(combined(given, rule)) - 1.0).abs().max()) < 0.3


def test_control_the_mean_goes_where_one_bad_site_wants():
    total = mean.start(bad(), trained=list(SHAPES))
    for update in [*updates(10), bad()]:
        total.add(update, weight=1.0)
    assert float(vector(total.result()).max()) < -80


@pytest.mark.parametrize("rule", sorted(robust.RULES))
def test_control_more_bad_sites_than_it_is_told_of_do(rule):
    given = [*updates(3), *[bad() for _ in range(8)]]
    assert float((vector(combined(given, rule)) - 1.0).abs().max()) > 0.3


@pytest.mark.parametrize("rule", sorted(robust.RULES))
def test_the_order_of_arrival_does_not_change_a_bit(rule):
    given = updates(7)
    expected = combined(given, rule)
    found = combined([given[k] for k in (3, 1, 6, 0, 2, 5, 4)], rule)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_krum_takes_one_update_as_it_is():
    given = updates(6)
    chosen = combined(given, "krum")
    assert any(all(torch.equal(chosen[name], update[name]) for name in SHAPES) for update in given)


def test_a_weight_that_is_not_positive_and_a_round_of_nobody_are_refused():
    total = robust.start(list(SHAPES), rule="median", num_bad=1)
    with pytest.raises(ValueError, match="weight"):
        total.add(bad(), weight=0.0)
    with pytest.raises(ValueError, match="no upload"):
        total.result()


def test_a_long_update_is_scaled_down_and_a_short_one_is_not():
    change = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    shorter, length = clipping.scaled(change, 2.5)
    assert (length, shorter["a"].tolist(), shorter["b"].tolist()) == (5.0, [1.5], [[2.0]])
    assert clipping.scaled(change, 5.0) == (change, 5.0)
    assert clipping.scaled(change, 0.0) == (change, 5.0)


def test_both_protections_are_told_with_what_is_asked_for():
    told = guarding.in_words(AggregationConfig(robust=Robust(rule="krum", num_bad_sites=2), max_update_norm=1.5))
    assert "the coordinator sees each site's own update" in told
    assert told.endswith("krum against 2 bad sites, and an update is scaled down to norm 1.5")
    assert guarding.in_words(AggregationConfig(max_update_norm=1.5)).endswith(
        "off, but an update is scaled down to norm 1.5"
    )
