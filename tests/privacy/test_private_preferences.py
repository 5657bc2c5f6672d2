"""Preferences under differential privacy: both answers of a pair, and all pairs of a patient, are one clipped unit."""

import dataclasses

import pytest
import torch

from client.train import loop, private
from common.adapter import adapter
from common.errors import PrivacyError
from common.loss import objectives, preference_score
from common.loss.objectives import Pair
from common.privacy import noise
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.schema.privacy import UnitPrivacy
from common.run.schema.training import Dpo, Kto
from common.text.prompts import Encoded
from tests import tiny

TOLERANCE = 1e-5  # relative; two orders of summation in float32 differ by a tenth of it
WAYS = ("stacked", "microbatch", "opacus")
DPO = Dpo(beta=0.3)
KTO = Kto(beta=0.3, undesirable_weight=1.5, reference_point="zero")
MAKE = {"dpo": tiny.pair, "kto": tiny.rated}


@pytest.fixture
def ready(engine):
    """In training mode, with a B other than zero and as large as the values of a trained adapter."""
    generator = torch.Generator().manual_seed(1)
    moved = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in engine.initial.items()}
    adapter.write(engine.model, moved)
    engine.model.train()
    return engine


def referenced(engine, examples):
    """The examples with their references; the engine keeps its adapter and is in training mode."""
    now = adapter.read(engine.model)
    found = preference_score.with_references(engine, examples, engine.initial, batch_size=4)
    adapter.write(engine.model, now)
    engine.model.train()
    return list(found)


def some_units(engine, objective, counts=(1, 2, 1, 3)):
    """Units of unequal numbers of examples, whose rows have unequal lengths."""
    run = tiny.settings("tiny", {"training.objective.kind": f'"{objective.kind}"', **_point(objective)})
    rows = [MAKE[objective.kind](number) for number in range(sum(counts))]
    examples = referenced(engine, objectives.encode(engine, rows, run)[0])
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [examples[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _point(objective):
    return {"training.objective.reference_point": '"zero"'} if objective.kind == "kto" else {}


def log_prob(engine, row: Encoded) -> torch.Tensor:
    """Of a row's answer, alone and without padding."""
    logits_tv = engine.model(torch.tensor([row.input_ids])).logits[0].float()
    targets = torch.tensor([i for i, is_answer in enumerate(row.is_answer) if is_answer and i])
    ids = torch.tensor(row.input_ids)[targets]
    return logits_tv[targets - 1].log_softmax(-1)[torch.arange(len(ids)), ids].sum()


def loss_of(engine, example, objective) -> torch.Tensor:
    """By the formula as published, without any of our code."""
    gains = [log_prob(engine, row) - known for row, known in zip(example.rows, example.reference, strict=True)]
    if isinstance(example, Pair):
        return -torch.log(torch.sigmoid(objective.beta * (gains[0] - gains[1])))
    weight, sign = (objective.desirable_weight, 1) if example.is_desirable else (objective.undesirable_weight, -1)
    return weight * (1 - torch.sigmoid(sign * objective.beta * gains[0]))


def gradient(engine) -> torch.Tensor:
    """All gradients side by side; they are cleared."""
    own = adapter.parameters(engine.model)
    found = torch.cat([own[name].grad.flatten() for name in sorted(own)])
    engine.model.zero_grad(set_to_none=True)
    return found


def naive(engine, population, objective) -> torch.Tensor:
    """Unit after unit, example after example, by autograd of the joint loss."""
    found = []
    for unit in population:
        for example in unit:
            loss_of(engine, example, objective).backward()
        found.append(gradient(engine))
    return torch.stack(found)


def taken(engine, population, way, objective) -> torch.Tensor:
    with private.prepared(engine, method=way, objective=objective) as (take, is_many):
        return take(population) if is_many else torch.cat([take([unit]) for unit in population])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_norms_and_clipped_sums_are_those_of_a_naive_loop_over_joint_gradients(ready, way, objective):
    population = some_units(ready, objective)
    assert len({objectives.length(example) for unit in population for example in unit}) > 1
    expected, found = naive(ready, population, objective), taken(ready, population, way, objective)
    norms = expected.norm(dim=1)
    assert ((found.norm(dim=1) - norms).abs() / norms).max() < TOLERANCE
    clip_norm = float(norms.median())
    wanted = (clip_norm / (norms + private.TINY)).clamp(max=1) @ expected
    total = noise.grid_step(clip_norm) * private.clip(found, clip_norm=clip_norm)[0]
    assert (total - wanted).norm() / wanted.norm() < TOLERANCE


@pytest.mark.parametrize("way", ["stacked", "microbatch"])
@pytest.mark.parametrize("changes", [{"training.gradient_checkpointing": "true"}, {"model.quantization": '"nf4"'}])
def test_checkpointing_and_a_quantised_base_change_nothing(load_tiny, way, changes):
    engine = load_tiny(changes)
    adapter.write(engine.model, {name: tensor + 0.02 for name, tensor in engine.initial.items()})
    engine.model.train()
    population = some_units(engine, DPO)
    expected, found = naive(engine, population, DPO), taken(engine, population, way, DPO)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < TOLERANCE


def joint(engine, population, clip_norm: float) -> torch.Tensor:
    """The clipped sum as training takes it."""
    with private.prepared(engine, method="stacked", objective=DPO) as (take, _):
        batches = ([unit] for unit in population)
        size = adapter.num_parameters(engine.tensor_specs)
        given = {"take": take, "clip_norm": clip_norm, "num_parameters": size, "device": engine.device}
        return private.clipped_sum(batches, **given)[0] * noise.grid_step(clip_norm)


def apart(engine, population, clip_norm: float) -> torch.Tensor:
    """The control: the chosen and the rejected row of each pair are clipped each for itself, as per-sample clipping
    of TRL's batch would do."""
    found = [torch.zeros(adapter.num_parameters(engine.tensor_specs))]
    for pair in (example for unit in population for example in unit):
        for side in (0, 1):
            gains = [log_prob(engine, row) - known for row, known in zip(pair.rows, pair.reference, strict=True)]
            gains[1 - side] = gains[1 - side].detach()
            (-torch.log(torch.sigmoid(DPO.beta * (gains[0] - gains[1])))).backward()
            found.append(private.clip(gradient(engine)[None], clip_norm=clip_norm)[0])
    return sum(found) * noise.grid_step(clip_norm)


def neighbours(engine):
    """Data sets and one patient more: ordinary pairs, many pairs of one patient, and a long answer against a short."""
    population = some_units(engine, DPO, (1, 2, 1, 2))
    yield population[:1], population[1]
    yield population[:3], population[3]
    yield [], population[0]
    long = some_units(engine, DPO, (5,))[0]
    yield population[:1], [dataclasses.replace(pair, reference=(50.0, -50.0)) for pair in long[:3]]
    yield population[:2], [dataclasses.replace(pair, rejected=cut(pair.rejected)) for pair in long[:3]]


def cut(row: Encoded) -> Encoded:
    """Only the first answer token counts."""
    first = row.is_answer.index(True)
    return dataclasses.replace(row, is_answer=tuple(place == first for place in range(len(row.is_answer))))


def largest(engine, clipped_sum, clip_norm: float, *, is_one_pair: bool = False) -> float:
    """Largest move over all neighbours, in units of C; for the control the unit has one pair only."""
    moves = []
    for population, unit in neighbours(engine):
        more = unit[:1] if is_one_pair else unit
        with_unit, without = [*population, more], population
        moves.append((clipped_sum(engine, with_unit, clip_norm) - clipped_sum(engine, without, clip_norm)).norm())
    return float(max(moves)) / clip_norm


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1.0, 10.0])
def test_one_patients_pairs_move_the_clipped_sum_by_at_most_the_clip_norm(ready, clip_norm):
    assert largest(ready, joint, clip_norm) <= 1 + 1e-6


