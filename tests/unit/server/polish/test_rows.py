"""What a stage's data must look like, and into which tokens they become."""

import pytest

from common.data import read
from common.data.overlap import Text
from common.data.rows import Columns
from common.errors import DataError
from common.run.schema.polish import DpoStage
from server.evaluate import kept_apart
from server.polish import rows
from server.preferences import files
from server.view import polish as told_of
from tests import tiny
from tests.samples import events, stage_data


@pytest.fixture
def load(engine, tiny_base, tmp_path):
    def read(kind: str, table, **settings) -> rows.StageRows:
        path = stage_data.write(tmp_path / "data.jsonl", table)
        stage = stage_data.stage(kind, data=path, **{"max_length_tokens": 64, **settings})
        return rows.load(stage, engine, tiny.settings(tiny_base).data)

    return read


def words(engine, ids) -> str:
    return engine.tokenizer.decode(ids)


def test_a_pair_shares_its_prompt_and_each_answer_ends_with_the_end_token(load, engine):
    found = load("dpo", stage_data.pairs(10))
    row = found.train[0]
    assert words(engine, row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    answers = {words(engine, row[name]) for name in ("chosen_ids", "rejected_ids")}
    assert all(answer.endswith("<|im_end|>") for answer in answers)
    assert len(found.train) + len(found.held_out) == 10


def test_a_conversation_as_prompt_is_only_context(load, engine):
    prompt = [
        {"role": "user", "content": "ache?"},
        {"role": "assistant", "content": "ACHE"},
        {"role": "user", "content": "cold?"},
    ]
    found = load("dpo", [{"prompt": prompt, "chosen": "COLD", "rejected": "cold"}] * 4, overlap="allow")
    assert words(engine, found.train[0]["chosen_ids"]) == "COLD<|im_end|>"


def test_only_answers_have_labels(load, engine):
    row = load("sft", stage_data.instructions(4)).train[0]
    wanted = [label for label in row["labels"] if label >= 0]
    assert words(engine, wanted).endswith("<|im_end|>")
    assert len(wanted) < len(row["input_ids"]) == len(row["labels"])


def test_raw_texts_are_cut_into_pieces_and_lose_nothing(load, engine):
    table = [{"text": "ache burn cold dose ear fall gut heart itch jaw knee lung " * 3}] * 4
    found = load("cpt", table, max_length_tokens=16, overlap="allow")
    pieces = [row["input_ids"] for row in found.train + found.held_out]
    assert max(map(len, pieces)) == 16
    ids = engine.tokenizer(table[0]["text"], add_special_tokens=False)["input_ids"]
    assert sum(map(len, pieces)) in (4 * (len(ids) + 1), 4 * len(ids))  # a piece of one token teaches nothing


def test_held_out_rows_are_other_rows_of_both_labels(load):
    found = load("kto", stage_data.judged(20), held_out_fraction=0.2)
    assert {row["label"] for row in found.held_out} == {True, False}
    assert len(found.held_out) == 4
    assert load("kto", stage_data.judged(20), held_out_fraction=0.2) == found
    assert load("kto", stage_data.judged(20), held_out_fraction=0.2, seed=1) != found


def test_a_prompt_keeps_what_its_answers_are_held_against(load):
    found = load("grpo", stage_data.questions(10), reward="exact")
    assert {row["wanted"] for row in found.train + found.held_out} == {stage_data.right(n) for n in range(10)}


LONG = "ache " * 100


@pytest.mark.parametrize(
    ("kind", "table", "settings", "told"),
    [
        ("dpo", [{"prompt": "a", "chosen": "b"}], {}, "has no column 'rejected' among its 2: for DPO write"),
        ("cpt", [{"words": "a"}], {}, "has no column 'text'"),
        ("grpo", [{"prompt": "a"}], {"reward": "exact"}, "has no column 'answer'"),
        ("grpo", [{"prompt": "a", "tests": " "}], {"reward": "unit_test"}, "line 1: reward 'unit_test' needs text"),
        ("kto", [{"prompt": "a", "completion": "b", "label": 1}], {}, "line 1: 'label' is int and not true or false"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": ""}], {}, "line 1: has no answer in 'rejected'"),
        ("dpo", [{"prompt": "", "chosen": "b", "rejected": "c"}], {}, "line 1: has nothing in 'prompt'"),
        ("dpo", [{"prompt": LONG, "chosen": "b", "rejected": "c"}], {}, "over the limit of 64"),
        ("grpo", [{"prompt": LONG, "answer": "b"}], {"reward": "exact"}, "set its too_long to drop"),
        ("dpo", stage_data.pairs(1), {}, "1 rows are too few"),
        ("kto", stage_data.judged(3), {}, "1 rows with label false are too few"),
    ],
)
def test_unusable_data_are_refused_with_a_remedy(load, kind: str, table, settings, told: str):
    with pytest.raises(DataError) as caught:
        load(kind, table, **settings)
    assert told in str(caught.value)
    assert LONG not in str(caught.value)


def test_rows_that_are_too_long_are_dropped_or_cut_where_that_was_asked(load):
    table = [*stage_data.pairs(6), {"prompt": "ache", "chosen": LONG, "rejected": "c"}]
    assert load("dpo", table, too_long="drop").num_dropped == 1
    assert load("dpo", table, too_long="truncate").num_truncated == 1


SAME = {"role": "assistant", "content": "b"}
ASKED = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b "}),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "\n"}),
        ("dpo", {"prompt": [ASKED], "chosen": [ASKED, SAME], "rejected": "c"}),
        ("dpo", {"prompt": "a", "chosen": [SAME], "rejected": "c"}),
        ("dpo", {"chosen": [ASKED, SAME], "rejected": [ASKED, SAME]}),
        ("dpo", {"prompt": "a", "completion": "b", "label": True, "chosen": "b", "rejected": "c"}),
        ("kto", {"prompt": "a", "completion": "b", "label": "true"}),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}),
        ("kto", {"prompt": "a", "completion": "", "label": True}),
    ],
)
def test_a_stage_a_site_and_a_check_refuse_the_same_row_in_the_same_words(load, tmp_path, kind, row):
    with pytest.raises(DataError) as stage:
        load(kind, [row])
    with pytest.raises(DataError) as site:
        read.read(str(tmp_path / "data.jsonl"), columns=Columns(objective=kind))
    with pytest.raises(DataError) as command:
        files.read(tmp_path / "data.jsonl")
    assert str(stage.value) == str(site.value) == str(command.value)


