"""A judge's verdicts: both orders, what cannot be read, agreement with people, and where rows may go."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from common.adapter import adapter
from common.errors import ConfigError, DataError, ModelError, TransportError
from common.events import EventLog
from server.evaluate import measure, suite
from server.evaluate.tasks import judge as task_judge
from server.evaluate.tasks import judge_ask
from tests import tiny

PAIRS = [("q", "long answer", "short"), ("q", "a", "much longer"), ("q", "same", "same ")]


def parts(question: str) -> tuple[str, str]:
    """Answers A and B of a question."""
    first, second = question.partition("[Answer A]\n")[2].split("\n\n[Answer B]\n")
    return first, second.partition("\n\nReply with")[0]


def longer(question: str) -> str:
    """A judge that prefers the longer answer: one with a preference that does not hang on places."""
    first, second = parts(question)
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "TIE"


RULES = {
    "longer": longer,
    "first": lambda _: "A",  # prefers a place
    "chatty": lambda question: f"I think {longer(question)} wins, as it is longer",
}


@pytest.fixture(scope="module")
def server():
    """An OpenAI-compatible server of rules; its model's name says which. Gives its address and what it was sent."""
    seen = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.headers.get("authorization"), body))
            reply = {"error": "no"} if body["model"] == "broken" else None
            if reply is None:
                text = RULES[body["model"]](body["messages"][0]["content"])
                reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/v1", seen
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def opened(engine, tiny_base, tmp_path):
    """A suite of one task of a judge."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": f"code {n}?", "output": "x"}) + "\n" for n in range(6))
    )

    def make(**task):
        given = {"name": "j", "kind": "judge", "data": str(tmp_path / "rows.jsonl"), **task}
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in given.items())
        run = tiny.settings(tiny_base, {"evaluation.tasks": f"[{{{table}}}]", "evaluation.max_new_tokens": "4"})
        return suite.open_suite(run, engine=engine, folder=tmp_path, log=EventLog(tmp_path / "events.jsonl"))

    return make


@pytest.fixture
def other(engine):
    """An adapter whose answers are not the base's."""
    generator = torch.Generator().manual_seed(4)
    return {name: value + torch.randn(value.shape, generator=generator) for name, value in engine.initial.items()}


def values(event):
    return {name.removeprefix("j."): figure["value"] for name, figure in event["figures"].items()}


def ask(rule):
    return lambda questions: [judge_ask.parse(RULES[rule](question)) for question in questions]


def test_a_judge_that_prefers_a_place_prefers_no_model():
    found = task_judge.preferred(task_judge.judge(ask("first"), PAIRS))
    assert found["win_rate"].rows == ((0.5,), (0.5,), (0.5,))
    assert found["consistent"].rows == ((0.0,), (0.0,), (1.0,))  # equal answers are not asked about
    control = task_judge.preferred(task_judge.judge(ask("longer"), PAIRS))
    assert control["win_rate"].rows == ((1.0,), (0.0,), (0.5,))
    assert control["consistent"].value == 1.0


def test_a_reply_that_is_no_verdict_is_counted_and_not_guessed_at():
    found = task_judge.preferred(task_judge.judge(ask("chatty"), PAIRS))
    assert found["unparsable"].rows == ((1.0,), (1.0,), (0.0,))
    assert found["win_rate"].value == 0.5


@pytest.mark.parametrize(
    ("reply", "word"),
    [("A", "A"), (" b.\n", "B"), ("[[TIE]]", "TIE"), ("**Verdict: A**", "A"), ("The answer is B", None),
     ("Answer B", "B"), ("A or B", None), ("AB", None), ("", None), ("neither", None)],
)  # fmt: skip
def test_only_a_bare_verdict_is_one(reply, word):
    assert judge_ask.parse(reply) == word


def test_calibration_is_agreement_and_kappa_with_people():
    human = [("q", "long answer", "short", "a"), ("q", "a", "bbb", "b"), ("q", "cc", "d", "b"), ("q", "e", "f", "tie")]
    found = task_judge.calibration(ask("longer"), human, min_agreement=0.7)
    assert found["agreement"].value == 0.75
    assert found["kappa"].value == pytest.approx((0.75 - 0.3125) / (1 - 0.3125))  # chance: 2*1/16 + 1*2/16 + 1*1/16
    assert found["reliable"].value == 1.0
    assert task_judge.calibration(ask("longer"), human, min_agreement=0.8)["reliable"].value == 0.0
    assert task_judge.calibration(ask("longer"), [], min_agreement=0.0)["reliable"].value == 0.0


