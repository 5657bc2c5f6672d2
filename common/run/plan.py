"""A run worked out once: what each round trains, sends and receives, how large it is, and what leaves. Loads no torch.

`RunManifest.plan` is that of the whole run; `for_site` gives a site its own. What changes from round to round stands in
tables here, so nobody reads the run file again to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.frame import wire
from common.frame.records import TensorSpec
from common.run import egress, packing, trainable
from common.run.catalogue.methods import FACTS, Facts
from common.run.egress import HEAD_BYTES, Egress
from common.run.schema.model import FACTORS
from common.run.schema.wire import WHOLE

if TYPE_CHECKING:
    from common.run.config import RunConfig
    from common.run.schema.aggregation import AggregationConfig
    from common.run.schema.model import AdapterConfig
    from common.run.schema.privacy import PrivacyConfig
    from common.run.schema.tasks import EvaluationConfig
    from common.run.schema.training import FederationConfig
    from common.run.schema.wire import WireConfig


@dataclass(frozen=True)
class Tensors:
    """Which of an adapter's tensors a site trains, sends, keeps and is sent.

    Attributes:
        every: The whole adapter.
        received: Sent to a site before polish: all but those that it makes from the run's seed, or keeps, itself.
        kept: Stay at a site from round to round, begin at zero and never travel.
        leaving: Leave a site in some round.
        trained: What a round trains; round r is entry r modulo their number.
        sent: What a round's update holds, likewise: what was trained, without what stays at the site.
    """

    every: tuple[TensorSpec, ...]
    received: tuple[TensorSpec, ...]
    kept: tuple[TensorSpec, ...]
    leaving: tuple[TensorSpec, ...]
    trained: tuple[tuple[TensorSpec, ...], ...]
    sent: tuple[tuple[TensorSpec, ...], ...]

    @classmethod
    def of(cls, method: Facts, specs: Sequence[TensorSpec]) -> Tensors:
        """Those of an adapter under a method."""
        name, turns = method.name, range(len(method.trains))
        return cls(
            every=tuple(specs),
            received=trainable.received_specs(name, specs),
            kept=trainable.kept_specs(name, specs),
            leaving=trainable.leaving_specs(name, specs),
            trained=tuple(trainable.trained_specs(name, specs, round_index=turn) for turn in turns),
            sent=tuple(trainable.sent_specs(name, specs, round_index=turn) for turn in turns),
        )


@dataclass(frozen=True)
class Plan:
    """What a run comes to, at the coordinator or at one site.

    Attributes:
        site: Whose plan it is; empty: the coordinator's.
        adapter: Section `[adapter]`; the ranks of sites are in it.
        tensors: At this site's rank.
        method: What holds of `aggregation.method`.
        federation: Section `[federation]`.
        aggregation: Section `[aggregation]`.
        privacy: Section `[privacy]`, resolved.
        evaluation: Section `[evaluation]`.
        wire: Section `[wire]`.
        evaluated_rounds: After how many rounds the sites score the adapter; beyond the last, polished adapters.
        egress: All that leaves a site.
        bytes_down: A request's adapter as a rule; values only.
        bytes_evaluation: What an evaluation brings beside that, where its adapter is another one than training's.
        bytes_up: An update; values only.
        request_bytes: The largest request, which brings the adapter whole, its frame included.
        max_update_bytes: The largest body of an update.
        num_expected: Sites of a round on average, by the run file alone; a sum that is private for sites is divided by
            it.
    """

    site: str
    adapter: AdapterConfig
    tensors: Tensors
    method: Facts
    federation: FederationConfig
    aggregation: AggregationConfig
    privacy: PrivacyConfig
    evaluation: EvaluationConfig
    wire: WireConfig
    evaluated_rounds: tuple[int, ...]
    egress: Egress
    bytes_down: int
    bytes_evaluation: int
    bytes_up: int
    request_bytes: int
    max_update_bytes: int
    num_expected: float

    @classmethod
    def of(cls, run: RunConfig, specs: Sequence[TensorSpec]) -> Plan:
        """The plan of a run.

        Args:
            run: Resolved.
            specs: The whole adapter, as the manifest has it.
        """
        method, settings = FACTS[run.aggregation.method], run.wire
        tensors = Tensors.of(method, specs)
        whole = packing.body_bytes(tensors.received, dtype="float32", density=1.0)
        is_whole = settings.down == WHOLE and not settings.is_adapter_sparse
        stepped = packing.body_bytes(tensors.received, dtype=settings.down, density=settings.down_density)
        up = max(packing.body_bytes(turn, dtype=settings.dtype, density=settings.density) for turn in tensors.sent)
        header = packing.MAX_HEADER_BYTES if packing.is_plain(settings.dtype, settings.density) else 0
        largest = tensors.every if run.evaluation.num_polish_stages else tensors.received
        return cls(
            site="",
            adapter=run.adapter,
            tensors=tensors,
            method=method,
            federation=run.federation,
            aggregation=run.aggregation,
            privacy=run.privacy,
            evaluation=run.evaluation,
            wire=settings,
            evaluated_rounds=run.evaluated_rounds,
            egress=egress.declare(
                tensors.sent,
                factors=method.sends,
                settings=settings,
                privacy=run.privacy,
                learns_preferences=run.training.objective.kind != "sft",
            ),
            bytes_down=whole if is_whole else stepped,
            bytes_evaluation=whole if settings.is_adapter_sparse else 0,
            bytes_up=up,
            request_bytes=egress.num_update_bytes(largest, dtype="float32")
            - HEAD_BYTES
            + wire.MAX_HEAD_BYTES
            + wire.OVERHEAD_BYTES,
            max_update_bytes=min(up + header, settings.max_update_mib << 20),
            num_expected=0.0 if run.privacy.mode == "none" else run.privacy.sampling_prob * run.federation.num_sites,
        )

    def for_site(self, site: str) -> Plan:
        """A site's own plan: the tensors at its rank. What is declared stays that of the whole run."""
        own = trainable.at_rank(self.tensors.every, self.rank_of(site))
        return replace(self, site=site, tensors=Tensors.of(self.method, own))

    def rank_of(self, site: str) -> int:
        """The rank of a site's adapter; one that `adapter.site_ranks` does not name has `adapter.r`."""
        return self.adapter.lower_ranks.get(site, self.adapter.r if isinstance(self.adapter, FACTORS) else 0)

    def trained(self, round_index: int) -> tuple[TensorSpec, ...]:
        """The tensors that are trained in a round."""
        return self.tensors.trained[round_index % len(self.tensors.trained)]

    def sent(self, round_index: int) -> tuple[TensorSpec, ...]:
        """The tensors of a round's update, no more and no less."""
        return self.tensors.sent[round_index % len(self.tensors.sent)]

    def down(self, round_index: int) -> tuple[TensorSpec, ...]:
        """The tensors that come with a request of a round; after polish all, since it trains also what sites make."""
        return self.tensors.every if round_index > self.federation.num_rounds else self.tensors.received

    @property
    def last_scored(self) -> int:
        """The last place of an adapter that sites score: after the last round, or the last polish stage."""
        return self.federation.num_rounds + self.evaluation.num_polish_stages

    @property
    def bytes_per_run(self) -> int:
        """Most bytes that leave a site in the run: its rounds, what is told when it opens, and scores after polish."""
        num_rounds, num_polished = self.federation.num_rounds, self.evaluation.num_polish_stages
        return self.egress.bytes_per_round * num_rounds + HEAD_BYTES * (1 + num_polished)
