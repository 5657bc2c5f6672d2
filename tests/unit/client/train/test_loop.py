import itertools

import pytest
import torch

from client.train import loop, schedule
from common.adapter import adapter
from common.errors import ModelError
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.schema.privacy import NoPrivacy, UnitPrivacy
from common.run.schema.training import AdamW, Sgd
from common.text import prompts
from tests import tiny


@pytest.fixture(scope="module")
def rows(shared_engine):
    return prompts.encode_all(tiny.rows(10), shared_engine.tokenizer, max_length_tokens=64, too_long="error")[0]


def settings(**changes) -> config.TrainingConfig:
    return config.TrainingConfig(**{"local_steps": 4, "batch_size": 3, "learning_rate": 1e-2, **changes})


def train(engine, rows, training=None, *, seed=1, round_index=0, num_rounds=2, start=None):
    """The adapter after one round, and what was told of it."""
    adapter.write(engine.model, start or engine.initial)
    told = loop.train(
        engine,
        rows,
        training=training or settings(),
        privacy=NoPrivacy(),
        round_index=round_index,
        num_rounds=num_rounds,
        seed=seed,
        source=SeededNoise(0),
    )
    return adapter.read(engine.model), told


def stirred(engine) -> dict[str, torch.Tensor]:
    """An adapter with B other than zero, so that gradients reach A from the first step."""
    generator = torch.Generator().manual_seed(6)
    return {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in engine.initial.items()}


