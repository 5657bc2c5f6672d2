from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("data", "frame_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    frame_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., frame_bytes: _Optional[int] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("wire_version", "is_busy")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    IS_BUSY_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    is_busy: bool
    def __init__(self, wire_version: _Optional[int] = ..., is_busy: _Optional[bool] = ...) -> None: ...
