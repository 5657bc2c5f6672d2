"""The coordinator's optimizers against Flower's, and against steps worked by hand."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flwr_strategy

from common.run.schema import aggregation, shape
from common.run.schema.aggregation import FedAdagrad, FedAdam, FedAvgM
from server.aggregate import optimizer
from simulations.engines.grid import InProcessGrid

RATE = 0.05
OURS = {
    "fedavgm": FedAvgM(learning_rate=RATE, beta1=0.7),
    "fedadam": FedAdam(learning_rate=RATE, beta1=0.7),
    "fedyogi": FedAdam(kind="fedyogi", learning_rate=RATE, beta1=0.7),
    "fedadagrad": FedAdagrad(learning_rate=RATE),
}
FLOWERS = {
    "fedavgm": lambda: flwr_strategy.FedAvgM(server_learning_rate=RATE, server_momentum=0.7),
    "fedadam": lambda: flwr_strategy.FedAdam(eta=RATE, beta_1=0.7, beta_2=0.99, tau=1e-3),
    "fedyogi": lambda: flwr_strategy.FedYogi(eta=RATE, beta_1=0.7, beta_2=0.99, tau=1e-3),
    "fedadagrad": lambda: flwr_strategy.FedAdagrad(eta=RATE, tau=1e-3),
}


def updates(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(3, 5, generator=generator) for _ in range(count)]


def ours(name: str, given) -> list[torch.Tensor]:
    """Steps of consecutive rounds."""
    memory: optimizer.Memory = {}
    steps = []
    for g in given:
        step, memory = optimizer.step({"w": g}, memory, settings=OURS[name])
        steps.append(step["w"])
    return steps


def flowers(name: str, given) -> list[np.ndarray]:
    """Steps of Flower's strategy, to which one node sends the same adapter as the mean of all."""
    strategy = FLOWERS[name]()
    grid = InProcessGrid({})  # gives messages the run that they need
    current = np.zeros((3, 5))
    steps = []
    for number, g in enumerate(given, start=1):
        arrays = ArrayRecord({"w": Array(current)})
        if isinstance(strategy, flwr_strategy.FedAvgM):
            strategy.current_arrays = arrays
        else:
            strategy.current_arrays = {"w": current}
        request = grid.create_message(RecordDict(), "train", 1, "1")
        told = MetricRecord({"num-examples": 1})
        answer = RecordDict({"arrays": ArrayRecord({"w": Array(current + g.double().numpy())}), "metrics": told})
        after, _ = strategy.aggregate_train(number, [Message(content=answer, reply_to=request)])
        new = after["w"].numpy()
        steps.append(new - current)
        current = new
    return steps


@pytest.mark.parametrize("name", ["fedavgm", "fedyogi", "fedadagrad"])
def test_steps_are_flowers(name):
    given = updates(5)
    for mine, theirs in zip(ours(name, given), flowers(name, given), strict=True):
        assert np.allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-7)


def test_steps_of_fedadam_are_flowers_without_its_correction_for_the_first_rounds():
    given = updates(5)
    for number, (mine, theirs) in enumerate(zip(ours("fedadam", given), flowers("fedadam", given), strict=True), 1):
        correction = (1 - 0.99 ** (number + 1)) ** 0.5 / (1 - 0.7 ** (number + 1))
        assert np.allclose(mine.numpy() * correction, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OURS)
def test_control_another_rate_gives_other_steps(name):
    faster = OURS[name].model_copy(update={"learning_rate": 2 * RATE})
    (g,) = updates(1)
    first, _ = optimizer.step({"w": g}, {}, settings=OURS[name])
    second, _ = optimizer.step({"w": g}, {}, settings=faster)
    assert torch.allclose(second["w"], 2 * first["w"])


def test_two_rounds_of_fedavgm_by_hand():
    """m = 4, then 0.5 * 4 + 2 = 4; a quarter of it each: 1 and 1."""
    settings = FedAvgM(learning_rate=0.25, beta1=0.5)
    first, memory = optimizer.step({"w": torch.tensor([4.0])}, {}, settings=settings)
    second, _ = optimizer.step({"w": torch.tensor([2.0])}, memory, settings=settings)
    assert (first["w"].item(), second["w"].item()) == (1.0, 1.0)


def test_one_round_of_fedyogi_by_hand():
    """m = 0.1 * 2, v = 0 - 0.01 * 4 * sign(0 - 4) = 0.04, step = 0.05 * 0.2 / (0.2 + 0.1)."""
    settings = FedAdam(kind="fedyogi", learning_rate=0.05, tau=0.1)
    step, _ = optimizer.step({"w": torch.tensor([2.0])}, {}, settings=settings)
    assert step["w"].item() == pytest.approx(0.01 / 0.3)


def test_factors_that_are_trained_in_turn_have_a_memory_each():
    settings = OURS["fedadam"]
    a, b = updates(2)
    _, after_b = optimizer.step({"B": b}, {}, settings=settings)
    _, after_a = optimizer.step({"A": a}, after_b, settings=settings)
    assert set(after_a) == {"m/A", "v/A", "m/B", "v/B"}
    assert torch.equal(after_a["m/B"], after_b["m/B"])


def test_without_an_optimizer_the_mean_is_added_as_it_is():
    mean = {"w": torch.ones(2)}
    step, memory = optimizer.step(mean, {}, settings=aggregation.NoServerOptimizer())
    assert step is mean
    assert memory == {}


def test_the_schema_and_the_rules_name_the_same_optimizers():
    names = shape.tables_of(aggregation.AggregationConfig)["server_optimizer"].variants
    assert set(names) == {"none", *OURS}
