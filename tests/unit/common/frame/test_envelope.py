import json
import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import WireError
from common.frame import envelope


def content(array: Array, **others: object) -> RecordDict:
    return RecordDict({"frame": ArrayRecord({"frame": array}), **others})


def test_unpack_returns_what_was_declared():
    frame = os.urandom(1000)
    assert envelope.unpack(content(Array(*envelope.declare(frame)))) == frame


def test_a_frame_survives_flowers_own_encoding():
    frame = bytes(12 << 20)  # several chunks, all alike
    sent = Array(*envelope.declare(frame))
    received = Array.inflate(sent.deflate(), children=sent.children)
    assert envelope.unpack(content(received)) == frame


@pytest.mark.parametrize(
    ("dtype", "shape", "stype"),
    [
        ("uint8", (4,), "silotune.frame"),
        ("uint8", (3, 1), "silotune.frame"),
        ("uint8", (), "silotune.frame"),
        ("float32", (3,), "silotune.frame"),
        ("uint8", (3,), "numpy.ndarray"),
    ],
)
def test_unpack_refuses_bytes_declared_as_something_else(dtype, shape, stype):
    with pytest.raises(WireError):
        envelope.unpack(content(Array(dtype, shape, stype, b"abc")))


def test_unpack_refuses_a_numpy_array_that_flower_itself_would_decode():
    array = Array(np.arange(3, dtype=np.uint8))
    assert array.numpy().tolist() == [0, 1, 2]
    with pytest.raises(WireError):
        envelope.unpack(content(array))


def test_unpack_refuses_data_that_are_not_bytes():
    records = content(Array(*envelope.declare(b"abc")))
    records["frame"]["frame"].data = memoryview(b"abc")
    with pytest.raises(WireError):
        envelope.unpack(records)


@pytest.mark.parametrize("extra", [MetricRecord({"loss": 0.1}), ConfigRecord({"note": "text"}), ArrayRecord()])
def test_unpack_refuses_a_second_record(extra):
    array = Array(*envelope.declare(b"abc"))
    assert envelope.unpack(content(array)) == b"abc"
    with pytest.raises(WireError):
        envelope.unpack(content(array, extra=extra))


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"frame": ArrayRecord()}),
        RecordDict({"frame": MetricRecord({"frame": 1})}),
        RecordDict({"other": ArrayRecord({"frame": Array(*envelope.declare(b"a"))})}),
        RecordDict({"frame": ArrayRecord({n: Array(*envelope.declare(b"a")) for n in ("frame", "more")})}),
    ],
)
def test_unpack_refuses_other_forms(records):
    with pytest.raises(WireError):
        envelope.unpack(records)


def test_every_flower_error_code_has_a_name():
    from flwr.common.constant import ErrorCode

    codes = {value for name, value in vars(ErrorCode).items() if name.isupper()} - {ErrorCode.UNKNOWN}
    unnamed = {code for code in codes if envelope.failure_name(code) == "unknown"}
    assert unnamed == {ErrorCode.MOD_FAILED_PRECONDITION}  # we use no mods
    assert json.dumps(sorted(set(envelope.FAILURES.values())))
