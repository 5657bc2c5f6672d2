"""The round loop: sample, send, collect, aggregate, checkpoint, evaluate. Read this file first."""

from dataclasses import dataclass, field
from typing import Any

from common.errors import ConfigError, ProtocolError, SilotuneError, TooFewSitesError, WireError
from common.kinds import KINDS
from common.records import RoundPlan, UpdateHead
from server import checkpoint, collect, federation, ranks, sampling
from server.aggregate import bound, gap, optimizer, products, robust
from server.aggregate.method import State, Sum
from server.evaluate import answers, held_out
from server.federation import Federation


@dataclass
class Tally:
    """What a round has received so far; memory does not grow with the number of sites.

    Attributes:
        combined: Running combination of the updates.
        gap_meter: Watches the updates for the aggregation gap; None where there is none, or where the
            method keeps the mean of the products.
        heads: What each site told of its training.
        bytes_up: Frames received, refused ones included.
    """

    combined: Sum
    gap_meter: gap.GapMeter | None
    heads: list[UpdateHead] = field(default_factory=list)
    bytes_up: int = 0


def run(fed: Federation, state: State, *, first_round: int = 0) -> State:
    """Play all rounds from `first_round`; every finished round is on disk before the next begins.

    Raises:
        TooFewSitesError: A round got fewer valid updates than `federation.min_sites`.
        StorageError: A checkpoint or event could not be written.
    """
    settings = fed.manifest.run
    _evaluate(fed, state, num_rounds=first_round)  # after an interruption too: the last figures may be missing
    for num_rounds in range(first_round + 1, settings.federation.num_rounds + 1):
        state = play(fed, state, round_index=num_rounds - 1)
        if num_rounds == settings.federation.num_rounds or num_rounds % settings.evaluation.every_rounds == 0:
            _evaluate(fed, state, num_rounds=num_rounds)
    return state


def _evaluate(fed: Federation, state: State, *, num_rounds: int) -> None:
    """Held-out figures of the adapter after so many rounds; answers are generated after the last."""
    settings = fed.manifest.run
    generate = num_rounds == settings.federation.num_rounds and settings.evaluation.exact_match_rows > 0
    held_out.evaluate(fed, state, num_rounds=num_rounds, generate=generate)
    if num_rounds in (0, settings.federation.num_rounds):
        answers.score(fed, state, num_rounds=num_rounds)


def play(fed: Federation, state: State, *, round_index: int) -> State:
    """One round: from the global adapter to the next, which is on disk when this returns."""
    started = fed.clock()
    federation.rejoin(fed)
    cohort = _choose(fed, round_index)
    plan = RoundPlan(fed.manifest.sha256, round_index)
    fed.log.append("round_started", round=round_index, sites=[fed.name(node) for node in cohort])
    frames = fed.request("train", plan, state, nodes=cohort)
    tally = _collect(fed, state, plan, frames)
    _require_quorum(fed, tally, round_index)
    combined = tally.combined.result()
    averaged = fed.method.apply(state, combined)
    step, fed.memory = optimizer.step(combined, fed.memory, settings=fed.manifest.run.aggregation)
    after = averaged if step is combined else fed.method.apply(state, step)
    after = ranks.agree(after, combined, run=fed.manifest.run, num_done=round_index + 1)
    norms = _gap(tally, state, averaged, combined)
    _require_rank(fed, norms)
    digest = checkpoint.save(
        fed.folder, after, memory=fed.memory, num_rounds=round_index + 1, run_sha256=fed.manifest.sha256
    )
    fed.record("aggregated", round_index=round_index, num_updates=len(tally.heads), adapter_sha256=digest)
    checkpoint.prune(fed.folder, num_kept=fed.manifest.run.output.keep_checkpoints)
    fed.log.append(
        "round_finished",
        round=round_index,
        adapter_sha256=digest,
        num_updates=len(tally.heads),
        train_loss=_train_loss(tally.heads),
        gap=gap.whole(norms.values()) if norms else None,
        **({} if (rank := ranks.left(after)) is None else {"rank": rank}),
        gap_modules={name: gap.whole([pair]) for name, pair in norms.items()},
        bytes_down=sum(map(len, frames.values())),
        bytes_up=tally.bytes_up,
        seconds=round(fed.clock() - started, 3),
    )
    return after


def _gap(tally: Tally, before: State, after: State, combined: State) -> dict[str, tuple[float, float]]:
    """Norms of what the new adapter misses, and of the step, by module; empty for a method that misses nothing."""
    if tally.gap_meter:
        return tally.gap_meter.per_module(after)
    return gap.of_products(before, products.pairs(combined), after)


