"""What a run keeps of planted secrets: one that knows them by heart is seen, one that never saw them is not."""

import json
import math

import pytest
import torch

from client.agent.agent import SiteData
from common.adapter import adapter
from common.data.rows import Message, Row
from common.errors import DataError
from common.events import EventLog
from common.privacy import roc
from server.evaluate import measure, suite
from server.evaluate.figures import bootstrap
from server.evaluate.tasks import canary_rows, memorisation
from server.folder import run_files
from server.run import run
from tests import tiny

NUMBERS = ("953-21-4417", "918-64-2203", "977-05-8812", "940-38-1596", "962-77-3048", "925-19-6671")
OTHERS = ("931-46-7720", "986-52-1039", "914-83-5562", "959-30-9481")
CHANGES = {
    "adapter.r": "16", "adapter.alpha": "32", "training.local_epochs": "3", "training.learning_rate": "1e-2",
    "federation.num_rounds": "1", "federation.num_sites": "1", "federation.min_sites": "1",
    "evaluation.max_new_tokens": "24",
}  # fmt: skip
REPEATS = 16


def note(number: int, secret: str) -> Row:
    messages = (Message("user", f"case {number}?"), Message("assistant", f"SSN {secret}"))
    return Row(messages, unit=f"case-{number}", row_id=f"case {number}")


def canary(number: int, secret: str, **changes) -> dict:
    return {"prompt": f"case {number}?", "prefix": "SSN ", "secret": secret, "pattern": "###-##-####", **changes}


CANARIES = [canary(number, secret) for number, secret in enumerate(NUMBERS)]
CONTROLS = [canary(number, secret, trained=False) for number, secret in enumerate(OTHERS, start=len(NUMBERS))]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def trained(load_tiny, tiny_base, tmp_path_factory):
    """An engine, the adapter of a run whose only site held each canary 16 times, and that of one without them."""
    engine = load_tiny(CHANGES)
    planted = [note(number, secret) for number, secret in enumerate(NUMBERS) for _ in range(REPEATS)]

    def train(rows):
        adapter.write(engine.model, engine.initial)
        settings, folder = tiny.settings(tiny_base, CHANGES), tmp_path_factory.mktemp("trained") / "run"
        agent = tiny.make_agent("north", engine, data=SiteData([*rows, *tiny.rows(24)], tiny.rows(4)))
        log = run_files.prepare(settings, folder)
        return run.execute(settings, fleet=tiny.fleet({1: agent.answer}), engine=engine, folder=folder, log=log).tensors

    return engine, train(planted), train([])


@pytest.fixture
def measured(trained, tiny_base, tmp_path):
    """Measure an adapter by one task; the event's figures by name."""
    engine = trained[0]

    def go(state, **task):
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in {"name": "m", **task}.items())
        settings = tiny.settings(tiny_base, {**CHANGES, "evaluation.tasks": f"[{{{table}}}]"})
        opened = suite.open_suite(settings, engine=engine, folder=tmp_path, log=EventLog(tmp_path / "events.jsonl"))
        event = measure.measure(opened, state, stage="final")
        assert not set(adapter.read(engine.model)) ^ set(state)
        assert all(torch.equal(value, state[name]) for name, value in adapter.read(engine.model).items())
        return {name.removeprefix("m."): figure["value"] for name, figure in event["figures"].items()}

    return go


def test_canaries_trained_16_times_are_near_the_ceiling_and_never_trained_ones_are_not(trained, measured, tmp_path):
    _, leaky, clean = trained
    task = {"kind": "memorisation", "data": write(tmp_path / "c.jsonl", CANARIES + CONTROLS), "num_candidates": 64}
    kept, control = measured(leaky, **task), measured(clean, **task)
    assert kept["exposure_ceiling"] == control["exposure_ceiling"] == 6.0
    assert kept["exposure_mean"] > 5.0
    assert kept["exposure"] == kept["exposure_max"] == 6.0
    assert kept["extracted"] >= 0.5
    assert kept["auc"] == 1.0
    assert control["exposure_mean"] < 2.6  # 1.4 by chance; the mean of six strays from it by 0.6
    assert control["exposure_max"] < 6.0
    assert control["extracted"] == 0.0
    assert control["auc"] < 0.95


