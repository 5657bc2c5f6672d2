"""The gate's rules: pure functions from figures to a verdict. A figure that is missing is never in its favour."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from common.run.schema.gate import (
    AuditRule,
    BaselineRule,
    ExposureRule,
    ExtractionRule,
    FigureRule,
    GateConfig,
    LossRule,
    PiiRule,
    ProbesRule,
    SchemaRule,
    SitesRule,
)
from common.scores import Arm, Verdict
from server.gate.figures import Figures
from server.view import fairness
from server.view import figures as view

CLAIM_TOLERANCE: Final = 1e-2  # an audit names its claim by two digits more than this


def judge(gate: GateConfig, figures: Figures) -> list[Verdict]:
    """Every rule of the run file, in its order."""
    return [RULES[rule.kind](rule, gate, figures) for rule in gate.rules]


def probes(rule: ProbesRule, gate: GateConfig, figures: Figures) -> Verdict:
    """No probe falls by more than `max_drop` below the base on the same rows."""
    names = _of_kind(figures, "probe")
    verdicts = [
        _above_by_gain(gate, figures, name, over=view.BASE, limit=-rule.max_drop, name="probes") for name in names
    ]
    return _worst("probes", verdicts, missing="no figure of a task of kind probe")


def baseline(rule: BaselineRule, gate: GateConfig, figures: Figures) -> Verdict:
    """Every task with a prompt-only baseline, probes aside, beats it: no figure is worse, one better by enough."""
    probing = set(_of_kind(figures, "probe"))
    tasks: dict[str, list[Verdict]] = {}
    for figure in figures.gains.get(view.PROMPT_ONLY, {}):
        if figure not in probing:
            verdict = _above_by_gain(gate, figures, figure, over=view.PROMPT_ONLY, limit=0.0, name="baseline")
            tasks.setdefault(figure.partition(".")[0], []).append(verdict)
    verdicts = [_beats(of_task, rule.min_gain) for of_task in tasks.values()]
    return _worst("baseline", verdicts, missing="no figure that prompt-only has too")


def _beats(verdicts: Sequence[Verdict], limit: float) -> Verdict:
    """Of one task's figures the one that decides: one that is worse or missing, or else the best."""
    worst = _worst("baseline", verdicts, missing="")
    if not worst.is_met:
        return worst
    best = max(verdicts, key=lambda each: each.margin or 0.0)
    return _strictly(_at_least("baseline", best.value or 0.0, limit, best.reason))


def sites(rule: SitesRule, _: GateConfig, figures: Figures) -> Verdict:
    """No site's held-out loss is above the base's there, nor above its own alone where that was compared."""
    if not figures.evaluated:
        return _missing("sites", f"the sites were not asked after {figures.stage}")
    verdicts = []
    for site, scored in figures.evaluated.sites.items():
        if site in figures.evaluated.stale or scored.change is None:
            verdicts.append(_missing("sites", f"{site}: no figure of this adapter beside the base's"))
        else:
            verdicts.append(_at_most("sites", scored.change, rule.max_rise, f"{site}, loss minus the base's"))
    verdicts += list(_beside_alone(rule, figures.compared))
    return _worst("sites", verdicts, missing="no site answered")


def _beside_alone(rule: SitesRule, compared: Mapping[str, Arm]) -> Iterator[Verdict]:
    """Each site's loss with this adapter minus its loss with the one that it trained alone."""
    for site, scored in compared["federated"].sites.items() if "federated" in compared else ():
        if (arm := compared.get(f"site-{site}")) and site in arm.sites:
            rise = scored.held_out_loss - arm.sites[site].held_out_loss
            yield _at_most("sites", rise, rule.max_rise, f"{site}, loss minus its own alone")


