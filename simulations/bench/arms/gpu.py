"""The measured arms of `bench gpu`: the same rows and the same base through a site's training and through TRL's."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from client.train.loop import Trainer
from common.errors import ModelError
from common.privacy.noise import SystemNoise
from common.run import config
from common.run.schema.privacy import NoPrivacy, PrivacyConfig, UnitPrivacy
from common.text.prompts import Encoded
from simulations.bench.arms import llama
from simulations.bench.arms.llama import SHAPES

NUM_WARM: Final = 3  # steps, in which kernels are compiled
ANSWER_SHARE: Final = 0.4
MEDIAN_TOKENS: Final = 365
SPREAD: Final = 0.6  # of the logarithm of lengths
SHORTEST: Final = 48
LONGEST: Final = 1024
LEARNING_RATE: Final = 2e-4


def main(who: str, settings: str) -> dict[str, Any]:
    """Train one shape for some steps.

    Args:
        who: `silotune` or `trl`.
        settings: JSON: `shape`, `batch_rows`, `num_steps`, `lengths` (`real` or `full`), `is_checkpointed`, and for
            TRL `rows_at_once`, `packed_tokens` (0: rows are padded), `use_liger`; for silotune `micro_batch_tokens`
            (0: as the card has room) and `privacy`.

    Returns:
        `tokens_per_s` without padding, `peak_gib`, `losses` of all steps, `num_tokens` and `flops_per_token`.

    Raises:
        ModelError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ModelError("bench gpu needs a CUDA device; bench dp and bench tax run on a CPU")
    given = json.loads(settings)
    shape = SHAPES[given["shape"]]
    drawn = list(rows(given["batch_rows"] * given["num_steps"], shape.vocabulary, is_full=given["lengths"] == "full"))
    arm = {"silotune": _silotune, "trl": _trl}[who]
    base = llama.make_base(shape, torch.device("cuda"))
    num_parameters = sum(
        module.in_features * module.out_features for module in base.modules() if isinstance(module, nn.Linear)
    )
    return {**arm(base, drawn, given), "flops_per_token": 4 * num_parameters}


def rows(count: int, vocabulary: int, *, is_full: bool) -> Iterator[Encoded]:
    """Random tokens with the lengths that instruction data have: log-normal, or all as long as they may be."""
    draws = torch.Generator().manual_seed(1)
    for number in range(count):
        length = LONGEST if is_full else 0
        while not SHORTEST <= length <= LONGEST:
            length = int(MEDIAN_TOKENS * math.exp(SPREAD * torch.randn((), generator=draws).item()))
        ids = torch.randint(1, vocabulary, (length,), generator=draws).tolist()
        num_prompt = int((1 - ANSWER_SHARE) * length)
        yield Encoded(tuple(ids), (False,) * num_prompt + (True,) * (length - num_prompt), f"unit {number}")


class _Clock:
    """Tokens a second and memory of the steps after the first few."""

    def __init__(self) -> None:
        self._began, self._num_tokens = 0.0, 0

    def step(self, number: int, num_tokens: int) -> None:
        """A step is over; `number` counts from 1."""
        if number > NUM_WARM:
            self._num_tokens += num_tokens
        if number == NUM_WARM:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._began = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """The figures."""
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - self._began, torch.cuda.max_memory_allocated() / 2**30
        return {"tokens_per_s": self._num_tokens / seconds, "peak_gib": peak, "num_tokens": self._num_tokens}


def _silotune(base: Any, rows: Sequence[Encoded], given: dict[str, Any]) -> dict[str, Any]:
    """A site's steps."""
    engine = llama.make_engine(base, torch.device("cuda"), is_checkpointed=given["is_checkpointed"])
    training = config.TrainingConfig(
        batch_size=given["batch_rows"],
        micro_batch_tokens=given["micro_batch_tokens"],
        local_steps=given["num_steps"],
        local_epochs=0.0,
        learning_rate=LEARNING_RATE,
        schedule="constant",
    )
    privacy: PrivacyConfig = NoPrivacy(mode="none")
    if given.get("privacy"):
        prob = given["batch_rows"] / len(rows)
        privacy = UnitPrivacy(mode="unit", sampling_prob=prob, noise_multiplier=1.0, clip_norm=0.1)
    clock = _Clock()
    trainer = Trainer(
        engine, rows, training=training, privacy=privacy, round_index=0, num_rounds=1, seed=1, source=SystemNoise()
    )
    with trainer:
        for number in range(given["num_steps"]):
            # the arms see the same rows in the same order; a private step draws its own
            here = rows[number * given["batch_rows"] : (number + 1) * given["batch_rows"]]
            units = trainer.draw() if given.get("privacy") else [[row] for row in here]
            trainer.step(units)
            examples = [example for unit in units for example in unit]
            clock.step(number + 1, sum(len(row.input_ids) for example in examples for row in example.rows))
    losses = [float(loss) for loss in trainer.state()["losses"]]
    return {**clock.result(), "losses": losses}


def _trl(base: Any, rows: Sequence[Encoded], given: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with peft and bitsandbytes, as its documentation has it; only rows are not shuffled."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    packed, at_once = given["packed_tokens"], given["rows_at_once"]
    table = [
        {
            "input_ids": list(row.input_ids),
            "labels": [i if answers else -100 for i, answers in zip(row.input_ids, row.is_answer, strict=True)],
        }
        for row in rows
    ]
    pad, end, unknown = "<pad>", "<eos>", "<unk>"
    words = Tokenizer(models.WordLevel({pad: 0, end: 1, unknown: 2}, unk_token=unknown))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token=end)  # type: ignore[no-untyped-call]
    base.is_loaded_in_4bit = True  # as a base has it that transformers quantised
    clock, seen, losses = _Clock(), list[int](), list[float]()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.step(state.global_step, sum(seen))
            seen.clear()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in (logs or {}) else [])

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows: Any = train_dataset or self.train_dataset
            return SequentialSampler(rows)

    settings = SFTConfig(
        output_dir="/tmp/silotune-bench-gpu",  # noqa: S108  nothing is saved
        per_device_train_batch_size=1 if packed else at_once,
        gradient_accumulation_steps=1 if packed else given["batch_rows"] // at_once,
        num_train_epochs=1,
        max_steps=-1 if packed else given["num_steps"],
        bf16=True,
        gradient_checkpointing=given["is_checkpointed"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        max_length=packed or LONGEST,
        packing=bool(packed),
        use_liger_kernel=given["use_liger"],
        optim="adamw_torch_fused",
        seed=1,
    )
    lora = LoraConfig(r=llama.RANK, lora_alpha=32, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    trainer = InOrder(
        model=base,
        args=settings,
        train_dataset=Dataset.from_list(table),
        peft_config=lora,
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    collate = trainer.data_collator

    def counted(examples: Any) -> Any:
        seen.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()
    return {**clock.result(), "losses": losses}
