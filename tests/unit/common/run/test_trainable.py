import pytest
import torch

from common.adapter import adapter
from common.errors import ModelError
from common.frame.records import TensorSpec
from common.run import egress, trainable
from common.run.catalogue.methods import FACTS
from common.run.plan import Plan
from tests import tiny

SPECS = tuple(
    TensorSpec(f"{module}.lora_{factor}.weight", (2, 8) if factor == "A" else (8, 2))
    for module in ("k_proj", "q_proj")
    for factor in "AB"
)
NAMES = [spec.name for spec in SPECS]
CORES = tuple(TensorSpec(f"{module}.lora_H.weight", (2, 1)) for module in ("k_proj", "q_proj"))


def specs_of(method: str) -> tuple[TensorSpec, ...]:
    """The adapter of a method."""
    return tuple(sorted(SPECS + CORES, key=lambda spec: spec.name)) if FACTS[method].has_cores else SPECS


def trained(method: str, round_index: int = 0) -> list[str]:
    return list(trainable.trained_names(method, specs_of(method), round_index=round_index))


def test_fedavg_trains_and_moves_everything():
    assert trained("fedavg") == trained("fedavg", 7) == NAMES
    assert trainable.received_specs("fedavg", SPECS) == SPECS


def test_ffa_trains_the_up_projections_alone_and_the_others_never_travel():
    ups = ["k_proj.lora_B.weight", "q_proj.lora_B.weight"]
    assert trained("ffa") == trained("ffa", 1) == ups
    assert [spec.name for spec in trainable.received_specs("ffa", SPECS)] == ups


def test_a_side_adapter_goes_down_and_is_never_trained():
    beside = (TensorSpec("q_proj.residual_A.weight", (3, 8)), TensorSpec("q_proj.residual_B.weight", (8, 3)))
    for method in ("fedex", "flora"):
        assert trainable.received_specs(method, SPECS + beside) == SPECS + beside
        assert trainable.leaving_specs(method, SPECS + beside) == SPECS


def test_under_ravan_the_cores_alone_are_trained_and_travel():
    assert trained("ravan") == trained("ravan", 1) == [spec.name for spec in CORES]
    assert trainable.received_specs("ravan", specs_of("ravan")) == CORES


@pytest.mark.parametrize("method", FACTS)
def test_what_is_fixed_is_never_trained_and_what_is_trained_is_sent_down(method):
    specs = specs_of(method)
    leaving = trainable.leaving_specs(method, specs)
    assert leaving
    assert set(leaving) <= set(trainable.received_specs(method, specs))
    assert {spec for turn in trainable.all_turns(method, specs) for spec in turn} == set(leaving)


@pytest.mark.parametrize("method", FACTS)
def test_what_is_trained_is_sent_or_stays_and_nothing_else_does(method):
    for number in range(3):
        names = set(trained(method, number))
        sent = set(trainable.sent_names(method, specs_of(method), round_index=number))
        assert sent
        assert names - sent == {spec.name for spec in trainable.kept_specs(method, specs_of(method))}


def test_under_fedsa_the_up_projections_are_trained_and_never_travel():
    assert trained("fedsa") == NAMES
    downs = ("k_proj.lora_A.weight", "q_proj.lora_A.weight")
    assert trainable.sent_names("fedsa", SPECS, round_index=0) == downs
    assert tuple(spec.name for spec in trainable.received_specs("fedsa", SPECS)) == downs


@pytest.mark.parametrize("method", FACTS)
def test_the_declaration_allows_the_largest_update_and_not_a_whole_adapter_more(method):
    side = {"aggregation.residual_rank": "8"} if FACTS[method].base_delta == "residual" else {}
    run = tiny.settings("tiny", {"aggregation.method": method, **side})
    specs = specs_of(method)
    declared = Plan.of(run, specs).egress
    sizes = [egress.num_update_bytes(turn, dtype="float32") for turn in trainable.all_turns(method, specs)]
    assert declared.bytes_per_message == max(sizes)
    assert declared.factors == FACTS[method].sends


def test_training_only_freezes_the_others_and_gives_them_back(engine):
    names = set(trainable.trained_names("ffa", engine.tensor_specs, round_index=0))
    with adapter.training_only(engine.model, names):
        assert set(adapter.parameters(engine.model)) == names
    assert adapter.specs(adapter.parameters(engine.model)) == engine.tensor_specs


def test_training_only_gives_them_back_after_a_failure(engine):
    with pytest.raises(ZeroDivisionError), adapter.training_only(engine.model, [engine.tensor_specs[0].name]):
        torch.zeros(1).item() / 0
    assert adapter.specs(adapter.parameters(engine.model)) == engine.tensor_specs


def test_a_tensor_that_the_adapter_lacks_cannot_be_trained(engine):
    with pytest.raises(ModelError, match="no tensor other"), adapter.training_only(engine.model, ["other"]):
        pass