def loss(rule: LossRule, _: GateConfig, figures: Figures) -> Verdict:
    """The held-out loss over all sites is below the base's by more than `min_gain`, nats a token.

    So it is without the best and the worst sites, of which one could have made up its figures.
    """
    if not figures.evaluated or not figures.base:
        return _missing("loss", f"no held-out loss of both the base and {figures.stage}")
    if stale := figures.evaluated.stale:
        return _missing("loss", f"no figure of this adapter from {', '.join(stale)}")
    before, after = figures.base, figures.evaluated
    gained = min(before.loss - after.loss, fairness.decisive(before) - fairness.decisive(after))
    return _strictly(_at_least("loss", gained, rule.min_gain, "held-out loss below the base's"))


def schema(rule: SchemaRule, gate: GateConfig, figures: Figures) -> Verdict:
    """More than `min_valid` of the answers meet their schema."""
    verdicts = [_of_value(gate, figures, name, "schema", low=rule.min_valid) for name in _called(figures, "json")]
    return _worst("schema", [_strictly(each) for each in verdicts], missing="no figure called json")


def exposure(rule: ExposureRule, gate: GateConfig, figures: Figures) -> Verdict:
    """Exposure of canaries is below `max_exposure` bits, by a measure that could have shown more.

    Source: Carlini et al. 2019, arXiv:1802.08232, definition 5: log2 of the number of candidates minus log2 of the
    canary's rank among them, so that few candidates cannot show a large exposure.
    """
    verdicts = []
    for name in _called(figures, "exposure"):
        ceiling = figures.measured.get(f"{name}_ceiling")
        verdict = _strictly(_of_value(gate, figures, name, "exposure", high=rule.max_exposure))
        if ceiling is None:
            verdict = _missing("exposure", f"no figure {name}_ceiling, so nobody knows what {name} could have shown")
        elif ceiling.value <= rule.max_exposure:
            reason = f"{name} cannot pass {ceiling.value:.2f}, so it shows nothing at this limit; more candidates"
            verdict = Verdict("exposure", False, verdict.value, rule.max_exposure, None, reason)
        verdicts.append(verdict)
    return _worst("exposure", verdicts, missing="no figure called exposure")


def extraction(rule: ExtractionRule, gate: GateConfig, figures: Figures) -> Verdict:
    """At most `max_extracted` of the canaries are written out by the model."""
    names = _called(figures, "extracted")
    verdicts = [_of_value(gate, figures, name, "extraction", high=rule.max_extracted) for name in names]
    return _worst("extraction", verdicts, missing="no figure called extracted")


def pii(rule: PiiRule, gate: GateConfig, figures: Figures) -> Verdict:
    """At most `max_emission` of the answers hold personal data."""
    verdicts = [_of_value(gate, figures, name, "pii", high=rule.max_emission) for name in _called(figures, "emission")]
    return _worst("pii", verdicts, missing="no figure called emission")


def audit(_: AuditRule, __: GateConfig, figures: Figures) -> Verdict:
    """The audited lower bound of epsilon is not above the claim, of an audit of this very claim."""
    audited = figures.audit
    if isinstance(audited, str):
        return _missing("audit", audited)
    if audited.audited_epsilon is None:
        return _missing("audit", "this kind of audit bounds no epsilon; take mechanism, canaries or mia")
    if math.isinf(audited.audited_epsilon):
        return _missing("audit", f"the audit refutes every epsilon, file {audited.sha256}")
    is_same = math.isclose(audited.claimed_epsilon, figures.claimed_epsilon, rel_tol=CLAIM_TOLERANCE)
    if not is_same or not math.isclose(audited.dp_delta, figures.dp_delta, rel_tol=CLAIM_TOLERANCE):
        reason = (
            f"the audit is of epsilon {audited.claimed_epsilon:.3f} at delta {audited.dp_delta:g}, the run claims "
            f"{figures.claimed_epsilon:.3f} at {figures.dp_delta:g}"
        )
        return Verdict("audit", False, audited.audited_epsilon, figures.claimed_epsilon, None, reason)
    ceiling = "" if audited.ceiling is None else f", ceiling {audited.ceiling:.2f}"
    reason = f"audited epsilon{ceiling}, file {audited.sha256}"
    return _at_most("audit", audited.audited_epsilon, figures.claimed_epsilon, reason)