def test_control_clipping_chosen_and_rejected_apart_exceeds_it_even_for_a_single_pair(ready):
    assert largest(ready, joint, 1e-3, is_one_pair=True) <= 1 + 1e-6
    assert largest(ready, apart, 1e-3, is_one_pair=True) > 1.2


def test_a_pair_is_drawn_whole_and_counts_as_one_row_of_its_patient(ready):
    unit = some_units(ready, DPO, (3,))[0]
    drawn = private.poisson([unit], sampling_prob=1.0, max_rows=2, source=SeededNoise(1))[0]
    assert len(drawn) == 2
    assert all(len(example.rows) == 2 for example in drawn)
    assert {example.unit for example in private.group(unit)[0]} == {unit[0].unit}


@pytest.mark.parametrize("way", WAYS)
def test_a_reference_point_over_the_batch_is_refused_whatever_the_way(ready, way):
    with (
        pytest.raises(PrivacyError, match=r"training\.objective\.reference_point = 'zero'"),
        private.prepared(ready, method=way, objective=KTO.model_copy(update={"reference_point": "batch"})),
    ):
        pass


@pytest.mark.parametrize("objective", [DPO, KTO], ids=["dpo", "kto"])
def test_private_training_tells_nothing_and_noise_that_drowns_every_gradient_drowns_the_preference(engine, objective):
    """The control of learning is the same run under large noise."""
    shares = {}
    for multiplier in (0.05, 500.0):
        adapter.write(engine.model, engine.initial)
        examples = [example for unit in some_units(engine, objective, (2,) * 12) for example in unit]
        adapter.write(engine.model, engine.initial)
        training = config.TrainingConfig(
            objective=Kto(reference_point="zero") if objective is KTO else Dpo(),
            local_epochs=0.0,
            local_steps=25,
            batch_size=8,
            learning_rate=2e-2,
        )
        privacy = UnitPrivacy(sampling_prob=0.5, noise_multiplier=multiplier, clip_norm=1.0, max_rows_per_unit=2)
        given = {"round_index": 0, "num_rounds": 1, "seed": 1, "source": SeededNoise(1)}
        result = loop.train(engine, examples, training=training, privacy=privacy, **given)
        assert (result.train_loss, result.num_tokens, result.seconds) == (None, None, None)
        score = preference_score.score(engine, examples, objective, batch_size=8)
        shares[multiplier] = score.preference_loss_sum / len(examples)
    start = {"dpo": 0.6931, "kto": 0.5 * (1 * 16 + 1.5 * 8) / 24}[objective.kind]
    assert shares[0.05] < 0.8 * start
    assert shares[500.0] > 0.9 * start
