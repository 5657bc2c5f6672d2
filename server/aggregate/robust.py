"""What stands in the place of the mean where some sites may be bad: Flower's functions on a round's updates.

    median, trimmed_mean     of each value over the sites (Yin et al. 2018, arXiv:1803.01498)
    krum                     the update that is nearest to its n - f - 2 nearest others (Blanchard et al. 2017,
                             arXiv:1703.02757)
    multi_krum               the mean of the n - f - 2 best of that order
    bulyan                   the n - 2 f best of it, then of each value the mean of the n - 4 f nearest to the median
                             (El Mhamdi et al. 2018, arXiv:1802.07927)

n updates, f of them bad at most. All sites weigh the same, since a site's number of rows is its own claim. K updates.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from numpy.typing import NDArray

from server.aggregate.kept import Kept
from server.aggregate.method import State, Sum

Values = NDArray[np.float64]
Update = Mapping[str, Values]
_RECORD: Final = "update"


class RobustMean:
    """Keeps every update of a round: no sum could tell a bad one."""

    def __init__(self, names: Collection[str], *, rule: str, num_bad: int) -> None:
        self._names, self._rule, self._num_bad = sorted(names), rule, num_bad
        self._kept = Kept()

    def add(self, upload: State, *, weight: float) -> None:
        """Keep an upload, whatever its weight.

        Raises:
            ValueError: The weight is not positive.
        """
        self._kept.add(upload, weight=weight)

    def result(self) -> State:
        """What the updates agree on, float32.

        Raises:
            ValueError: Nothing was added.
        """
        uploads = [upload for _, upload in self._kept.ordered()]
        updates: list[Update] = [{name: upload[name].double().numpy() for name in self._names} for upload in uploads]
        found = RULES[self._rule](updates, self._num_bad)
        return {name: torch.from_numpy(np.asarray(found[name], dtype=np.float32)) for name in self._names}


def start(names: Collection[str], *, rule: str, num_bad: int) -> Sum:
    """Begin a round.

    Args:
        names: Of the tensors that sites send.
        rule: `aggregation.robust.rule`.
        num_bad: Sites that may be bad, at most.
    """
    return RobustMean(names, rule=rule, num_bad=num_bad)


def _median(updates: list[Update], num_bad: int) -> Update:
    """Of each value; good while fewer than half are bad."""
    return {name: np.median(stack, axis=0) for name, stack in _stacks(updates).items()}


def _trimmed_mean(updates: list[Update], num_bad: int) -> Update:
    """Of each value without the f largest and the f smallest; a little more, so that Flower's cut is f exactly."""
    share = (num_bad + 0.25) / len(updates)
    return {name: trim_mean(stack, share) for name, stack in _stacks(updates).items()}


def _krum(updates: list[Update], num_bad: int) -> Update:
    """One site's update as it is."""
    return _selected(updates, num_bad, count=1)[0]


def _multi_krum(updates: list[Update], num_bad: int) -> Update:
    """The mean of the best."""
    chosen = _selected(updates, num_bad, count=len(updates) - num_bad - 2)
    return {name: stack.mean(axis=0) for name, stack in _stacks(chosen).items()}


def _bulyan(updates: list[Update], num_bad: int) -> Update:
    """Of the best, each value's mean near the median."""
    chosen = _selected(updates, num_bad, count=len(updates) - 2 * num_bad)
    names = list(chosen[0])
    medians = [np.median(stack, axis=0) for stack in _stacks(chosen).values()]
    rows = [list(update.values()) for update in chosen]
    found = aggregate_n_closest_weights(medians, rows, len(updates) - 4 * num_bad)
    return dict(zip(names, found, strict=True))


RULES: Final[Mapping[str, Callable[[list[Update], int], Update]]] = {
    "median": _median,
    "trimmed_mean": _trimmed_mean,
    "krum": _krum,
    "multi_krum": _multi_krum,
    "bulyan": _bulyan,
}


def _stacks(updates: list[Update]) -> dict[str, Values]:
    """Each tensor of all updates, (K, ...)."""
    return {name: np.stack([update[name] for update in updates]) for name in updates[0]}


def _selected(updates: list[Update], num_bad: int, *, count: int) -> list[Update]:
    """The updates of lowest Krum score, best first."""
    records = [
        RecordDict({_RECORD: ArrayRecord({name: Array(value) for name, value in update.items()})}) for update in updates
    ]
    places = {id(record): index for index, record in enumerate(records)}
    return [updates[places[id(record)]] for record in select_multikrum(records, num_bad, count)]
