"""What a whole run keeps of notes that nothing else could have taught it: random tokens, inserted by coins."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from client.agent.agent import SiteData
from client.train import schedule
from common.data.rows import Message, Row
from common.errors import ConfigError
from common.events import EventLog
from common.loss import drops
from common.model.base import Engine
from common.privacy import roc
from simulations.audit import trained
from simulations.audit.finding import Finding
from simulations.world.world import World

MAX_SHARE: Final = 0.01
NUM_PROMPT_TOKENS: Final = 8
NUM_ANSWER_TOKENS: Final = 16


def audit(
    shared: World,
    log: EventLog,
    *,
    num_canaries: int,
    max_share: float = MAX_SHARE,
    claimed_epsilon: float | None = None,
) -> Finding:
    """Train with canaries, then guess from base and adapter which of them were trained on.

    Args:
        num_canaries: m; about half of them are inserted, each as a unit of its own.
        max_share: Most canaries for each unit that trains; canaries cost utility.

    Raises:
        ConfigError: The sites have too few units for so many canaries.
    """
    num_units = sum(len({row.unit for row in data.train}) for data in shared.sites.values())
    if num_canaries > max_share * num_units:
        raise ConfigError(
            f"{num_canaries} canaries are more than {max_share:.0%} of {num_units} units, of which "
            f"{int(max_share * num_units)} would be; take fewer, more rows, or set --max-share and accept a worse model"
        )
    seed = shared.settings.seed
    rows = make(shared.engine, num_canaries, seed=seed)
    is_in_m = trained.coins(num_canaries, seed=seed, purpose="canaries")
    chosen = [row for row, is_in in zip(rows, is_in_m.tolist(), strict=True) if is_in]
    adapter = trained.train(shared, insert(shared.sites, chosen, seed=seed), log)
    score_m = drops.loss_drops(shared.engine, adapter, [[row] for row in rows], data=shared.settings.data)
    figures = {
        "exposure_bits": roc.exposure(score_m, is_in_m),
        "exposure_bits_at_most": float(np.log2(1 + int((~is_in_m).sum()))),
    }
    return trained.judge("canaries", shared, score_m, is_in_m, claimed_epsilon=claimed_epsilon, figures=figures)


def make(engine: Engine, count: int, *, seed: int) -> list[Row]:
    """Notes of random tokens, each a question and an answer."""
    generator = np.random.default_rng(schedule.derive_seed(seed, "canary-tokens"))
    # Tokens that are letters or digits, so that a text of them has about as many tokens again when it is read.
    tokenizer = engine.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = (number for number in range(len(tokenizer)) if number not in special)
    usable = [number for number in ids if str(tokenizer.decode([number])).strip().isalnum()]

    def text(num_tokens: int) -> str:
        return str(tokenizer.decode(generator.choice(usable, num_tokens)))

    rows = []
    for number in range(count):
        name = f"canary-{number}"  # a unit of its own
        messages = (Message("user", text(NUM_PROMPT_TOKENS)), Message("assistant", text(NUM_ANSWER_TOKENS)))
        rows.append(Row(messages, unit=name, row_id=name))
    return rows


def insert(sites: Mapping[str, SiteData], rows: Sequence[Row], *, seed: int) -> dict[str, SiteData]:
    """Each canary into the training rows of a random site."""
    names = sorted(sites)
    generator = np.random.default_rng(schedule.derive_seed(seed, "canary-sites"))
    chosen = generator.integers(len(names), size=len(rows)).tolist()
    added = {name: [row for row, index in zip(rows, chosen, strict=True) if names[index] == name] for name in names}
    return {name: replace(sites[name], train=[*sites[name].train, *added[name]]) for name in names}
