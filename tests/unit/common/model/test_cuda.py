"""The engine on a CUDA device: every precision loads, trains, and takes the adapter that the CPU has."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch

from client.train import loop, private
from common.adapter import adapter
from common.loss import objectives, preference_score
from common.model import base, loading, varlen
from common.model.base import Engine
from common.privacy.noise import SeededNoise
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def load_cuda(tiny_base) -> Callable[[str], Engine]:
    """Load the tiny base on the device, in one of the precisions."""

    def load(quantization: str) -> Engine:
        settings = tiny.settings(tiny_base, {"model.quantization": quantization})
        return loading.engine_of(settings, tiny_base, device_name="cuda", trains=True)

    return load


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_training_lowers_the_loss_on_cuda(load_cuda, tiny_base, quantization):
    engine = load_cuda(quantization)
    settings = tiny.settings(tiny_base, {"model.quantization": quantization, "training.local_epochs": "2.0"})
    rows, _ = base.encode(engine, tiny.rows(32), settings.data)
    train = partial(loop.train, engine, rows, training=settings.training, privacy=settings.privacy)
    losses = [train(round_index=index, num_rounds=4, seed=1, source=SeededNoise(0)).train_loss for index in range(4)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in adapter.parameters(engine.model).values())


def test_initial_adapter_is_the_same_on_cuda_and_cpu(load_cuda, load_tiny):
    on_cuda, on_cpu = load_cuda("none").initial, load_tiny().initial
    assert all(torch.equal(on_cuda[name], on_cpu[name]) for name in on_cpu)


def gradient_of(engine, rows, **cut) -> torch.Tensor:
    """Of the mean loss, flattened; B is other than zero so that A has one."""
    adapter.write(engine.model, {name: tensor + 0.02 for name, tensor in engine.initial.items()})
    engine.model.train()
    engine.model.zero_grad()
    loop.mean_gradient(engine, rows, micro_batch_size=len(rows), **cut)
    parameters = adapter.parameters(engine.model)
    return torch.cat([parameters[name].grad.flatten() for name in sorted(parameters)])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Over the length of the second."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_packed_rows_have_the_gradient_of_padded_ones_on_cuda(load_cuda, tiny_base, quantization):
    """In bfloat16 by the kernel for rows of different lengths, cut by tokens or not, checkpointed or not."""
    engine = load_cuda(quantization)
    rows, _ = base.encode(engine, tiny.rows(12), tiny.settings(tiny_base).data)
    assert varlen.traits_of(engine.model).can_pack
    assert varlen.traits_of(engine.model).head is not None
    packed, cut = gradient_of(engine, rows), gradient_of(engine, rows, micro_batch_tokens=100)
    with tiny.padded(engine.model):
        padded = gradient_of(engine, rows)
    base.checkpoint(varlen.base_of(engine.model))
    again = gradient_of(engine, rows)
    assert apart(packed, padded) < 0.03
    assert apart(cut, packed) < 0.03
    assert apart(again, packed) < 0.03
    other = gradient_of(engine, rows[::2])
    assert apart(other, packed) > 0.1  # control: the bounds tell two batches apart


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_no_step_waits_for_the_card(load_cuda, tiny_base, objective):
    """A step that asks the card for a value fails under torch's debug mode; the first, which warms up, may."""
    engine = load_cuda("none")
    changes = {"training.objective.kind": f'"{objective}"', "training.local_steps": "6", "training.local_epochs": "0.0"}
    settings = tiny.settings(tiny_base, changes)
    given = {"sft": tiny.row, "dpo": tiny.pair, "kto": tiny.rated}[objective]
    examples, _ = objectives.encode(engine, [given(number) for number in range(16)], settings)
    examples = preference_score.with_references(engine, examples, engine.initial, batch_size=4)
    adapter.write(engine.model, engine.initial)
    trainer = loop.Trainer(
        engine,
        examples,
        training=settings.training,
        privacy=settings.privacy,
        round_index=0,
        num_rounds=1,
        seed=1,
        source=SeededNoise(0),
    )
    with trainer:
        for _ in range(3):  # the second is checked, which asks
            trainer.step(trainer.draw())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls this mode a prototype, once
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(2):
                trainer.step(trainer.draw())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.step(trainer.draw())
    assert trainer.result(seconds=0.0).train_loss > 0


@pytest.mark.parametrize("method", ["microbatch", "stacked"])
def test_a_unit_has_its_own_gradient_on_cuda_whoever_is_beside_it(load_cuda, tiny_base, method):
    engine = load_cuda("none")
    rows, _ = base.encode(engine, tiny.rows(12), tiny.settings(tiny_base).data)
    adapter.write(engine.model, {name: tensor + 0.02 for name, tensor in engine.initial.items()})
    units = [rows[:3], rows[3:5], rows[5:]]
    with private.prepared(engine, method=method) as (take, is_many):
        together = take(units) if is_many else torch.cat([take([unit]) for unit in units])
    with private.prepared(engine, method="microbatch") as (take, _):
        alone = torch.cat([take([unit]) for unit in units])
    assert max(apart(one, other) for one, other in zip(together, alone, strict=True)) < 0.03
    assert apart(together[0], alone[1]) > 0.1  # control


def test_a_round_is_saved_and_continued_on_cuda(load_cuda, tiny_base):
    engine = load_cuda("none")
    settings = tiny.settings(tiny_base, {"training.local_steps": "5", "training.local_epochs": "0.0"})
    rows, _ = base.encode(engine, tiny.rows(16), settings.data)
    given = {"training": settings.training, "privacy": settings.privacy, "round_index": 0, "num_rounds": 1, "seed": 1}
    ends = []
    for num_before in (0, 3):
        adapter.write(engine.model, engine.initial)
        first = loop.Trainer(engine, rows, source=SeededNoise(0), **given)
        with first:
            for _ in range(num_before):
                first.step(first.draw())
            state = first.state()
        adapter.write(engine.model, engine.initial)
        second = loop.Trainer(engine, rows, source=SeededNoise(0), **given)
        second.load_state(state)
        with second:
            while second.num_done < second.num_steps:
                second.step(second.draw())
        ends.append(torch.cat([tensor.flatten() for tensor in adapter.read(engine.model).values()]))
    assert apart(ends[1], ends[0]) < 1e-3