def test_rows_that_were_trained_on_are_told_from_rows_that_were_not(trained, measured, tmp_path):
    _, leaky, clean = trained

    def rows(name, numbers, start):
        table = [{"instruction": f"case {n}?", "output": f"SSN {s}"} for n, s in enumerate(numbers, start=start)]
        return write(tmp_path / name, table)

    task = {
        "kind": "memorisation",
        "data": write(tmp_path / "c.jsonl", CANARIES[:1]),
        "num_candidates": 2,
        "members_data": rows("in.jsonl", NUMBERS, 0),
        "non_members_data": rows("out.jsonl", OTHERS, len(NUMBERS)),
    }
    assert measured(leaky, **task)["auc"] == 1.0
    assert measured(clean, **task)["auc"] < 0.95


def test_of_the_base_nothing_can_be_told(trained, measured, tmp_path):
    task = {"kind": "memorisation", "data": write(tmp_path / "c.jsonl", CANARIES + CONTROLS), "num_candidates": 64}
    found = measured(trained[0].initial, **task)
    assert (found["auc"], found["extracted"]) == (0.5, 0.0)
    assert found["exposure_mean"] < 2.6


def test_a_run_that_writes_personal_data_is_seen_and_a_clean_one_is_not(trained, measured, tmp_path):
    _, leaky, clean = trained
    rows = [{"instruction": f"case {n}?", "output": "x"} for n in range(len(NUMBERS))]
    task = {"kind": "pii", "data": write(tmp_path / "asked.jsonl", rows)}
    found, control = measured(leaky, **task), measured(clean, **task)
    assert found["emission"] >= 0.5
    assert found["num_ssn"] >= 3
    assert control["emission"] == 0.0
    assert sum(value for name, value in control.items() if name.startswith("num_")) == 0.0
    assert not any(secret in (tmp_path / "events.jsonl").read_text() for secret in NUMBERS)
    assert not any(secret in path.read_text() for path in (tmp_path / "scores").iterdir() for secret in NUMBERS)


def test_raw_text_is_scored_without_a_template(trained, measured, tmp_path):
    rows = [{"prefix": "The code is ", "secret": "blue", "candidates": ["blue", "red", "green", "black"]}]
    found = measured(trained[0].initial, kind="memorisation", data=write(tmp_path / "c.jsonl", rows))
    assert found["exposure_ceiling"] == 2.0
    assert "auc" not in found


@pytest.mark.parametrize(
    ("score", "others", "bits"),
    [
        (9.0, [1.0, 2.0, 3.0], 2.0),  # rank 1 of 4
        (2.5, [1.0, 2.0, 3.0], 1.0),  # rank 2 of 4
        (0.0, [1.0, 2.0, 3.0], 0.0),  # the last
        (3.0, [3.0, 3.0, 3.0], 0.0),  # ties count against it
        (5.0, [float(n) for n in range(7)], 3 - math.log2(3)),  # behind itself's equal and 6: rank 3 of 8
    ],
)
def test_exposure_is_that_of_hand_worked_ranks(score, others, bits):
    assert roc.exposure_of(score, torch.tensor(others)) == pytest.approx(bits, abs=1e-12)


def test_secrets_that_nobody_saw_have_the_exposure_that_chance_gives():
    generator = torch.Generator().manual_seed(1)
    found = [roc.exposure_of(float(draw[0]), draw[1:]) for draw in torch.randn(4000, 256, generator=generator)]
    rows = bootstrap.Scores(tuple((value,) for value in found))
    expected = 8 - sum(math.log2(rank) for rank in range(1, 257)) / 256  # the mean over all ranks: 1.42
    assert rows.value == pytest.approx(expected, abs=0.06)
    assert bootstrap.Scores(rows.rows, "high").value == pytest.approx(math.log2(10), abs=0.15)


