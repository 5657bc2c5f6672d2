"""The adapter as steps: coordinator and sites hold the same, whoever restarts; what does not fit is not trained on."""

import shutil

import pytest
import torch

from common.adapter import adapter, broadcast, compact
from common.adapter.broadcast import Form, Held
from common.errors import ModelError, ProtocolError, WireError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.run.schema.wire import WireConfig
from server.fleet import broadcast as steps
from server.folder import checkpoint, run_files
from server.run import run
from tests import tiny

SMALL = {"training.batch_size": "12", "wire.dtype": '"int4"', "wire.down": '"int3"'}
BASE = {"q.lora_A.weight": torch.randn(2, 9, generator=torch.Generator().manual_seed(1))}
AFTER = {"q.lora_A.weight": BASE["q.lora_A.weight"] + 0.01}
SPECS = adapter.specs(BASE)
INT4, FLOAT32 = WireConfig(down="int4"), WireConfig(down="float32")


def watched(node, seen: list[tuple[str, str, int]]):
    """A node whose requests are noted: kind, form, bytes."""

    def answer(data: bytes) -> bytes:
        frame = wire.unpack(data, max_body_bytes=1 << 24)
        seen.append((frame.kind, frame.head.get("adapter", {}).get("form", ""), len(data)))
        return node(data)

    return answer


def test_a_run_sends_steps_once_and_the_hash_after_that(federate, nodes, engine, told):
    seen: list[tuple[str, str, int]] = []
    fed = federate({**nodes, 1: watched(nodes[1], seen)}, SMALL)
    fed.wait()
    fed.play_all(engine.initial)
    assert [(kind, form) for kind, form, _ in seen] == [
        ("open", ""),
        ("evaluate", "same"),
        ("train", "same"),
        ("evaluate", "step"),
        ("train", "same"),
        ("evaluate", "step"),
    ]
    whole = adapter.encoded_size(engine.tensor_specs, dtype="float32")
    assert all(size < whole / 6 for kind, _, size in seen if kind != "open")
    assert told("site_failed") == []
    assert all(event["bytes_up"] < 3 * whole / 5 for event in told("round_finished"))


def test_a_site_that_starts_anew_is_sent_the_steps_from_the_start_or_the_adapter_whole(federate, nodes, engine, told):
    seen: list[tuple[str, str, int]] = []
    agents = {1: tiny.make_agent("north", engine, count=16)}
    fed = federate({**nodes, 1: watched(lambda data: agents[1].answer(data), seen)}, SMALL)
    fed.wait()
    state = fed.play(fed.play(engine.initial, round_index=0), round_index=1)
    (body,) = {len(step.body) for step in fed.steps}
    for steps_left, form in ((fed.steps, "step"), (fed.steps[1:], "whole")):
        fed.steps = steps_left  # a coordinator that was resumed has none
        agents[1] = tiny.make_agent("north", engine, count=16)
        fed.evaluate(state, num_rounds=2, generate=False)
        seen.clear()
        fed.rejoin()
        fed.evaluate(state, num_rounds=2, generate=False)
        assert [(kind, form) for kind, form, _ in seen] == [("open", ""), ("evaluate", form)]
        assert told("evaluated")[-1]["stale"] == []
        assert form == "whole" or 2 * body < seen[-1][2] < 2 * body + 2000
    assert [event["site"] for event in told("site_failed")] == ["north", "north"]


