"""The current global adapter on every site's held-out rows."""

import math
from collections.abc import Sequence
from typing import Any, Final

from common.adapter import adapter
from common.errors import ProtocolError, SilotuneError
from common.event_kinds import Evaluated, EvaluationStarted, NotEvaluated, SiteEvaluated
from common.frame.records import RoundPlan, SiteMetrics, from_head, to_head
from common.loss import evaluation
from common.scores import SiteFigures
from server.aggregate import weights
from server.aggregate.method import State
from server.fleet import collect, sampling
from server.fleet.broadcast import Step
from server.fleet.run import Run
from server.fleet.sites import Sites
from server.view import fairness
from server.view.run_view import RunView

TOO_LATE: Final = "no site answered; each has gone on to a later step, or was away"
_NOT_SUMS: Final = ("site", "run_sha256", "num_rows", "seconds", "signer", "signature")


def evaluate(
    sites: Sites, state: State, *, num_rounds: int, generate: bool, steps: Sequence[Step] = ()
) -> float | None:
    """Ask the sites that tell figures, whether they trained or not, and log what they tell.

    Beyond `evaluation.sites_per_round` sites a sample is asked, the same one every time (`sampling.panel`). The mean
    rests on all of it that ever answered: one that is missing now counts with its last figures and is named as stale,
    so that the mean does not fall because the worst site has gone.

    A site answers no evaluation that comes after a later step. So where that later step, the next round, was begun
    before the run was interrupted, and nobody answers, the event is `not_evaluated` and the run goes on.

    Args:
        sites: Of the run.
        state: The global adapter after `num_rounds` rounds.
        num_rounds: 0 is the base.
        generate: Also count exact matches.
        steps: See `Sites.request`.

    Returns:
        Mean negative log-likelihood per answer token over all sites' held-out rows, nats; see `mean_loss`. None where
        no site tells held-out figures, or none any more; the run goes on.

    Raises:
        ProtocolError: No site has ever answered.
    """
    plan = RoundPlan(sites.run.manifest.sha256, num_rounds, generate)
    told = None
    is_late = max(RunView.read(sites.run.log.path).trained, default=-1) >= num_rounds
    try:
        told = ask(sites, state, plan, steps=steps)
    except ProtocolError:
        if not is_late:
            raise
    if told is None or (is_late and "sites" in told and len(told["stale"]) == len(told["sites"])):
        own = told["server_loss"] if told else _own_loss(sites.run, state)
        told = {"server_loss": own, "reason": TOO_LATE}
    kind = Evaluated if "sites" in told else NotEvaluated
    sites.run.log.append(kind(num_rounds=num_rounds, adapter_sha256=adapter.digest(state), **told))
    return told.get("loss")


def is_told(run: Run, state: State, *, num_rounds: int) -> bool:
    """Whether the events have the figures of this very adapter after so many rounds."""
    scored = RunView.read(run.log.path).evaluated.get(num_rounds)
    return scored is not None and scored.adapter_sha256 == adapter.digest(state)


def recall(sites: Sites, *, num_rounds: int) -> None:
    """Take up the sites' last figures from the events of a run that was interrupted after so many rounds."""
    run_sha256 = sites.run.manifest.sha256
    for _, event in sorted(RunView.read(sites.run.log.path).evaluated.items()):
        for site, figures in event.sites.items() if event.num_rounds <= num_rounds else ():
            sums: dict[str, Any] = {**figures.sums, "num_rows": figures.num_rows, "seconds": 0.0}
            sites.metrics[site] = SiteMetrics(site=site, run_sha256=run_sha256, **sums)


