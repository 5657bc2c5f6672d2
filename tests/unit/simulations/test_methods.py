"""Every method through whole runs: the functions that production calls, at sites of a few rows."""

from dataclasses import replace

import pytest
import torch

from common import adapter, events, trainable, wire
from common.methods import FACTS
from server import checkpoint, run
from server.aggregate import table
from tests import tiny

CHANGES = {"training.batch_size": "4", "training.local_epochs": "2", "federation.num_rounds": "3"}
METHODS = sorted(FACTS)


def settings(base, method: str, changes=None):
    return tiny.settings(base, {**CHANGES, "aggregation.method": method, **(changes or {})})


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """Run in a folder of the test's; gives the outcome and the events."""

    def execute(nodes, method: str, *, name: str = "run", resume: bool = False, changes=None):
        folder, found = tmp_path / name, settings(tiny_base, method, changes)
        log = run.prepare(found, folder, resume=resume)
        outcome = run.execute(found, fleet=tiny.fleet(nodes), engine=engine, folder=folder, log=log, resume=resume)
        return outcome, events.read(log.path)

    return execute


@pytest.fixture
def nodes(engine):
    return tiny.make_nodes(engine)


def listening(answer, heard: list):
    """A node whose requests and replies are kept."""

    def node(frame: bytes) -> bytes:
        reply = answer(frame)
        heard.append(tuple(wire.unpack(data, max_body_bytes=1 << 24) for data in (frame, reply)))
        return reply

    return node


def stopping(answer, *, after: int):
    """A node that stops the whole process when it is asked to train for the so-manieth time."""
    asked = []

    def change(frame: bytes) -> bytes:
        asked.append(frame)
        if len(asked) > after:
            raise KeyboardInterrupt
        return frame

    return tiny.spoilt(answer, "train", change)


def names_in(body: bytes) -> set[str]:
    import safetensors.torch

    return set(safetensors.torch.load(body))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_lowers_the_held_out_loss_and_only_the_methods_tensors_travel(play, nodes, engine, method):
    heard: list = []
    outcome, log = play({**nodes, 1: listening(nodes[1], heard)}, method)
    losses = [event["loss"] for event in log if event["kind"] == "evaluated"]
    assert losses[-1] < losses[0] - 0.05
    sent = {spec.name for spec in trainable.received_specs(method, engine.tensor_specs)}
    assert all(names_in(request.body) == sent for request, _ in heard if request.kind != "open")
    updates = [reply for _, reply in heard if reply.kind == "update"]
    expected = [set(trainable.trained_names(method, engine.tensor_specs, round_index=number)) for number in range(3)]
    assert [names_in(reply.body) for reply in updates] == expected
    assert adapter.specs(outcome.tensors) == engine.tensor_specs
    finished = [event for event in log if event["kind"] == "round_finished"]
    assert all((event["gap"] is None) == FACTS[method].is_exact for event in finished)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(play, nodes, tmp_path, method):
    expected, _ = play(nodes, method, name="whole")
    with pytest.raises(KeyboardInterrupt):
        play({**nodes, 2: stopping(nodes[2], after=1)}, method)
    assert checkpoint.finished(tmp_path / "run") == [1]
    found, _ = play(nodes, method, resume=True)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


OPTIMIZERS = [("fedavg", "fedavgm", "0.5"), ("fedavg", "fedyogi", "0.02"), ("rolora", "fedadam", "0.02")]


@pytest.mark.parametrize(("method", "name", "rate"), OPTIMIZERS)
def test_the_coordinators_optimizer_lowers_the_loss_and_goes_on_after_an_interruption(
    play, nodes, tmp_path, method, name, rate
):
    changes = {"aggregation.server_optimizer": name, "aggregation.server_learning_rate": rate}
    expected, log = play(nodes, method, name="whole", changes=changes)
    losses = [event["loss"] for event in log if event["kind"] == "evaluated"]
    assert losses[-1] < losses[0] - 0.03
    with pytest.raises(KeyboardInterrupt):
        play({**nodes, 2: stopping(nodes[2], after=2)}, method, changes=changes)
    assert checkpoint.finished(tmp_path / "run") == [1, 2]
    found, _ = play(nodes, method, resume=True, changes=changes)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_control_without_its_memory_a_resumed_run_ends_elsewhere(play, nodes, tmp_path, monkeypatch):
    changes = {"aggregation.server_optimizer": "fedavgm", "aggregation.server_learning_rate": "0.5"}
    expected, _ = play(nodes, "fedavg", name="whole", changes=changes)
    with pytest.raises(KeyboardInterrupt):
        play({**nodes, 2: stopping(nodes[2], after=2)}, "fedavg", changes=changes)
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *given, **named: replace(load(*given, **named), memory={}))
    found, _ = play(nodes, "fedavg", resume=True, changes=changes)
    assert not all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_the_gap_is_that_of_the_mean_whatever_the_optimizer_makes_of_it(play, nodes):
    _, plain = play(nodes, "fedavg", name="plain")
    changes = {"aggregation.server_optimizer": "fedavgm", "aggregation.server_learning_rate": "0.1"}
    _, slowed = play(nodes, "fedavg", name="slowed", changes=changes)
    gaps = [next(event["gap"] for event in log if event["kind"] == "round_finished") for log in (plain, slowed)]
    assert gaps[0] == gaps[1] > 0


def test_under_ffa_the_down_projections_are_orthonormal_and_stay(play, nodes, engine):
    outcome, _ = play(nodes, "ffa")
    downs = [name for name in outcome.tensors if trainable.factor_of(name) == "A"]
    for name in downs:
        rows = outcome.tensors[name]
        assert float((rows @ rows.T - torch.eye(rows.shape[0])).abs().max()) < 1e-6
        assert not torch.equal(rows, engine.initial[name])
    changed = [name for name in outcome.tensors if float(outcome.tensors[name].norm()) and name not in downs]
    assert len(changed) == len(downs)


def test_the_table_and_the_facts_name_the_same_methods():
    assert set(table.METHODS) == set(FACTS)
    assert all(method.facts is FACTS[name] for name, method in table.METHODS.items())
