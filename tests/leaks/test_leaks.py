"""Do a site's rows leave it? A thousand canaries, forty-eight forms, three places; each zero has a control.

`docs/leak-test.md` says what is captured and what is not.
"""

import base64
import bz2
import gzip
import io
import quopri
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.numpy

from client.courier import line
from common.agent_pb2 import Chunk
from common.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from common.errors import DataError, RemoteError
from tests import tiny
from tests.leaks import bench, canaries, captures, encodings, relays, smuggler, world
from tests.leaks.bench import Bench
from tests.leaks.search import GAP, Found, Searcher
from tests.samples import vault

CANARIES = canaries.make()
ROWS = canaries.table(CANARIES)
TOKENIZER = tiny.make_tokenizer()
FORMS = encodings.all_of(lambda text: TOKENIZER(text, add_special_tokens=False).input_ids)
SHARES = smuggler.shares(CANARIES, FORMS)
CHANGES = {
    "data.max_length_tokens": "192",
    "data.held_out_fraction": "0.25",
    "training.batch_size": "16",
    "federation.num_sites": "0",
    "federation.min_sites": "1",
    "evaluation.exact_match_rows": "50",
    "evaluation.max_new_tokens": "8",
}
QUICK = {"training.local_epochs": "0.0", "training.local_steps": "3", "evaluation.exact_match_rows": "4"}
MIN_POINTS = {"open": 110, "evaluate": 80, "train": 80, "refusal": 25}  # at which an error is raised
RULES = {"max_length_tokens": "192", "min_sites": "1", "max_rows": "1000", "approval": '"none"'}


@pytest.fixture(scope="module")
def searcher() -> Searcher:
    return Searcher(CANARIES, FORMS)


