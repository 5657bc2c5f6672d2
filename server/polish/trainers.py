"""One TRL trainer for each kind of stage, on tokens that are ready and on an adapter that stays float32.

Each class overrides only where TRL would turn texts into tokens; the losses are TRL's own.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # our docs and errors say which kinds are experimental

import torch
from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped]
from transformers import PrinterCallback, TrainerCallback
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from common.model.base import Engine
from common.run.schema.polish import OrpoStage, PolishStage, SampledStage, SimpoStage
from server.polish.rewards import Reward
from server.polish.rows import StageRows, Tokens
from server.polish.rows import num_steps as num_steps_of
from server.polish.unfinished import Kept

NUM_REPORTED: Final = 10  # steps of a stage that become events
_MARGINS: Final = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
FIGURES: Final[Mapping[str, Mapping[str, str]]] = {
    "sft": {"loss": "loss"},
    "cpt": {"loss": "loss"},
    "dpo": {**_MARGINS, "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected"},
    "orpo": _MARGINS,
    "simpo": _MARGINS,
    "kto": {"loss": "loss", "margin": "rewards/margins"},
    "reward": {"loss": "loss", "margin": "margin", "accuracy": "accuracy"},
    "grpo": {"reward": "reward", "length": "completions/mean_length"},
    "rloo": {"reward": "reward", "length": "completions/mean_length"},
}


class _Sft(Kept, SFTTrainer):
    """Imitation, and continued pre-training."""


class _Reward(Kept, RewardTrainer):
    """A score of answers (Bradley and Terry 1952, as in arXiv:2203.02155)."""


class _Ready:
    """For trainers that would tokenise in `_prepare_dataset`: the rows are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class _Dpo(Kept, _Ready, DPOTrainer):
    """Rafailov et al. 2023, arXiv:2305.18290; Azar et al. 2023, arXiv:2310.12036 (ipo); arXiv:2403.00409 (robust)."""


class _Kto(Kept, _Ready, KTOTrainer):
    """Ethayarajh et al. 2024, arXiv:2402.01306."""


class _Orpo(Kept, ORPOTrainer):
    """Hong et al. 2024, arXiv:2403.07691."""

    def tokenize_row(self, feature: Tokens, model: Any = None) -> Tokens:
        return feature


class _Simpo(Kept, CPOTrainer):
    """Meng et al. 2024, arXiv:2405.14734: TRL's CPO trainer with that loss and no term for the chosen answer alone."""

    def tokenize_row(self, feature: Tokens, model: Any = None) -> Tokens:
        return feature


class _Prompted:
    """For trainers that sample: a prompt is a list of token ids."""

    num_epochs_done: int

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler draws each epoch's order from one generator, which a checkpoint does not hold."""
        sampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        for _ in range(self.num_epochs_done):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}


class _Grpo(Kept, _Prompted, GRPOTrainer):
    """Shao et al. 2024, arXiv:2402.03300."""


class _Rloo(Kept, _Prompted, RLOOTrainer):
    """Ahmadian et al. 2024, arXiv:2402.14740."""


