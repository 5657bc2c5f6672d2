"""The round loop: sample, send, collect, aggregate, checkpoint, evaluate. Read this file first."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from common import events
from common.errors import ConfigError, SilotuneError, TooFewSitesError, WireError
from common.event_kinds import RoundFinished, RoundStarted, SiteTrained
from common.frame.records import RoundPlan, UpdateHead
from common.privacy import clipping
from common.privacy import sites as site_privacy
from common.privacy.noise import Noise
from common.run.catalogue.kinds import KINDS
from server.aggregate import adalora, gap, noised, optimizer, products, robust, weights
from server.aggregate.method import State, Sum
from server.aggregate.noised import NoisedSum
from server.evaluate import measure
from server.fleet import broadcast, collect, federation, sampling
from server.fleet import sites as held_out
from server.fleet.federation import Federation
from server.folder import checkpoint
from server.gate import stopping
from server.run import screening

Norms = dict[str, gap.Norms]  # by module


@dataclass
class Tally:
    """What a round has received so far; memory does not grow with the number of sites.

    Attributes:
        combined: Running combination of the updates.
        gap_meter: Watches the updates for the aggregation gap; None where there is none, or where the
            method keeps the mean of the products.
        heads: What each site told of its training.
        weights: How much each of them counts.
        held_to_share: Sites whose claim was brought down to `aggregation.max_weight_share`.
        bytes_up: Frames received, refused ones included.
    """

    combined: Sum
    gap_meter: gap.GapMeter | None
    heads: list[UpdateHead] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    held_to_share: list[str] = field(default_factory=list)
    bytes_up: int = 0


def run(fed: Federation, state: State, *, first_round: int = 0) -> State:
    """Play all rounds from `first_round`, fewer if `gate.stop_after` ends them; each is on disk before the next begins.

    Raises:
        TooFewSitesError: A round got fewer valid updates than `federation.min_sites`.
        StorageError: A checkpoint or event could not be written.
    """
    settings = fed.manifest.run
    _catch_up(fed, state, num_rounds=first_round)
    for num_rounds in range(first_round + 1, settings.federation.num_rounds + 1):
        if stopping.ends(settings, fed.log, num_rounds=num_rounds - 1):
            break
        state = play(fed, state, round_index=num_rounds - 1)
        if num_rounds in fed.manifest.plan.evaluated_rounds:
            _evaluate(fed, state, num_rounds=num_rounds)
    return state


def _catch_up(fed: Federation, state: State, *, num_rounds: int) -> None:
    """The figures that are due before the next round, unless the run was interrupted and has them already.

    None is asked for that the schedule does not have: a site that went on to the next round refuses it, and would
    refuse every later try to resume.
    """
    held_out.recall(fed, num_rounds=num_rounds)
    if num_rounds not in fed.manifest.plan.evaluated_rounds:
        return
    if held_out.is_told(fed, state, num_rounds=num_rounds):
        _measure(fed, state, num_rounds=num_rounds)
    else:
        _evaluate(fed, state, num_rounds=num_rounds)


def _evaluate(fed: Federation, state: State, *, num_rounds: int) -> None:
    """Held-out figures of the adapter after so many rounds; answers are generated after the last."""
    settings = fed.manifest.run
    generate = num_rounds == settings.federation.num_rounds and settings.evaluation.exact_match_rows > 0
    held_out.evaluate(fed, state, num_rounds=num_rounds, generate=generate)
    _measure(fed, state, num_rounds=num_rounds)


def _measure(fed: Federation, state: State, *, num_rounds: int) -> None:
    """The coordinator's tasks, where they are due."""
    settings = fed.manifest.run
    last, every = settings.federation.num_rounds, settings.evaluation.tasks_every_rounds
    if fed.suite and (num_rounds in (0, last) or (every and num_rounds % every == 0)):
        measure.measure(fed.suite, state, stage=measure.stage_of(num_rounds, last=last))


def play(fed: Federation, state: State, *, round_index: int) -> State:
    """One round: from the global adapter to the next, which is on disk when this returns."""
    started = fed.clock()
    tally, bytes_down = _gather(fed, state, round_index=round_index)
    after, norms = _advance(fed, state, tally, round_index=round_index)
    digest = checkpoint.save(
        fed.folder, after, memory=fed.memory, num_rounds=round_index + 1, run_sha256=fed.manifest.sha256
    )
    fed.record("aggregated", round_index=round_index, num_updates=len(tally.heads), adapter_sha256=digest)
    checkpoint.prune(fed.folder, num_kept=fed.manifest.run.output.keep_checkpoints)
    fed.log.append(
        RoundFinished(
            round=round_index,
            adapter_sha256=digest,
            num_updates=len(tally.heads),
            train_loss=_train_loss(tally),
            held_to_share=sorted(tally.held_to_share),
            **_of_gap(norms),
            rank=adalora.left(after),
            bytes_down=bytes_down,
            bytes_up=tally.bytes_up,
            seconds=round(fed.clock() - started, 3),
            **_spent(fed, tally, round_index),
        )
    )
    return after


