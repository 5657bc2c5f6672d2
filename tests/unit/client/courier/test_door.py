"""The line between courier and agent, over a real socket."""

import grp
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from client.courier import door as service
from client.courier import line
from common.agent_pb2 import Chunk
from common.agent_pb2_grpc import AgentServicer, AgentStub, add_AgentServicer_to_server
from common.errors import ConfigError, ProtocolError, RemoteError, TransportError, WireError
from common.frame import wire
from common.frame.exchanges import EXCHANGES

MIB = 1 << 20
CANARY = "patient-row-4711"


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="silotune-", dir="/tmp") as folder:  # a socket's path is short
        yield Path(folder) / "agent.sock"


@pytest.fixture
def serve(socket_path: Path):
    servers = []

    def start(answer, *, max_message_bytes: int = MIB) -> None:
        servers.append(service.serve(answer, socket_path=socket_path, max_message_bytes=max_message_bytes))

    yield start
    for server in servers:
        server.stop(0).wait()


@pytest.mark.parametrize("kind", EXCHANGES)
def test_each_typed_call_carries_frames_both_ways(serve, socket_path, kind):
    serve(lambda frame: frame[::-1])
    assert line.call(socket_path, kind, b"frame", 5.0) == b"emarf"


def test_an_empty_frame_crosses(serve, socket_path):
    serve(lambda frame: frame)
    assert line.call(socket_path, "open", b"", 5.0) == b""


def test_twenty_megabytes_cross(serve, socket_path):
    frame = os.urandom(20 * MIB)
    serve(lambda received: received[::-1], max_message_bytes=20 * MIB)
    assert line.call(socket_path, "train", frame, 30.0) == frame[::-1]


def test_a_frame_above_the_limit_never_reaches_the_agent(serve, socket_path):
    seen = []
    serve(lambda frame: seen.append(len(frame)) or b"", max_message_bytes=3 * MIB)
    line.call(socket_path, "train", bytes(3 * MIB), 5.0)  # control: at the limit
    with pytest.raises(WireError):
        line.call(socket_path, "train", bytes(3 * MIB + 1), 5.0)
    assert seen == [3 * MIB]


def test_a_stream_that_never_ends_is_cut(serve, socket_path):
    seen, num_sent = [], 0
    serve(lambda frame: seen.append(1) or frame, max_message_bytes=2 * MIB)

    def endless() -> Iterator[Chunk]:
        nonlocal num_sent
        while num_sent < 500:
            num_sent += 1
            yield Chunk(data=bytes(MIB), frame_bytes=2 * MIB)

    assert refusal(socket_path, endless()) is grpc.StatusCode.INVALID_ARGUMENT
    assert num_sent < 100
    assert not seen


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [Chunk(data=b"ab", frame_bytes=3)],
        [Chunk(data=b"abcd", frame_bytes=3)],
        [Chunk(data=b"ab", frame_bytes=3), Chunk(data=b"cd")],
        [Chunk(data=b"abc")],
        [Chunk(data=b"abc", frame_bytes=2**63)],
    ],
)
def test_a_frame_that_is_not_whole_never_reaches_the_agent(serve, socket_path, chunks):
    seen = []
    serve(lambda frame: seen.append(frame) or frame)
    raw_call(socket_path, iter([Chunk(data=b"ab", frame_bytes=3), Chunk(data=b"c")]))  # control: whole
    assert refusal(socket_path, iter(chunks)) is grpc.StatusCode.INVALID_ARGUMENT
    assert seen == [b"abc"]