def test_a_server_judges_the_adapter_against_the_base(opened, engine, other, server, tmp_path):
    url, seen = server
    seen.clear()
    key, pairs = tmp_path / "key", tmp_path / "human.jsonl"
    key.write_text("secret-of-the-judge\n")
    key.chmod(0o600)
    pairs.write_text(json.dumps({"prompt": "q", "a": "yes, as it is red", "b": "no", "preferred": "a"}) + "\n")
    found = opened(
        judge_url=url, judge_model="longer", judge_key_file=str(key), calibration_data=str(pairs), min_agreement=0.9
    )
    assert values(measure.measure(found, engine.initial, stage="base"))["win_rate"] == 0.5  # the same answers
    num_asked = len(seen)
    event = values(measure.measure(found, other, stage="final"))
    assert (event["agreement"], event["reliable"], event["unparsable"], event["consistent"]) == (1.0, 1.0, 0.0, 1.0)
    assert num_asked == 2  # calibration, once
    assert len(seen) > num_asked
    assert {header for header, _ in seen} == {"Bearer secret-of-the-judge"}
    assert all(body["temperature"] == 0 for _, body in seen)
    lengths = [tuple(map(len, parts(body["messages"][0]["content"]))) for _, body in seen[num_asked:]]
    wins = sum(a > b for a, b in lengths[: len(lengths) // 2])
    losses = sum(a < b for a, b in lengths[: len(lengths) // 2])
    assert event["win_rate"] == pytest.approx(0.5 + (wins - losses) / 12)
    assert "secret-of-the-judge" not in (tmp_path / "events.jsonl").read_text()


def test_prompt_only_answers_come_from_the_base_with_the_prompt(opened, engine, server):
    url, seen = server
    task = {"judge_url": url, "judge_model": "first"}
    prompted = opened(**task, against="prompt-only", baseline_prompt="Say knee, knee, knee and nothing else at all.")
    before = len(seen)
    assert values(measure.measure(prompted, engine.initial, stage="base"))["win_rate"] == 0.5
    assert len(seen) > before  # the base answers otherwise with the prompt; without it there is nothing to ask
    before = len(seen)
    measure.measure(opened(**task), engine.initial, stage="base")
    assert len(seen) == before


def roomy(folder):
    """A tiny base that takes longer texts than the others do, as a question to a judge is long."""
    made = tiny.make_base(folder)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return made


@pytest.mark.parametrize("is_same_base", [True, False])
def test_a_model_of_this_process_judges_and_the_adapter_is_left_as_it_was(
    opened, load_tiny, tiny_base, other, tmp_path, is_same_base
):
    judge = roomy(tmp_path / "judge")
    engine = load_tiny(folder=judge if is_same_base else tiny_base)
    pairs = tmp_path / "human.jsonl"
    rows = [{"prompt": "q", "a": "x", "b": f"y{n}", "preferred": "a"} for n in range(2)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite_of_one = opened(judge_base=str(judge), calibration_data=str(pairs), max_rows=2, max_new_tokens=2)
    event = values(measure.measure(dataclasses.replace(suite_of_one, engine=engine), other, stage="final"))
    assert event["unparsable"] == 0.0  # the likeliest word is always one
    assert event["agreement"] in (0.0, 0.5, 1.0)
    assert all(torch.equal(value, other[name]) for name, value in adapter.read(engine.model).items())


def test_what_a_server_does_wrong_is_told_without_a_row(opened, engine, other, server):
    with pytest.raises(TransportError, match="does not answer as an OpenAI-compatible server does"):
        measure.measure(opened(judge_url=server[0], judge_model="broken"), other, stage="final")
    with pytest.raises(TransportError, match="start it") as caught:
        measure.measure(opened(judge_url="http://127.0.0.1:9/v1", judge_model="longer"), other, stage="final")
    assert "code" not in str(caught.value)


def test_keys_and_pairs_that_cannot_be_used_are_refused(opened, engine, other, server, tmp_path):
    task = {"judge_url": server[0], "judge_model": "longer"}
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        opened(**task, judge_key_file=str(tmp_path / "key"))
    (tmp_path / "human.jsonl").write_text(json.dumps({"prompt": "q", "a": "x", "b": "y", "preferred": "x"}))
    with pytest.raises(DataError, match="must hold a, b or tie"):
        opened(**task, calibration_data=str(tmp_path / "human.jsonl"))


def test_rows_that_will_leave_this_machine_are_announced(opened, capsys):
    opened(judge_url="https://judge.example/v1", judge_model="m", allow_remote=True)
    assert "sends its rows and all answers to judge.example, another machine" in capsys.readouterr().err
    opened(judge_url="http://127.0.0.1:9/v1", judge_model="m")
    assert capsys.readouterr().err == ""  # control


def test_another_judge_is_another_evaluation(opened, tiny_base, tmp_path):
    assert opened(judge_base=str(tiny_base)).sha256 != opened(judge_base=str(roomy(tmp_path / "judge"))).sha256
    with pytest.raises(ModelError):
        opened(judge_base=str(tmp_path / "nowhere"))
