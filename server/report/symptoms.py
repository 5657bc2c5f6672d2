"""What is wrong with a run, as far as its own figures tell: pure functions from events to symptoms with remedies.

A symptom is a pattern that is known to have a usual cause. Its evidence is figures of this run; that the cause is the
usual one is a guess. No symptom does not mean that all is well.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.event_kinds import RunFailed, SiteFailed, SiteRefused
from common.scores import Figure, Gain
from server.view import figures
from server.view.run_view import RunView

MIN_FALL: Final = 0.05  # share of the held-out loss that counts as fallen
PROBE_DROP: Final = 0.01
MIN_LARGE_GAPS: Final = 2  # rounds; one large gap is chance
DIVERGING: Final = 2  # evaluations in a row in which a site's loss rises while the mean's falls
LESS_LIKELY: Final = 1.0  # nats of a whole chosen answer; DPO always shifts it by a little
LONGER: Final = 1.5  # factor of an answer's length
MORE_REPEATED: Final = 0.1  # rise of the share of repeated pieces
MAX_LOST: Final = 0.3  # of what the adapter does; more of it lost is seen in its answers
_MEMORY: Final = (r"\bout of memory\b", r"\bOutOfMemory", r"MemoryError\b")
_NOT_FINITE: Final = (r"\bdiverged\b", r"\bnot finite\b", r"\bis -?(?:nan|inf)\b")
_MODEL_ERROR: Final = (r"\bfailed \(ModelError\)",)  # all that a site whose loss is not finite says


@dataclass(frozen=True)
class Symptom:
    """A known pattern in a run's figures.

    Attributes:
        name: What it is called.
        evidence: The figures that show it.
        remedy: What usually helps.
    """

    name: str
    evidence: str
    remedy: str


Finder = Callable[[RunView], Iterator[Symptom]]


def symptoms(view: RunView) -> list[Symptom]:
    """All symptoms that a run's events show, the gravest kinds first."""
    return [symptom for find in FINDERS for symptom in find(view)]


def failed(view: RunView) -> Iterator[Symptom]:
    """The run, a site or a stage ended in a value that is not finite."""
    failures = [event for event in view.problems if not isinstance(event, SiteRefused)]
    shown = [event for event in failures if _says(event, _NOT_FINITE)]
    shown += [
        event
        for event in failures
        if isinstance(event, SiteFailed) and event.step == "train" and _says(event, _MODEL_ERROR)
    ]
    if shown:
        who = sorted({event.site if isinstance(event, SiteFailed) else "the coordinator" for event in shown})
        yield Symptom(
            "training diverged",
            f"no finite values at {', '.join(who)}, or a site's model that does not fit: {shown[-1].reason}",
            "Read that site's own log under the reference; if it diverged, lower training.learning_rate (a third is a "
            "usual step), lower training.max_grad_norm, or raise training.warmup_fraction.",
        )


def out_of_memory(view: RunView) -> Iterator[Symptom]:
    """A site or the coordinator ran out of memory, as a reason or a code says."""
    if shown := [event for event in view.problems if _says(event, _MEMORY)]:
        who = sorted({"the coordinator" if isinstance(event, RunFailed) else event.site for event in shown})
        yield Symptom(
            "out of memory",
            f"{len(shown)} times, at {', '.join(who)}: {shown[-1].reason}",
            "Set training.micro_batch_size lower, then training.gradient_checkpointing, then data.max_length_tokens; "
            "model.quantization = 'nf4' makes the base smaller.",
        )


def forgetting(view: RunView) -> Iterator[Symptom]:
    """Probes of the newest stage fall below the base's by more than a point, and their interval does not hold 0."""
    for name, figure, gain in _against_base(view):
        better = gain.mean if figure.higher_is_better else -gain.mean
        if figure.kind == "probe" and better < -PROBE_DROP and figures.verdict(figure, gain) == "worse":
            yield Symptom(
                "forgetting",
                f"{name} {figures.rise(gain)} from the base, over {figure.num_rows} rows",
                "Lower training.learning_rate or federation.num_rounds, take a smaller adapter.r, or mix general rows "
                "into the coordinator's own stages.",
            )


def flat_tasks(view: RunView) -> Iterator[Symptom]:
    """Held-out loss falls by 5 % and more while no figure of a task, probes aside, is better than the base's."""
    evaluated = view.evaluated
    found = [entry for entry in _against_base(view) if entry[1].kind not in ("probe", "memorisation", "pii")]
    if len(evaluated) < 2 or not found:
        return
    first, last = evaluated[min(evaluated)].loss, evaluated[max(evaluated)].loss
    verdicts = [figures.verdict(figure, gain) for _, figure, gain in found]
    if min(evaluated) == 0 and last <= first * (1 - MIN_FALL) and "better" not in verdicts:
        yield Symptom(
            "loss falls, tasks are flat",
            f"held-out loss {first:.3f} to {last:.3f}, and of {len(found)} figures of tasks none is better than the "
            f"base's ({', '.join(f'{name} {figures.rise(gain)}' for name, _, gain in found[:3])})",
            "Look whether the tasks ask as the sites' rows do (prompt, form of the answer), whether "
            "evaluation.max_new_tokens cuts answers, and whether the tasks have enough rows to tell.",
        )


