import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import WireError
from common.frame import wire
from common.frame.records import OpenedHead, RoundPlan, SiteMetrics, UpdateHead, from_head, to_head
from common.frame.wire import Frame

UPDATE = UpdateHead(
    site="north",
    run_sha256="ab" * 32,
    round_index=1,
    num_examples=120,
    num_steps=15,
    num_tokens=6021,
    train_loss=1.25,
    seconds=0.5,
)
PLAN = RoundPlan("ab" * 32, 2, generate=True)
OPENED = OpenedHead("north", "ab" * 32, 120, 30, 1, 0, 15)
METRICS = SiteMetrics("north", "ab" * 32, 2, 812.5, 650, 30, 30, 11, 0.125)


def change(record: object, **fields: object) -> dict[str, object]:
    return {**to_head(record), **fields}


@pytest.mark.parametrize("record", [UPDATE, PLAN, OPENED, METRICS], ids=lambda record: type(record).__name__)
def test_records_survive_the_wire(record):
    frame = wire.unpack(wire.pack(Frame("any", to_head(record))), max_body_bytes=0)
    assert from_head(type(record), frame.head) == record


@pytest.mark.parametrize("record", [UPDATE, PLAN, OPENED, METRICS], ids=lambda record: type(record).__name__)
def test_every_field_is_needed_and_no_other_is_taken(record):
    for name in to_head(record):
        head = {key: value for key, value in to_head(record).items() if key != name}
        with pytest.raises(WireError, match=name):
            from_head(type(record), head)
    with pytest.raises(WireError, match="extra"):
        from_head(type(record), change(record, extra=1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("site", 7),
        ("site", None),
        ("site", ["north"]),
        ("site", "n" * 257),
        ("round_index", "1"),
        ("round_index", 1.0),
        ("round_index", True),
        ("round_index", -1),
        ("num_examples", None),
        ("num_examples", 2**53 + 1),
        pytest.param("num_examples", 10**400, id="num_examples-beyond-float"),
        ("train_loss", "1.0"),
        ("train_loss", True),
        ("train_loss", -0.5),
        ("train_loss", float("nan")),
        ("train_loss", float("inf")),
        ("train_loss", 1e300),
        pytest.param("train_loss", 10**400, id="train_loss-beyond-float"),
        ("train_loss", [1.0]),
        ("train_loss", {"a": 1}),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(WireError, match=field):
        from_head(UpdateHead, change(UPDATE, **{field: value}))


@pytest.mark.parametrize("value", [0, 1, 1.0, "true", None])
def test_a_claim_is_true_or_false_and_nothing_like_it(value):
    with pytest.raises(WireError, match="generate"):
        from_head(RoundPlan, change(PLAN, generate=value))


def test_a_whole_number_serves_as_a_float_and_becomes_one():
    head = from_head(UpdateHead, change(UPDATE, seconds=3))
    assert head.seconds == 3.0
    assert type(head.seconds) is float


def test_the_largest_values_are_taken():
    head = from_head(UpdateHead, change(UPDATE, num_tokens=2**53, seconds=2.0**53, site="n" * 256))
    assert head.num_tokens == 2**53


def test_names_of_unknown_fields_cannot_break_a_message():
    head = change(UPDATE, **{"\x1b[2J" * 999: 1})
    with pytest.raises(WireError) as caught:
        from_head(UpdateHead, head)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(field=st.sampled_from([field.name for field in dataclasses.fields(UpdateHead)]), value=JSON)
def test_whatever_a_peer_puts_into_a_field_raises_our_error_or_fits(field, value):
    try:
        record = from_head(UpdateHead, change(UPDATE, **{field: value}))
    except WireError:
        return
    told, expected = getattr(record, field), {f.name: f.type for f in dataclasses.fields(UpdateHead)}[field]
    assert isinstance(told, expected)
    assert not isinstance(told, bool)


def test_mean_loss_of_a_site_is_per_answer_token():
    assert METRICS.loss == 812.5 / 650
