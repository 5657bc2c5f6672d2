"""Training did something, and what it did is what will be sent: checked, since a silent failure costs GPU days.

Opacus issue 820 is such a case: 45 GPU-hours of models that had not moved, without an error.
"""

import torch
from torch import Tensor

from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ModelError
from common.model.base import Engine
from common.run.catalogue import kinds

PROBE_TOKENS = 16


def check_moved(engine: Engine, before: Tensors) -> None:
    """Every module of the adapter has changed in some value.

    Raises:
        ModelError: Names the first that has not.
    """
    after = adapter.read(engine.model)
    moved = {kinds.module_of(name) for name in after if not torch.equal(after[name], before[name])}
    still = [module for module in adapter.module_names(adapter.specs(after)) if module not in moved]
    if still:
        raise ModelError(
            f"training did not change the adapter of {still[0]} ({len(still)} such modules); nothing was sent. "
            "Look at training.learning_rate, or report this"
        )


@torch.no_grad()
def check_reload(engine: Engine) -> None:
    """The trained adapter, written as bytes and read back, gives the same logits.

    Raises:
        ModelError: It does not.
    """
    tensors = adapter.read(engine.model)
    expected = _logits(engine)
    data = adapter.encode(tensors, dtype="float32")
    adapter.write(engine.model, adapter.decode(data, adapter.specs(tensors), dtype="float32"))
    if not torch.equal(_logits(engine), expected):
        raise ModelError("the adapter gives other logits once it is saved and read back; nothing was sent")


def _logits(engine: Engine) -> Tensor:
    """Of a fixed input, in evaluation mode."""
    was_training = engine.model.training
    engine.model.eval()
    ids = torch.arange(PROBE_TOKENS, device=engine.device)[None] % len(engine.tokenizer)
    logits: Tensor = engine.model(input_ids=ids).logits
    engine.model.train(was_training)
    return logits