def is_same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def plain(engine, rows, training, *, seed, round_index, num_rounds):
    """The same round as an ordinary training loop: the whole batch at once, torch's own optimisers and loss.

    Rows lie in the same order as ours within a batch: Adam divides by gradients of nearly 0, and so magnifies rounding.
    """
    adapter.write(engine.model, stirred(engine))
    parameters = list(adapter.parameters(engine.model).values())
    kinds = {
        "sgd": lambda: torch.optim.SGD(
            parameters, momentum=training.optimizer.momentum, weight_decay=training.optimizer.weight_decay
        ),
        "adamw": lambda: torch.optim.AdamW(
            parameters,
            betas=(training.optimizer.beta1, training.optimizer.beta2),
            eps=training.optimizer.epsilon,
            weight_decay=training.optimizer.weight_decay,
        ),
    }
    optimizer = kinds[training.optimizer.kind]()
    steps = training.local_steps
    order = itertools.chain.from_iterable(
        schedule.batches(
            num_rows=len(rows),
            batch_size=training.batch_size,
            first_step=round_index * steps,
            num_steps=steps,
            seed=seed,
        )
    )
    engine.model.train()
    for step in range(steps):
        chosen = sorted(
            (rows[i] for i in itertools.islice(order, training.batch_size)), key=lambda row: len(row.input_ids)
        )
        batch = prompts.collate(chosen, pad_id=engine.pad_id)
        labels_bt = torch.full_like(batch.input_ids_bt, -100)
        labels_bt.view(-1)[batch.predicting_n + 1] = batch.targets_n
        logits_btv = engine.model(batch.input_ids_bt, attention_mask=batch.attention_mask_bt).logits
        loss = torch.nn.functional.cross_entropy(logits_btv[:, :-1].flatten(0, 1), labels_bt[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        progress = (round_index * steps + step) / (num_rounds * steps)
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(progress, training)
        optimizer.step()
    return adapter.read(engine.model)


CASES = {
    "sgd": {"optimizer": Sgd(), "learning_rate": 0.5},
    "sgd with momentum and decay": {"optimizer": Sgd(momentum=0.9, weight_decay=0.1), "learning_rate": 0.5},
    "adamw": {"learning_rate": 1e-3},
    "adamw with decay and betas": {
        "optimizer": AdamW(weight_decay=0.5, beta1=0.8, beta2=0.95, epsilon=1e-6),
        "learning_rate": 1e-3,
    },
    "sgd clipped": {"optimizer": Sgd(), "learning_rate": 0.5, "max_grad_norm": 0.05},
    "sgd not clipped": {"optimizer": Sgd(), "learning_rate": 0.1, "max_grad_norm": 0.0},
    "linear with warm-up": {"optimizer": Sgd(), "learning_rate": 0.5, "schedule": "linear", "warmup_fraction": 0.4},
    "micro-batches": {"optimizer": Sgd(), "learning_rate": 0.5, "micro_batch_size": 1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("round_index", [0, 1])
def test_a_round_equals_a_plain_loop(engine, rows, case, round_index):
    training = settings(**CASES[case])
    expected = plain(engine, rows, training, seed=9, round_index=round_index, num_rounds=2)
    found, _ = train(engine, rows, training, seed=9, round_index=round_index, start=stirred(engine))
    difference = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert difference < 1e-6
    assert not is_same(found, stirred(engine))


@pytest.mark.parametrize(
    ("case", "without"),
    [
        ("sgd with momentum and decay", {"optimizer": Sgd(momentum=0.9)}),
        ("sgd with momentum and decay", {"optimizer": Sgd(weight_decay=0.1)}),
        ("adamw with decay and betas", {"optimizer": AdamW(weight_decay=0.5, beta1=0.8, epsilon=1e-6)}),
        ("adamw with decay and betas", {"optimizer": AdamW(beta1=0.8, beta2=0.95, epsilon=1e-6)}),
        ("sgd clipped", {"max_grad_norm": 0.0}),
        ("linear with warm-up", {"warmup_fraction": 0.0}),
        ("linear with warm-up", {"schedule": "constant"}),
    ],
)
def test_control_each_setting_changes_the_result(engine, rows, case, without):
    first, _ = train(engine, rows, settings(**CASES[case]), round_index=1)
    second, _ = train(engine, rows, settings(**{**CASES[case], **without}), round_index=1)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) > 5e-6


def test_the_same_seed_gives_the_same_adapter_to_the_bit(engine, rows):
    first, told = train(engine, rows)
    torch.manual_seed(77)
    second, told_again = train(engine, rows)
    assert is_same(first, second)
    assert told.train_loss == told_again.train_loss


def test_another_site_or_round_gives_another_adapter(engine, rows):
    here, there = (schedule.derive_seed(5, site) for site in ("north", "south"))
    assert not is_same(train(engine, rows, seed=here)[0], train(engine, rows, seed=there)[0])
    assert not is_same(train(engine, rows, round_index=0)[0], train(engine, rows, round_index=1)[0])


def test_dropout_is_the_same_for_the_same_seed_and_other_for_another_round(load_tiny, rows):
    engine = load_tiny({"adapter.dropout": "0.5"})
    training = settings(local_steps=1, batch_size=10, schedule="constant")
    first, again = (train(engine, rows, training)[0] for _ in range(2))
    other, _ = train(engine, rows, training, round_index=1)
    assert is_same(first, again)
    assert not is_same(first, other)


def test_control_without_dropout_a_full_batch_is_the_same_in_every_round(engine, rows):
    training = settings(local_steps=1, batch_size=10, schedule="constant")
    first, other = (train(engine, rows, training, round_index=number)[0] for number in (0, 1))
    assert max(float((first[name] - other[name]).abs().max()) for name in first) < 1e-6


def test_training_leaves_the_callers_random_state_alone(engine, rows):
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    train(engine, rows)
    assert torch.equal(torch.randn(3), expected)


def test_what_is_told_of_a_round(engine, rows):
    _, told = train(engine, rows)
    chosen = schedule.batches(num_rows=10, batch_size=3, first_step=0, num_steps=4, seed=1)
    assert told.num_steps == 4
    assert told.num_tokens == sum(len(rows[i].input_ids) for batch in chosen for i in batch)
    assert told.seconds > 0
    assert 0 < told.train_loss < 20


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(engine, rows):
    start = {name: tensor + 1e25 for name, tensor in engine.initial.items()}
    with pytest.raises(ModelError, match=r"training loss is nan at step 0; lower training\.learning_rate"):
        train(engine, rows, start=start)


def test_each_round_starts_with_a_fresh_optimizer(engine, rows):
    """The global adapter that comes back is not the one that the moments were of."""
    training = settings(optimizer=Sgd(momentum=0.9), schedule="constant", learning_rate=0.2)
    after_one, _ = train(engine, rows, training, round_index=0)
    straight, _ = train(engine, rows, training, round_index=1, start=after_one)
    again, _ = train(engine, rows, training, round_index=1, start=after_one)
    assert is_same(straight, again)


PRIVATE = UnitPrivacy(sampling_prob=0.5, noise_multiplier=1.0, clip_norm=0.5, max_rows_per_unit=2)


def interrupted(engine, rows, privacy, *, num_before: int, without: str = "") -> dict[str, torch.Tensor]:
    """The adapter of a round whose trainer was saved after some steps and continued by a new one."""
    given = {"training": settings(), "round_index": 0, "num_rounds": 1, "seed": 1, "proximal": 0.5}
    adapter.write(engine.model, stirred(engine))
    with loop.Trainer(engine, rows, privacy=privacy, source=SeededNoise(3), **given) as first:
        for _ in range(num_before):
            first.step(first.draw())
        state = first.state()
    torch.manual_seed(11)
    adapter.write(engine.model, stirred(engine))
    with loop.Trainer(engine, rows, privacy=privacy, source=SeededNoise(3), **given) as second:
        fresh = second.state()
        second.load_state({**state, without: fresh[without]} if without else state)
        while second.num_done < second.num_steps:
            second.step(second.draw())
    return adapter.read(engine.model)


@pytest.mark.parametrize("privacy", [NoPrivacy(), PRIVATE], ids=["plain", "unit"])
def test_a_round_that_was_saved_and_continued_ends_at_the_same_bits(load_tiny, rows, privacy):
    engine = load_tiny({"adapter.dropout": "0.3"})
    whole = interrupted(engine, rows, privacy, num_before=0)
    for num_before in (1, 3):
        assert is_same(interrupted(engine, rows, privacy, num_before=num_before), whole)
    random = "noise" if privacy.mode == "unit" else "random"
    for part in (random, "optimizer"):  # controls: without either the end is another
        assert not is_same(interrupted(engine, rows, privacy, num_before=2, without=part), whole)


def test_control_the_round_is_another_where_its_state_is_not_loaded(load_tiny, rows):
    engine = load_tiny({"adapter.dropout": "0.3"})
    plain = NoPrivacy()
    for part in ("num_done", "parameters"):
        other = interrupted(engine, rows, plain, num_before=2, without=part)
        assert not is_same(other, interrupted(engine, rows, plain, num_before=0))