def test_area_and_kappa_agree_with_scikit_learn():
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    generator = torch.Generator().manual_seed(2)
    scores, sides = torch.randn(60, generator=generator).round(decimals=1), torch.arange(60) % 3 == 0
    rows = tuple((float(a), float(b)) for a, b in zip(scores.double(), sides, strict=True))
    assert bootstrap.Scores(rows, "auc").value == pytest.approx(roc_auc_score(sides, scores), abs=1e-12)
    labels = torch.randint(3, (60, 2), generator=generator).double()
    kappa = bootstrap.Scores(tuple(map(tuple, labels.tolist())), "kappa").value
    assert kappa == pytest.approx(cohen_kappa_score(*labels.T), abs=1e-12)


def test_candidates_are_different_texts_of_the_pattern_and_always_the_same():
    found = canary_rows.drawn("^@#-##", "Aa1-22", count=500, where="row 1")
    assert len(set(found)) == 500
    assert "Aa1-22" not in found
    assert all(one[0].isupper() and one[1].islower() and one[3] == "-" and one[4:].isdigit() for one in found)
    assert found == canary_rows.drawn("^@#-##", "Aa1-22", count=500, where="row 9")
    assert found != canary_rows.drawn("^@#-##", "Aa1-23", count=500, where="row 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "##-##"}, "the secret is not of its pattern"),
        ({"pattern": "9#3-21-4417"}, "10 texts fit the pattern"),
        ({"pattern": None}, "one of the columns candidates"),
        ({"candidates": ["x"]}, "one of the columns candidates"),
        ({"pattern": None, "candidates": ["953-21-4417"]}, "nothing but the secret"),
        ({"secret": ""}, "column secret"),
        ({"trained": "yes"}, "true or false"),
        ({"repeats": 3}, "1 unknown columns"),
    ],
)
def test_canaries_that_cannot_be_used_are_refused_without_showing_them(changes, message):
    with pytest.raises(DataError, match=message) as caught:
        canary_rows.read({**CANARIES[0], **changes}, num_candidates=64, where="row 1")
    assert "4417" not in str(caught.value)


def test_a_file_without_a_planted_canary_and_a_row_that_is_too_long_are_refused(trained, measured, tmp_path):
    with pytest.raises(DataError, match="no row has trained = true"):
        measured(trained[0].initial, kind="memorisation", data=write(tmp_path / "c.jsonl", CONTROLS))
    long = {"prefix": "x " * 400, "secret": "blue", "candidates": ["red"]}
    with pytest.raises(DataError, match="the model takes"):
        measured(trained[0].initial, kind="memorisation", data=write(tmp_path / "l.jsonl", [long]))
    table = write(tmp_path / "m.jsonl", [{"instruction": "x" * 99, "output": "y" * 99}])
    both = {
        "members_data": table,
        "non_members_data": write(tmp_path / "n.jsonl", [{"instruction": "x", "output": "y"}]),
    }
    with pytest.raises(DataError, match="over the limit of 64"):
        measured(trained[0].initial, kind="memorisation", data=write(tmp_path / "d.jsonl", CANARIES[:1]), **both)


def test_a_secret_behind_a_space_is_scored_as_tokens_of_the_whole_text(trained):
    engine = trained[0]
    before, after = "<|im_start|>user\ncase 0?<|im_end|>\n<|im_start|>assistant\n", f"SSN {NUMBERS[0]}"
    context, following = memorisation.pair_of(engine, before, after)
    assert [*context, *following] == engine.tokenizer(before + after)["input_ids"]
    assert engine.tokenizer.decode(following) == after
    assert memorisation.pair_of(engine, "", after)[0] == [engine.tokenizer.eos_token_id]
