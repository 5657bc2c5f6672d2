"""Every method through whole runs: the functions that production calls, at sites of a few rows."""

from dataclasses import replace

import pytest
import torch

from common import events
from common.adapter import adapter
from common.errors import ConfigError
from common.frame import wire
from common.model import base as model
from common.run import trainable
from common.run.catalogue.methods import FACTS
from common.run.rules import compatibility
from server.aggregate.methods import table
from server.folder import checkpoint, run_files
from server.run import run
from tests import tiny

CHANGES = {"training.batch_size": "4", "training.local_epochs": "2", "federation.num_rounds": "3"}
METHODS = sorted(FACTS)
SIDE = {"aggregation.residual_rank": "36"}  # three rounds of three sites at rank 4
HEADS = {"aggregation.num_heads": "2"}


def own(name: str) -> dict[str, str]:
    """What a method cannot do without."""
    beside = SIDE if FACTS[name].base_delta == "residual" else HEADS if FACTS[name].has_cores else {}
    return {"aggregation.method": name, **beside}


OWN = {name: own(name) for name in FACTS}


def settings(base, method: str, changes=None):
    return tiny.settings(base, {**CHANGES, **OWN[method], **(changes or {})})


@pytest.fixture(scope="module")
def wide_engine(load_tiny):
    """The tiny base with a side adapter, loaded once."""
    return load_tiny(OWN["fedex"])


@pytest.fixture(scope="module")
def cored_engine(load_tiny):
    """The tiny base with cores, loaded once."""
    return load_tiny(OWN["ravan"])


@pytest.fixture
def engine(request, engine, wide_engine, cored_engine):
    """The base as the test's method needs it."""
    method = request.node.callspec.params.get("method", "") if hasattr(request.node, "callspec") else ""
    if method not in FACTS or not (FACTS[method].base_delta == "residual" or FACTS[method].has_cores):
        return engine
    found = cored_engine if FACTS[method].has_cores else wide_engine
    adapter.write(found.model, found.initial)
    return found


@pytest.fixture
def play(engine, tiny_base, tmp_path):
    """Run in a folder of the test's; gives the outcome and the events."""

    def execute(nodes, method: str, *, name: str = "run", resume: bool = False, changes=None, own_engine=engine):
        folder, found = tmp_path / name, settings(tiny_base, method, changes)
        log = run_files.prepare(found, folder, resume=resume)
        outcome = run.execute(found, fleet=tiny.fleet(nodes), engine=own_engine, folder=folder, log=log, resume=resume)
        return outcome, events.read(log.path)

    return execute


@pytest.fixture
def nodes(engine, tmp_path):
    return tiny.make_nodes(engine, tmp_path / "sites")


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
    requests = [request for request, _ in heard if request.kind != "open"]
    assert all(names_in(request.body) == sent for request in requests if request.body)
    crossed = [(request.kind, request.head["round_index"]) for request in requests if request.body]
    assert crossed == [("evaluate", 1), ("evaluate", 2), ("evaluate", 3)]  # not the start, and nothing twice
    updates = [reply for _, reply in heard if reply.kind == "update"]
    expected = [set(trainable.sent_names(method, engine.tensor_specs, round_index=number)) for number in range(3)]
    assert [names_in(reply.body) for reply in updates] == expected
    assert adapter.specs(outcome.tensors) == engine.tensor_specs
    finished = [event for event in log if event["kind"] == "round_finished"]
    has_gap = FACTS[method].has_bias or not FACTS[method].is_linear
    assert all((event["gap"] is not None) == has_gap for event in finished)
    assert all(event["gap"] < 1e-4 for event in finished if FACTS[method].is_exact and has_gap)


QUICK = [name for name in METHODS if not FACTS[name].is_experimental]
RESUMED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_run_under_the_wires_defaults_ends_with_the_same_adapter_to_the_bit(
    play, nodes, engine, tmp_path, method
):
    down = "float32" if compatibility.STEPS.why_not(FACTS[method]) else "int4"
    changes = {"wire.dtype": "int8", "wire.down": down}
    expected, log = play(tiny.make_nodes(engine, tmp_path / "others"), method, name="whole", changes=changes)
    with pytest.raises(KeyboardInterrupt):
        play({**nodes, 2: stopping(nodes[2], after=1)}, method, changes=changes)
    assert run_files.finished(tmp_path / "run") == [1]
    restarted = tiny.make_nodes(engine, tmp_path / "sites")
    found, told = play(restarted, method, resume=True, changes=changes)
    assert not [event for event in told if event["kind"] == "site_failed"]
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    losses = [[event["sites"] for event in one if event["kind"] == "evaluated"][-1] for one in (log, told)]
    assert losses[0] == losses[1]


