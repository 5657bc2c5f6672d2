"""Examples, references and losses of preferences on a real model, and what the mean gradient makes of them."""

import dataclasses

import pytest
import torch

from client.train.loop import mean_gradient
from common.adapter import adapter, start
from common.data.rows import Message
from common.errors import DataError
from common.loss import likelihood, objectives, preference_score
from common.loss.objectives import Pair, Rated
from common.model import base
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from common.text import prompts
from tests import tiny

TOLERANCE = 1e-6
MAKE = {"dpo": tiny.pair, "kto": tiny.rated}
NAMES = ["dpo", "kto"]


def settings(name: str, **changes: str):
    return tiny.settings("tiny", {"training.objective.kind": f'"{name}"', **changes})


def encoded(engine, name: str, count: int = 7, **changes: str):
    rows = [MAKE[name](number) for number in range(count)]
    return objectives.encode(engine, rows, settings(name, **changes))[0]


@pytest.fixture
def moved(engine):
    """An adapter that has left the start, in training mode, and examples that know where the start was."""

    def ready(name: str, count: int = 7):
        examples = preference_score.with_references(engine, encoded(engine, name, count), engine.initial, batch_size=4)
        generator = torch.Generator().manual_seed(1)
        values = {key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in engine.initial.items()}
        adapter.write(engine.model, values)
        engine.model.train()
        examples = [apart(example, number) for number, example in enumerate(examples)]
        return examples, settings(name, **{"training.objective.beta": "0.5"}).training.objective

    return ready


def apart(example, number: int):
    """The same example, with gains on answers to other prompts that are large and unequal."""
    if isinstance(example, Pair):
        return example
    return dataclasses.replace(example, reference=(example.reference[0], example.reference[1] - number))


def test_answers_are_tokenised_as_those_of_any_other_row(engine):
    run = settings("dpo")
    row = tiny.pair(3)
    (pair,), report = objectives.encode(engine, [row], run)
    plain, _ = base.encode(engine, [tiny.row(3)], run.data)
    assert pair.chosen == plain[0]
    assert pair.rejected.input_ids != pair.chosen.input_ids
    num_shared = pair.chosen.is_answer.index(True)
    assert pair.rejected.input_ids[:num_shared] == pair.chosen.input_ids[:num_shared]
    assert (report.num_rows, report.num_dropped) == (1, 0)
    assert (pair.unit, [len(rated.rows) for rated in encoded(engine, "kto")]) == (row.unit, [1] * 7)


def test_an_earlier_answer_of_the_prompt_is_not_learnt_from(engine):
    turns = (Message("user", "ache"), Message("assistant", "ACHE"), Message("user", "burn"))
    chosen, rejected = ((*turns, Message("assistant", text)) for text in ("BURN", "COLD"))
    row = dataclasses.replace(tiny.pair(0), messages=chosen, rejected=rejected, num_context=3)
    ((pair,), _) = objectives.encode(engine, [row], settings("dpo"))
    text = engine.tokenizer.decode([i for i, told in zip(*dataclasses.astuple(pair.chosen)[:2], strict=True) if told])
    assert "BURN" in text
    assert "ACHE" not in text


def test_a_pair_goes_if_one_of_its_answers_is_too_long(engine):
    long = dataclasses.replace(
        tiny.pair(0), rejected=(tiny.pair(0).messages[0], Message("assistant", "a long answer " * 20))
    )
    run = settings("dpo", **{"data.too_long": '"drop"'})
    kept, report = objectives.encode(engine, [long, tiny.pair(1)], run)
    assert (len(kept), report.num_dropped) == (1, 1)
    with pytest.raises(DataError, match="no answer token is left in any of 1 rows"):
        objectives.encode(engine, [long], run)


@pytest.mark.parametrize(("name", "match"), [("dpo", "no rejected answer"), ("kto", "rows with a label")])
def test_rows_of_another_objective_are_refused(engine, name, match):
    with pytest.raises(DataError, match=match):
        objectives.encode(engine, tiny.rows(4), settings(name))


