"""Which of an adapter's tensors a site trains, sends, keeps and is sent in a round; loads no torch.

The one place where this is decided: training, the update, its declaration and its checks all ask here.
"""

import math
from collections.abc import Sequence

from common.frame.records import TensorSpec
from common.run.catalogue.methods import FACTS


def factor_of(name: str) -> str:
    """`A` or `B`, by a tensor's name; empty for a tensor of the side adapter; of other kinds anything else.

    Example:
        >>> factor_of("base_model.model.q_proj.lora_A.weight"), factor_of("base_model.model.q_proj.residual_A.weight")
        ('A', '')
    """
    _, found, rest = name.rpartition(".lora_")
    return rest.partition(".")[0] if found else ""


def trained_specs(method: str, tensor_specs: Sequence[TensorSpec], *, round_index: int) -> tuple[TensorSpec, ...]:
    """The tensors that a site trains in a round.

    Args:
        method: As in `aggregation.method`.
        tensor_specs: The whole adapter.
        round_index: From 0.
    """
    return _of_turn(FACTS[method].trains, tensor_specs, round_index=round_index)


def sent_specs(method: str, tensor_specs: Sequence[TensorSpec], *, round_index: int) -> tuple[TensorSpec, ...]:
    """The tensors of a round's update, exactly these: what was trained, without what stays at the site."""
    return _of_turn(FACTS[method].sends, tensor_specs, round_index=round_index)


def is_side(name: str) -> bool:
    """Whether a tensor is of the side adapter, which nobody trains."""
    return ".residual_" in name


def trained_names(method: str, tensor_specs: Sequence[TensorSpec], *, round_index: int) -> tuple[str, ...]:
    """Names of `trained_specs`.

    Example:
        >>> specs = [TensorSpec("q.lora_A.weight", (2, 8)), TensorSpec("q.lora_B.weight", (8, 2))]
        >>> trained_names("ffa", specs, round_index=0)
        ('q.lora_B.weight',)
    """
    return tuple(spec.name for spec in trained_specs(method, tensor_specs, round_index=round_index))


def sent_names(method: str, tensor_specs: Sequence[TensorSpec], *, round_index: int) -> tuple[str, ...]:
    """Names of `sent_specs`.

    Example:
        >>> specs = [TensorSpec("q.lora_A.weight", (2, 8)), TensorSpec("q.lora_B.weight", (8, 2))]
        >>> sent_names("fedsa", specs, round_index=0), len(trained_names("fedsa", specs, round_index=0))
        (('q.lora_A.weight',), 2)
    """
    return tuple(spec.name for spec in sent_specs(method, tensor_specs, round_index=round_index))


def all_turns(method: str, tensor_specs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, ...]]:
    """The tensors of an update for every kind of round that the method has."""
    return [sent_specs(method, tensor_specs, round_index=turn) for turn in range(len(FACTS[method].trains))]


def leaving_specs(method: str, tensor_specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors that leave a site in some round of a run."""
    names = {spec for turn in all_turns(method, tensor_specs) for spec in turn}
    return tuple(spec for spec in tensor_specs if spec in names)


def kept_specs(method: str, tensor_specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors that stay at a site from round to round, begin at zero and never travel."""
    return tuple(spec for spec in tensor_specs if factor_of(spec.name) in FACTS[method].client_state)


def received_specs(method: str, tensor_specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors that a site is sent: all but those that it makes from the run's seed, or keeps, itself."""
    own = (*FACTS[method].fixed, *FACTS[method].client_state)
    return tuple(spec for spec in tensor_specs if factor_of(spec.name) not in own)


def at_rank(tensor_specs: Sequence[TensorSpec], rank: int) -> tuple[TensorSpec, ...]:
    """The factors at another rank; a tensor that is no factor of a pair is the same everywhere.

    Example:
        >>> [spec.shape for spec in at_rank([TensorSpec("q.lora_A.weight", (8, 64))], 2)]
        [(2, 64)]
    """
    found = []
    for name, shape, factor in ((spec.name, spec.shape, factor_of(spec.name)) for spec in tensor_specs):
        cut = (rank, *shape[1:]) if factor == "A" else (*shape[:-1], rank) if factor == "B" else shape
        found.append(TensorSpec(name, cut))
    return tuple(found)


def _of_turn(turns: Sequence[str], tensor_specs: Sequence[TensorSpec], *, round_index: int) -> tuple[TensorSpec, ...]:
    """The tensors of a round."""
    return _with(turns[round_index % len(turns)], tensor_specs)


def _with(factors: str, tensor_specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """All tensors but the factors that are not named, and the side adapter."""
    left_out = {"A", "B"} - set(factors)
    return tuple(spec for spec in tensor_specs if factor_of(spec.name) not in left_out and not is_side(spec.name))


def num_values(tensor_specs: Sequence[TensorSpec]) -> int:
    """Values in tensors of these shapes."""
    return sum(math.prod(spec.shape) for spec in tensor_specs)


def in_words(turns: Sequence[str]) -> str:
    """The factors of an update, for people.

    Example:
        >>> in_words(("AB",)), in_words(("B", "A"))
        ('A and B', 'B, then A, in turn')
    """
    words = [" and ".join(factors) for factors in turns]
    return words[0] if len(words) == 1 else f"{', then '.join(words)}, in turn"
