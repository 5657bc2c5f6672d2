"""Every kind of stage moves its objective in 20 steps on a tiny model; data that say nothing do not move it."""

import copy
import dataclasses
import gc

import pytest
import torch

from common.adapter import adapter
from common.errors import ModelError
from common.run.schema.polish import DpoStage
from server.polish import borrow, rows, stages
from server.report import symptoms
from tests import tiny
from tests.samples import stage_data
from tests.samples.events import view

COMMON = {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "max_length_tokens": 64, "held_out_fraction": 0.2}
SAMPLED = {"batch_size": 8, "max_new_tokens": 4, "schedule": "constant", "held_out_fraction": 0.3}
NO_CAPITALS = {"reward": "regex", "pattern": "[^A-Z]*", "learning_rate": 3e-2, **SAMPLED}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stage-data")
    tables = {
        "pairs": stage_data.pairs(),
        "equal_pairs": stage_data.pairs(20, is_both_ways=True),
        "judged": stage_data.judged(),
        "equal_judged": stage_data.judged(20, is_both_ways=True),
        "instructions": stage_data.instructions(),
        "texts": stage_data.texts(),
        "questions": stage_data.questions(),
        "letters": [{"instruction": row["prompt"], "output": "A"} for row in stage_data.questions()],
        "checked": [{"prompt": row["prompt"], "answer": "A", "tests": "pass"} for row in stage_data.questions()],
        "impossible": [{**row, "answer": "B B", "tests": "assert False"} for row in stage_data.questions()],
    }
    return {name: stage_data.write(folder / f"{name}.jsonl", table) for name, table in tables.items()}


@pytest.fixture
def play(engine, tiny_base, files):
    """Play one stage from an adapter; gives what it did."""

    def run(
        kind: str, data: str, *, start=None, judge=None, change=None, on=None, tell=lambda *_: None, **settings
    ) -> stages.Played:
        target = on or engine
        stage = stage_data.stage(kind, data=files[data], **{**COMMON, **settings})
        found = rows.load(stage, target, tiny.settings(tiny_base).data)
        found = change(found) if change else found
        begin = target.initial if start is None else start
        return stages.play(stage, begin, engine=target, data=found, tell=tell, judge=judge)

    return run


def moved(played: stages.Played, name: str) -> float:
    return played.after[name] - played.before[name]


@pytest.mark.parametrize(
    ("kind", "data"), [("sft", "instructions"), pytest.param("cpt", "texts", marks=pytest.mark.slow)]
)
def test_imitation_lowers_the_loss_on_rows_it_has_not_seen(play, kind: str, data: str):
    assert moved(play(kind, data), "loss") < -1.0


@pytest.mark.parametrize(
    ("kind", "data"), [("sft", "instructions"), pytest.param("cpt", "texts", marks=pytest.mark.slow)]
)
def test_imitation_of_other_answers_does_not(play, kind: str, data: str):
    def spoil(found: rows.StageRows) -> rows.StageRows:
        """Train on other tokens in the place of those that the held-out rows have."""
        other = [{**row, "labels": [-100 if t < 0 else 3 + t % 7 for t in row["labels"]]} for row in found.train]
        return dataclasses.replace(found, train=other)

    assert moved(play(kind, data, change=spoil), "loss") > 0.0


@pytest.mark.parametrize(
    ("kind", "data", "equal"),
    [
        ("dpo", "pairs", "equal_pairs"),
        ("kto", "judged", "equal_judged"),
        ("reward", "pairs", "equal_pairs"),
        pytest.param("orpo", "pairs", "equal_pairs", marks=pytest.mark.slow),
        pytest.param("simpo", "pairs", "equal_pairs", marks=pytest.mark.slow),
    ],
)
def test_preferences_widen_the_margin_and_pairs_that_prefer_nothing_do_not(play, kind: str, data: str, equal: str):
    real, control = moved(play(kind, data), "margin"), moved(play(kind, equal), "margin")
    assert real > 0.03
    assert control < real / 4


@pytest.mark.parametrize(
    "settings", [{"loss": "ipo"}, {"loss": "robust", "label_smoothing": 0.1}, {"label_smoothing": 0.1}]
)
@pytest.mark.slow
def test_the_other_losses_of_dpo_widen_the_margin_and_pairs_that_prefer_nothing_do_not(play, settings):
    real, control = (moved(play("dpo", data, **settings), "margin") for data in ("pairs", "equal_pairs"))
    assert real > 0.03
    assert control < real / 4


