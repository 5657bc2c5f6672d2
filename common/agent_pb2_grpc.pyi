from collections.abc import Iterator
from typing import Any, Protocol

from common.agent_pb2 import Chunk, HelloReply, HelloRequest

class _Frames(Protocol):
    def __call__(self, chunks: Iterator[Chunk], *, timeout: float) -> Iterator[Chunk]: ...

class _Hello(Protocol):
    def __call__(self, request: HelloRequest, *, timeout: float) -> HelloReply: ...

class AgentStub:
    Hello: _Hello
    Exchange: _Frames
    def __init__(self, channel: Any) -> None: ...

class AgentServicer:
    def Hello(self, request: HelloRequest, context: Any) -> HelloReply: ...
    def Exchange(self, request_iterator: Iterator[Chunk], context: Any) -> Iterator[Chunk]: ...

def add_AgentServicer_to_server(servicer: AgentServicer, server: Any) -> None: ...