def make(
    stage: PolishStage,
    engine: Engine,
    rows: StageRows,
    *,
    scratch: str,
    keeps: bool = False,
    tell: Callable[[int, Mapping[str, float]], None],
    model: Any = None,
    reward: Reward | None = None,
) -> Any:
    """A trainer that is ready to train and to evaluate on the held-out rows.

    Args:
        engine: Base, adapter and tokenizer.
        keeps: Leave a checkpoint there after each tenth of the stage; else nothing is written while all is well.
        tell: Gets a step's number and its figures.
        model: Trained in the place of the engine's model: the reward model.
    """
    trainer_class, config_class, of_kind = _KINDS[stage.kind]
    num_steps = num_steps_of(stage, rows)
    interval = max(1, num_steps // NUM_REPORTED)
    options = {
        "output_dir": scratch,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "logging_steps": interval,
        "use_cpu": engine.device.type == "cpu",
        "bf16": False,  # autocast; the base computes in its own type, the adapter in float32
        "fp16": False,
        "gradient_checkpointing": False,  # as the engine was loaded
        "seed": stage.seed,
        "max_steps": num_steps,
        "per_device_train_batch_size": stage.micro_rows,
        "per_device_eval_batch_size": stage.micro_rows,
        "gradient_accumulation_steps": stage.batch_size // stage.micro_rows,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.schedule,
        "warmup_steps": int(stage.warmup_fraction * num_steps),
        "max_grad_norm": stage.max_grad_norm,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    if keeps:  # the checkpoint before stays until the next is whole
        options |= {"save_strategy": "steps", "save_steps": interval, "save_total_limit": 2}
    disable_progress_bars()
    sources: dict[str, Any] = {"reward_funcs": [reward]} if isinstance(stage, SampledStage) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL's own defaults and plans; nothing that a reader could act on
        args = config_class(**options, **of_kind(stage))
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process on the engine's own device, however many the machine has
        trainer = trainer_class(
            model=model if model is not None else engine.model,
            args=args,
            train_dataset=Dataset.from_list(_form(rows.train, stage)),
            eval_dataset=Dataset.from_list(_form(rows.held_out, stage)),
            processing_class=engine.tokenizer,
            callbacks=[_StepLog(tell)],
            **sources,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def figures(trainer: Any, stage: PolishStage) -> dict[str, float]:
    """The objective's figures on the held-out rows, as the adapter is now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = trainer.evaluate()
    named = {name: measured.get(f"eval_{key}") for name, key in FIGURES[stage.kind].items()}
    return {name: float(value) for name, value in named.items() if value is not None and math.isfinite(value)}


class _StepLog(TrainerCallback):
    """Passes a step's figures on."""

    def __init__(self, tell: Callable[[int, Mapping[str, float]], None]) -> None:
        self._tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """What TRL logs of a step; its own summary at the end of training has no `loss`."""
        if logs and "loss" in logs:
            self._tell(state.global_step, {key: value for key, value in logs.items() if isinstance(value, float)})


def _form(rows: Sequence[Tokens], stage: PolishStage) -> list[Tokens]:
    """Rows under the names that the kind's trainer reads."""
    if stage.kind == "reward":
        return [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
    formed = []
    if stage.kind in ("orpo", "simpo"):  # a pair as TRL's older trainers take it
        for row in rows:
            prompt = row["prompt_ids"]
            pair: Tokens = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
            for name in ("chosen", "rejected"):
                ids = prompt + row[f"{name}_ids"]
                labels = [-100] * len(prompt) + row[f"{name}_ids"]
                pair |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}
            formed.append(pair)
        return formed
    if stage.kind != "kto":
        return list(rows)
    # KTO estimates its KL term from the answer of the neighbour within the batch (Ethayarajh et al. 2024, section 4.1);
    # TRL rotates within micro-batches too.
    for start in range(0, len(rows), stage.micro_rows):
        batch = rows[start : start + stage.micro_rows]
        answers = [row["completion_ids"] for row in batch]
        pairs = zip(batch, [answers[-1], *answers[:-1]], strict=True)
        formed += [{**row, "KL_completion_ids": other} for row, other in pairs]
    return formed


def _sampled(stage: SampledStage) -> dict[str, Any]:
    return {
        "beta": stage.beta,
        "num_generations": stage.num_generations,
        "max_completion_length": stage.max_new_tokens,
        "temperature": stage.temperature,
    }


def _pairs(stage: OrpoStage | SimpoStage) -> dict[str, Any]:
    return {"beta": stage.beta, "max_length": stage.max_length_tokens, "remove_unused_columns": False}


def _imitation(_: PolishStage) -> dict[str, Any]:
    return {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}


# Trainer, its settings, and what of a stage goes into them besides what all kinds share.
_KINDS: Final[Mapping[str, tuple[Any, Any, Callable[[Any], dict[str, Any]]]]] = {
    "sft": (_Sft, SFTConfig, _imitation),
    "cpt": (_Sft, SFTConfig, _imitation),
    "dpo": (
        _Dpo,
        DPOConfig,
        lambda stage: {
            "beta": stage.beta,
            "loss_type": [stage.loss],
            "label_smoothing": stage.label_smoothing,
            "max_length": None,
        },
    ),
    "kto": (
        _Kto,
        KTOConfig,
        lambda stage: {
            "beta": stage.beta,
            "desirable_weight": stage.desirable_weight,
            "undesirable_weight": stage.undesirable_weight,
            "max_length": None,
        },
    ),
    "orpo": (_Orpo, ORPOConfig, _pairs),
    "simpo": (
        _Simpo,
        CPOConfig,
        lambda stage: {**_pairs(stage), "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": stage.margin},
    ),
    "reward": (_Reward, RewardConfig, lambda _: {"max_length": None}),
    "grpo": (_Grpo, GRPOConfig, _sampled),
    "rloo": (_Rloo, RLOOConfig, _sampled),
}