def test_a_resumed_run_ends_with_the_same_adapter_to_the_bit(engine, tiny_base, tmp_path):
    settings = tiny.settings(tiny_base, SMALL)

    def play(folder, *, resume: bool):
        log = run_files.prepare(settings, folder, resume=resume)
        fleet = tiny.fleet(tiny.make_nodes(engine))
        return run.execute(settings, fleet=fleet, engine=engine, folder=folder, log=log, resume=resume).tensors

    whole = play(tmp_path / "one", resume=False)
    shutil.rmtree(checkpoint.folder_of(tmp_path / "one", 2))
    again = play(tmp_path / "one", resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_rounding_leaves_out_of_a_step_is_in_a_later_one():
    state, memory, whole = BASE, {}, {name: tensor.clone() for name, tensor in BASE.items()}
    for number in range(6):
        change = {
            name: torch.randn(t.shape, generator=torch.Generator().manual_seed(number)) for name, t in BASE.items()
        }
        whole = {name: tensor + change[name] for name, tensor in whole.items()}
        wanted = {name: tensor + change[name] for name, tensor in state.items()}
        state, memory, _ = steps.settle(state, wanted, memory, sent=SPECS, dtype="int3")
    name = SPECS[0].name
    assert torch.allclose(state[name] + memory[steps.LEFT_OUT + name], whole[name], atol=1e-5)
    assert not torch.allclose(state[name], whole[name], atol=1e-2)  # the control: without the memory they differ


def request(form: Form, body: bytes) -> Frame:
    return Frame("train", {**to_head(RoundPlan("r", 0)), "adapter": to_head(form)}, body)


def receive(form: Form, body: bytes, held, settings=INT4):
    return broadcast.receive(request(form, body), SPECS, settings=settings, held=(held, None))


def step() -> tuple[Form, bytes, Held]:
    _, _, made = steps.settle(BASE, AFTER, {}, sent=SPECS, dtype="int4")
    return Form("step", made.sha256, made.base_sha256), made.body, Held(made.base_sha256, BASE)


def test_a_site_comes_to_the_adapter_that_the_coordinator_holds():
    form, body, held = step()
    found = receive(form, body, held)
    assert found.sha256 == adapter.digest(found.tensors) == form.sha256
    assert receive(Form("same", held.sha256, held.sha256), b"", held).tensors == BASE


def test_steps_that_a_site_missed_lead_to_the_same_bits_and_are_kept_while_they_weigh_less_than_the_adapter():
    state, memory, made = BASE, {}, []
    for number in range(9):
        moved = {name: tensor + 0.01 * number for name, tensor in state.items()}
        state, memory, step = steps.settle(state, moved, memory, sent=SPECS, dtype="int4")
        made = steps.light([*made, step], sent=SPECS)
    whole, size = adapter.encoded_size(SPECS, dtype="float32"), len(made[-1].body)
    assert len(made) == whole // size > 2
    (form, body, nodes), *others = steps.forms(state, nodes=[1, 2], held={1: made[0].base_sha256}, steps=made)
    assert (form.form, nodes, len(body)) == ("step", [1], len(made) * size)
    assert [(form.form, nodes) for form, _, nodes in others] == [("whole", [2])]
    base = [state for state in history(9) if adapter.digest(state) == made[0].base_sha256]
    found = receive(form, body, Held(made[0].base_sha256, base[0]))
    assert all(torch.equal(found.tensors[name], state[name]) for name in state)
    with pytest.raises(ModelError):  # the control: a step fewer
        receive(form, body[size:], Held(made[0].base_sha256, base[0]))
    broken = [made[0], made[2]]
    assert steps.light(broken, sent=SPECS) == made[2:3]  # steps that do not follow each other are no chain


def history(num_rounds: int):
    """The adapters of such a run, the first one's included."""
    state, memory, found = BASE, {}, [BASE]
    for number in range(num_rounds):
        moved = {name: tensor + 0.01 * number for name, tensor in state.items()}
        state, memory, _ = steps.settle(state, moved, memory, sent=SPECS, dtype="int4")
        found.append(state)
    return found


@pytest.mark.parametrize("form", ["step", "same"])
def test_a_step_from_an_adapter_that_a_site_does_not_hold_is_refused(form):
    good, body, held = step()
    for other in (None, Held("0" * 64, held.tensors)):
        with pytest.raises(ProtocolError, match="does not hold"):
            receive(Form(form, good.sha256, good.base_sha256), body, other)


def test_a_step_that_leads_elsewhere_is_refused():
    form, _, held = step()
    other = compact.encode({name: -0.01 * torch.ones_like(t) for name, t in BASE.items()}, dtype="int4", draws=None)
    with pytest.raises(ModelError, match="not the one that the coordinator holds"):
        receive(form, other, held)


def test_malformed_forms_are_refused():
    form, body, held = step()
    with pytest.raises(WireError, match="no such form"):
        receive(Form("half", form.sha256, form.base_sha256), body, held)
    with pytest.raises(WireError, match="builds on none"):
        receive(Form("whole", form.sha256, form.base_sha256), body, held)
    with pytest.raises(WireError, match="1 bytes where"):
        receive(Form("same", held.sha256, held.sha256), b"\0", held)
    with pytest.raises(WireError, match=r"wire\.down is float32"):
        receive(form, body, held, FLOAT32)
    with pytest.raises(WireError, match="sends its largest values"):
        receive(Form("same", held.sha256, held.sha256), b"", held, WireConfig(down="float32", down_density=0.5))
    for size in (0, len(body) - 1, len(body) + 1, 9 * len(body)):
        with pytest.raises(WireError, match="of steps"):
            receive(form, (9 * body)[:size], held)
    with pytest.raises(WireError, match="does not say"):
        broadcast.receive(Frame("train", {}, body), SPECS, settings=INT4, held=(held,))


def test_sparse_updates_with_error_feedback_give_the_same_bytes_when_asked_again(engine, tiny_base, tmp_path):
    from client.agent.agent import Agent
    from common.run.manifest import RunManifest

    changes = {"wire.dtype": '"int4"', "wire.density": "0.1", "training.batch_size": "12"}
    manifest = RunManifest(tiny.settings(tiny_base, changes), engine.base_sha256, engine.tensor_specs)
    body = adapter.encode(engine.initial, dtype="float32")

    def train(agent: Agent, number: int) -> bytes:
        head = to_head(RoundPlan(manifest.sha256, number))
        reply = agent.answer(wire.pack(Frame("train", head, body)))
        return wire.expect(reply, "update", max_body_bytes=1 << 24).body

    def make(folder) -> Agent:
        agent = Agent(
            "north",
            load_data=lambda _: tiny.site_data("north", 16),
            load_engine=lambda _: engine,
            report=lambda reference, error: pytest.fail(str(error)),
            state_folder=folder,
        )
        wire.expect(agent.answer(wire.pack(Frame("open", {}, manifest.to_bytes()))), "opened", max_body_bytes=0)
        return agent

    agent = make(tmp_path / "state")
    first, second = train(agent, 0), train(agent, 1)
    assert train(agent, 1) == second
    assert train(make(tmp_path / "state"), 1) == second  # after a restart
    assert train(make(tmp_path / "other"), 1) != second  # the control: a site that has forgotten
    assert len(first) == len(second)
