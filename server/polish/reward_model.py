"""A reward model on the engine's own base: its adapter, trained beside one score for the last token.

B batch, T tokens.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import DataError, ModelError
from common.frame import wire
from common.model.base import Engine
from server.polish import borrow

MODEL_FILE: Final = "reward_model.safetensors"
CONFIG_FILE: Final = "reward_model.json"
HEAD: Final = "score.weight"
JUDGE: Final = "judge"


class _Head(nn.Linear):
    """A score in float32, whatever the base computes in."""

    def forward(self, hidden_bth: Tensor) -> Tensor:
        return super().forward(hidden_bth.float())


@dataclass(frozen=True)
class RewardModel:
    """A trained reward model.

    Attributes:
        tensors: Its adapter, under the run's names.
        head: Weights of the score, (1, hidden size), float32.
    """

    tensors: Tensors
    head: Tensor


def build(engine: Engine, *, seed: int) -> Any:
    """The engine's base, adapter included, under a score head; the base is shared, not copied.

    Returns:
        A transformers model for sequence classification with one label.

    Raises:
        ModelError: transformers knows no such model for this base.

    Source: for the head's start, Stiennon et al. 2020, arXiv:2009.01325: N(0, 1 / (hidden size + 1)).
    """
    base: Any = engine.model.get_base_model()  # type: ignore[operator]
    config = copy.deepcopy(base.config)
    config.num_labels, config.pad_token_id = 1, engine.pad_id
    try:
        kind: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise ModelError(f"{config.model_type}: transformers has no reward model for this base; choose dpo") from error
    with torch.device("meta"):
        model = kind(config)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ModelError(f"{config.model_type}: its reward model has no linear score; choose dpo")
    size = model.score.in_features
    model.score = _Head(size, 1, bias=False)
    source = torch.Generator().manual_seed(seed)
    model.score.weight.data = torch.randn(1, size, generator=source) / math.sqrt(size + 1)
    setattr(model, base.base_model_prefix, getattr(base, base.base_model_prefix))
    return model.to(engine.device)


def read(engine: Engine, model: Any) -> RewardModel:
    """What was trained."""
    return RewardModel(adapter.read(engine.model), model.score.weight.detach().to("cpu", torch.float32, copy=True))


def save(folder: Path, trained: RewardModel, *, base_sha256: str) -> None:
    """Write the adapter and the head as one safetensors file, and beside it what they belong to.

    Raises:
        StorageError: Disk full or not writable.
    """
    storage.write_atomic(folder / MODEL_FILE, safetensors.torch.save({**trained.tensors, HEAD: trained.head}))
    facts = {"base_sha256": base_sha256, "head": HEAD, "reads": "last token that is no padding"}
    storage.write_atomic(folder / CONFIG_FILE, wire.canonical_json(facts) + b"\n")


def load(folder: Path, engine: Engine) -> RewardModel:
    """Read a reward model of the same base.

    Raises:
        DataError: It is not there, or of another base.
    """
    try:
        facts = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = safetensors.torch.load((folder / MODEL_FILE).read_bytes())
        head = tensors.pop(HEAD)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no reward model; play its stage again") from error
    adapter.check_specs(adapter.specs(tensors), engine.tensor_specs)
    if facts.get("base_sha256") != engine.base_sha256:
        raise DataError(f"{folder}: the reward model is of another base; play its stage again")
    return RewardModel(tensors, head)


class Judge:
    """Scores answers with a reward model that is one more frozen adapter on the same base."""

    __name__ = "reward_model"  # by which TRL calls its figures

    def __init__(self, engine: Engine, trained: RewardModel) -> None:
        self._engine = engine
        self._model = build(engine, seed=0)
        self._model.score.weight.data = trained.head.to(engine.device)
        self._model.score.requires_grad_(False)
        borrow.add_frozen(engine.model, JUDGE, trained.tensors)

    @torch.no_grad()
    def __call__(self, *, prompts: Sequence[list[int]], completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        """The score of each answer to its prompt, both as token ids."""
        peft_model: Any = self._engine.model
        was_training = peft_model.training
        peft_model.eval()
        peft_model.set_adapter(JUDGE)
        try:
            scores = []
            for prompt, answer in zip(prompts, completion_ids, strict=True):  # alone, so that no padding takes part
                ids_bt = torch.tensor([[*prompt, *answer]], device=self._engine.device)
                logits = self._model(input_ids=ids_bt, attention_mask=torch.ones_like(ids_bt)).logits
                scores.append(float(logits[0, 0]))
            return scores
        finally:
            peft_model.set_adapter("default")
            peft_model.train(was_training)
