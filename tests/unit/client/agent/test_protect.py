import pytest
import torch

from client.agent import protect
from client.agent.protect import RawDelta
from common.adapter import adapter, compact
from common.errors import ModelError, PrivacyError
from common.privacy.noise import SeededNoise
from common.run.schema.privacy import NoPrivacy, UnitPrivacy
from common.run.schema.wire import WireConfig

BEFORE = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)}
NONE = NoPrivacy()


def test_a_delta_is_after_minus_before():
    delta = protect.subtract({"a": torch.tensor([1.5, 2.0]), "b": torch.ones(1)}, BEFORE)
    assert torch.equal(delta.tensors["a"], torch.tensor([0.5, 0.0]))
    assert torch.equal(delta.tensors["b"], torch.ones(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_delta_that_no_training_gives_is_refused(value):
    with pytest.raises(ModelError, match="local update: tensor b"):
        protect.subtract({**BEFORE, "b": torch.tensor([value])}, BEFORE)


def send(privacy, trained_with, *, dtype: str = "float32"):
    settings = WireConfig(dtype=dtype)
    return protect.protect(
        RawDelta(BEFORE),
        privacy=privacy,
        trained_with=trained_with,
        num_shares=1,
        source=SeededNoise(1),
        settings=settings,
        draws=compact.dice("run"),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unprotected_update_says_so_and_has_the_runs_dtype(dtype):
    outgoing = send(NONE, "none", dtype=dtype)
    assert outgoing.protection == "none"
    found = adapter.decode(outgoing.body, adapter.specs(BEFORE), dtype=dtype)
    assert torch.equal(found["a"], BEFORE["a"])


PRIVATE = UnitPrivacy(sampling_prob=0.1, noise_multiplier=1.0)


@pytest.mark.parametrize(("promised", "done"), [(PRIVATE, "none"), (NONE, "unit")])
def test_training_that_was_not_what_the_run_promises_is_not_sent(promised, done):
    with pytest.raises(PrivacyError, match=rf"'{promised.mode}'.*'{done}'; nothing was sent") as caught:
        send(promised, done)
    assert caught.value.exit_code == 5


def test_control_private_training_is_sent_and_says_so():
    assert send(PRIVATE, "unit").protection == "unit"


def test_a_raw_delta_is_not_what_can_be_sent():
    assert not isinstance(RawDelta(BEFORE), protect.OutgoingUpdate)
    assert not hasattr(RawDelta(BEFORE), "body")