def test_the_log_probability_of_a_row_is_what_the_likelihood_sums(engine):
    rows = [row for pair in encoded(engine, "dpo") for row in pair.rows]
    batch = prompts.collate(rows, pad_id=engine.pad_id)
    with torch.no_grad():
        found = -likelihood.row_nll(engine.model, batch)
        single = [likelihood.answer_nll(engine.model, prompts.collate([row], pad_id=0))[0] for row in rows]
    assert torch.allclose(-found, torch.stack(single), atol=1e-4)


@pytest.mark.parametrize("method", sorted(FACTS))
def test_the_start_of_every_method_is_the_base_with_the_adapter_switched_off(load_tiny, method):
    has_side = FACTS[method].base_delta == "residual"
    changes = {"aggregation.method": f'"{method}"', **({"aggregation.residual_rank": "8"} if has_side else {})}
    engine = load_tiny(changes)
    run = tiny.settings("tiny", {**changes, "training.objective.kind": '"dpo"'})
    manifest = RunManifest(run, engine.base_sha256, engine.tensor_specs)
    pairs = encoded(engine, "dpo")
    adapter.write(engine.model, {name: torch.full_like(t, 0.3) for name, t in engine.initial.items()})
    begun = start.initial(manifest, engine.initial)
    found = preference_score.with_references(engine, pairs, begun, batch_size=4)
    with torch.no_grad(), engine.model.disable_adapter():
        for pair in found:
            for row, known in zip(pair.rows, pair.reference, strict=True):
                off = objectives.log_probs(engine, [row])
                assert float(off) == pytest.approx(known, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_where_nothing_has_moved_every_margin_is_exactly_zero(engine, name, batch_size):
    objective = settings(name).training.objective
    examples = preference_score.with_references(engine, encoded(engine, name), engine.initial, batch_size=batch_size)
    score = preference_score.score(engine, examples, objective, batch_size=batch_size)
    assert score.num_preferred == 0
    assert score.preference_loss_sum == pytest.approx({"dpo": 7 * 0.6931472, "kto": 3.5}[name])
    assert score.nll_sum > 0
    assert score.num_answer_tokens > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 100])
def test_the_gradient_is_that_of_the_whole_batch_for_any_cut(moved, engine, name, micro_batch_size):
    examples, objective = moved(name)
    expected_loss, expected = by_autograd(engine, examples, objective)
    loss = float(mean_gradient(engine, examples, micro_batch_size=micro_batch_size, objective=objective))
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    found = take(engine)
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < TOLERANCE


def test_control_a_reference_point_of_each_cut_alone_is_another_gradient(moved, engine):
    examples, objective = moved("kto")
    _, expected = by_autograd(engine, examples, objective)
    for example in examples:
        mean_gradient(engine, [example], micro_batch_size=1, objective=objective)
    found = {key: value / len(examples) for key, value in take(engine).items()}
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) > 100 * TOLERANCE


def by_autograd(engine, examples, objective):
    """Loss and gradient of the mean over the whole batch, row by row and without padding."""
    mean_of = torch.stack(
        [
            log_prob(engine, e.mismatched).detach() - e.reference[1]
            for e in examples
            if isinstance(e, Rated) and e.mismatched
        ]
        or [torch.zeros(())]
    ).mean()
    origin = float(mean_of.clamp(min=0))
    total = torch.zeros(())
    for example in examples:
        gains = [log_prob(engine, row) - known for row, known in zip(example.rows, example.reference, strict=False)]
        if isinstance(example, Pair):
            total = total - torch.log(torch.sigmoid(objective.beta * (gains[0] - gains[1])))
        else:
            sign = 1 if example.is_desirable else -1
            total = total + 1 - torch.sigmoid(sign * objective.beta * (gains[0] - origin))
    (total / len(examples)).backward()
    return float(total.detach()) / len(examples), take(engine)


def log_prob(engine, row) -> torch.Tensor:
    logits_tv = engine.model(torch.tensor([row.input_ids])).logits[0].float().log_softmax(-1)
    places = [t for t in range(1, len(row.input_ids)) if row.is_answer[t]]
    return torch.stack([logits_tv[t - 1, row.input_ids[t]] for t in places]).sum()


