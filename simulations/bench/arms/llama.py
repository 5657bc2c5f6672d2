"""Llamas with random weights, to be trained where only speed and memory count."""

import gc
from dataclasses import dataclass
from typing import Any, Final

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.adapter import adapter
from common.model import base as model
from common.model import kernels, varlen
from common.model.base import Engine
from common.run.schema.model import LoraAdapter

RANK: Final = 16


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


class Tokens:
    """All that training asks of a tokenizer."""

    pad_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def make_base(shape: Shape, device: torch.device, *, is_quantised: bool = True) -> Any:
    """A frozen Llama with random weights, in bfloat16 and NF4 (if it is to be) on a GPU, and in float32 on a CPU."""
    torch.manual_seed(1)
    settings = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, shape.tokens),
        tie_word_embeddings=True,
    )
    is_gpu = device.type == "cuda"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if is_gpu else torch.float32)
    with torch.device(device):
        base = LlamaForCausalLM(settings)
    torch.set_default_dtype(before)
    base.requires_grad_(False)
    base.config.use_cache = False
    if is_gpu and is_quantised:
        _quantise(base)
    return base


def make_engine(base: Any, device: torch.device, *, is_checkpointed: bool) -> Engine:
    """The base with LoRA on all linear layers, and on a card with the kernels that `base.load` would use."""
    with model.quiet_peft():
        whole = get_peft_model(base, model.lora_config(LoraAdapter(r=RANK)))
    whole.to(device)
    kernels.install(whole, device)
    varlen.traits_of(whole)
    if is_checkpointed:
        model.checkpoint(base)
    initial = adapter.read(whole)
    tokens: Any = Tokens(base.config.vocab_size)
    return Engine(whole, tokens, device, "", adapter.specs(initial), initial)


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
