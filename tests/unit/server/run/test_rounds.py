"""A round takes the updates that are right and goes on without the others, as long as there are enough."""

import math
import tracemalloc

import pytest
import torch

from client.agent.agent import SiteData
from common.adapter import adapter
from common.errors import StorageError, TooFewSitesError, TransportError
from common.frame import wire
from common.frame.records import OpenedHead, UpdateHead, to_head
from common.frame.wire import Frame
from common.run import packing
from server.aggregate.methods import fedavg
from server.fleet import collect
from server.fleet import sites as fleet_sites
from server.folder import checkpoint, run_files
from tests import tiny

SMALL = {"federation.num_sites": "0", "training.batch_size": "12"}  # one step a round


@pytest.fixture
def ready(federate):
    """A federation whose sites have joined."""

    def make(nodes, changes=None):
        fed = federate(nodes, {**SMALL, **(changes or {})})
        fed.wait()
        return fed

    return make


def play(fed, engine, round_index: int = 0):
    return fed.play(engine.initial, round_index=round_index)


def is_same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


def scaled(factor: float):
    """A body with every value multiplied."""

    def alter(body: bytes, specs) -> bytes:
        found = adapter.decode(body, specs, dtype="float32")
        return adapter.encode({name: tensor * factor for name, tensor in found.items()}, dtype="float32")

    return alter