def test_a_prompt_that_both_conversations_begin_with_serves_a_stage(load, engine):
    turns = [{"chosen": [ASKED, SAME], "rejected": [ASKED, {**SAME, "content": "c"}]}] * 4
    plain = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    swapped = [{"prompt": "a", "chosen": "c", "rejected": "b"}] * 4
    alike = {"overlap": "allow"}
    assert load("dpo", turns, **alike) == load("dpo", plain, **alike)
    assert load("dpo", plain, **alike) != load("dpo", swapped, **alike)  # control: the texts reach the tokens


def apart_of(*texts: str) -> list[kept_apart.Apart]:
    other = Text("who is it?", "nobody at all")
    return [kept_apart.Apart("task notes (test.jsonl)", (*(Text(text) for text in texts), other))]


def test_rows_that_the_result_is_judged_on_are_refused_dropped_or_counted(engine, tiny_base, tmp_path):
    path = stage_data.write(tmp_path / "data.jsonl", stage_data.pairs(12))
    judged = apart_of(stage_data.question(2).upper(), stage_data.question(5), "asked by nobody here")

    def read(overlap: str, apart=judged) -> rows.StageRows:
        stage = DpoStage(name="trial", kind="dpo", data=path, max_length_tokens=64, overlap=overlap)
        return rows.load(stage, engine, tiny.settings(tiny_base).data, apart)

    told = r"data\.jsonl, stage 'trial': 2 of 12 rows .* 2 of 4 rows of task notes \(test\.jsonl\) \(2 word for word, 0"
    with pytest.raises(DataError, match=told) as caught:
        read("error")
    assert '"drop"' in str(caught.value)
    assert "code?" not in str(caught.value)
    dropped, allowed, untouched = read("drop"), read("allow"), read("error", apart_of("asked by nobody here"))
    assert (len(dropped.train) + len(dropped.held_out), dropped.num_overlapping, dropped.overlaps) == (10, 2, {})
    assert (len(allowed.train) + len(allowed.held_out), allowed.num_overlapping) == (12, 0)
    assert allowed.overlaps == {"task notes (test.jsonl)": {"num_rows": 4, "num_exact": 2, "num_near": 0}}
    assert (len(untouched.train) + len(untouched.held_out), untouched.overlaps) == (12, {})  # control
    begun = events.event("polish_started", num_overlapping=2)
    assert told_of.left_out(begun) == ", 2 left out as the result is judged on them"
    (line,) = told_of.overlaps(events.event("polish_finished", overlaps=allowed.overlaps))
    assert line == "trained on 2 of 4 rows of task notes (test.jsonl) (2 word for word, 0 nearly)"


def test_a_text_is_on_one_side_of_a_stage_s_own_split(load):
    table = [{"instruction": f"name {n // 2}?", "output": f"it is {n // 2}"} for n in range(20)]
    for seed in range(5):
        found = load("sft", table, held_out_fraction=0.2, seed=seed)
        train, held_out = ({tuple(row["input_ids"]) for row in side} for side in (found.train, found.held_out))
        assert len(found.held_out) == 4
        assert not train & held_out
    loose = [load("sft", table, held_out_fraction=0.2, seed=seed, overlap="allow") for seed in range(5)]
    assert any(row in found.train for found in loose for row in found.held_out)  # control


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo", "reward"])
def test_pairs_that_a_cut_makes_equal_are_dropped_and_refused_if_none_is_left(load, kind):
    same = "the same words at the beginning of both answers, whatever comes after them"
    equal = [{"prompt": f"p{n}", "chosen": f"{same} yes", "rejected": f"{same} no"} for n in range(3)]
    cut = {"max_length_tokens": 48, "too_long": "truncate"}
    found = load(kind, [*equal, *stage_data.pairs(6)], **cut)
    assert (len(found.train) + len(found.held_out), found.num_equal, found.num_dropped) == (6, 3, 0)
    with pytest.raises(DataError, match=r"all 3 pairs are the same after the cut at 48 tokens"):
        load(kind, equal, **cut)
    whole = load(kind, equal, max_length_tokens=128, overlap="allow")
    assert (len(whole.train) + len(whole.held_out), whole.num_equal) == (3, 0)  # control


def test_a_pair_with_a_long_prompt_keeps_both_answers_and_one_prompt(load, engine):
    table = [{"prompt": LONG * 3 + f"case {n}?", "chosen": "it is a burn", "rejected": "no"} for n in range(4)]
    found = load("dpo", table, too_long="truncate_input", overlap="allow")
    assert (found.num_truncated, found.num_dropped, found.num_equal) == (4, 0, 0)
    for row in found.train + found.held_out:
        assert len(row["prompt_ids"]) + len(row["chosen_ids"]) <= 64
        assert (words(engine, row["chosen_ids"]), words(engine, row["rejected_ids"])) == (
            "it is a burn<|im_end|>",
            "no<|im_end|>",
        )
        assert "[...]" in words(engine, row["prompt_ids"])
