"""Whether merged weights are the base plus the adapter: logits on fixed tokens, beside what the adapter does to them.

What is merged is held to a share of the adapter's effect and not of the logits: an adapter that does little would
otherwise be lost, doubled or put into the wrong weight without notice.

V vocabulary, B sequences, T tokens.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from common.errors import ModelError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
SHAPE_BT: Final = (4, 32)
SHARE: Final = 0.02  # of the adapter's effect: float32 sums in another order differ by far less
FLOOR: Final = 1e-4  # of the logits: a smaller effect is lost in the rounding of float32 and bf16


@dataclass(frozen=True)
class Probe:
    """Of a merged checkpoint; root mean squares over that of the adapter's own logits, all without their mean.

    Attributes:
        effect: Base alone, from base and adapter side by side: what the adapter does.
        summed: Their sum in float32, from side by side.
        rounding: The sum rounded to bf16, from the sum.
        saved: The checkpoint as it is loaded again, from the rounded sum.
    """

    effect: float
    summed: float
    rounding: float
    saved: float

    def check(self, where: str) -> None:
        """Sum and checkpoint must be the adapter beside its base, but for the rounding.

        Raises:
            ModelError: They are not, or a figure is no number.
        """
        for what, off in (("the sum of base and adapter", self.summed), ("the merged checkpoint", self.saved)):
            if not off <= allowed(self.effect):
                raise ModelError(
                    f"{where}: logits of {what} are off by {off:.2e} of their size, where the adapter itself moves "
                    f"them by {self.effect:.2e}; allowed is {allowed(self.effect):.0e}. Serve the adapter beside its "
                    "base (format peft or vllm), and report this base and these targets as a fault of silotune"
                )


def allowed(effect: float) -> float:
    """The largest difference of what should be the same function.

    Args:
        effect: What the adapter does to the logits, as a share of their size.

    Example:
        >>> allowed(0.5), allowed(1e-6)
        (0.01, 0.0001)
    """
    return max(SHARE * effect, FLOOR)


def stored(kind: type[Record], figures: Mapping[str, Any], *, what: str) -> Record:
    """Figures of a seal as a record of floats.

    Raises:
        ModelError: They are none; `what` names them.
    """
    try:
        record = kind(**figures)
        if not all(math.isfinite(float(value)) for value in dataclasses.astuple(record)):
            raise ValueError("not finite")
        return record
    except (TypeError, ValueError) as error:
        raise ModelError(f"the seal's figures of {what} are malformed; get the folder again") from error


@torch.no_grad()
def logits(network: Any) -> Tensor:
    """On fixed tokens, float32, without their mean over the vocabulary; shape (B, T, V)."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = network.config.get_text_config().vocab_size
    ids_bt = torch.randint(num_tokens, SHAPE_BT, generator=generator)
    logits_btv: Tensor = network.eval()(input_ids=ids_bt.to(network.device)).logits.float().cpu()
    return logits_btv - logits_btv.mean(dim=-1, keepdim=True)


def difference(given_btv: Tensor, wanted_btv: Tensor, *, size_btv: Tensor | None = None) -> float:
    """Root mean square of the difference over that of `size_btv`; None: of what is wanted."""
    return float((given_btv - wanted_btv).norm() / (wanted_btv if size_btv is None else size_btv).norm())


def add_up(network: Any) -> Any:
    """Merge a peft model's adapter into its base, in place: float32, every layer added in float64 and rounded once.

    A sum in float32 would be rounded to one or the other neighbour in bf16 by the order in which a processor adds, so
    that an export would not be the same where it is verified.
    A weight that another layer shares, as the head of a tied base shares the embedding, becomes the layer's own first:
    the adapter changes what the one layer does, and would change the other as well.

    Returns:
        The base with other weights; its configuration says so where head and embedding are no longer tied.
    """
    owners = collections.Counter(id(weight) for part in network.modules() for weight in part._parameters.values())
    adapted: list[Any] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:
        layer = module.get_base_layer()
        weight = getattr(layer, "weight", None)
        if weight is not None and owners[id(weight)] > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            for settings in (network.config, network.config.get_text_config()):
                settings.tie_word_embeddings = False

        def merge(*given: Any, module: Any = module, plain: Any = module.merge, **options: Any) -> None:
            module.double()  # only now, so that one layer at a time is that large
            plain(*given, **options)
            module.get_base_layer().float()  # the adapter's own parts may be shared

        module.merge = merge
    return network.merge_and_unload()


@torch.no_grad()
def round_weights(network: Any) -> None:
    """To bf16, in place and still float32; not the buffers: no checkpoint holds the rotary frequencies."""
    for weight in network.parameters():
        weight.copy_(weight.to(torch.bfloat16))
