"""Whatever a server sends and whatever goes wrong at a site: a code and a reference cross, and nothing else."""

import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.agent import sitelog
from client.agent.agent import MAX_BODY_BYTES, Agent, SiteData
from common.adapter import adapter
from common.data.rows import Message, Row
from common.errors import DataError, ModelError, StorageError
from common.frame import wire
from common.frame.records import RoundPlan, to_head
from common.frame.wire import Frame
from common.run.manifest import RunManifest
from tests import tiny

CANARY = "patient Ada Lovelace has a rare disease"


@pytest.fixture
def manifest(engine, tiny_base):
    return RunManifest(tiny.settings(tiny_base), engine.base_sha256, engine.tensor_specs)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "agent.jsonl"


@pytest.fixture
def make(engine, log):
    """A site whose log is a file; its data and base come from functions."""

    def agent(load_data=lambda _: tiny.site_data("north", 12), load_engine=lambda _: engine) -> Agent:
        return Agent(
            "north",
            load_data=load_data,
            load_engine=load_engine,
            report=lambda reference, error: sitelog.report(log, reference, error),
        )

    return agent


@pytest.fixture
def agent(make, manifest):
    """A site that has opened the run."""
    ready = make()
    assert wire.unpack(ready.answer(offer(manifest)), max_body_bytes=0).kind == "opened"
    return ready


def offer(manifest: RunManifest) -> bytes:
    return wire.pack(Frame("open", body=manifest.to_bytes()))


def request(manifest: RunManifest, state, *, kind: str = "train", **changes: object) -> bytes:
    head = {**to_head(RoundPlan(manifest.sha256, 0)), **changes}
    return wire.pack(Frame(kind, head, state if isinstance(state, bytes) else adapter.encode(state, dtype="float32")))


def refused(agent: Agent, frame: bytes, log) -> str:
    """The code of a refusal, of which nothing else is told, and whose reference is in the site's log."""
    answer = wire.unpack(agent.answer(frame), max_body_bytes=0)
    assert (answer.kind, sorted(answer.head), answer.body) == ("refused", ["code", "reference"], b"")
    assert re.fullmatch("[0-9a-f]{12}", answer.head["reference"])
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["reference"] == answer.head["reference"]
    return answer.head["code"]


@pytest.mark.parametrize("kind", ["fetch", "", "update", "opened", "__init__", "Open"])
def test_an_unknown_request_is_refused(agent, log, kind):
    assert refused(agent, wire.pack(Frame(kind)), log) == "ProtocolError"


@pytest.mark.parametrize("data", [b"", b"x", b"SILO" + bytes(60), b"\x80\x04N."])
def test_what_is_no_frame_is_refused(agent, log, data):
    assert refused(agent, data, log) == "WireError"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_nothing_is_done_for_a_run_that_is_not_open(make, manifest, engine, log, kind):
    assert refused(make(), request(manifest, engine.initial, kind=kind), log) == "ProtocolError"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_nothing_is_done_for_another_run(agent, manifest, engine, log, kind):
    frame = request(manifest, engine.initial, kind=kind, run_sha256="ab" * 32)
    assert refused(agent, frame, log) == "ProtocolError"


@pytest.mark.parametrize(("kind", "round_index"), [("train", 2), ("train", 3), ("evaluate", 3), ("evaluate", 10**6)])
def test_a_round_beyond_the_last_is_refused(agent, manifest, engine, log, kind, round_index):
    frame = request(manifest, engine.initial, kind=kind, round_index=round_index)
    assert refused(agent, frame, log) == "ProtocolError"


def test_the_adapter_after_the_last_round_can_be_evaluated(agent, manifest, engine):
    frame = request(manifest, engine.initial, kind="evaluate", round_index=2)
    assert wire.unpack(agent.answer(frame), max_body_bytes=0).kind == "metrics"


@pytest.mark.parametrize(
    "changes", [{"round_index": -1}, {"round_index": True}, {"round_index": "0"}, {"extra": 1}, {"generate": 1}]
)
def test_a_malformed_plan_is_refused(agent, manifest, engine, log, changes):
    assert refused(agent, request(manifest, engine.initial, **changes), log) == "WireError"


