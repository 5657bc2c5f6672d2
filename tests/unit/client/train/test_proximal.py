"""FedProx's step: that of the paper's loss where training is plain, apart from clipping and noise where it is not."""

import itertools

import pytest
import torch

from client.train import loop, private, schedule
from client.train.loop import mean_gradient
from common.adapter import adapter
from common.model import base
from common.privacy import noise
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.schema.privacy import NoPrivacy, UnitPrivacy
from common.run.schema.training import AdamW, Sgd
from tests import tiny

MU, RATE, STEPS = 3.0, 0.05, 4
PLAIN = NoPrivacy()
PRIVATE = UnitPrivacy(sampling_prob=0.5, noise_multiplier=1.0, clip_norm=0.01, max_rows_per_unit=2)
TRAINING = config.TrainingConfig(
    local_epochs=0.0,
    local_steps=STEPS,
    batch_size=3,
    learning_rate=RATE,
    schedule="constant",
    warmup_fraction=0.0,
    optimizer=Sgd(),
    max_grad_norm=0.0,
)


def encoded(engine):
    return base.encode(engine, tiny.rows(10), tiny.settings("tiny").data)[0]


def stirred(engine) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in engine.initial.items()}


def trained(engine, proximal: float, *, privacy=PLAIN, training=TRAINING) -> dict[str, torch.Tensor]:
    adapter.write(engine.model, stirred(engine))
    loop.train(
        engine,
        encoded(engine),
        training=training,
        privacy=privacy,
        round_index=0,
        num_rounds=1,
        seed=1,
        source=SeededNoise(5),
        proximal=proximal,
    )
    return adapter.read(engine.model)


def apart(one, other) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def by_the_papers_loss(engine) -> dict[str, torch.Tensor]:
    """Steps of torch's own SGD on f + mu/2 || w - w_t ||^2, the penalty differentiated by torch."""
    rows, origin = encoded(engine), stirred(engine)
    adapter.write(engine.model, origin)
    parameters = adapter.parameters(engine.model)
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    engine.model.train()
    batches = schedule.batches(num_rows=len(rows), batch_size=3, first_step=0, num_steps=STEPS, seed=1)
    for indices in batches:
        optimizer.zero_grad()
        mean_gradient(engine, [rows[index] for index in indices], micro_batch_size=3)
        penalty = sum((parameter - origin[name]).square().sum() for name, parameter in parameters.items())
        (MU / 2 * penalty).backward()
        optimizer.step()
    return adapter.read(engine.model)


def test_steps_are_those_of_sgd_on_the_papers_loss(engine):
    expected = by_the_papers_loss(engine)
    assert apart(trained(engine, MU), expected) < 1e-6
    assert apart(trained(engine, 0.0), expected) > 1e-4  # control: without the pull it is another place


def test_a_pull_that_is_stronger_ends_nearer_to_where_the_round_began(engine):
    origin = stirred(engine)
    far, near, nearest = (apart(trained(engine, mu), origin) for mu in (0.0, 5.0, 15.0))
    assert nearest < near < far


def test_a_core_is_pulled_back_together_with_its_scales(load_tiny):
    engine = load_tiny({"aggregation.method": "ravan", "aggregation.num_heads": "2"})
    origin = stirred(engine)
    far, near, nearest = (apart(trained(engine, mu), origin) for mu in (0.0, 5.0, 15.0))
    assert nearest < near < far


def test_the_pull_is_the_same_under_adamw_which_does_not_scale_it(engine):
    """One step moves nothing to pull back; the second is pulled by exactly rate * mu * (w - w_t)."""
    after = {
        (steps, mu): trained(
            engine, mu, training=TRAINING.model_copy(update={"local_steps": steps, "optimizer": AdamW()})
        )
        for steps, mu in itertools.product((1, 2), (0.0, MU))
    }
    origin = stirred(engine)
    assert apart(after[1, 0.0], after[1, MU]) == 0
    expected = {name: t - RATE * MU * (after[1, 0.0][name] - origin[name]) for name, t in after[2, 0.0].items()}
    assert apart(after[2, MU], expected) < 1e-6


def private_steps(engine, monkeypatch, *, is_pulled_before_clipping: bool = False) -> dict[str, torch.Tensor]:
    """Noised gradients as they are released, each followed by the rule written out."""
    origin = stirred(engine)
    adapter.write(engine.model, origin)
    parameters = adapter.parameters(engine.model)
    engine.model.train()

    def pull() -> dict[str, torch.Tensor]:
        return {name: MU * (parameter.detach() - origin[name]) for name, parameter in parameters.items()}

    if is_pulled_before_clipping:
        clip = private.clip
        together = lambda rows_up, **kw: clip(rows_up + torch.cat([p.flatten() for p in pull().values()]), **kw)  # noqa: E731
        monkeypatch.setattr(private, "clip", together)
    with torch.random.fork_rng():
        torch.manual_seed(schedule.derive_seed(1, 0))
        source = SeededNoise(5)
        for _ in range(STEPS):
            tiny.private_step(engine, encoded(engine), PRIVATE, source)
            outside = {} if is_pulled_before_clipping else pull()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter -= RATE * (parameter.grad + outside.get(name, 0.0))
    monkeypatch.undo()
    return adapter.read(engine.model)


def test_under_dp_the_pull_is_beside_the_noised_gradient_and_not_in_what_is_clipped(engine, monkeypatch):
    found = trained(engine, MU, privacy=PRIVATE)
    assert apart(found, private_steps(engine, monkeypatch)) < 1e-6
    inside = private_steps(engine, monkeypatch, is_pulled_before_clipping=True)
    assert apart(found, inside) > 1e-4  # control: with the penalty in each unit's loss


def test_under_dp_every_units_gradient_is_clipped_to_the_same_norm_with_and_without_the_pull(engine, monkeypatch):
    """The first step begins where the round does: the same rows give the same clipped sum, to the bit."""
    sums: list[torch.Tensor] = []
    clip = private.clip

    def watched(rows_up, **limits):
        sums.append(clip(rows_up, **limits)[0])
        assert float(sums[-1].norm()) <= len(rows_up) * 2**noise.GRID_BITS
        return clip(rows_up, **limits)

    monkeypatch.setattr(private, "clip", watched)
    trained(engine, MU, privacy=PRIVATE)
    with_pull = len(sums)
    trained(engine, 0.0, privacy=PRIVATE)
    assert torch.equal(sums[0], sums[with_pull])


@pytest.mark.parametrize("proximal", ["10.0", "-1.0"])
def test_a_pull_over_the_whole_way_and_a_push_are_refused(proximal):
    with pytest.raises(Exception, match="proximal"):
        tiny.settings("tiny", {"training.learning_rate": "0.1", "aggregation.proximal": proximal})
