"""The courier: what it imports, what it carries, what it tells."""

import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from client.courier import app as courier
from client.courier import line
from common.errors import RemoteError, TransportError
from common.frame import envelope
from common.frame.exchanges import EXCHANGES
from simulations.engines.grid import InProcessGrid

ROOT = Path(__file__).parents[4]
CANARY = "patient-row-4711"
HEAVY = ("torch", "transformers", "peft", "datasets")


@pytest.fixture(autouse=True)
def _identity():
    InProcessGrid({})  # names this process as a Flower end


def message(array: Array | None = None) -> Message:
    records = RecordDict({"frame": ArrayRecord({"frame": array or Array(*envelope.declare(b"frame"))})})
    return Message(records, 1, "query.train", ttl=30.0)


def context(**node_config: str) -> Context:
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})


def imported(names: tuple[str, ...], *, code: str) -> list[str]:
    code = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return told.stdout.split()


def test_it_imports_nothing_heavy():
    assert imported((*HEAVY, "grpc"), code="import client.courier.app") == ["grpc"]  # control: what is imported is seen


def test_frames_pass_through_unread(monkeypatch):
    calls = []
    monkeypatch.setattr(line, "call", lambda *arguments: calls.append(arguments) or b"reply")
    reply = courier.app(message(), context(**{"agent-socket": "/run/agent.sock"}))
    assert envelope.unpack(reply.content) == b"reply"
    assert calls == [(Path("/run/agent.sock"), "train", b"frame", 30.0)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransportError(CANARY), envelope.AGENT_AWAY),
        (RemoteError(CANARY), envelope.COURIER_FAILED),
        (ZeroDivisionError(CANARY), envelope.COURIER_FAILED),
    ],
)
def test_a_failure_is_told_as_a_code_only(monkeypatch, error, code):
    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(line, "call", fail)
    reply = courier.app(message(), context(**{"agent-socket": "x"}))
    assert (reply.error.code, reply.error.reason) == (code, None)


def test_control_flower_would_let_the_text_out(monkeypatch):
    from flwr.clientapp import ClientApp

    plain = ClientApp()

    @plain.query("train")
    def fail(message: Message, context: Context) -> Message:
        raise ValueError(CANARY)

    with pytest.raises(ValueError, match=CANARY):  # run_clientapp.py sends str() of it to the server
        plain(message(), context())


def test_a_node_without_a_socket_path_and_a_malformed_message_are_codes():
    assert courier.app(message(), context()).error.code == envelope.COURIER_FAILED
    lie = Array("uint8", (9,), envelope.STYPE, b"frame")
    told = courier.app(message(lie), context(**{"agent-socket": "x"}))
    assert told.error.code == envelope.BAD_CONTENT


def test_every_typed_call_is_registered():
    assert set(courier.app._registered_funcs) == {f"query.{kind}" for kind in EXCHANGES}