def _gather(fed: Federation, state: State, *, round_index: int) -> tuple[Tally, int]:
    """The updates of the round's sites, enough of them, and how many bytes went out for them."""
    federation.rejoin(fed)
    source = fed.make_noise(round_index)
    cohort = _choose(fed, round_index, source)
    plan = RoundPlan(fed.manifest.sha256, round_index)
    fed.log.append(RoundStarted(round=round_index, sites=[fed.name(node) for node in cohort]))
    frames = fed.request("train", plan, state, nodes=cohort)
    tally = _collect(fed, state, plan, frames, source)
    _require_quorum(fed, tally, round_index, num_drawn=len(cohort))
    return tally, sum(map(len, frames.values()))


def _advance(fed: Federation, state: State, tally: Tally, *, round_index: int) -> tuple[State, Norms]:
    """The next global adapter, and how much of the step it misses."""
    combined = tally.combined.result()
    averaged = fed.method.apply(state, combined)
    step, fed.memory = optimizer.step(combined, fed.memory, settings=fed.manifest.run.aggregation.server_optimizer)
    if isinstance(tally.combined, NoisedSum):
        fed.memory = tally.combined.remembered(fed.memory)
    after = averaged if step is combined else fed.method.apply(state, step)
    after = _settle(fed, state, adalora.agree(after, combined, run=fed.manifest.run, num_done=round_index + 1))
    norms = _gap(tally, state, averaged, combined)
    _require_rank(fed, norms)
    return after, norms


def _settle(fed: Federation, before: State, after: State) -> State:
    """The next global adapter exactly as sites will hold it."""
    wire, sent = fed.manifest.plan.wire, fed.manifest.plan.tensors.received
    if wire.down == "float32":
        return after
    held, fed.memory, step = broadcast.settle(
        before, after, fed.memory, sent=sent, dtype=wire.down, density=wire.down_density
    )
    fed.steps = broadcast.light([*fed.steps, step], sent=sent)
    return held


def _spent(fed: Federation, tally: Tally, round_index: int) -> dict[str, Any]:
    """What all rounds so far have cost a site as a whole; nothing in another run.

    The event with these figures is written before the adapter goes out, and a resumed run looks for it.
    """
    if fed.manifest.run.privacy.mode != "site":
        return {}
    this = {"kind": "round_finished", "round": round_index, "num_updates": len(tally.heads)}
    log = [*events.read(fed.log.path), this]
    return site_privacy.spent_by(fed.manifest.run, log, num_rounds=round_index + 1)


def _gap(tally: Tally, before: State, after: State, combined: State) -> Norms:
    """Norms of what the new adapter misses, and of the step, by module; empty for a method that misses nothing."""
    if tally.gap_meter:
        return tally.gap_meter.per_module(after)
    return gap.of_products(before, products.pairs(combined), after)


def _of_gap(norms: Norms) -> dict[str, Any]:
    """The gap of a round, whole and by module, each with its standard error; None where there is none."""
    each = {name: [pair] for name, pair in norms.items()}
    return {
        "gap": gap.whole(norms.values()) if norms else None,
        "gap_error": gap.error(norms.values()) if norms else None,
        "gap_modules": {name: gap.whole(pair) for name, pair in each.items()},
        "gap_module_errors": {name: gap.error(pair) for name, pair in each.items()},
    }


def _require_rank(fed: Federation, norms: Norms) -> None:
    """A side adapter that is too narrow for what it must hold ends the run; the finished rounds are on disk."""
    settings = fed.manifest.run.aggregation
    lost = gap.whole(norms.values())
    if fed.method.facts.base_delta == "residual" and lost > settings.residual_max_lost:
        raise ConfigError(
            f"aggregation.residual_rank = {settings.residual_rank} cuts {100 * lost:.1f} % of this round's step, over "
            f"residual_max_lost = {settings.residual_max_lost:g}; raise the rank, or choose another aggregation.method"
        )


def _choose(fed: Federation, round_index: int, source: Noise) -> list[int]:
    """The nodes of the round's sites; drawn by name, since a node's number is the link's own."""
    settings = fed.manifest.run
    present = {fed.name(node_id): node_id for node_id in fed.present()}
    if len(present) < settings.federation.min_sites:
        raise TooFewSitesError(
            f"{len(present)} sites are connected, federation.min_sites is {settings.federation.min_sites}; "
            f"rounds up to {round_index} are on disk"
        )
    if settings.privacy.mode == "site":
        drawn = sampling.poisson(list(present), sampling_prob=settings.privacy.sampling_prob, source=source)
        return [present[name] for name in drawn]
    num_sites = settings.federation.sites_per_round
    names = sampling.choose(list(present), num_sites=num_sites, seed=settings.seed, round_index=round_index)
    return [present[name] for name in names]


