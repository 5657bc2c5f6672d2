import pytest
import torch

from common.adapter import adapter
from common.errors import ModelError, RemoteError, TransportError, WireError
from common.frame import wire
from common.frame.records import RoundPlan, UpdateHead, to_head
from common.frame.wire import Frame
from common.run import packing
from common.run.manifest import RunManifest
from server.fleet import collect
from server.fleet.grid import GridFleet
from simulations.engines.grid import InProcessGrid
from tests import tiny


def ask(answers, *, timeout_s: float = 10.0, frames=None):
    """What came, and the seconds of the fake clock that passed."""
    clock, sleep = tiny.fake_time()
    started = clock()
    fleet = GridFleet(InProcessGrid(answers))
    sent = frames or dict.fromkeys(answers, b"question")
    found = list(collect.ask(fleet, sent, kind="train", timeout_s=timeout_s, clock=clock, sleep=sleep))
    return found, clock() - started


def after(polls: int):
    """A node that answers when it is asked for the so-manieth time."""
    asked = []

    def node(frame: bytes) -> bytes | None:
        asked.append(frame)
        return b"at last" if len(asked) > polls else None

    return node


def test_every_node_answers_its_own_question():
    found, waited = ask({1: bytes.upper, 2: bytes.title}, frames={1: b"one", 2: b"two"})
    assert [(answer.node_id, answer.frame, answer.reason) for answer in found] == [(1, b"ONE", ""), (2, b"Two", "")]
    assert waited == 0


def test_answers_come_in_the_order_in_which_they_are_there():
    found, waited = ask({1: after(2), 2: bytes.upper})
    assert [answer.node_id for answer in found] == [2, 1]
    assert waited == pytest.approx(collect.POLL_S)  # after a look that brought something, the next comes at once


def test_a_node_that_never_answers_is_given_up_at_the_deadline():
    found, waited = ask({1: tiny.silent, 2: bytes.upper}, timeout_s=10)
    assert [(answer.node_id, answer.frame is None, answer.is_late) for answer in found] == [
        (2, False, False),
        (1, True, True),
    ]
    assert found[1].reason == "no answer within 10 s"
    assert 10 <= waited <= 10 + collect.POLL_S


def test_a_broken_link_is_told_at_once_and_is_not_late():
    def away(_: bytes) -> bytes:
        raise TransportError("no agent")

    (answer,), waited = ask({1: away})
    assert (answer.frame, answer.reason, answer.is_late) == (None, "agent-away", False)
    assert waited == 0


def test_nobody_is_asked_nothing():
    assert ask({}) == ([], 0)


def test_only_one_answer_is_held_at_a_time():
    """The next node works only after the caller has taken the answer before."""
    worked = []
    answers = {number: lambda frame, number=number: worked.append(number) or frame for number in (1, 2, 3)}
    fleet = GridFleet(InProcessGrid(answers))
    taken = collect.ask(fleet, dict.fromkeys(answers, b"q"), kind="train", timeout_s=1)
    next(taken)
    assert worked == [1]
    next(taken)
    assert worked == [1, 2]


@pytest.fixture
def manifest(engine, tiny_base):
    return RunManifest(tiny.settings(tiny_base), engine.base_sha256, engine.tensor_specs)


@pytest.fixture
def update(manifest, engine):
    """A right update, with a head and a body that may be changed."""

    def make(*, body: bytes | None = None, kind: str = "update", **changes: object) -> bytes:
        head = to_head(UpdateHead("north", manifest.sha256, 1, 12, 3, 300, 1.5, 0.1))
        delta = body if body is not None else adapter.encode(engine.initial, dtype="float32")
        return wire.pack(Frame(kind, {**head, **changes}, delta))

    return make


def read(data: bytes, manifest: RunManifest):
    frame = wire.expect(data, "update", max_body_bytes=manifest.plan.max_update_bytes)
    return collect.read_update(frame, RoundPlan(manifest.sha256, 1), expected=manifest.plan.for_site("north"))


def test_a_right_update_is_read(update, manifest, engine):
    head, tensors = read(update(), manifest)
    assert (head.site, head.num_examples) == ("north", 12)
    assert adapter.specs(tensors) == engine.tensor_specs
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}  # as it crossed


@pytest.mark.parametrize(
    "changes",
    [
        {"round_index": 0},
        {"round_index": 2},
        {"run_sha256": "ab" * 32},
        {"num_examples": 0},
        {"num_examples": -1},
        {"num_examples": 10**400},
        {"train_loss": "1"},
        {"extra": 1},
        {"kind": "metrics"},
        {"body": b""},
        {"body": b"\x80\x04N."},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_wrong_update_is_refused(update, manifest, changes):
    with pytest.raises(WireError):
        read(update(**changes), manifest)


def test_the_dtype_must_be_the_runs(update, manifest, engine):
    with pytest.raises(WireError):
        read(update(body=adapter.encode(engine.initial, dtype="bfloat16")), manifest)


def test_tensors_must_be_the_manifests(update, manifest, engine):
    few = dict(list(engine.initial.items())[1:])
    with pytest.raises(ModelError):
        read(update(body=adapter.encode(few, dtype="float32")), manifest)


def test_a_refusal_is_told_as_one(manifest):
    frame = wire.pack(Frame("refused", {"code": "DataError", "reference": "0a1b"}))
    with pytest.raises(RemoteError) as caught:
        read(frame, manifest)
    told = collect.reason_of(caught.value, GridFleet(InProcessGrid({})))
    assert told == "failed (DataError); the site's log has the reason under reference 0a1b"
    simulated = GridFleet(InProcessGrid({}), explain={"0a1b": "line 3 is empty"}.get)
    assert collect.reason_of(caught.value, simulated) == "failed (DataError): line 3 is empty"


def test_an_update_cannot_be_larger_than_its_tensors_and_a_header(manifest, tiny_base):
    exact = adapter.encoded_size(manifest.tensor_specs, dtype="float32")
    assert manifest.plan.max_update_bytes == exact + packing.MAX_HEADER_BYTES
    small = RunManifest(
        tiny.settings(tiny_base, {"wire.max_update_mib": "1"}), manifest.base_sha256, manifest.tensor_specs
    )
    assert small.plan.max_update_bytes == 1 << 20


def test_a_larger_frame_is_refused_before_it_is_parsed(update, manifest):
    with pytest.raises(WireError, match="limits are"):
        read(update(body=bytes(manifest.plan.max_update_bytes + 1)), manifest)