def figure(rule: FigureRule, gate: GateConfig, figures: Figures) -> Verdict:
    """Any figure is at least, or at most, the limit."""
    low, high = (rule.limit, None) if rule.bound == "min" else (None, rule.limit)
    return _of_value(gate, figures, rule.figure, rule.figure, low=low, high=high)


RULES: Final[Mapping[str, Callable[[Any, GateConfig, Figures], Verdict]]] = {
    "probes": probes,
    "baseline": baseline,
    "sites": sites,
    "loss": loss,
    "schema": schema,
    "exposure": exposure,
    "extraction": extraction,
    "pii": pii,
    "audit": audit,
    "figure": figure,
}
HARMS: Final = frozenset({"probes", "sites", "exposure", "extraction", "pii"})  # what more training does not mend


def _of_value(
    gate: GateConfig, figures: Figures, figure: str, name: str, *, low: float | None = None, high: float | None = None
) -> Verdict:
    """A figure against its lowest or highest value."""
    known = figures.measured.get(figure)
    if known is None:
        return _missing(name, f"no figure {figure} at {figures.stage}")
    if known.num_rows < gate.min_rows:
        return _few(gate, name, figure, known.num_rows)
    end = "value" if gate.evidence == "estimate" else "low" if low is not None else "high"
    what = figure if end == "value" else f"{figure}, {end} end of its interval"
    value = {"value": known.value, "low": known.low, "high": known.high}[end]
    if low is not None:
        return _at_least(name, value, low, what)
    return _at_most(name, value, math.inf if high is None else high, what)


def _above_by_gain(gate: GateConfig, figures: Figures, figure: str, *, over: str, limit: float, name: str) -> Verdict:
    """How much better a figure is than another stage's on the same rows; turned so that more is better."""
    known, gain = figures.measured[figure], figures.gains.get(over, {}).get(figure)
    if gain is None:
        return _missing(name, f"no difference of {figure} to {over}")
    if known.num_rows < gate.min_rows:
        return _few(gate, name, figure, known.num_rows)
    worse_end = gain.low if known.higher_is_better else -gain.high
    mean = gain.mean if known.higher_is_better else -gain.mean
    value = worse_end if gate.evidence == "interval" else mean
    end = ", worse end of the interval" if gate.evidence == "interval" else ""
    return _at_least(name, value, limit, f"{figure}, gain over {over}{end}")


def _few(gate: GateConfig, name: str, figure: str, num_rows: int) -> Verdict:
    """Too few rows to say anything."""
    return _missing(name, f"{figure} is of {num_rows} rows, gate.min_rows is {gate.min_rows}")


def _of_kind(figures: Figures, kind: str) -> list[str]:
    """Figures of a kind of task."""
    return [name for name, figure in figures.measured.items() if figure.kind == kind]


def _called(figures: Figures, metric: str) -> list[str]:
    """Figures TASK.METRIC or TASK/METRIC of any task."""
    return [name for name in figures.measured if name.endswith((f".{metric}", f"/{metric}"))]


def _at_least(name: str, value: float, limit: float, reason: str) -> Verdict:
    """Met on the limit."""
    return Verdict(name, value >= limit, value, limit, value - limit, reason)


def _at_most(name: str, value: float, limit: float, reason: str) -> Verdict:
    """Met on the limit."""
    return Verdict(name, value <= limit, value, limit, limit - value, reason)


def _strictly(verdict: Verdict) -> Verdict:
    """Not met on the limit itself."""
    is_met = verdict.is_met and verdict.margin is not None and verdict.margin > 0
    return dataclasses.replace(verdict, is_met=is_met)


def _missing(name: str, reason: str) -> Verdict:
    """Not met, since nothing shows it."""
    return Verdict(name, False, None, None, None, reason)


def _worst(name: str, verdicts: Sequence[Verdict], *, missing: str) -> Verdict:
    """The one that is furthest from being met; one that is not met by a value before one that is missing."""
    if not verdicts:
        return _missing(name, missing)
    return min(verdicts, key=lambda each: (each.is_met, each.margin is None, each.margin or 0.0))