def test_there_are_a_thousand_canaries_and_forty_eight_forms():
    assert len(set(CANARIES)) == 1000
    assert len(FORMS) == 48
    assert sum(map(len, SHARES.values())) == 1000
    assert all(canary in text for canary, text in zip(CANARIES, canaries.texts(ROWS), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_every_canary_is_found_in_each_form_alone(searcher, name):
    sent = GAP.join(FORMS[name].encode(text) for text in canaries.texts(ROWS))
    assert {(name, canary) for canary in CANARIES} <= searcher.find([sent])
    assert searcher.find([random.Random(name).randbytes(len(sent))]) == set()


def test_control_compressed_forms_are_missed_without_undoing_them():
    blunt = Searcher(CANARIES, FORMS, unwrap=False)
    sent = {name: GAP.join(FORMS[name].encode(text) for text in canaries.texts(ROWS)) for name in FORMS}
    missed = {name for name, data in sent.items() if not blunt.find([data])}
    assert missed == set(encodings.WRAPPED)


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def as_npz(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, array)
    return file.getvalue()


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "string of protobuf": lambda data: b"\x0a" + bytes([len(data)]) + data,
    "npy": lambda data: as_npy(np.frombuffer(data, np.uint8)),
    "npz": lambda data: as_npz(np.frombuffer(data, np.uint8)),
    "safetensors": lambda data: safetensors.numpy.save({"a": np.frombuffer(data, np.uint8)}),
    "base64 in lines": lambda data: base64.encodebytes(data * 4),
    "base64 of hex": lambda data: base64.b64encode(data.hex().encode()),
    "hex of zlib": lambda data: zlib.compress(data).hex().encode(),
    "UTF-16 of base64": lambda data: base64.b64encode(data).decode().encode("utf-16-le"),
    "bz2 of gzip of base64": lambda data: bz2.compress(gzip.compress(base64.b64encode(data))),
    "broken gzip": lambda data: gzip.compress(data * 2 + random.Random(3).randbytes(500))[:-200],
    "quoted-printable in lines": lambda data: quopri.encodestring(b"x" * 60 + data),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_canary_is_found_in_containers_and_in_forms_of_forms(searcher, name):
    noise, canary = random.Random(5).randbytes(999), CANARIES[7]
    hits = searcher.find([noise + CONTAINERS[name](canary.encode()) + noise])
    assert {found for _, found in hits} == {canary}
    assert searcher.find([noise + CONTAINERS[name](canary.upper()[::-1].encode()) + noise]) == set()


def test_megabytes_of_noise_hold_no_canary(searcher):
    assert searcher.find([random.Random(1).randbytes(8 << 20)]) == set()


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("l")  # short: sockets are in it


@pytest.fixture
def bench_of(folder, tiny_base, engine):
    """Starts a site on canary rows, with or without its guard."""

    @contextmanager
    def start(rows, *, is_guarded: bool, **changes: str) -> Iterator[Bench]:
        settings = tiny.settings(tiny_base, {**CHANGES, **changes})
        policy = vault.policy_text(engine.base_sha256, **RULES) if is_guarded else ""
        place = folder / str(is_guarded)
        with bench.running(settings, rows, folder=place, base=tiny_base, engine=engine, policy=policy) as site:
            yield site

    return start


def whole_forms(found: Found) -> set[str]:
    """Forms of which every canary that was sent in them is found."""
    return {name for name, own in SHARES.items() if {(name, canary) for canary in own} <= found}


def test_a_smuggling_agent_gets_all_forms_through_its_socket_without_a_guard_and_none_with_one(bench_of, searcher):
    for is_guarded, answers, expected in ((False, "update", set(FORMS)), (True, "refused", set())):
        with bench_of(ROWS, is_guarded=is_guarded, **QUICK) as site:
            smuggler.corrupt(site.agent, canaries.texts(ROWS), FORMS)
            assert site.ask("open").kind == "opened"
            assert site.ask("train").kind == answers
            found = searcher.find(site.at_socket())
        assert whole_forms(found) == expected
        assert bool(found) == (not is_guarded)


def test_a_canary_that_a_stream_cuts_is_found_once_its_pieces_are_joined(searcher):
    text = CANARIES[3].encode()
    messages = [Chunk(data=part).SerializeToString() for part in (text[:9], text[9:])]
    body = b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)
    parts = [body[at : at + 10] for at in range(0, len(body), 10)]
    stream = b"".join(len(part).to_bytes(3, "big") + bytes(5) + b"\x01" + part for part in parts)
    assert searcher.find([stream]) == set()
    assert searcher.find(captures.of_grpc(stream)) == {("utf-8", CANARIES[3])}


def test_an_honest_guarded_site_lets_no_canary_through_its_socket(bench_of, searcher):
    with bench_of(ROWS, is_guarded=True, **QUICK) as site:
        kinds = [site.ask(kind).kind for kind in bench.KINDS]
        assert kinds == ["opened", "metrics", "update"]
        assert searcher.find(site.at_socket()) == set()
        assert searcher.find(captures.of_folder(site.logs)) == set()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", [ValueError, DataError])
@pytest.mark.parametrize("kind", [*bench.KINDS, "refusal"])
def test_an_error_whose_text_is_rows_leaves_none_wherever_it_is_raised(
    bench_of, searcher, caplog, capfd, kind, error, every
):
    rows, asked = ROWS[:16], "train" if kind == "refusal" else kind
    spilt = "; ".join(canaries.texts(rows))
    with bench_of(rows, is_guarded=True, **QUICK) as site:
        if kind == "refusal":
            bench.refuse(site, asked, lambda: error(spilt))
        points = bench.raise_points(site, asked)[::every]
        spared = [point for point in points if not bench.fail(site, asked, at=point, error=lambda: error(spilt))]
        found = searcher.find(site.at_socket())
        own = searcher.find([*captures.of_folder(site.logs), caplog.text.encode(), capfd.readouterr().err.encode()])
    print(f"{kind}: {len(points)} raise points")
    assert spared == []
    assert len(points) * every >= MIN_POINTS[kind]
    assert found == set()
    assert bool(own) == (error is DataError)  # the site's own log takes the text of the product's errors, and no other


def test_control_the_text_of_an_error_at_a_door_without_edges_is_found(folder, searcher):
    class Open(AgentServicer):
        def Exchange(self, request_iterator: Any, context: Any) -> Iterator[Any]:
            raise ValueError(ROWS[0]["instruction"])

    folder.chmod(0o700)
    server = grpc.server(ThreadPoolExecutor(1))
    add_AgentServicer_to_server(Open(), server)
    server.add_secure_port(f"unix:{folder}/a", grpc.local_server_credentials(grpc.LocalConnectionType.UDS))
    server.start()
    with relays.before_socket(folder / "b", folder / "a") as record:
        with pytest.raises(RemoteError):
            line.call(folder / "b", "open", b"", 20.0)
        assert {canary for _, canary in searcher.find(record.sent())} == {CANARIES[0]}
    server.stop(None).wait()


@pytest.fixture(scope="module")
def base_sha256(load_tiny) -> str:
    return load_tiny().base_sha256


@pytest.mark.slow
def test_a_federation_whose_site_smuggles_unguarded_leaks_all_forms_at_all_three_places(folder, tiny_base, searcher):
    settings = tiny.settings(tiny_base, CHANGES)
    seen = world.play(settings, {"west": ROWS}, folder=folder, base=tiny_base, smugglers=["west"], policy="")
    at_socket, at_egress, on_disk, _ = look(searcher, seen)
    assert whole_forms(at_socket) == whole_forms(at_egress) == set(FORMS)
    assert FORMS.keys() <= {name for name, _ in on_disk}
    assert len({canary for _, canary in on_disk}) >= 990  # a page of the database ends within some


@pytest.mark.slow
def test_a_federation_of_guarded_sites_leaks_nothing_at_any_place_even_if_one_smuggles(
    folder, tiny_base, base_sha256, searcher
):
    policy = vault.policy_text(base_sha256, **{**RULES, "min_slice": "50"})
    settings, tables = tiny.settings(tiny_base, CHANGES), {"north": ROWS, "west": ROWS}
    seen = world.play(settings, tables, folder=folder, base=tiny_base, smugglers=["west"], policy=policy)
    assert seen.state.is_completed
    assert look(searcher, seen) == [set()] * 4
    assert_that_the_run_was_real(seen)


def look(searcher: Searcher, seen: world.Captured) -> list[Found]:
    """What is found at each place; `pytest -rP` shows the figures."""
    return [
        report(place, captured, searcher.find(captured))
        for place, captured in (
            ("agent's socket", seen.at_socket()),
            ("courier's egress", seen.at_egress()),
            ("server's disk", seen.on_disk()),
            ("couriers' files", seen.at_couriers()),
        )
    ]


def report(place: str, captured: list[bytes], found: Found) -> Found:
    num_canaries, num_forms = len({canary for _, canary in found}), len(FORMS.keys() & {name for name, _ in found})
    print(f"{place}: {sum(map(len, captured)):,} bytes, {num_canaries} canaries, {num_forms} forms")
    return found


def assert_that_the_run_was_real(seen: world.Captured) -> None:
    """Both rounds, answers generated, the smuggler refused each time, and all that left seen on its way."""
    told = [event for event in seen.events() if event["kind"] == "site_trained"]
    assert [(event["site"], event["round"]) for event in told] == [("north", 0), ("north", 1)]
    codes = [entry.facts["code"] for entry in seen.entries("west", "refused")]
    assert codes == ["PolicyRefusedError", "DataError", "InternalError", "PolicyRefusedError"]
    steps = [(entry.facts["step"], entry.facts["round_index"]) for entry in seen.entries("north", "left")]
    assert steps == [
        ("open", 0),
        *((step, number) for number in (0, 1) for step in ("evaluate", "train")),
        ("evaluate", 2),
    ]
    left = {entry.facts["sha256"] for site in ("north", "west") for entry in seen.entries(site, "left")}
    assert left <= captures.frames(seen.at_socket())
    assert left <= captures.frames(seen.at_egress())