def test_a_verifiable_reward_rises_and_a_constant_one_teaches_nothing(play, engine):
    assert moved(play("grpo", "questions", **NO_CAPITALS), "reward") > 0.1
    control = play("grpo", "questions", **{**NO_CAPITALS, "pattern": "[^ÿ]*"})
    assert control.before["reward"] == control.after["reward"] == 1.0
    assert all(torch.equal(control.tensors[name], engine.initial[name]) for name in engine.initial)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["exact", "json", "unit_test"])
def test_the_other_verifiable_rewards_rise_and_what_no_answer_earns_teaches_nothing(play, engine, tmp_path, reward):
    """Answers of one token, so that right ones come by chance: for `exact` after a little imitation."""
    number, nothing = tmp_path / "number.json", tmp_path / "nothing.json"
    number.write_text('{"type": "integer"}')
    nothing.write_text("false")
    start = play("sft", "letters", steps=4, batch_size=8).tensors if reward == "exact" else engine.initial
    own = {"json": {"json_schema": str(number)}, "unit_test": {"test_timeout_s": 5.0}}.get(reward, {})
    settings = {**SAMPLED, **own, "start": start, "reward": reward, "max_new_tokens": 1, "learning_rate": 3e-2}
    played = play("grpo", "checked", **settings)
    assert moved(played, "reward") > 0.1
    control = play("grpo", "impossible", **{**settings, **({"json_schema": str(nothing)} if reward == "json" else {})})
    assert control.before["reward"] == control.after["reward"] == 0.0
    assert all(torch.equal(control.tensors[name], start[name]) for name in start)


@pytest.mark.slow
def test_a_reward_model_s_score_rises_and_a_model_that_scores_all_alike_teaches_nothing(play, engine):
    judge = play("reward", "pairs").reward
    settings = {"reward_stage": "judge", **SAMPLED}
    assert moved(play("rloo", "questions", judge=judge, **settings), "reward") > 0.1
    blind = dataclasses.replace(judge, head=torch.zeros_like(judge.head))
    control = play("rloo", "questions", judge=blind, **settings)
    assert control.after["reward"] == 0.0
    gone = max(float((control.tensors[name] - engine.initial[name]).abs().max()) for name in engine.initial)
    assert gone < 1e-6
    assert set(engine.model.peft_config) == {"default"}


def test_a_reward_model_is_something_of_its_own_and_leaves_the_adapter_alone(play, engine):
    played = play("reward", "pairs", steps=3)
    assert all(torch.equal(played.tensors[name], engine.initial[name]) for name in engine.initial)
    assert played.reward.head.shape == (1, 64)
    assert any(not torch.equal(played.reward.tensors[name], engine.initial[name]) for name in engine.initial)
    now = adapter.read(engine.model)
    assert all(torch.equal(now[name], engine.initial[name]) for name in now)


def test_the_reference_is_the_start_or_the_base(play, engine):
    start = play("sft", "instructions", steps=2).tensors
    from_start = play("dpo", "pairs", start=start, steps=1, learning_rate=1e-12)
    assert from_start.before["margin"] == 0.0
    assert from_start.before["loss"] == pytest.approx(0.693147, abs=1e-5)
    from_base = play("dpo", "pairs", start=start, steps=1, learning_rate=1e-12, reference="base")
    assert abs(from_base.before["margin"]) > 1e-4


@pytest.mark.parametrize(
    ("kind", "data", "reference"),
    [("dpo", "pairs", "start"), pytest.param("kto", "judged", "base", marks=pytest.mark.slow)],
)
def test_no_second_base_is_in_memory_while_a_stage_with_a_reference_trains(play, engine, kind, data, reference):
    weight = engine.model.get_input_embeddings().weight

    def copies() -> int:
        found = [one for one in gc.get_objects() if type(one) is type(weight) and one.shape == weight.shape]
        return len({one.data_ptr() for one in found})

    before, during = copies(), []
    play(kind, data, steps=1, reference=reference, tell=lambda *_: during.append(copies()))
    assert during
    assert set(during) == {before}
    second = copy.deepcopy(engine.model)  # control: what TRL makes of a model that is no peft model
    assert copies() > before
    del second