def ask(sites: Sites, state: State, plan: RoundPlan, *, steps: Sequence[Step] = ()) -> dict[str, Any]:
    """Ask the sites that are there and have rows held out about an adapter; see `evaluate`.

    Args:
        sites: Of the run.
        state: The adapter.
        plan: The adapter's place in the run: rounds before it, and stages after the last; 0 is the base.
        steps: See `Sites.request`.

    Returns:
        What an event tells of it; no `sites` and no loss but the coordinator's where no site tells figures.

    Raises:
        ProtocolError: No site has ever answered.
    """
    if not any(site.num_held_out for site in sites.opened.values()):
        return {"server_loss": _own_loss(sites.run, state)}
    nodes, counted = _panel(sites)
    frames = sites.request("evaluate", plan, state, nodes=nodes, steps=steps)
    fresh, bytes_up = set(), 0
    sites.run.log.tell(EvaluationStarted(sites=[sites.name(node_id) for node_id in nodes]))
    for answer in sites.ask(frames, kind="evaluate"):
        bytes_up += len(answer.frame or b"")
        metrics = _read(sites, answer, plan)
        if metrics is not None:
            sites.metrics[metrics.site] = metrics
            fresh.add(metrics.site)
            sites.run.log.tell(SiteEvaluated(site=metrics.site))
    told_now = [sites.metrics[site] for site in sorted(sites.metrics.keys() & counted)]
    own = _own_loss(sites.run, state)
    told = _told(sites, told_now, is_base=not plan.round_index, fresh=fresh, server_loss=own)
    return {**told, "bytes_down": sum(map(len, frames.values())), "bytes_up": bytes_up}


def _panel(sites: Sites) -> tuple[list[int], set[str]]:
    """The nodes to ask, and the names of the sites whose figures count: these, and those in whose place they are.

    Of a site that is away the last figures count, and those of whoever was asked in its place only while it is away.
    """
    settings = sites.run.manifest.run
    limits = {"num_sites": settings.evaluation.sites_per_round, "seed": settings.seed}
    there = {site: node_id for site, node_id in sites.present().items() if sites.opened[node_id].num_held_out}
    asked = sampling.panel(there, **limits)
    return [there[site] for site in asked], {*asked, *sampling.panel({*there, *sites.metrics}, **limits)}


def mean_loss(metrics: list[SiteMetrics], *, max_share: float) -> float:
    """Over all answer tokens of all sites, nats; over all their rows where preferences are learnt.

    A site's number of tokens is its own claim, so that no site has more than `max_share` of the mean; see
    `server.aggregate.weights`.
    """
    held = weights.capped({m.site: float(m.num_terms) for m in metrics}, max_share=max_share)
    return math.fsum(m.loss_sum * (held[m.site] / m.num_terms) for m in metrics) / math.fsum(held.values())


def exact_match(metrics: list[SiteMetrics]) -> float | None:
    """Share of generated answers equal to the reference; None if none was generated."""
    num_generated = sum(m.num_generated for m in metrics)
    return sum(m.num_exact for m in metrics) / num_generated if num_generated else None


def accuracy(metrics: list[SiteMetrics], *, max_share: float = 1.0) -> float | None:
    """Share of held-out preferences that the adapter agrees with; None where none are learnt."""
    agreed = {m.site: m.num_preferred / m.num_rows for m in metrics if m.num_preferred is not None}
    held = weights.capped({m.site: float(m.num_rows) for m in metrics}, max_share=max_share)
    return math.fsum(share * held[site] for site, share in agreed.items()) / sum(held.values()) if agreed else None


def answer_loss(metrics: list[SiteMetrics]) -> float | None:
    """Negative log-likelihood of chosen or rated answers, nats per token; None where that is the loss itself.

    It rises where the answers of all pairs become less likely together, which a margin does not show.
    """
    told = [m for m in metrics if m.preference_loss_sum is not None]
    return sum(m.nll_sum for m in told) / sum(m.num_answer_tokens for m in told) if told else None


def _check_preferences(metrics: SiteMetrics, sites: Sites) -> None:
    """Figures of preferences are there if the run learns them, and only then."""
    wanted = sites.run.manifest.run.training.objective.kind != "sft"
    told = (metrics.preference_loss_sum, metrics.num_preferred)
    if any((figure is not None) != wanted for figure in told):
        raise ProtocolError("figures of preferences are missing, or told where the run learns none")
    if wanted and not metrics.num_rows >= max(metrics.num_preferred or 0, 1):
        raise ProtocolError(f"agrees with {metrics.num_preferred} of {metrics.num_rows} preferences")