OPTIMIZERS = [("fedavg", "fedavgm", "0.5"), ("fedavg", "fedyogi", "0.02"), ("rolora", "fedadam", "0.02")]


@pytest.mark.parametrize(("method", "name", "rate"), OPTIMIZERS)
def test_the_coordinators_optimizer_lowers_the_loss_and_goes_on_after_an_interruption(
    play, nodes, tmp_path, method, name, rate
):
    changes = {"aggregation.server_optimizer.kind": name, "aggregation.server_optimizer.learning_rate": rate}
    expected, log = play(nodes, method, name="whole", changes=changes)
    losses = [event["loss"] for event in log if event["kind"] == "evaluated"]
    assert losses[-1] < losses[0] - 0.03
    with pytest.raises(KeyboardInterrupt):
        play({**nodes, 2: stopping(nodes[2], after=2)}, method, changes=changes)
    assert run_files.finished(tmp_path / "run") == [1, 2]
    found, _ = play(nodes, method, resume=True, changes=changes)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_control_without_its_memory_a_resumed_run_ends_elsewhere(play, nodes, tmp_path, monkeypatch):
    changes = {"aggregation.server_optimizer.kind": "fedavgm", "aggregation.server_optimizer.learning_rate": "0.5"}
    expected, _ = play(nodes, "fedavg", name="whole", changes=changes)
    with pytest.raises(KeyboardInterrupt):
        play({**nodes, 2: stopping(nodes[2], after=2)}, "fedavg", changes=changes)
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *given, **named: replace(load(*given, **named), memory={}))
    found, _ = play(nodes, "fedavg", resume=True, changes=changes)
    assert not all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_the_gap_is_that_of_the_mean_whatever_the_optimizer_makes_of_it(play, nodes):
    once = {"federation.num_rounds": "1"}
    _, plain = play(nodes, "fedavg", name="plain", changes=once)
    optimizer = {"aggregation.server_optimizer.kind": "fedavgm", "aggregation.server_optimizer.learning_rate": "0.1"}
    _, slowed = play(nodes, "fedavg", name="slowed", changes={**once, **optimizer})
    gaps = [next(event["gap"] for event in log if event["kind"] == "round_finished") for log in (plain, slowed)]
    assert gaps[0] == gaps[1] > 0


def test_under_ffa_the_down_projections_are_orthonormal_and_stay(play, nodes, engine):
    outcome, _ = play(nodes, "ffa", changes={"federation.num_rounds": "1"})
    downs = [name for name in outcome.tensors if trainable.factor_of(name) == "A"]
    for name in downs:
        rows = outcome.tensors[name]
        assert float((rows.double() @ rows.double().T - torch.eye(rows.shape[0])).abs().max()) < 1e-6
        assert not torch.equal(rows, engine.initial[name])
    changed = [name for name in outcome.tensors if float(outcome.tensors[name].norm()) and name not in downs]
    assert len(changed) == len(downs)


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_a_side_adapter_that_is_too_narrow_ends_the_run_before_the_round_counts(
    play, nodes, load_tiny, tmp_path, method
):
    narrow = load_tiny({**OWN[method], "aggregation.residual_rank": "1"})
    with pytest.raises(ConfigError, match=r"residual_rank = 1 cuts \d+\.\d % .* raise the rank"):
        play(tiny.make_nodes(narrow), method, own_engine=narrow, changes={"aggregation.residual_rank": "1"})
    assert run_files.finished(tmp_path / "run") == []
    loose = {"aggregation.residual_rank": "1", "aggregation.residual_max_lost": "1.0"}
    _, log = play(tiny.make_nodes(narrow), method, own_engine=narrow, name="loose", changes=loose)
    gaps = [event["gap"] for event in log if event["kind"] == "round_finished"]
    assert all(0 < gap < 1 for gap in gaps)


