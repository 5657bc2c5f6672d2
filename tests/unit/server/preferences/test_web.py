"""The page for blind ranking: who may use it, what it tells, and that answers survive."""

import json
import re
import socket

import pytest

from common.errors import ConfigError
from server.preferences import answers, blind, web
from server.preferences.answers import Session
from tests.samples.page import TOKEN, Client, post


@pytest.fixture
def tasks(tmp_path):
    source = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Why {k}?", "base": f"<b>{k}</b>", "tuned": f"So {k}."} for k in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "rate" / "tasks.jsonl"
    blind.make(source, between=("base", "tuned"), seed=5, tasks=path, key=tmp_path / "key.json")
    return path


@pytest.fixture
def session(tasks, tmp_path):
    with Session(tasks, tmp_path / "anna.jsonl", rater="anna") as opened:
        yield opened


@pytest.fixture
def client(session):
    return Client(web.make(session, token=TOKEN))


def test_a_rater_goes_through_all_tasks_and_every_answer_is_kept_at_once(client, session, tmp_path):
    state = client.get(f"/{TOKEN}/state").json()
    assert (state["num_tasks"], state["num_done"], state["task"]["number"], state["last"]) == (3, 0, 1, None)
    for number, choice in ((1, "left"), (2, "tie"), (3, "skip")):
        state = post(client, "answer", {"task": number, "answer": choice}).json()
        assert answers.read(tmp_path / "anna.jsonl").choices[number] == choice
    assert (state["task"], state["last"]) == (None, 3)
    state = post(client, "undo", {"task": 3}).json()
    assert state["task"]["number"] == 3
    assert answers.read(tmp_path / "anna.jsonl").choices == {1: "left", 2: "tie"}


def test_a_page_that_is_behind_is_told_where_the_session_is_and_changes_nothing(client, session):
    post(client, "answer", {"task": 1, "answer": "left"})
    late = post(client, "answer", {"task": 1, "answer": "right"})
    assert (late.status_code, late.json()["task"]["number"]) == (409, 2)
    assert post(client, "undo", {"task": 2}).status_code == 409
    assert session.answers.choices == {1: "left"}


@pytest.mark.parametrize("path", ["/", "/state", "/wrong/", "/wrong/state", f"/{TOKEN}x/state", f"/{TOKEN[:-1]}/state"])
def test_without_the_token_nothing_is_told(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "Why" not in answer.text
    assert client.post("/wrong/answer", json={"task": 1, "answer": "left"}).status_code == 404
    assert client.get(f"/{TOKEN}/state").status_code == 200  # control


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"headers": {"Origin": "https://evil.example"}}, 403),
        ({"headers": {"Origin": "null"}}, 403),
        ({"headers": {"Host": "evil.example"}}, 400),
        ({"headers": {"Content-Type": "text/plain"}}, 415),
    ],
)
def test_another_sites_page_can_send_nothing(client, session, options, status):
    assert post(client, "answer", {"task": 1, "answer": "left"}, **options).status_code == status
    assert session.num_done == 0
    own = {"headers": {"Origin": "http://127.0.0.1:8765"}}  # control
    assert post(client, "answer", {"task": 1, "answer": "left"}, **own).status_code == 200


@pytest.mark.parametrize(
    "body", [{}, [], {"task": "1", "answer": "left"}, {"task": True, "answer": "left"}, {"task": 1, "answer": "best"}]
)
def test_a_malformed_answer_is_refused(client, session, body):
    assert post(client, "answer", body).status_code == 400
    assert session.num_done == 0


def test_a_long_body_is_refused_before_it_is_read(client):
    assert post(client, "answer", {"task": 1, "answer": "left", "more": "x" * 2000}).status_code == 413


def test_nothing_that_is_served_tells_candidates_apart(client):
    served = client.get(f"/{TOKEN}/").text + client.get(f"/{TOKEN}/state").text
    assert not any(word in served for word in ('base"', "tuned", "swapped", "seed", "key.json", "answers.jsonl"))


def test_the_page_needs_nothing_from_elsewhere_and_forbids_it(client):
    answer = client.get(f"/{TOKEN}/")
    assert not re.search(r"(?:src|href)=\"(?!data:)|@import|url\(|https?://", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_texts_are_never_put_into_the_page_as_markup(client):
    page = client.get(f"/{TOKEN}/").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


def test_every_control_has_a_name_and_a_key(client):
    page = client.get(f"/{TOKEN}/").text
    assert '<html lang="en">' in page
    for key in ("1", "2", "=", "S", "U"):
        assert f'aria-keyshortcuts="{key}"' in page
    assert 'role="status"' in page
    assert "prefers-color-scheme: dark" in page


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """WCAG 2.2, success criterion 1.4.3."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_the_text_is_enough_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") < 4.5  # control: a grey that is known to fail by a little
    schemes = re.findall(r":root \{(.*?)\}", web.PAGE.read_text(), flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        pairs = [("ink", "page"), ("ink", "card"), ("dim", "card"), ("dim", "page"), ("wrong", "card")]
        for text, behind in [*pairs, ("main-ink", "main"), ("main-ink", "main-over")]:
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
        assert contrast(colours["focus"], colours["card"]) >= 3


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "rate.example"])
def test_others_reach_the_page_only_through_tls(host, tmp_path):
    with pytest.raises(ConfigError, match="--certificate and --key"):
        web.Door(host)
    with pytest.raises(ConfigError, match="go together"):
        web.Door("127.0.0.1", certificate=tmp_path / "c.pem")
    assert web.Door().host == "127.0.0.1"  # control


def test_a_port_that_is_taken_is_named(session):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} .*; choose another with --host or --port"):
            web.serve(session, door=web.Door(port=port), say=print)