def _require_rank(fed: Federation, norms: dict[str, tuple[float, float]]) -> None:
    """A side adapter that is too narrow for what it must hold ends the run; the finished rounds are on disk."""
    settings = fed.manifest.run.aggregation
    lost = gap.whole(norms.values())
    if fed.method.facts.base_delta == "residual" and lost > settings.residual_max_lost:
        raise ConfigError(
            f"aggregation.residual_rank = {settings.residual_rank} cuts {100 * lost:.1f} % of this round's step, over "
            f"residual_max_lost = {settings.residual_max_lost:g}; raise the rank, or choose another aggregation.method"
        )


def _choose(fed: Federation, round_index: int) -> list[int]:
    """The nodes of the round's sites; drawn by name, since a node's number is the link's own."""
    settings = fed.manifest.run
    present = {fed.name(node_id): node_id for node_id in fed.present()}
    if len(present) < settings.federation.min_sites:
        raise TooFewSitesError(
            f"{len(present)} sites are connected, federation.min_sites is {settings.federation.min_sites}; "
            f"rounds up to {round_index} are on disk"
        )
    num_sites = settings.federation.sites_per_round
    names = sampling.choose(list(present), num_sites=num_sites, seed=settings.seed, round_index=round_index)
    return [present[name] for name in names]


def _collect(fed: Federation, state: State, plan: RoundPlan, frames: dict[int, bytes]) -> Tally:
    """Take updates as they come; one that is missing or wrong is logged and left out."""
    names = [spec.name for spec in collect.update_specs(fed.manifest, plan)]
    facts = fed.method.facts
    settings = fed.manifest.run.aggregation
    if settings.robust == "none":
        has_gap = facts.is_linear and not facts.is_exact and KINDS[fed.manifest.run.adapter.kind].has_factors
        meter = gap.GapMeter(state) if has_gap else None
        tally = Tally(fed.method.start(state, trained=names), meter)
    else:
        tally = Tally(robust.start(names, rule=settings.robust, num_bad=settings.num_bad_sites), None)
    for answer in fed.ask(frames, kind="train"):
        tally.bytes_up += len(answer.frame or b"")
        try:
            head, change = _read(fed, answer, plan)
        except SilotuneError as error:
            fed.fail(answer, error, step="train")
        else:
            fed.record_received(answer, plan, step="train")
            length = _take(fed, tally, head, change)
            fed.log.append("site_trained", **_of_training(head), update_norm=length, bytes_up=len(answer.frame or b""))
    return tally


def _read(fed: Federation, answer: collect.Answer, plan: RoundPlan) -> tuple[UpdateHead, State]:
    """One update, checked before a float of it is used."""
    if answer.frame is None:
        raise ProtocolError(answer.reason)
    head, change = collect.read_update(answer.frame, fed.manifest, plan)
    if head.site != fed.name(answer.node_id) or head.num_examples != fed.sites[answer.node_id].num_examples:
        raise WireError("update is under another name, or claims another number of rows than the site opened with")
    if fed.trail:
        fed.trail.keep(head)
    return head, change


def _take(fed: Federation, tally: Tally, head: UpdateHead, change: State) -> float:
    """Add one update to the round, no longer than the run allows; its norm as it came."""
    change, length = bound.scaled(change, fed.manifest.run.aggregation.max_update_norm)
    weight = float(head.num_examples) if fed.manifest.run.aggregation.weighting == "examples" else 1.0
    tally.combined.add(change, weight=weight)
    if tally.gap_meter:
        tally.gap_meter.add(change, weight=weight)
    tally.heads.append(head)
    return length


def _of_training(head: UpdateHead) -> dict[str, Any]:
    """What a site told of its training, for the events."""
    return {
        "site": head.site,
        "round": head.round_index,
        "train_loss": head.train_loss,
        "num_examples": head.num_examples,
        "num_steps": head.num_steps,
        "seconds": None if head.seconds is None else round(head.seconds, 3),
    }


def _require_quorum(fed: Federation, tally: Tally, round_index: int) -> None:
    """A round with too few updates does not count."""
    needed = fed.manifest.run.federation.min_sites
    if len(tally.heads) < needed:
        raise TooFewSitesError(
            f"round {round_index + 1} got {len(tally.heads)} valid updates, federation.min_sites is {needed}; "
            f"the events say why the others failed; rounds up to {round_index} are on disk"
        )


def _train_loss(heads: list[UpdateHead]) -> float | None:
    """Mean over the round's rows, nats per answer token; None where sites do not tell it."""
    told = [(head.train_loss, head.num_examples) for head in heads if head.train_loss is not None]
    return sum(loss * count for loss, count in told) / sum(count for _, count in told) if told else None