def _check_counts(metrics: SiteMetrics, sites: Sites, *, node_id: int) -> None:
    """Counts that the run and what the site opened with make possible."""
    run, num_held_out = sites.run.manifest.run, sites.opened[node_id].num_held_out
    if metrics.num_exact > metrics.num_generated:
        raise ProtocolError(f"{metrics.num_exact} of {metrics.num_generated} generated answers are exact")
    if metrics.num_generated > run.evaluation.exact_match_rows:
        raise ProtocolError(
            f"{metrics.num_generated} answers were generated, evaluation.exact_match_rows is "
            f"{run.evaluation.exact_match_rows}"
        )
    if metrics.num_rows > num_held_out:
        raise ProtocolError(f"figures over {metrics.num_rows} rows of a site that opened with {num_held_out} held out")
    num_tokens = metrics.num_rows * run.data.max_length_tokens * (1 if run.training.objective.kind != "dpo" else 2)
    if metrics.num_answer_tokens > num_tokens:
        raise ProtocolError(f"{metrics.num_answer_tokens} answer tokens in {metrics.num_rows} rows")


def _read(sites: Sites, answer: collect.Answer, plan: RoundPlan) -> SiteMetrics | None:
    """One site's figures; None, and an event, if they are missing or wrong."""
    try:
        metrics = from_head(SiteMetrics, sites.expect(answer, "metrics").head)
        collect.check_round(metrics.run_sha256, metrics.round_index, plan)
        if metrics.site != sites.name(answer.node_id) or not metrics.num_answer_tokens:
            raise ProtocolError("figures under another name, or over no tokens")
        _check_counts(metrics, sites, node_id=answer.node_id)
        _check_preferences(metrics, sites)
    except SilotuneError as error:
        sites.fail(answer, error, step="evaluate")
        return None
    sites.received(answer, plan, step="evaluate")
    return metrics


def _own_loss(run: Run, state: State) -> float | None:
    """The same figure on the coordinator's own held-out rows; None without any."""
    own = run.own_rows
    if own is None:
        return None
    adapter.write(own.engine.model, state)
    batch_size = run.manifest.run.evaluation.batch_size
    nll_sum, num_tokens = evaluation.held_out_nll(own.engine, own.encoded, batch_size=batch_size)
    return nll_sum / num_tokens


def _told(
    sites: Sites, metrics: list[SiteMetrics], *, is_base: bool, fresh: set[str], server_loss: float | None
) -> dict[str, Any]:
    """The figures of an event: over all sites that count, by site, and how evenly they fare."""
    if not metrics:
        raise ProtocolError("no site answered an evaluation; see the sites' logs")
    losses, exact = {m.site: m.loss for m in metrics}, {m.site: exact_match([m]) for m in metrics}
    before = {} if is_base else RunView.read(sites.run.log.path).base_losses
    change = {site: loss - before[site] for site, loss in losses.items() if site in before}
    max_share = sites.run.manifest.run.aggregation.max_weight_share
    return {
        "loss": mean_loss(metrics, max_share=max_share),
        "trimmed_loss": fairness.trimmed(losses),
        "outliers": fairness.outliers(losses),
        "exact_match": exact_match(metrics),
        "accuracy": accuracy(metrics, max_share=max_share),
        "answer_loss": answer_loss(metrics),
        "server_loss": server_loss,
        "stale": [m.site for m in metrics if m.site not in fresh],
        "sites": {m.site: _figures(m, change=change.get(m.site)) for m in metrics},
        "fairness": fairness.of_sites(losses, exact),
        "precisions": fairness.of_precisions(sites.run.manifest.run.model, metrics),
        "worse_than_base": [site for site, rise in change.items() if rise > 0],
    }


def _figures(metrics: SiteMetrics, *, change: float | None) -> SiteFigures:
    """One site's, for the events."""
    return SiteFigures(
        loss=metrics.loss,
        num_rows=metrics.num_rows,
        exact_match=exact_match([metrics]),
        accuracy=accuracy([metrics]),
        sums={name: value for name, value in to_head(metrics).items() if name not in _NOT_SUMS},
        change=change,
    )
