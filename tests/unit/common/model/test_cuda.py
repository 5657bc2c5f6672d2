"""The engine on a CUDA device: every precision loads, trains, and takes the adapter that the CPU has."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from client.train import loop
from common.adapter import adapter
from common.model import base, loading
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