def test_a_round_is_the_weighted_mean_of_the_updates(ready, nodes, engine, told):
    after = play(ready(nodes), engine)
    combined = fedavg.start(engine.initial, trained=list(engine.initial))
    for site, count in tiny.SITES.items():
        fed = ready({1: tiny.make_agent(site, engine, count=count).answer}, {"federation.min_sites": "1"})
        alone = play(fed, engine)
        change = {name: alone[name] - engine.initial[name] for name in alone}
        combined.add(change, weight=3 * count // 4)
    expected = fedavg.apply(engine.initial, combined.result())
    assert max(float((after[name] - expected[name]).abs().max()) for name in after) < 1e-6
    assert [event["site"] for event in told("site_trained")][:3] == ["north", "south", "west"]


def test_uniform_weights_are_honoured(ready, nodes, engine):
    by_rows = play(ready(nodes), engine)
    uniform = play(ready(nodes, {"aggregation.weighting": '"uniform"'}), engine)
    assert not is_same(by_rows, uniform)


def test_the_order_of_arrival_does_not_change_a_bit(ready, nodes, engine):
    def late(answer, polls: int):
        asked = []

        def node(frame: bytes) -> bytes | None:
            asked.append(frame)
            return answer(frame) if len(asked) > polls else None

        return node

    expected = play(ready(nodes), engine)
    found = play(ready({1: late(nodes[1], 5), 2: late(nodes[2], 3), 3: nodes[3]}), engine)
    assert is_same(found, expected)


def test_what_a_round_tells(ready, nodes, engine, told):
    fed = ready(nodes, {"training.batch_size": "4"})  # after one step A has not moved, and the gap is 0
    play(fed, engine)
    (started,), (finished,) = told("round_started"), told("round_finished")
    assert started["sites"] == ["north", "south", "west"]
    assert finished["num_updates"] == 3
    trained = told("site_trained")
    rows = sum(event["num_examples"] for event in trained)
    mean = sum(event["train_loss"] * event["num_examples"] for event in trained) / rows
    assert finished["train_loss"] == pytest.approx(mean)
    assert finished["bytes_up"] == sum(event["bytes_up"] for event in trained)
    assert finished["gap"] > 0
    assert set(finished["gap_modules"]) == set(adapter.module_names(engine.tensor_specs))
    assert (
        checkpoint.load(fed.folder, engine.tensor_specs, num_rounds=1, run_sha256=fed.manifest.sha256).sha256
        == finished["adapter_sha256"]
    )


FAULTS = {
    "another number of rows": lambda _: tiny.with_head(num_examples=10_000),
    "another name": lambda _: tiny.with_head(site="south"),
    "another round": lambda _: tiny.with_head(round_index=1),
    "another run": lambda _: tiny.with_head(run_sha256="ab" * 32),
    "no rows": lambda _: tiny.with_head(num_examples=0),
    "a number of 400 digits": lambda _: tiny.with_head(num_tokens=10**400),
    "NaN": lambda specs: tiny.with_body(lambda body: scaled(math.nan)(body, specs)),
    "values beyond all measure": lambda specs: tiny.with_body(lambda body: scaled(1e30)(body, specs)),
    "no tensors": lambda _: tiny.with_body(lambda body: b""),
    "pickle": lambda _: tiny.with_body(lambda body: b"\x80\x04N."),
    "a cut body": lambda _: tiny.with_body(lambda body: body[:-1]),
    "a header in UTF-16": lambda _: tiny.with_body(lambda body: utf16_header(body)),
    "a huge body": lambda _: tiny.with_body(lambda body: body + bytes(packing.MAX_HEADER_BYTES)),
    "a flipped byte": lambda _: lambda frame: frame[:-40] + bytes([frame[-40] ^ 1]) + frame[-39:],
    "no frame": lambda _: lambda frame: b"",
    "another kind": lambda _: lambda frame: wire.pack(Frame("opened")),
}


def utf16_header(body: bytes) -> bytes:
    """The same safetensors bytes, whose header is JSON to Python and not to safetensors."""
    size = int.from_bytes(body[:8], "little")
    header = body[8 : 8 + size].decode().encode("utf-16")
    return len(header).to_bytes(8, "little") + header + body[8 + size :]


@pytest.fixture(scope="module")
def without_west(shared_engine, tiny_base, tmp_path_factory):
    """The adapter after a round of north and south."""
    two = {number: answer for number, answer in tiny.make_nodes(shared_engine).items() if number < 3}
    fed = tiny.federation(shared_engine, tmp_path_factory.mktemp("two"), two, tiny.settings(tiny_base, SMALL))
    fed.wait()
    return play(fed, shared_engine)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_update_is_left_out_and_told_and_the_round_goes_on(ready, nodes, engine, told, without_west, fault):
    change = FAULTS[fault](engine.tensor_specs)
    fed = ready({**nodes, 3: tiny.spoilt(nodes[3], "train", change)})
    after = play(fed, engine)
    (failed,) = told("site_failed")
    assert (failed["site"], failed["step"]) == ("west", "train")
    assert failed["reason"].isprintable()
    assert len(failed["reason"]) < 600
    assert is_same(after, without_west)


def test_control_a_right_update_is_taken(ready, nodes, engine, told):
    fed = ready({**nodes, 3: tiny.spoilt(nodes[3], "train", lambda frame: frame)})
    assert is_same(play(fed, engine), play(ready(nodes), engine))
    assert told("site_failed") == []


def test_a_site_that_never_answers_is_left_out_at_the_deadline(ready, nodes, engine, told):
    fed = ready({**nodes, 3: tiny.mute(nodes[3], "train")}, {"federation.round_timeout_s": "60"})
    before = fed.clock()
    play(fed, engine)
    assert fed.clock() - before == pytest.approx(60, abs=1)
    (failed,) = told("site_failed")
    assert failed["reason"] == "ProtocolError: no answer within 60 s"
    assert told("round_finished")[0]["num_updates"] == 2


def test_a_site_that_falls_silent_costs_one_whole_wait_and_is_taken_in_when_it_is_back(ready, nodes, engine, told):
    is_away = []
    changes = {"federation.round_timeout_s": "600", "federation.num_rounds": "3"}
    fed = ready({**nodes, 3: lambda frame: None if is_away else nodes[3](frame)}, changes)
    is_away.append(True)
    state, began = fed.play(engine.initial, round_index=0), fed.clock()
    assert began - 1000 == pytest.approx(600, abs=1)
    fed.evaluate(state, num_rounds=1, generate=False)
    assert fed.clock() == began
    state = fed.play(state, round_index=1)
    assert fed.clock() - began < fleet_sites.SECOND_WAIT_S + 1
    assert [event["site"] for event in told("site_skipped")] == ["west"]
    is_away.clear()
    fed.play(state, round_index=2)
    assert [event["sites"] for event in told("round_started")][1:] == [["north", "south"], ["north", "south", "west"]]
    assert told("round_finished")[-1]["num_updates"] == 3
    assert not fed.suspects


def test_a_site_that_opens_and_never_trains_is_waited_for_shortly_after_the_first_time(ready, nodes, engine):
    fed = ready({**nodes, 3: tiny.mute(nodes[3], "train")}, {"federation.round_timeout_s": "600"})
    state, began = fed.play(engine.initial, round_index=0), fed.clock()
    assert began - 1000 == pytest.approx(600, abs=1)  # control
    fed.play(state, round_index=1)
    assert fed.clock() - began < fleet_sites.SECOND_WAIT_S + 1


def test_a_refusal_is_told_with_its_reference(ready, nodes, engine, told):
    def refuse(frame: bytes) -> bytes:
        return wire.pack(Frame("refused", {"code": "ModelError", "reference": "0a1b"}))

    play(ready({**nodes, 3: tiny.spoilt(nodes[3], "train", refuse)}), engine)
    assert "ModelError" in told("site_failed")[0]["reason"]
    assert "0a1b" in told("site_failed")[0]["reason"]


def test_a_round_with_too_few_updates_does_not_count_and_earlier_ones_stay(ready, nodes, engine):
    faults = []

    def fail_later(frame: bytes) -> bytes:
        faults.append(1)
        return b"" if len(faults) > 1 else frame

    broken = {**nodes, 2: tiny.spoilt(nodes[2], "train", fail_later), 3: tiny.spoilt(nodes[3], "train", lambda _: b"")}
    fed = ready(broken)
    state = play(fed, engine)
    with pytest.raises(
        TooFewSitesError, match=r"round 2 got 1 valid updates.*min_sites is 2.*rounds up to 1"
    ) as caught:
        fed.play(state, round_index=1)
    assert caught.value.exit_code == 6
    assert run_files.finished(fed.folder) == [1]
    found = checkpoint.load(fed.folder, engine.tensor_specs, num_rounds=1, run_sha256=fed.manifest.sha256)
    assert is_same(found.tensors, state)


def test_a_run_whose_sites_have_gone_ends_with_what_is_on_disk(ready, nodes, engine):
    fed = ready(nodes)
    play(fed, engine)
    fed.fleet = tiny.fleet({1: nodes[1]})
    with pytest.raises(TooFewSitesError, match=r"1 sites are connected.*rounds up to 1 are on disk"):
        fed.play(engine.initial, round_index=1)


def test_a_node_whose_agent_was_started_anew_is_taken_back(ready, nodes, engine, told):
    restarted = tiny.make_agent("west", engine, count=tiny.SITES["west"]).answer
    fed = ready(nodes)
    play(fed, engine)
    fed.fleet = tiny.fleet({**nodes, 3: restarted})
    fed.play(engine.initial, round_index=1)
    assert [event["site"] for event in told("site_failed")] == ["west"]
    after = play(fed, engine)
    assert is_same(after, play(ready(nodes), engine))
    assert [event["site"] for event in told("site_joined")][:4] == ["north", "south", "west", "west"]


def test_a_site_may_come_back_with_other_rows(ready, nodes, engine, told):
    data = tiny.site_data("west", 8)
    fewer = tiny.make_agent("west", engine, data=SiteData(data.train[:3], data.held_out)).answer
    fed = ready(nodes)
    fed.fleet = tiny.fleet({**nodes, 3: fewer})
    play(fed, engine)
    play(fed, engine)
    assert [event["num_examples"] for event in told("site_trained") if event["site"] == "west"] == [3]


def test_a_broken_link_to_the_fleet_ends_the_run_as_retryable(ready, nodes, engine):
    def break_link(*_: object, **__: object) -> str:
        raise TransportError("the SuperLink did not answer")

    fed = ready(nodes)
    fed.fleet.send = break_link
    with pytest.raises(TransportError):
        play(fed, engine)


def test_a_full_disk_is_not_a_sites_fault(ready, nodes, engine, told):
    fed = ready(nodes)

    def fail_on_trained(event) -> None:
        if event["kind"] == "site_trained":
            raise StorageError("disk full")

    fed.log.listeners.append(fail_on_trained)
    with pytest.raises(StorageError):
        play(fed, engine)
    assert told("site_failed") == []


def test_cohorts_are_drawn_anew_and_cover_all_sites(ready, nodes, engine, told):
    fed = ready(nodes, {"federation.sites_per_round": "2", "federation.num_rounds": "8"})
    for round_index in range(8):
        play(fed, engine, round_index)
    cohorts = [tuple(event["sites"]) for event in told("round_started")]
    assert {len(cohort) for cohort in cohorts} == {2}
    assert {site for cohort in cohorts for site in cohort} == set(tiny.SITES)
    assert len(set(cohorts)) > 1


def canned(site: str, fed, engine):
    """A node that answers at once, without a base or rows."""
    opened = OpenedHead(site, fed.manifest.sha256, 10, 2, 0, 0, 1)
    update = UpdateHead(site, fed.manifest.sha256, 0, 10, 1, 100, 1.0, 0.1)
    zero = {name: torch.zeros_like(tensor) for name, tensor in engine.initial.items()}

    def node(frame: bytes) -> bytes:
        if wire.unpack(frame, max_body_bytes=1 << 24).kind == "open":
            return wire.pack(Frame("opened", to_head(opened)))
        return wire.pack(Frame("update", to_head(update), adapter.encode(zero, dtype="float32")))

    return node


def peak_bytes(fed, engine, num_sites: int) -> int:
    """Most memory of Python objects, frames included, that a round takes."""
    fed.fleet = tiny.fleet({number: canned(f"site-{number}", fed, engine) for number in range(1, num_sites + 1)})
    fed.wait()
    tracemalloc.start()
    play(fed, engine)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_of_a_round_does_not_grow_with_the_number_of_sites(federate, engine):
    size = adapter.encoded_size(engine.tensor_specs, dtype="float32")
    few, many = (peak_bytes(federate({}, {"federation.num_sites": "0"}), engine, count) for count in (8, 48))
    assert many - few < 40 * size / 4


def test_control_a_round_that_gathers_frames_first_needs_more(federate, engine, monkeypatch):
    size = adapter.encoded_size(engine.tensor_specs, dtype="float32")
    real = collect.ask
    monkeypatch.setattr(collect, "ask", lambda *given, **named: iter(list(real(*given, **named))))
    few, many = (peak_bytes(federate({}, {"federation.num_sites": "0"}), engine, count) for count in (8, 48))
    assert many - few > 40 * size / 2
