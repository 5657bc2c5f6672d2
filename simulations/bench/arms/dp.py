"""The measured arm of `bench dp`: steps of a random model, with and without differential privacy, by turns."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from client.train import loop, private
from client.train.loop import mean_gradient
from client.train.private import Unit
from common.adapter import adapter
from common.errors import ModelError
from common.model import base as model
from common.model.base import Engine
from common.privacy.noise import SystemNoise
from common.run import config
from common.run.schema.privacy import UnitPrivacy
from common.text.prompts import Encoded
from simulations.bench.arms import process

NUM_WARM: Final = 3
NUM_STEPS: Final = 12


@dataclass(frozen=True)
class Shape:
    """A Llama and the batch that it trains on."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int
    answer_tokens: int


SHAPES: Final = {
    "10m": Shape(256, 768, 6, 8, 8, 4096, rows=8, tokens=256, answer_tokens=64),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, rows=4, tokens=128, answer_tokens=32),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, rows=8, tokens=1024, answer_tokens=256),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, rows=4, tokens=1024, answer_tokens=256),
}


def main(shape_name: str, arms: str) -> dict[str, Any]:
    """Time and memory of a step of each arm.

    Args:
        shape_name: One of `SHAPES`.
        arms: `plain`, `stacked`, `microbatch`, `opacus`, with commas; measured by turns.

    Returns:
        By arm `seconds` (median; CPU seconds without a GPU) and `peak_mib`: on a GPU the most that was allocated, on a
        CPU the process', so that memory is compared between processes of one arm each.
    """
    device = model.choose_device("auto")
    shape = SHAPES[shape_name]
    engine = make_engine(shape, device)
    rows = make_rows(shape)
    names = arms.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    optimizer = loop.make_optimizer(adapter.parameters(engine.model).values(), config.TrainingConfig().optimizer)
    engine.model.train()
    for step in range(NUM_WARM + NUM_STEPS):
        for name in names:
            with _arm(name, engine, rows, optimizer) as take_step:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    began = time.perf_counter()
                    take_step()
                    torch.cuda.synchronize()
                    spent, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**20
                else:  # CPU seconds, as other jobs share the cores
                    began = process.cpu_s()
                    take_step()
                    spent, peak = process.cpu_s() - began, process.peak_rss_mib()
            if step >= NUM_WARM:
                seconds[name].append(spent)
                peaks[name] = max(peaks[name], peak)
    return {name: {"seconds": median(seconds[name]), "peak_mib": peaks[name]} for name in names}


def make_engine(shape: Shape, device: torch.device) -> Engine:
    """A Llama with random weights, in NF4 and bfloat16 on a GPU and in float32 on a CPU, with LoRA on all linears."""
    torch.manual_seed(1)
    settings = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.tokens,
        tie_word_embeddings=True,
    )
    is_gpu = device.type == "cuda"
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if is_gpu else torch.float32)
        base = LlamaForCausalLM(settings)
        torch.set_default_dtype(before)
    base.requires_grad_(False)
    base.config.use_cache = False
    if is_gpu:
        _quantise(base)
    with model.quiet_peft():
        whole = get_peft_model(base, model.lora_config(config.AdapterConfig(r=16)))
    whole.to(device)
    if is_gpu:
        model.checkpoint(base)
    initial = adapter.read(whole)
    return Engine(whole, _Tokens(), device, "", adapter.specs(initial), initial)  # type: ignore[arg-type]


def make_rows(shape: Shape) -> list[Encoded]:
    """Random tokens, the last of them the answer; each row is a unit."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.tokens), generator=generator).tolist()
    is_answer = (False,) * (shape.tokens - shape.answer_tokens) + (True,) * shape.answer_tokens
    return [Encoded(tuple(row), is_answer, f"unit {number}") for number, row in enumerate(ids)]


class _Tokens:
    """All that training asks of a tokenizer."""

    pad_token_id = 0


def _quantise(base: nn.Module) -> None:
    """Every linear layer but the head as NF4 with double quantisation."""
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                small = Linear4bit(  # type: ignore[no-untyped-call]
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                small.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(parent, name, small.to(child.weight.device))
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _arm(
    name: str, engine: Engine, rows: list[Encoded], optimizer: torch.optim.Optimizer
) -> Iterator[Callable[[], None]]:
    """One optimiser step, as a site's training takes it."""
    if name == "plain":

        def plain() -> None:
            optimizer.zero_grad()
            mean_gradient(engine, rows, micro_batch_size=len(rows))
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()

        yield plain
        return
    privacy = UnitPrivacy(sampling_prob=1.0, noise_multiplier=1.0, clip_norm=0.1)
    units: list[Unit] = [[row] for row in rows]
    mechanism = private.Mechanism(
        units, parameters=adapter.parameters(engine.model), privacy=privacy, source=SystemNoise()
    )
    if name not in ("stacked", "microbatch", "opacus"):
        raise ModelError(f"no such arm: {name}")
    with private.prepared(engine, method=name) as (take, is_many):  # type: ignore[arg-type]

        def private_step() -> None:
            optimizer.zero_grad()
            mechanism.set_gradients([units] if is_many else [[unit] for unit in units], take=take)
            optimizer.step()

        yield private_step
