"""The weighted mean of the sites' products B_i A_i, as one pair of thin matrices; what non-linear methods rest on."""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from common.adapter import ranks
from server.aggregate import factored
from server.aggregate.kept import Kept
from server.aggregate.method import State, Sum

_STACKED: Final = "stacked/"  # before a module's name, apart from the module's own factors


class MeanOfProducts:
    """Keeps every upload of a round: the products of a sum are not the sum of the products."""

    def __init__(self, state: State, *, is_partitioned: bool = False) -> None:
        self._state = state
        self._is_partitioned = is_partitioned
        self._kept = Kept()

    def add(self, upload: State, *, weight: float) -> None:
        """Keep an upload.

        Raises:
            ValueError: The weight is not positive.
        """
        self._kept.add(upload, weight=weight)

    def result(self) -> dict[str, Tensor]:
        """Of each module `[p_1 B_1, ..., p_K B_K]` and `[A_1; ...; A_K]`: rank K r, product the mean; see `pairs`.

        Raises:
            ValueError: Nothing was added.
        """
        ordered = sorted(self._kept.ordered(), key=lambda kept: kept[0])
        weights = [weight for weight, _ in ordered]
        local = [factored.modules(self._local(upload)) for _, upload in ordered]
        stacked: dict[str, Tensor] = {}
        for module, (b_dr, a_rk) in factored.modules(self._state).items():
            held = [site[module] for site in local]
            shares = _shares(weights, [len(a_qk) for _, a_qk in held], is_partitioned=self._is_partitioned)
            left_dm = torch.cat([share * b_dq for share, (b_dq, _) in zip(shares, held, strict=True)], dim=1)
            right_mk = torch.cat([a_qk for _, a_qk in held], dim=0)
            if self._is_partitioned:
                most = max(len(a_qk) for _, a_qk in held)
                left_dm = torch.cat([left_dm, b_dr[:, most:]], dim=1)
                right_mk = torch.cat([right_mk, a_rk[most:]], dim=0)
            stacked |= factored.named(_STACKED + module, left_dm, right_mk)
        return stacked

    def _local(self, upload: State) -> dict[str, Tensor]:
        """A site's adapter after its training, at its rank."""
        return {name: tensor + upload[name] for name, tensor in ranks.cut(self._state, upload).items()}


def start(state: State, *, trained: Collection[str]) -> Sum:
    """Begin a round; both factors of every module are trained."""
    return MeanOfProducts({name: state[name] for name in trained})


def start_partitioned(state: State, *, trained: Collection[str]) -> Sum:
    """Begin a round in which component j of a product weighs among the sites that hold one, and not among all.

    p_i^(j) = p_i 1[q_i >= j] / sum_l p_l 1[q_l >= j],   mean = sum_j sum_i p_i^(j) b_ij a_ij

    Among all, what only larger sites hold would shrink every round, down to the smallest rank. A component that no site
    of the round holds stays as it was: the larger sites were away, and nobody moved it. With equal ranks it is the
    plain mean.

    Source: raFLoRA, arXiv:2602.13486.
    """
    return MeanOfProducts({name: state[name] for name in trained}, is_partitioned=True)


def pairs(combined: State) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean of the products of every module in a round's result; empty if it holds none."""
    found = {name: tensor for name, tensor in combined.items() if name.startswith(_STACKED)}
    return {name.removeprefix(_STACKED): pair for name, pair in factored.modules(found).items()}


def _shares(weights: list[float], sizes: list[int], *, is_partitioned: bool) -> list[float | Tensor]:
    """What each site's columns count; `sizes` are the sites' ranks."""
    total = sum(weights)
    if not is_partitioned or len(set(sizes)) == 1:
        return [weight / total for weight in weights]
    holding = [sum(w for w, q in zip(weights, sizes, strict=True) if q > j) for j in range(max(sizes))]
    return [torch.tensor([weight / holding[j] for j in range(q)]) for weight, q in zip(weights, sizes, strict=True)]