def _tally(fed: Federation, state: State, source: Noise, *, round_index: int) -> Tally:
    """What takes a round's updates: the method's own sum, or what stands in its place."""
    facts, run = fed.method.facts, fed.manifest.run
    settings = run.aggregation
    names = [spec.name for spec in fed.manifest.plan.sent(round_index)]
    if run.privacy.mode == "site":  # and no meter, whose figure no noise would cover
        expected = fed.manifest.plan.num_expected
        start = noised.start(state, names, privacy=run.privacy, expected=expected, source=source, memory=fed.memory)
        return Tally(start, None)
    if settings.robust.rule != "none":
        return Tally(robust.start(names, rule=settings.robust.rule, num_bad=settings.robust.num_bad_sites), None)
    has_gap = facts.has_bias and KINDS[run.adapter.kind].has_factors
    meter = gap.GapMeter(state, seed=run.seed + round_index) if has_gap else None
    return Tally(fed.method.start(state, trained=names), meter)


def _collect(fed: Federation, state: State, plan: RoundPlan, frames: dict[int, bytes], source: Noise) -> Tally:
    """Add up the updates that count."""
    by_rows = fed.manifest.run.aggregation.weighting == "examples"
    max_share = fed.manifest.run.aggregation.max_weight_share if by_rows else 1.0
    tally = _tally(fed, state, source, round_index=plan.round_index)
    arrived = screening.passed(fed, _arriving(fed, tally, plan, frames), round_index=plan.round_index)
    for _, weight, (head, change) in weights.weighed(_claims(fed, arrived, by_rows=by_rows), max_share=max_share):
        tally.combined.add(change, weight=weight)
        if tally.gap_meter:
            tally.gap_meter.add(change, weight=weight)
        tally.heads.append(head)
        tally.weights.append(weight)
        if by_rows and weight < head.num_examples:
            tally.held_to_share.append(head.site)
    return tally


def _claims(
    fed: Federation, updates: Iterator[screening.Update], *, by_rows: bool
) -> Iterator[tuple[str, float, tuple[UpdateHead, State]]]:
    """Updates that count, no longer than the run allows, with the weight that their site claims.

    The events tell a site's norm as it came, unless noise is to cover it.
    """
    run = fed.manifest.run
    for head, change, num_bytes in updates:
        shorter, length = clipping.scaled(change, run.aggregation.max_update_norm)
        told = None if run.privacy.mode == "site" else length
        fed.log.append(SiteTrained(**_of_training(head), update_norm=told, bytes_up=num_bytes))
        yield head.site, float(head.num_examples) if by_rows else 1.0, (head, shorter)


def _arriving(fed: Federation, tally: Tally, plan: RoundPlan, frames: dict[int, bytes]) -> Iterator[screening.Update]:
    """Updates as they come; one that is missing or wrong is logged and left out."""
    for answer in fed.ask(frames, kind="train"):
        num_bytes = len(answer.frame or b"")
        tally.bytes_up += num_bytes
        try:
            head, change = _read(fed, answer, plan)
        except SilotuneError as error:
            fed.fail(answer, error, step="train")
        else:
            fed.record_received(answer, plan, step="train")
            yield head, change, num_bytes


def _read(fed: Federation, answer: collect.Answer, plan: RoundPlan) -> tuple[UpdateHead, State]:
    """One update, checked before a float of it is used."""
    frame = fed.expect(answer, "update", max_body_bytes=fed.manifest.plan.max_update_bytes)
    head, change = collect.read_update(frame, plan, expected=fed.manifest.plan.for_site(fed.name(answer.node_id)))
    if head.site != fed.name(answer.node_id) or head.num_examples != fed.sites[answer.node_id].num_examples:
        raise WireError("update is under another name, or claims another number of rows than the site opened with")
    if fed.trail:
        fed.trail.keep(head)
    return head, change


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


def _require_quorum(fed: Federation, tally: Tally, round_index: int, *, num_drawn: int) -> None:
    """A round with too few updates does not count.

    Where the coordinator noises the sum of sites that were drawn in secret, a round counts whoever was drawn, even
    nobody; only one in which all of them failed does not.
    """
    run = fed.manifest.run
    needed = run.federation.min_sites
    limit = f"federation.min_sites is {needed}"
    if run.privacy.mode == "site" and run.privacy.noise_at == "server":
        needed, limit = min(1, num_drawn), f"{num_drawn} sites were drawn"
    if len(tally.heads) < needed:
        raise TooFewSitesError(
            f"round {round_index + 1} got {len(tally.heads)} valid updates, {limit}; "
            f"the events say why the others failed; rounds up to {round_index} are on disk"
        )


def _train_loss(tally: Tally) -> float | None:
    """Mean by the weights of the round, nats per answer token; None where sites do not tell it."""
    told = [(h.train_loss, w) for h, w in zip(tally.heads, tally.weights, strict=True) if h.train_loss is not None]
    return sum(loss * weight for loss, weight in told) / sum(weight for _, weight in told) if told else None