def large_gap(view: RunView) -> Iterator[Symptom]:
    """The aggregation gap passes `aggregation.gap_warning` in two rounds and more."""
    limit = view.plan.gap_warning if view.plan else math.inf
    large = [event for event in view.rounds.values() if (event.gap or 0.0) > limit]
    if view.plan and len(large) >= MIN_LARGE_GAPS:
        instead = view.plan.without_gap
        method = f", or aggregation.method = '{instead}', which has none" if instead else ""
        worst = max(large, key=lambda event: event.gap or 0.0)
        error = f" ± {worst.gap_error:.1%}" if worst.gap_error else ""
        yield Symptom(
            "large aggregation gap",
            f"above {limit:.0%} in {len(large)} of {len(view.rounds)} rounds, at most {worst.gap:.0%}{error}",
            f"Take fewer local steps a round{method}.",
        )


def diverging_site(view: RunView) -> Iterator[Symptom]:
    """One site's held-out loss rises twice in a row while the mean over all sites falls."""
    newest = [event for _, event in sorted(view.evaluated.items())][-(DIVERGING + 1) :]
    mean = [event.loss for event in newest]
    if len(newest) <= DIVERGING or not _is_falling(mean):
        return
    for site in newest[-1].sites:
        losses = [event.sites[site].loss for event in newest if site in event.sites and site not in event.stale]
        if len(losses) == len(newest) and _is_falling([-loss for loss in losses]):
            yield Symptom(
                "a site drifts away",
                f"{site}: loss {losses[0]:.3f} to {losses[-1]:.3f} while the mean went {mean[0]:.3f} to {mean[-1]:.3f}",
                "Look at that site's rows (language, columns, labels); aggregation.weighting = 'uniform' gives small "
                "sites more weight, aggregation.proximal keeps sites together, aggregation.screening.action names "
                "outliers.",
            )


def collapse(view: RunView) -> Iterator[Symptom]:
    """A stage of preferences lowers the likelihood of the chosen answers too, or its answers grow or repeat.

    Source: Pal et al. 2024, arXiv:2402.13228 (chosen log-probabilities fall under DPO); Park et al. 2024,
    arXiv:2403.19159 (answers grow).
    """
    for event in view.polish_finished.values():
        if signs := list(_collapsing(event.before, event.after)):
            yield Symptom(
                "preference stage collapses",
                f"stage {event.stage}: {'; '.join(signs)}",
                "Lower the stage's learning_rate or epochs, raise beta, take loss = 'ipo', or play an sft stage on the "
                "chosen answers first; look for pairs whose chosen answer is merely longer.",
            )


def _collapsing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Signs of it in the figures that the stage has."""
    both = [key for key in ("logp_chosen", "logp_rejected") if key in before and key in after]
    is_falling = len(both) == 2 and all(after[key] < before[key] for key in both)
    if is_falling and before["logp_chosen"] - after["logp_chosen"] > LESS_LIKELY:
        fell = ", ".join(f"{key} {before[key]:.2f} to {after[key]:.2f}" for key in both)
        yield f"both likelihoods fall ({fell})"
    if before.get("length") and after.get("length", 0.0) > LONGER * before["length"]:
        yield f"answers grow ({before['length']:.0f} to {after['length']:.0f} tokens)"
    if "repetition" in before and after.get("repetition", 0.0) > before["repetition"] + MORE_REPEATED:
        yield f"answers repeat ({before['repetition']:.0%} to {after['repetition']:.0%})"


def merged(view: RunView) -> Iterator[Symptom]:
    """Formats of the folder that the run has written lose much of the adapter."""
    yield from of_formats(view.exported.logits if view.exported else {})


def of_formats(logits: Mapping[str, Mapping[str, float]]) -> list[Symptom]:
    """Formats of an export whose error is no longer small beside what the adapter does.

    Args:
        logits: Of `server.verify.verify`'s result: by format, and by `base`, the difference from the adapter's logits.
    """
    effect = logits.get("base", {}).get("difference", 0.0)
    return [
        Symptom(
            "merged worse than adapter",
            f"{name} differs from the adapter by {compared['difference']:.2e}, the base by {effect:.2e}",
            "Rounding eats what was learnt: serve the adapter beside its base (peft, vllm), or take a finer type.",
        )
        for name, compared in logits.items()
        if name != "base" and compared["difference"] > MAX_LOST * effect > 0
    ]


FINDERS: Final[tuple[Finder, ...]] = (
    failed,
    out_of_memory,
    collapse,
    forgetting,
    diverging_site,
    flat_tasks,
    large_gap,
    merged,
)


def _against_base(view: RunView) -> Iterator[tuple[str, Figure, Gain]]:
    """Name, figure and difference from the base of the newest adapter; one that a gate went back to is an older one."""
    stages = [name for name in view.measured if name not in (figures.BASE, figures.PROMPT_ONLY)]
    newest = next(iter(view.gated), stages[-1] if stages else "")
    if newest in stages:
        event = view.measured[newest]
        gains = event.gains.get(figures.BASE, {})
        yield from ((name, figure, gains[name]) for name, figure in event.figures.items() if name in gains)


def _says(event: RunFailed | SiteFailed | SiteRefused, words: Sequence[str]) -> bool:
    """Whether an event's reason or code holds one of a few words, as whole ones."""
    text = f"{event.reason} {event.error if isinstance(event, RunFailed) else ''}"
    return any(re.search(word, text) for word in words)


def _is_falling(values: Sequence[float]) -> bool:
    """Whether each value is below the one before."""
    return all(after < before for before, after in itertools.pairwise(values))