def away(answer, *, rounds: set[int]):
    """A node that never hears what it is asked to train in these rounds; all that comes back is an empty frame."""
    asked: list[int] = []

    def node(frame: bytes) -> bytes:
        if wire.unpack(frame, max_body_bytes=1 << 24).kind != "train":
            return answer(frame)
        asked.append(len(asked))
        return b"" if asked[-1] in rounds else answer(frame)

    return node


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_a_site_that_was_away_is_sent_all_that_it_missed(play, nodes, engine, method):
    """It misses a round, and holds the sum of all rounds' residuals from the next request on, as the others do."""
    heard: dict[int, list] = {1: [], 2: []}
    late = away(listening(nodes[1], heard[1]), rounds={0})
    outcome, log = play({**nodes, 1: late, 2: listening(nodes[2], heard[2])}, method)
    assert [event["num_updates"] for event in log if event["kind"] == "round_finished"][:2] == [2, 3]
    last = [[one.body for one, _ in heard[node] if one.kind == "evaluate"][-1] for node in (1, 2)]
    assert last[0] == last[1]
    found = adapter.decode(last[0], engine.tensor_specs, dtype="float32")
    assert all(torch.equal(found[name], tensor) for name, tensor in outcome.tensors.items())
    trained = [one.body for one, _ in heard[1] if one.head.get("round_index") == 1 and one.body]
    assert len(trained) == 1  # it is scored and trained from in the second round, and crosses once
    sent = adapter.decode(trained[0], engine.tensor_specs, dtype="float32")
    assert any(bool(tensor.any()) for name, tensor in sent.items() if "residual_B" in name)


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_the_exported_adapter_is_one_that_plain_peft_loads_with_the_same_loss(play, nodes, engine, tiny_base, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    outcome, _ = play(nodes, method)
    adapter.write(engine.model, outcome.tensors)
    ids = torch.arange(12).unsqueeze(0) + 40
    with torch.no_grad():
        engine.model.eval()
        beside = engine.model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        plain = base(input_ids=ids).logits
        with model.quiet_peft():
            loaded = PeftModel.from_pretrained(base, str(outcome.folder / "adapter")).eval()
        found = loaded(input_ids=ids).logits
        merged = loaded.merge_and_unload()(input_ids=ids).logits
    assert torch.allclose(found, beside, atol=1e-4)
    assert torch.allclose(merged, beside, atol=1e-4)
    assert float((plain - beside).abs().max()) > 0.1
    card = (outcome.folder / "adapter" / "README.md").read_text()
    assert "LoRA r = 4, alpha = 8.0, all-linear, beside a frozen one of r = 36" in card
    assert "the same function as LoRA r = alpha = 64" in card


def test_the_side_adapter_is_frozen_of_zeros_and_of_the_same_scale(wide_engine):
    adapter.write(wide_engine.model, wide_engine.initial)
    beside = adapter.side_parameters(wide_engine.model)
    assert len(beside) == len(adapter.parameters(wide_engine.model))
    assert not any(parameter.requires_grad or parameter.any() for parameter in beside.values())
    layer = next(
        module
        for module in wide_engine.model.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "lora_A")
    )
    assert layer.scaling["default"] == layer.scaling[adapter.SIDE] == 2.0
    assert list(layer.active_adapters) == ["default", adapter.SIDE]


def test_the_table_and_the_facts_name_the_same_methods():
    assert set(table.METHODS) == set(FACTS)
    assert all(method.facts is FACTS[name] for name, method in table.METHODS.items())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_side_adapter_adds_to_a_quantised_base_what_it_says(load_tiny, quantization):
    """Beside the factors as in them: the same product in either place gives the same answer."""
    changes = {**OWN["fedex"], "aggregation.residual_rank": "4", "model.quantization": quantization}
    wide = load_tiny(changes)
    assert wide.num_base_parameters == load_tiny({"model.quantization": quantization}).num_base_parameters
    generator = torch.Generator().manual_seed(3)
    moved = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in wide.initial.items()}
    trained = {n: t if ".lora_" in n else torch.zeros_like(t) for n, t in moved.items()}
    beside = {n: moved[n.replace(".residual_", ".lora_")] if ".residual_" in n else 0 * t for n, t in moved.items()}
    answers = []
    for tensors in (trained, beside, wide.initial):
        adapter.write(wide.model, tensors)
        wide.model.eval()
        with torch.no_grad():
            answers.append(wide.model(input_ids=torch.arange(12).unsqueeze(0) + 40).logits.float())
    assert torch.allclose(answers[0], answers[1], atol=1e-4)
    assert float((answers[0] - answers[2]).abs().max()) > 0.01