def test_a_wrong_adapter_is_refused(agent, manifest, engine, log):
    name = manifest.tensor_specs[0].name
    good = dict(engine.initial)
    wrong = {
        "another shape": {**good, name: torch.zeros(2, 2)},
        "one missing": {key: good[key] for key in good if key != name},
        "one more": {**good, "lm_head.weight": torch.zeros(2)},
        "NaN": {**good, name: torch.full_like(good[name], float("nan"))},
        "infinity": {**good, name: torch.full_like(good[name], float("inf"))},
    }
    assert {case: refused(agent, request(manifest, state), log) for case, state in wrong.items()} == dict.fromkeys(
        wrong, "ModelError"
    )
    for body in (b"", b"\x80\x04N.", adapter.encode(good, dtype="float32") + b"\0"):
        assert refused(agent, request(manifest, body), log) == "WireError"
    assert refused(agent, request(manifest, adapter.encode(good, dtype="bfloat16")), log) == "WireError"


def test_a_body_that_is_declared_too_large_is_refused_before_it_is_read(agent, log):
    prefix = wire._PREFIX.pack(wire.MAGIC, wire.VERSION, 16, MAX_BODY_BYTES + 1)
    assert refused(agent, prefix + bytes(100), log) == "WireError"


def test_a_manifest_that_is_none_is_refused(make, log):
    assert refused(make(), wire.pack(Frame("open", body=b"{}")), log) == "WireError"


def test_a_manifest_for_other_tensors_than_the_base_gives_is_refused(make, manifest, log):
    other = RunManifest(manifest.run, manifest.base_sha256, manifest.tensor_specs[1:])
    assert refused(make(), offer(other), log) == "ModelError"


@pytest.mark.parametrize("error", [DataError("rows.jsonl: line 3"), ModelError("no such base")])
def test_an_error_of_ours_crosses_as_its_class(make, manifest, log, error):
    def fail(_):
        raise error

    assert refused(make(load_data=fail), offer(manifest), log) == type(error).__name__
    assert str(error) in log.read_text()


def test_text_of_a_foreign_error_neither_crosses_nor_is_logged(make, manifest, log):
    caught = []

    def fail(_):
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            caught.append(error)
            raise ValueError(CANARY) from error

    agent = make(load_data=fail)
    answer = agent.answer(offer(manifest))
    assert b"Ada" not in answer
    assert refused(agent, offer(manifest), log) == "InternalError"
    assert "Ada" not in log.read_text()
    assert CANARY in str(caught[0])  # control: it was there to be told


def test_a_row_that_cannot_be_used_is_named_by_place_and_not_by_text(make, manifest, log):
    long = Row((Message("user", CANARY * 9), Message("assistant", "x")), unit="Ada", row_id="rows.jsonl line 7")
    data = SiteData([long], tiny.rows(3))
    answer = make(load_data=lambda _: data).answer(offer(manifest))
    assert b"Ada" not in answer
    assert "rows.jsonl line 7" in log.read_text()
    assert "Ada" not in log.read_text()


def test_a_site_whose_log_cannot_be_written_still_tells_no_more(engine, manifest):
    def report(reference: str, error: Exception) -> None:
        raise StorageError("disk full")

    def fail(_):
        raise ValueError(CANARY)

    agent = Agent("north", load_data=fail, load_engine=lambda _: engine, report=report)
    answer = wire.unpack(agent.answer(offer(manifest)), max_body_bytes=0)
    assert (answer.kind, answer.head["code"]) == ("refused", "StorageError")
    assert CANARY not in str(answer)


def test_a_run_that_could_not_be_opened_can_be_opened_later(make, manifest, log):
    faults = [DataError("not mounted yet")]

    def load_data(_):
        if faults:
            raise faults.pop()
        return tiny.site_data("north", 12)

    agent = make(load_data=load_data)
    assert refused(agent, offer(manifest), log) == "DataError"
    assert wire.unpack(agent.answer(offer(manifest)), max_body_bytes=0).kind == "opened"


def test_a_failed_request_leaves_the_site_ready(agent, manifest, engine, log):
    expected = wire.unpack(agent.answer(request(manifest, engine.initial)), max_body_bytes=1 << 24).body
    refused(agent, request(manifest, engine.initial, round_index=9), log)
    refused(agent, b"no frame", log)
    found = wire.unpack(agent.answer(request(manifest, engine.initial)), max_body_bytes=1 << 24).body
    assert found == expected


@given(data=st.binary(max_size=80), kind=st.sampled_from(["open", "train", "evaluate", "x"]), wrapped=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_a_site_raise(agent, data, kind, wrapped):
    frame = wire.pack(Frame(kind, {"run_sha256": "", "round_index": 0}, data)) if wrapped else data
    assert wire.unpack(agent.answer(frame), max_body_bytes=0).kind == "refused"
