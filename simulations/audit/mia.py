"""Can an attacker learn who was trained on? Half of the units, by coins, train; losses are calibrated on the base."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client.agent.agent import SiteData
from common.data.rows import Row
from common.errors import DataError
from common.events import EventLog
from common.loss import drops
from simulations.audit import trained
from simulations.audit.finding import Finding
from simulations.world.world import World


def audit(shared: World, log: EventLog, *, claimed_epsilon: float | None = None) -> Finding:
    """Train on half of the units of every site and attack by the loss.

    The units are the canaries of the one-run bound, as each is in with probability 1/2, for itself.

    Args:
        shared: A resolved run, its base and its sites; training and held-out rows are dealt anew.

    Raises:
        DataError: A site has so few units that the coins left one of the sides empty.

    Source: Yeom et al. 2018, arXiv:1709.01604, for the attack by loss.
    """
    units, is_in_m, dealt = deal(shared.sites, seed=shared.settings.seed)
    adapter = trained.train(shared, dealt, log)
    score_m = drops.loss_drops(shared.engine, adapter, units, data=shared.settings.data)
    figures = {"members": int(is_in_m.sum())}
    return trained.judge("mia", shared, score_m, is_in_m, claimed_epsilon=claimed_epsilon, figures=figures)


def deal(sites: Mapping[str, SiteData], *, seed: int) -> tuple[list[list[Row]], Tensor, dict[str, SiteData]]:
    """All units, which of them train, and the sites that follow from it."""
    units: list[list[Row]] = []
    is_in: list[Tensor] = []
    dealt: dict[str, SiteData] = {}
    for name, data in sorted(sites.items()):
        units_of_site = trained.by_unit([*data.train, *data.held_out])
        chosen = trained.coins(len(units_of_site), seed=seed, purpose=f"members of {name}")
        sides: dict[bool, list[Row]] = {True: [], False: []}  # members train, the others are held out
        for rows, is_member in zip(units_of_site, chosen.tolist(), strict=True):
            sides[is_member] += rows
        if not sides[True] or not sides[False]:
            raise DataError(f"{name}: {len(units_of_site)} units are too few to be dealt to two sides; give it more")
        dealt[name] = SiteData(sides[True], sides[False])
        units, is_in = [*units, *units_of_site], [*is_in, chosen]
    return units, torch.cat(is_in), dealt
