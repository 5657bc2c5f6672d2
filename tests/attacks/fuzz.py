"""Mutations of real requests against a running gateway: what it answers to each, and how much memory that takes.

Each mutation follows from a seed and its number alone, dates and signatures aside. Half of them change the head, and
have a connection each; the others change the body under a right length, and share connections.
"""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest

from tests.attacks.world import HEARTBEAT, LIST_NODES, PROTOBUF, World

SITES, OPERATOR = ("birch", "fir", "iris"), "olga"
CUT = 0  # no answer: cut, or waits for more until it is cut by the clock
HEADS_LAST_S = 60.0  # the SuperLink takes a node's signature for 300 s
TOKENS = (b"\r\n", b"\r\n\r\n", b"\0", b" ", b":", b"0", b"-1", b"%2e%2e/", b"?", b"chunked", b"gzip", b"\xff" * 64)


@dataclass(frozen=True)
class Call:
    """A request that is answered well: by whom, where, and its body."""

    who: str
    path: str
    body: bytes

    @property
    def door(self) -> str:
        return "control" if self.who == OPERATOR else "fleet"


@dataclass
class Seen:
    """Answers by status, an example of each, and how many came on a connection that was open already."""

    statuses: Counter[int] = field(default_factory=Counter)
    examples: dict[int, str] = field(default_factory=dict)
    num_reused: int = 0

    def take(self, status: int, number: int, request: bytes) -> None:
        self.statuses[status] += 1
        self.examples.setdefault(status, f"mutation {number}: {request[:600]!r}")


def calls(world: World, start_run: bytes) -> list[Call]:
    """The corpus."""
    found = []
    for site in SITES:
        node = Node(node_id=world.node_ids[site])
        found += [
            Call(site, HEARTBEAT, world.heartbeat(site)),
            Call(site, "/v1/fleet/pull-messages", PullMessagesRequest(node=node).SerializeToString()),
            Call(site, "/v1/fleet/get-run", GetRunRequest(node=node, run_id=7).SerializeToString()),
        ]
    return [
        *found,
        Call(OPERATOR, LIST_NODES, b""),
        Call(OPERATOR, "/v1/control/list-runs", ListRunsRequest(run_id=7).SerializeToString()),
        Call(OPERATOR, "/v1/control/start-run", start_run),
    ]


def mutate(dice: random.Random, data: bytes, *, most: int = 6) -> bytes:
    """One to `most` changes: a byte, a token, a piece removed, doubled or moved, the end cut."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, most)):
        place, other = sorted(dice.randrange(len(changed) + 1) for _ in range(2))
        kind = dice.randrange(6)
        if kind == 0 or not changed:
            changed[place : place + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            changed[place:place] = dice.choice(TOKENS)
        elif kind == 2:
            del changed[place : min(other, place + 40)]
        elif kind == 3:
            changed[place:place] = changed[place:other]
        elif kind == 4:
            changed[place:place] = bytes([dice.randrange(256)]) * dice.randint(1, 64)
        elif dice.random() < 0.1:
            del changed[place:]
        else:
            changed[place : place + 2] = bytes(reversed(changed[place : place + 2]))
    return bytes(changed)


class Caller:
    """One thread's connections and heads."""

    def __init__(self, world: World, seen: Seen, lock: threading.Lock, *, wait_s: float) -> None:
        self._world, self._seen, self._lock, self._wait_s = world, seen, lock, wait_s
        self._open: dict[str, object] = {}
        self._lines: dict[str, tuple[float, bytes]] = {}
        self._contexts = {name: world.context(name) for name in (*SITES, OPERATOR)}

    def play(self, call: Call, *, seed: int, number: int) -> None:
        """Send one mutation, and note the answer."""
        dice = random.Random(f"{seed}/{number}")
        is_head = dice.random() < 0.5
        body = call.body if is_head else mutate(dice, call.body, most=2)
        head = self._head(call, len(body))
        request = (mutate(dice, head) if is_head else head) + body
        status = self._fresh(call, request) if is_head else self._shared(call, request)
        with self._lock:
            self._seen.take(status, number, request)

    def ask(self, call: Call) -> int:
        """Send a request as it is."""
        return self._fresh(call, self._head(call, len(call.body)) + call.body)

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()
        self._open.clear()

    def _head(self, call: Call, num_bytes: int) -> bytes:
        """A head with a right length; a node's signature is made anew now and then."""
        made_at, lines = self._lines.get(call.who, (0.0, b""))
        if time.monotonic() - made_at > HEADS_LAST_S or not lines:
            given = {"content-type": PROTOBUF} if call.who == OPERATOR else self._world.headers(call.who)
            lines = "".join(f"{name}: {value}\r\n" for name, value in given.items()).encode()
            self._lines[call.who] = (time.monotonic(), lines)
        start = f"POST {call.path} HTTP/1.1\r\nhost: gateway\r\n".encode()
        return start + lines + b"content-length: %d\r\n\r\n" % num_bytes

    def _fresh(self, call: Call, request: bytes) -> int:
        """On a connection of its own: what comes after a changed head may be read as anything."""
        try:
            with self._connect(call) as connection:
                connection.settimeout(self._wait_s)
                connection.sendall(request)
                return _status(connection.recv(65536))
        except OSError:
            return CUT

    def _shared(self, call: Call, request: bytes) -> int:
        """On the connection that is open; anew if the gateway has closed it meanwhile."""
        for _ in range(2):
            connection = self._open.pop(call.who, None)
            is_old = connection is not None
            try:
                connection = connection or self._connect(call)
                connection.settimeout(20)
                connection.sendall(request)
                status, is_kept = _answer(connection)
            except OSError:
                status, is_kept = CUT, False
            if is_kept:
                self._open[call.who] = connection
            elif connection is not None:
                connection.close()
            if status != CUT or not is_old:
                with self._lock:
                    self._seen.num_reused += is_old
                return status
        return CUT

    def _connect(self, call: Call):
        return self._world.raw(call.who, door=call.door, context=self._contexts[call.who])


def play(world: World, corpus: list[Call], *, seed: int, num_mutations: int, num_threads: int, wait_s: float) -> Seen:
    """Send them all; every thread takes each `num_threads`-th, and waits so long for an answer to a changed head."""
    seen, lock = Seen(), threading.Lock()

    def work(first: int) -> None:
        caller = Caller(world, seen, lock, wait_s=wait_s)
        for number in range(first, num_mutations, num_threads):
            caller.play(corpus[number % len(corpus)], seed=seed, number=number)
        caller.close()

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    return seen


def ask(world: World, corpus: list[Call]) -> dict[str, int]:
    """Status of every request as it is, by path; of several sites' the last."""
    caller = Caller(world, Seen(), threading.Lock(), wait_s=20)
    return {call.path: caller.ask(call) for call in corpus}


def _status(answer: bytes) -> int:
    return int(answer.split(b" ")[1]) if answer else CUT


def _answer(connection) -> tuple[int, bool]:
    """Status of a whole answer, and whether the connection goes on."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return _status(data), False
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields.get(b"content-length", b"-1")) - len(rest)
    while left > 0 and (piece := connection.recv(65536)):
        left -= len(piece)
    return _status(data), left == 0 and fields.get(b"connection") != b"close"
