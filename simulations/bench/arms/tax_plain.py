"""The yardstick of `bench tax`: the same steps by transformers, peft and torch alone.

silotune only says which rows each step takes. Padding, forward, backward, clipping, optimiser and the mean over sites
are written out here as one would by hand. Logits are formed for answer tokens only, as silotune does: the model's own
`.loss` forms all of them, and against that the tax would look lower.

b rows of a batch, t tokens of the longest, p positions that some row needs, v vocabulary, n answer tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from client.train import schedule
from common.errors import ConfigError
from common.model import base as model
from common.run import config
from common.text import prompts
from common.text.prompts import Encoded
from simulations.bench.arms import process, tax_silotune
from simulations.world import world
from simulations.world.world import Source


@dataclass(frozen=True)
class Site:
    """One site's rows of every step, and its weight."""

    batches: list[list[Encoded]]
    weight: float


def main(quantization: str, base: str, local_steps: str) -> dict[str, Any]:
    """Return the CPU clock at the end of every round, and the loss of each."""
    torch.set_num_threads(1)
    overrides = tax_silotune.settings(quantization, base, local_steps)
    settings = config.load(tax_silotune.RUN_FILE, overrides=overrides)
    num_rounds, folder = settings.federation.num_rounds, world.base_folder(settings.model.base)
    sites = list(load_rows(Source.of(settings), folder, settings.training, num_rounds=num_rounds))
    is_quantised = settings.model.quantization == "nf4"
    peft_model = load_model(folder, settings.adapter, is_quantised=is_quantised, seed=settings.seed)
    rounds, losses = [], []
    for round_index in range(num_rounds):
        losses.append(play(peft_model, sites, settings.training, round_index, num_rounds))
        rounds.append(process.cpu_s())
    return {"rounds_cpu_s": rounds, "losses": losses}


def load_rows(source: Source, base_folder: Path, training: config.TrainingConfig, *, num_rounds: int) -> Iterator[Site]:
    """The rows that silotune would take at every step of the run."""
    tokenizer, data = model.load_tokenizer(base_folder), source.data
    for name, site in source.sites().items():
        rows, _ = prompts.encode_all(
            site.train, tokenizer, max_length_tokens=data.max_length_tokens, too_long=data.too_long
        )
        num_steps = training.local_steps * num_rounds
        chosen = schedule.batches(
            num_rows=len(rows),
            batch_size=training.batch_size,
            first_step=0,
            num_steps=num_steps,
            seed=schedule.derive_seed(source.seed, name),
        )
        yield Site([[rows[index] for index in indices] for indices in chosen], float(len(rows)))


def load_model(base_folder: Path, adapter: config.AdapterConfig, *, is_quantised: bool, seed: int) -> Any:
    """Base and LoRA, as the run file says; A is drawn module by module, so that both arms start at the same values."""
    four_bit = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = AutoModelForCausalLM.from_pretrained(
        base_folder,
        dtype=torch.float32,
        quantization_config=four_bit if is_quantised else None,
    )
    base.config.use_cache = False
    if adapter.kind != "lora":
        raise ConfigError(f"adapter.kind = '{adapter.kind}': the plain arm trains lora; set 'lora'")
    lora = LoraConfig(r=adapter.r, lora_alpha=int(adapter.alpha), target_modules="all-linear")
    peft_model: Any = get_peft_model(base, lora)
    torch.manual_seed(seed)
    for name, value in sorted(peft_model.named_parameters()):
        if "lora_A" in name:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    return peft_model


def play(
    peft_model: Any, sites: Sequence[Site], training: config.TrainingConfig, round_index: int, num_rounds: int
) -> float:
    """One round of federated averaging; returns its mean training loss."""
    trained = {name: value for name, value in peft_model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    losses, weight = [], sum(site.weight for site in sites)
    for site in sites:
        _copy(trained, before)
        losses.append(_train(peft_model, list(trained.values()), site, training, round_index, num_rounds))
        for name, value in trained.items():
            total[name].add_(value.detach(), alpha=site.weight / weight)
    _copy(trained, total)
    return sum(loss * site.weight for loss, site in zip(losses, sites, strict=True)) / weight


def _train(
    peft_model: Any,
    parameters: list[nn.Parameter],
    site: Site,
    training: config.TrainingConfig,
    round_index: int,
    num_rounds: int,
) -> float:
    """A site's steps of one round; returns their mean loss."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    peft_model.train()
    first, losses = round_index * training.local_steps, []
    rates = schedule.rates(round_index, num_rounds=num_rounds, num_steps=training.local_steps, training=training)
    for step, rate in enumerate(rates, start=first):
        optimizer.zero_grad()
        # Mean negative log-likelihood of the batch's answer tokens.
        rows = site.batches[step]
        width = max(len(row.input_ids) for row in rows)
        ids_bt = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in rows])
        mask_bt = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
        answer_bt = torch.tensor([[*row.is_answer, *[False] * (width - len(row.is_answer))] for row in rows])[:, 1:]
        needed_p = answer_bt.any(dim=0).nonzero().squeeze(1)
        logits_bpv = peft_model(input_ids=ids_bt, attention_mask=mask_bt, logits_to_keep=needed_p).logits
        is_answer_bp = answer_bt[:, needed_p]
        loss = cross_entropy(logits_bpv[is_answer_bp], ids_bt[:, 1:][:, needed_p][is_answer_bp])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in into.items():
        value.copy_(values[name])
