"""Which words of a note can be read off one update? The span of layer 0's gradients, by a coordinator who is curious.

What enters the query and value layers of layer 0 is the norm of a token's embedding, whatever its place, as positions
come in later. The gradient of A is a sum of such inputs, each times something; the gradient of B is a sum of A times
such inputs. So every token of the note lies in the space that the update spans, and hardly any other token does, as
long as the rank is above the number of distinct tokens. V tokens of the vocabulary, D width, R rank.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from client.agent.agent import SiteData
from client.train import loop
from common.adapter import adapter, cores
from common.adapter.adapter import Tensors
from common.data.rows import Row
from common.errors import ConfigError, DataError
from common.model import base as model
from common.model.base import Engine
from common.privacy import cost
from common.privacy.noise import Noise
from common.run.schema.privacy import DP_DELTA
from common.text.prompts import Encoded
from simulations.audit.finding import Finding
from simulations.world.world import World

TARGETS: Final = ("q_proj", "v_proj")
NUMERICAL_RANK: Final = 1e-4  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Attack:
    """What one note gave away.

    Attributes:
        recall: Share of its distinct tokens among as many tokens that lie closest to the span.
        chance: The recall of a guess.
    """

    recall: float
    num_tokens: int
    chance: float


def audit(shared: World, rows: Sequence[Row], *, sources: Sequence[Noise]) -> Finding:
    """Let a site train on one note at a time as the run says, and read the note off its update.

    Args:
        shared: A resolved run, of which one round is played; its adapter is on the query and value layers of layer 0.

    Raises:
        ConfigError: The adapter has no factors there.
        DataError: A note is too long for the run.

    Source: Petrov et al. 2024, arXiv:2405.15586 (DAGER), section 4, for the span; LoRA factors as in its appendix.
    """
    settings = shared.settings
    notes, _ = model.encode(shared.engine, rows, settings.data)
    attacks = [attack(shared, note, source=source) for note, source in zip(notes, sources, strict=True)]
    num_tokens = sum(result.num_tokens for result in attacks)
    return Finding(
        part="inversion",
        claimed_epsilon=cost.epsilon(settings) if settings.privacy.mode == "unit" else math.inf,
        audited_epsilon=None,
        ceiling=None,
        num_canaries=num_tokens,
        dp_delta=DP_DELTA if settings.privacy.mode == "none" else settings.privacy.dp_delta,
        figures={
            "notes": len(attacks),
            "recall": sum(result.recall * result.num_tokens for result in attacks) / num_tokens,
            "recall_of_a_guess": sum(result.chance for result in attacks) / len(attacks),
        },
    )


def choose(sites: Mapping[str, SiteData], count: int) -> list[Row]:
    """Notes from all sites in turn."""
    turns = itertools.zip_longest(*(data.train for _, data in sorted(sites.items())))
    rows = [row for turn in turns for row in turn if row is not None]
    if len(rows) < count:
        raise DataError(f"{count} notes wanted, {len(rows)} there; ask for fewer")
    return rows[:count]


def attack(shared: World, note: Encoded, *, source: Noise) -> Attack:
    """Train on one note from the adapter as attached, and rank the vocabulary by its distance to the update's span."""
    engine, settings = shared.engine, shared.settings
    if any(name.endswith(cores.WEIGHT) for name in engine.initial):
        raise ConfigError("this attack reads the span of A and B, which ravan never trains; set another method")
    adapter.write(engine.model, engine.initial)
    loop.train(
        engine,
        [note],
        training=settings.training,
        privacy=settings.privacy,
        round_index=0,
        num_rounds=1,
        seed=settings.seed,
        source=source,
    )
    distance_v = distances(engine, before=engine.initial, after=adapter.read(engine.model))
    wanted = set(note.input_ids[:-1])  # the last token is learned and never read
    guessed = set(distance_v.argsort()[: len(wanted)].tolist())
    return Attack(len(wanted & guessed) / len(wanted), len(wanted), len(wanted) / len(distance_v))


def distances(engine: Engine, *, before: Tensors, after: Tensors) -> Tensor:
    """Of every token to what the update of layer 0 spans, from 0 to 1; the mean over the factors that changed."""
    # What each token would be at the input of layer 0's projections.
    base: Any = engine.model.get_base_model().model  # type: ignore[operator]
    with torch.no_grad():
        embedded_vd: Tensor = base.layers[0].input_layernorm(base.embed_tokens.weight)
    inputs_vd = embedded_vd.float().cpu()
    names = [name for name in before if ".layers.0." in name and any(f".{target}." in name for target in TARGETS)]
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in sorted(names) if "lora_A" in name]
    if not pairs:
        raise ConfigError("the adapter has no query or value layer in layer 0; set adapter.targets to all-linear")
    distances_fv: list[Tensor] = []
    for name_a, name_b in pairs:
        a_rd = before[name_a]
        for change, points in ((after[name_a] - a_rd, inputs_vd), (after[name_b] - before[name_b], inputs_vd @ a_rd.T)):
            if bool(change.any()):
                # Of each point, scaled to length 1, to the space of the change's rows.
                _, values, basis_kd = torch.linalg.svd(change.double(), full_matrices=False)
                basis_kd = basis_kd[values > NUMERICAL_RANK * values[0]]
                unit_vd = torch.nn.functional.normalize(points.double(), dim=1)
                distances_fv.append(torch.linalg.vector_norm(unit_vd - unit_vd @ basis_kd.T @ basis_kd, dim=1))
    if not distances_fv:
        raise DataError("the update of layer 0 is zero; raise training.learning_rate")
    return torch.stack(distances_fv).mean(0)