def take(engine) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in adapter.parameters(engine.model).items()}
    engine.model.zero_grad()
    return found


def test_the_reference_point_is_the_mean_gain_on_answers_to_other_prompts_and_never_below_zero(moved, engine):
    examples, objective = moved("kto")
    assert all(example.mismatched.input_ids != example.answer.input_ids for example in examples)
    with torch.no_grad():
        gains = [float(log_prob(engine, e.mismatched)) - e.reference[1] for e in examples]
    signs = [1.0, -1.0]
    found = []
    for sign in signs:  # a reference that is as far on the other side turns the mean around
        turned = [
            dataclasses.replace(e, reference=(e.reference[0], e.reference[1] + (gain if sign < 0 else -gain) * 2))
            for e, gain in zip(examples, gains, strict=True)
        ]
        found.append(preference_score.reference_point(engine, turned, objective, batch_size=3))
    mean = sum(gains) / len(gains)
    assert found == [pytest.approx(max(3 * mean, 0.0), abs=1e-4), pytest.approx(max(-mean, 0.0), abs=1e-4)]
    zero = objective.model_copy(update={"reference_point": "zero"})
    assert preference_score.reference_point(engine, examples, zero, batch_size=3) == 0.0


def test_two_equal_answers_teach_nothing(moved, engine):
    examples, objective = moved("dpo")
    equal = [dataclasses.replace(e, rejected=e.chosen, reference=(e.reference[0],) * 2) for e in examples]
    loss = float(mean_gradient(engine, equal, micro_batch_size=3, objective=objective))
    assert loss == pytest.approx(0.6931472)
    assert max(float(value.abs().max()) for value in take(engine).values()) < TOLERANCE
    mean_gradient(engine, examples, micro_batch_size=3, objective=objective)  # the control
    assert max(float(value.abs().max()) for value in take(engine).values()) > 1000 * TOLERANCE


def test_pairs_that_a_cut_makes_equal_are_dropped_and_counted_and_refused_if_none_is_left(engine):
    same = "the same words at the beginning of both answers, whatever comes after "
    asked = Message("user", "which?")
    turns = [(asked, Message("assistant", same + end)) for end in ("yes", "no")]
    equal = [dataclasses.replace(tiny.pair(n), messages=turns[0], rejected=turns[1]) for n in range(3)]
    cut = settings("dpo", **{"data.max_length_tokens": "48", "data.too_long": '"truncate"'})
    kept, report = objectives.encode(engine, [*equal, *(tiny.pair(n) for n in range(4))], cut)
    assert (len(kept), report.num_dropped, report.num_rows) == (4, 3, 7)
    with pytest.raises(DataError, match=r"both answers of all 3 pairs are the same after the cut at 48 tokens"):
        objectives.encode(engine, equal, cut)
    roomy = settings("dpo", **{"data.max_length_tokens": "128", "data.too_long": '"truncate"'})
    assert len(objectives.encode(engine, equal, roomy)[0]) == 3  # control


def test_a_pair_with_a_long_input_is_cut_there_and_both_answers_stay(engine):
    pair = tiny.pair(3)
    long = Message("user", "ache burn cold dose ear fall gut heart " * 30)
    pair = dataclasses.replace(
        pair, messages=(long, pair.messages[1]), rejected=(long, Message("assistant", "no " * 9))
    )
    run = settings("dpo", **{"data.max_length_tokens": "96", "data.too_long": '"truncate_input"'})
    (found,), report = objectives.encode(engine, [pair], run)
    assert report.num_truncated == 1
    assert max(len(row.input_ids) for row in found.rows) <= 96
    texts = [engine.tokenizer.decode(row.input_ids) for row in found.rows]
    assert texts[0].partition("assistant")[0] == texts[1].partition("assistant")[0]
    assert [sum(row.is_answer) for row in found.rows] == [
        sum(row.is_answer) for row in (prompts.encode_whole(dataclasses.replace(pair, messages=turns), engine.tokenizer)
                               for turns in (pair.messages, pair.rejected))
    ]  # fmt: skip