def test_the_reference_of_an_adapter_with_cores_is_the_same_function(play, load_tiny):
    cored = load_tiny({"aggregation.method": "ravan", "aggregation.num_heads": "2"})
    generator = torch.Generator().manual_seed(3)
    start = {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in cored.initial.items()}
    played = play("dpo", "pairs", start=start, on=cored, steps=1)
    assert played.before["margin"] == pytest.approx(0.0, abs=1e-4)
    assert played.before["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert not any(torch.equal(played.tensors[name], start[name]) for name in start)
    from_base = play("dpo", "pairs", start=start, on=cored, steps=1, learning_rate=1e-12, reference="base")
    assert abs(from_base.before["margin"]) > 1e-2  # control


def test_the_engine_comes_back_as_it_was(play, engine):
    ids = torch.tensor([[5, 6, 7, 8]], device=engine.device)
    base = engine.model.get_base_model()
    names, config = set(vars(base)), base.config.to_dict()
    before = engine.model(input_ids=ids).logits
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for kind, data in [("dpo", "pairs"), ("reward", "pairs")]:
        play(kind, data, steps=1)
    adapter.write(engine.model, engine.initial)
    assert torch.equal(engine.model(input_ids=ids).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(base)
    assert set(vars(base)) == names
    assert base.config.to_dict() == config
    assert set(engine.model.peft_config) == {"default"}
    assert adapter.specs(adapter.read(engine.model)) == engine.tensor_specs


@pytest.fixture(scope="module")
def nf4(load_tiny):
    return load_tiny({"model.quantization": "nf4"})


def dtypes(engine) -> set[torch.dtype]:
    """Of what is trained."""
    return {parameter.dtype for parameter in adapter.parameters(engine.model).values()}


SLOWER = [("cpt", "texts"), ("kto", "judged"), ("orpo", "pairs"), ("simpo", "pairs"), ("grpo", "questions")]


@pytest.mark.parametrize(
    ("kind", "data"),
    [("sft", "instructions"), ("dpo", "pairs"), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOWER)],
)
def test_the_adapter_over_a_quantised_base_stays_float32(play, nf4, kind: str, data: str):
    played = play(kind, data, steps=2, on=nf4, **(NO_CAPITALS if kind == "grpo" else {}))
    assert dtypes(nf4) == {torch.float32}
    changed = [tensor for name, tensor in played.tensors.items() if not torch.equal(tensor, nf4.initial[name])]
    assert changed
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in changed)


def test_trl_alone_would_have_cast_it_to_bfloat16(nf4, files, tiny_base, tmp_path):
    from server.polish import trainers

    stage = DpoStage(name="trial", kind="dpo", data=files["pairs"], **COMMON)
    found = rows.load(stage, nf4, tiny.settings(tiny_base).data)
    with borrow.lent(nf4):
        trainers.make(stage, nf4, found, scratch=str(tmp_path), tell=lambda *_: None)
        assert torch.bfloat16 in dtypes(nf4)
        borrow.write_masters(nf4, nf4.initial)
        assert dtypes(nf4) == {torch.float32}


def test_an_adapter_that_diverged_goes_no_further(play, engine):
    far = {name: torch.full_like(tensor, 2e6) for name, tensor in engine.initial.items()}
    with pytest.raises(ModelError, match="diverged; lower the stage's learning_rate"):
        play("sft", "instructions", start=far, steps=1, learning_rate=1e-12)


def test_a_preference_stage_tells_how_its_answers_look_and_imitation_does_not(play):
    played = play("dpo", "pairs", steps=1)
    assert {"length", "repetition"} <= set(played.before) & set(played.after)
    assert 0.0 <= played.before["repetition"] <= 1.0
    assert 0.0 < played.before["length"] <= 64.0
    assert not {"length", "repetition"} & set(play("sft", "instructions", steps=1).before)  # control


def test_repetition_is_the_share_of_pieces_of_four_tokens_that_came_before():
    from server.polish.stages import repeated

    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repeated([5] * 10) == pytest.approx(6 / 7)
    assert repeated([1, 2, 3]) == repeated(range(50)) == 0.0


def test_a_stage_that_ruins_the_answers_is_told_as_a_collapse_and_one_that_does_not_is_none(play):
    def signs(**settings) -> str:
        played = play("dpo", "pairs", **settings)
        log = [{"kind": "polish_finished", "stage": "align", "before": played.before, "after": played.after}]
        return " ".join(one.evidence for one in symptoms.symptoms(view(log)))

    assert "answers repeat" in signs(learning_rate=0.3)
    assert signs(learning_rate=1e-5) == ""  # control


def test_a_stage_without_memory_names_the_settings_that_need_less_and_the_report_the_symptom():
    stage = DpoStage(name="align", kind="dpo", data="x", micro_batch_size=2)
    message = r"'align': out of memory; lower its micro_batch_size \(2 rows now\)"
    with pytest.raises(ModelError, match=message) as told, borrow.memory_named(stage):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    failed = {"kind": "run_failed", "error": "ModelError", "reason": str(told.value)}
    assert [one.name for one in symptoms.symptoms(view([failed]))] == ["out of memory"]
    with pytest.raises(ValueError, match="another"), borrow.memory_named(stage):  # control
        raise ValueError("another")