def test_one_piece_above_its_limit_is_refused_by_grpc(serve, socket_path):
    seen = []
    serve(lambda frame: seen.append(1) or frame, max_message_bytes=64 * MIB)
    frame = Chunk(data=bytes(16 * MIB), frame_bytes=16 * MIB)
    assert refusal(socket_path, iter([frame])) in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,  # to the agent, the stream may look empty
    )
    assert not seen


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_piece_that_would_grow_when_it_is_unpacked_is_refused(socket_path, is_guarded):
    """Its control is gRPC as it comes, which unpacks whatever its peer packed."""
    options = line.OPTIONS if is_guarded else [option for option in line.OPTIONS if "compression" not in option[0]]
    server = grpc.server(ThreadPoolExecutor(1), options=options)
    add_AgentServicer_to_server(service._Door(lambda frame: frame, max_message_bytes=4 * MIB), server)
    server.add_secure_port(f"unix:{socket_path}", grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
    server.start()
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    frame, code = bytes(MIB), "taken"
    with grpc.secure_channel(f"unix:{socket_path}", credentials) as channel:
        try:
            list(AgentStub(channel).Exchange(line.pieces(frame), timeout=5.0, compression=grpc.Compression.Gzip))
        except grpc.RpcError as error:
            code = error.code().name
    server.stop(0).wait()
    assert code == ("UNIMPLEMENTED" if is_guarded else "taken")


def test_an_exceptions_text_is_told_to_nobody(serve, socket_path, caplog):
    def fail(_: bytes) -> bytes:
        raise ValueError(CANARY)

    serve(fail)
    with pytest.raises(RemoteError) as caught:
        line.call(socket_path, "train", b"", 5.0)
    assert CANARY not in str(caught.value)
    with pytest.raises(grpc.RpcError) as raw:
        raw_call(socket_path, line.pieces(b""))
    assert CANARY not in f"{raw.value!r} {raw.value.details()}"
    assert CANARY not in caplog.text  # it may hold a row; the site's log tells where it happened
    assert "ValueError at" in caplog.text
    assert "test_door.py" in caplog.text


def test_control_a_plain_grpc_server_sends_the_text(socket_path):
    class Careless(AgentServicer):
        def Exchange(self, request_iterator, context):
            raise ValueError(CANARY)

    server = grpc.server(ThreadPoolExecutor(1))
    add_AgentServicer_to_server(Careless(), server)
    server.add_secure_port(f"unix:{socket_path}", grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
    server.start()
    with pytest.raises(grpc.RpcError) as raw:
        raw_call(socket_path, line.pieces(b""))
    server.stop(0).wait()
    assert CANARY in raw.value.details()


def test_calls_reach_the_agent_one_at_a_time(serve, socket_path):
    inside, most = 0, 0

    def count(frame: bytes) -> bytes:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return frame

    serve(count)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: line.call(socket_path, "train", bytes([n]), 60.0), range(4)))
    assert answers == [bytes([n]) for n in range(4)]
    assert most == 1


def test_hello_is_answered_while_the_agent_works(serve, socket_path):
    started, release = threading.Event(), threading.Event()
    serve(lambda frame: (started.set(), release.wait(60), frame)[-1])
    assert line.hello(socket_path) == line.Hello(wire_version=wire.VERSION, is_busy=False)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(line.call, socket_path, "train", b"x", 60.0)
        assert started.wait(60)
        assert line.hello(socket_path).is_busy
        release.set()
        assert answer.result() == b"x"


def test_a_caller_who_left_is_not_worked_for(serve, socket_path):
    started, release, seen = threading.Event(), threading.Event(), []
    serve(lambda frame: (seen.append(frame), started.set(), release.wait(60), frame)[-1])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(line.call, socket_path, "train", b"first", 60.0)
        assert started.wait(60)
        with pytest.raises(TransportError, match="in time"):
            line.call(socket_path, "train", b"second", 0.3)
        time.sleep(0.5)
        release.set()
        assert first.result() == b"first"
    time.sleep(0.3)
    assert seen == [b"first"]


def test_an_absent_agent_is_told_with_the_remedy(socket_path):
    with pytest.raises(TransportError, match="silotune-client serve") as caught:
        line.call(socket_path, "train", b"", 5.0)
    assert caught.value.is_retryable
    with pytest.raises(TransportError):
        line.hello(socket_path)


def test_an_unknown_kind_is_refused_before_any_connection(socket_path):
    with pytest.raises(ProtocolError, match="no call"):
        line.call(socket_path, "delete", b"", 5.0)


def test_only_this_user_may_open_the_socket(serve, socket_path):
    before = os.umask(0)
    try:
        serve(lambda frame: frame)
        assert os.umask(0) == 0  # ours is put back
    finally:
        os.umask(before)
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600


