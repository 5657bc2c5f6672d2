"""The adapter's largest values alone go down, or those of each step: what travels, what is held, what trains."""

import pytest
import torch

from client.agent import probes
from common.adapter import adapter, broadcast, compact
from common.errors import ConfigError, PolicyRefusedError, WireError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.run import packing
from common.run.schema.wire import WireConfig
from server.fleet import broadcast as steps
from tests import tiny

WHOLE = WireConfig(down="float32")
HALF = WireConfig(down="float32", down_density=0.5)
FLASC = {"wire.down_density": "0.25", "wire.density": "0.25", "wire.error_feedback": "false"}


def test_the_mask_is_the_one_that_was_worked_by_hand():
    # Shares of the row's largest: A 1, 1/4, 3/4, 1/8; B's direction 1/2, 1. The larger half: 1, 3/4 of A, and 1 of B.
    tensors = {
        "a.lora_A.weight": torch.tensor([[8.0, -2.0, 6.0, 1.0]]),
        "a.lora_B.weight": torch.tensor([[1.0], [2.0]]),
    }
    body = broadcast.plain_body("train", tensors, HALF)
    assert body == bytes.fromhex("a4 00000041 0000c040 00000040")  # 1010 01.., then 8, 6 and 2 as float32
    assert broadcast.plain_body("evaluate", tensors, HALF) == adapter.encode(tensors, dtype="float32")
    found = broadcast.receive(Frame("train", {}, body), adapter.specs(tensors), settings=HALF, held=()).tensors
    assert found["a.lora_A.weight"].tolist() == [[8.0, 0.0, 6.0, 0.0]]
    assert found["a.lora_B.weight"].tolist() == [[0.0], [2.0]]
    by_size = compact.encode(tensors, dtype="float32", density=0.5, draws=None)
    assert by_size[:1] == bytes.fromhex("e0")  # the control: by size alone B gets nothing


def test_a_density_of_one_is_the_whole_adapter_byte_for_byte():
    tensors = {"a.lora_A.weight": torch.randn(4, 9, generator=torch.Generator().manual_seed(1))}
    whole = adapter.encode(tensors, dtype="float32")
    assert broadcast.plain_body("train", tensors, WHOLE) == whole
    received = broadcast.receive(Frame("train", {}, whole), adapter.specs(tensors), settings=WHOLE, held=())
    assert torch.equal(received.tensors["a.lora_A.weight"], tensors["a.lora_A.weight"])
    with pytest.raises(WireError):  # the control: a site of the sparse run does not take it
        broadcast.receive(Frame("train", {}, whole), adapter.specs(tensors), settings=HALF, held=())


def test_a_site_trains_all_values_and_its_change_is_added_to_the_whole_adapter(federate, engine):
    """One round of one step of `fedavg`, against the same arithmetic on tensors at hand."""
    bodies: dict[str, list[bytes]] = {"train": [], "update": []}
    nodes = {number: heard(node, bodies) for number, node in tiny.make_nodes(engine).items()}
    fed = federate(nodes, {"wire.down_density": "0.25"})
    fed.wait()
    before = fed.play(engine.initial, round_index=0)  # so that B is not zero
    bodies["train"].clear()
    bodies["update"].clear()
    after = fed.play(before, round_index=1)
    sparse = compact.decode(bodies["train"][0], engine.tensor_specs, dtype="float32", density=0.25)
    changes = [adapter.decode(body, engine.tensor_specs, dtype="float32") for body in bodies["update"]]
    weights = [fed.opened[node].num_examples for node in sorted(nodes)]
    num_unsent = num_moved = 0
    for name, tensor in before.items():
        is_sent = sparse[name] != 0
        assert torch.equal(sparse[name][is_sent], tensor[is_sent])
        mean = sum(weight * change[name] for weight, change in zip(weights, changes, strict=True)) / sum(weights)
        assert torch.allclose(after[name], tensor + mean, atol=1e-6)
        num_unsent += int((~is_sent).sum())
        num_moved += int((changes[0][name][~is_sent] != 0).sum())
    assert num_unsent == sum(t.numel() for t in before.values()) - packing.num_sent(
        sum(t.numel() for t in before.values()), 0.25
    )
    assert num_moved > 0.9 * num_unsent  # dense training: what was not sent is trained too


def heard(node, bodies: dict[str, list[bytes]]):
    """A node whose bodies are kept."""

    def answer(data: bytes) -> bytes:
        reply = node(data)
        for frame in (wire.unpack(data, max_body_bytes=1 << 24), wire.unpack(reply, max_body_bytes=1 << 24)):
            bodies.setdefault(frame.kind, []).append(frame.body)
        return reply

    return answer


def test_a_run_with_sparse_downloads_and_uploads_trains_and_the_frames_are_smaller(federate, nodes, engine, told):
    fed = federate(nodes, FLASC)
    fed.wait()
    fed.play_all(engine.initial)
    losses = [event["loss"] for event in told("evaluated")]
    assert losses[-1] < losses[0] - 0.05
    whole = 3 * adapter.encoded_size(engine.tensor_specs, dtype="float32")
    for event in told("round_finished"):
        assert 0.25 * whole < event["bytes_down"] < 0.33 * whole
        assert 0.25 * whole < event["bytes_up"] < 0.33 * whole
    assert told("site_failed") == []


def test_what_a_sparse_step_leaves_out_is_in_a_later_one():
    base = {"q.lora_A.weight": torch.randn(2, 40, generator=torch.Generator().manual_seed(1))}
    specs, (name,) = adapter.specs(base), base
    state, memory, whole = base, {}, base[name].clone()
    for number in range(6):
        change = torch.randn(2, 40, generator=torch.Generator().manual_seed(number))
        whole = whole + change
        held = state
        state, memory, step = steps.settle(
            held, {name: held[name] + change}, memory, sent=specs, dtype="int8", density=0.2
        )
        form = broadcast.Form("step", step.sha256, step.base_sha256)
        request = Frame("train", {**to_head(RoundPlan("r", number)), "adapter": to_head(form)}, step.body)
        wanted = WireConfig(down="int8", down_density=0.2)
        site = broadcast.receive(request, specs, settings=wanted, held=(broadcast.Held(step.base_sha256, held),))
        assert torch.equal(site.tensors[name], state[name])
        assert len(step.body) == packing.body_bytes(specs, dtype="int8", density=0.2)
    assert torch.allclose(state[name] + memory[steps.LEFT_OUT + name], whole, atol=1e-5)
    assert not torch.allclose(state[name], whole, atol=1e-1)  # the control: without the memory they differ


def test_a_sites_probe_takes_sparse_factors_and_refuses_one_that_is_too_sparse(engine):
    def sent(density: float):
        settings = WireConfig(down="float32", down_density=density)
        body = broadcast.plain_body("train", engine.initial, settings)
        return broadcast.receive(Frame("train", {}, body), engine.tensor_specs, settings=settings, held=()).tensors

    probes.check(sent(0.25), max_tensor_norm=1e3)
    with pytest.raises(PolicyRefusedError, match="zero or depend"):
        probes.check(sent(0.001), max_tensor_norm=1e3)


def test_integers_may_be_sparse_for_any_kind_and_the_adapter_itself_only_for_lora():
    ia3 = {"adapter.kind": "ia3", "wire.down_density": "0.25"}
    with pytest.raises(ConfigError, match="no sparse download with this kind: a value that is not sent counts as zero"):
        tiny.settings("tiny", ia3)
    assert tiny.settings("tiny", {**ia3, "wire.down": "int8"}).wire.down_density == 0.25
