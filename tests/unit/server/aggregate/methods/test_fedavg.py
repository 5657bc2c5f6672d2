import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from server.aggregate.methods import fedavg, table

STATE = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[0.0]])}


def uploads(count: int, *, size: int = 1000) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Changes of sites with weights as numbers of rows have them."""
    generator = torch.Generator().manual_seed(2)
    return [
        ({"w": torch.randn(size, generator=generator) * 10 ** (k % 5 - 2)}, float(7 * k * k + 1)) for k in range(count)
    ]


def mean(given) -> dict[str, torch.Tensor]:
    combined = fedavg.start(given[0][0], trained=list(given[0][0]))
    for upload, weight in given:
        combined.add(upload, weight=weight)
    return combined.result()


def test_the_mean_is_weighted_by_rows():
    """By hand: (1 * 100 + 4 * 300) / 400 = 3.25 and (0 * 100 + 8 * 300) / 400 = 6."""
    combined = fedavg.start(STATE, trained=list(STATE))
    combined.add({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}, weight=100)
    combined.add({"a": torch.tensor([4.0, 8.0]), "b": torch.tensor([[2.0]])}, weight=300)
    found = combined.result()
    assert found["a"].tolist() == [3.25, 6.0]
    assert found["b"].tolist() == [[2.0]]
    after = fedavg.apply(STATE, found)
    assert after["a"].tolist() == [4.25, 7.0]
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_the_order_of_arrival_does_not_change_a_bit():
    given = uploads(5)
    expected = mean(given)["w"]
    assert all(torch.equal(mean(order)["w"], expected) for order in itertools.permutations(given))


def test_control_in_float32_the_order_of_arrival_does():
    def naive(order) -> torch.Tensor:
        total = torch.zeros(1000)
        for upload, weight in order:
            total += weight * upload["w"]
        return total / sum(weight for _, weight in order)

    given = uploads(5)
    assert not all(torch.equal(naive(order), naive(given)) for order in itertools.permutations(given))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_the_mean_is_that_of_float64_however_many_updates_wait(count, monkeypatch):
    """By numpy; a chunk of seven values, so that the last of each tensor is cut."""
    monkeypatch.setattr("server.aggregate.mean.CHUNK", 7)
    given = uploads(count)
    wanted = np.average([upload["w"].double() for upload, _ in given], axis=0, weights=[w for _, w in given])
    assert np.allclose(mean(given)["w"].double(), wanted, rtol=1e-7, atol=1e-9)


def test_one_site_alone_gets_its_own_change():
    ((upload, _),) = uploads(1)
    assert torch.equal(mean([(upload, 12.0)])["w"], upload["w"])


def test_a_mean_of_equal_uploads_is_the_upload():
    ((upload, _),) = uploads(1)
    found = mean([(upload, 1.0), (upload, 2.0), (upload, 4.0)])["w"]
    assert torch.equal(found, upload["w"])


def test_uploads_are_not_changed():
    ((upload, _),) = uploads(1)
    before = upload["w"].clone()
    mean([(upload, 3.0), (upload, 5.0)])
    assert torch.equal(upload["w"], before)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="weight"):
        fedavg.start(STATE, trained=list(STATE)).add(STATE, weight=weight)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no upload"):
        fedavg.start(STATE, trained=list(STATE)).result()


def test_the_table_finds_a_method_by_its_name():
    assert all(table.find(name).facts.name == name for name in table.METHODS)
    with pytest.raises(ConfigError, match=r"'fedprox'.*fedavg"):
        table.find("fedprox")


def test_every_method_of_the_schema_is_built():
    from common.run.schema.aggregation import AggregationConfig

    schema = json.loads(json.dumps(AggregationConfig.model_json_schema()))["properties"]["method"]
    assert set(schema.get("enum", [schema.get("const")])) == set(table.METHODS)


def test_facts_name_their_paper():
    assert all(method.facts.source for method in table.METHODS.values())
    assert Path(fedavg.__file__).read_text().count(fedavg.facts.source) >= 1