def test_a_couriers_group_may_open_the_socket(socket_path):
    group = grp.getgrgid(os.getgid()).gr_name
    server = service.serve(bytes, socket_path=socket_path, max_message_bytes=1, courier_group=group)
    facts = socket_path.stat()
    server.stop(0).wait()
    assert (stat.S_IMODE(facts.st_mode), facts.st_gid) == (0o660, os.getgid())
    with pytest.raises(ConfigError, match="no-such-group"):
        service.serve(bytes, socket_path=socket_path, max_message_bytes=1, courier_group="no-such-group")


def test_a_dead_processes_socket_is_replaced(serve, socket_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    assert socket_path.is_socket()
    serve(lambda frame: frame)
    assert line.call(socket_path, "open", b"x", 5.0) == b"x"


def test_a_live_agents_socket_is_left_alone(serve, socket_path):
    serve(lambda frame: b"first")
    with pytest.raises(ConfigError, match="already listens"):
        serve(lambda frame: b"second")
    assert line.call(socket_path, "open", b"", 5.0) == b"first"


def test_a_file_in_the_sockets_place_is_left_alone(serve, socket_path):
    socket_path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        serve(lambda frame: frame)
    assert socket_path.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o1777])
def test_a_folder_open_to_others_is_refused(serve, socket_path, mode):
    socket_path.parent.chmod(mode)
    with pytest.raises(ConfigError, match="0700"):
        serve(lambda frame: frame)
    socket_path.parent.chmod(0o700)


def test_a_missing_folder_and_a_long_path_are_told(serve, socket_path):
    with pytest.raises(ConfigError, match="create it"):
        service.serve(bytes, socket_path=socket_path.parent / "none" / "s", max_message_bytes=1)
    with pytest.raises(ConfigError, match="shorter"):
        service.serve(bytes, socket_path=socket_path.parent / ("x" * 100), max_message_bytes=1)


def test_sigterm_closes_the_door(socket_path):
    code = (
        "import sys; from pathlib import Path; from client.courier import door as service\n"
        "service.wait(service.serve(lambda f: f, socket_path=Path(sys.argv[1]), max_message_bytes=9))"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, socket_path], cwd=Path(__file__).parents[4])
    for _ in range(1200):
        if socket_path.exists():
            break
        time.sleep(0.1)
    assert line.call(socket_path, "open", b"x", 60.0) == b"x"
    agent.terminate()
    assert agent.wait(60) == 0
    assert not socket_path.exists()


def raw_call(socket_path: Path, chunks: Iterator[Chunk]) -> list[Chunk]:
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    with grpc.secure_channel(f"unix:{socket_path}", credentials) as channel:
        return list(AgentStub(channel).Exchange(chunks, timeout=30.0))


def refusal(socket_path: Path, chunks: Iterator[Chunk]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(socket_path, chunks)
    return caught.value.code()


@pytest.mark.parametrize("is_patient", [False, True])
def test_a_caller_that_stalls_in_the_middle_loses_its_turn(socket_path, is_patient):
    """Control: an agent that waits for ever answers nobody else."""
    server = grpc.server(ThreadPoolExecutor(4), options=line.OPTIONS)
    door = service._Door(lambda frame: frame, max_message_bytes=MIB, read_s=60.0 if is_patient else 0.3)
    add_AgentServicer_to_server(door, server)
    server.add_secure_port(f"unix:{socket_path}", grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
    server.start()
    done = threading.Event()

    def stalling() -> Iterator[Chunk]:
        yield Chunk(data=b"a", frame_bytes=2)
        done.wait(60.0)

    with ThreadPoolExecutor(1) as pool:
        stalled = pool.submit(refusal, socket_path, stalling())
        while not line.hello(socket_path).is_busy:
            time.sleep(0.01)
        try:
            assert line.call(socket_path, "open", b"frame", 1.0 if is_patient else 5.0) == b"frame"
            assert not is_patient
        except TransportError:
            assert is_patient
        finally:
            done.set()
            stalled.result()
            server.stop(0).wait()
