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

from common.event_kinds import Event
from server.view import export, figures
from server.view import gate as words

MIN_FALL: Final = 0.05  # share of the held-out loss that counts as fallen
PROBE_DROP: Final = 0.01
MIN_LARGE_GAPS: Final = 2  # rounds; one large gap is chance
DIVERGING: Final = 2  # evaluations in a row in which a site's loss rises while the mean's falls
LESS_LIKELY: Final = 1.0  # nats of a whole chosen answer; DPO always shifts it by a little
LONGER: Final = 1.5  # factor of an answer's length
MORE_REPEATED: Final = 0.1  # rise of the share of repeated pieces
MAX_EATEN: Final = 0.3  # of what the adapter does; more of it lost is seen in its answers
_MEMORY: Final = (r"\bout of memory\b", r"\bOutOfMemory", r"MemoryError\b")
_NOT_FINITE: Final = (r"\bdiverged\b", r"\bnot finite\b", r"\bis -?(?:nan|inf)\b")
_TOLD: Final = (r"\bfailed \(ModelError\)",)  # all that a site whose loss is not finite tells


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


Finder = Callable[[Sequence[Event]], Iterator[Symptom]]


def symptoms(log: Sequence[Event]) -> list[Symptom]:
    """All symptoms that a run's events show, the gravest kinds first."""
    return [symptom for find in FINDERS for symptom in find(log)]


def failed(log: Sequence[Event]) -> Iterator[Symptom]:
    """The run, a site or a stage ended in a value that is not finite."""
    told = [event for event in _of(log, "run_failed", "site_failed") if _names(event, _NOT_FINITE)]
    told += [event for event in _of(log, "site_failed") if event.get("step") == "train" and _names(event, _TOLD)]
    if told:
        who = sorted({str(event.get("site", "the coordinator")) for event in told})
        yield Symptom(
            "training diverged",
            f"no finite values at {', '.join(who)}, or a site's model that does not fit: {told[-1]['reason']}",
            "Read that site's own log under the reference; if it diverged, lower training.learning_rate (a third is a "
            "usual step), lower training.max_grad_norm, or raise training.warmup_fraction.",
        )


def out_of_memory(log: Sequence[Event]) -> Iterator[Symptom]:
    """A site or the coordinator ran out of memory, as a reason or a code says."""
    told = [event for event in _of(log, "site_failed", "site_refused", "run_failed") if _names(event, _MEMORY)]
    if told:
        who = sorted({str(event.get("site", f"node {event.get('node', '?')}")) for event in told})
        yield Symptom(
            "out of memory",
            f"{len(told)} times, at {', '.join(who)}: {told[-1]['reason']}",
            "Set training.micro_batch_size lower, then training.gradient_checkpointing, then data.max_length_tokens; "
            "model.quantization = 'nf4' makes the base smaller.",
        )


def forgetting(log: Sequence[Event]) -> Iterator[Symptom]:
    """Probes of the newest stage fall below the base's by more than a point, and their interval does not hold 0."""
    for name, figure, gain in _against_base(log):
        better = gain["mean"] if figure["higher_is_better"] else -gain["mean"]
        if figure["kind"] == "probe" and better < -PROBE_DROP and figures.verdict(figure, gain) == "worse":
            yield Symptom(
                "forgetting",
                f"{name} {figures.rise(gain)} from the base, over {figure['num_rows']} rows",
                "Lower training.learning_rate or federation.num_rounds, take a smaller adapter.r, or mix general rows "
                "into the coordinator's own stages.",
            )


def flat_tasks(log: Sequence[Event]) -> Iterator[Symptom]:
    """Held-out loss falls by 5 % and more while no figure of a task, probes aside, is better than the base's."""
    evaluated = _by_round(log)
    found = [entry for entry in _against_base(log) if entry[1]["kind"] not in ("probe", "memorisation", "pii")]
    if len(evaluated) < 2 or not found:
        return
    first, last = evaluated[min(evaluated)]["loss"], evaluated[max(evaluated)]["loss"]
    verdicts = [figures.verdict(figure, gain) for _, figure, gain in found]
    if min(evaluated) == 0 and last <= first * (1 - MIN_FALL) and "better" not in verdicts:
        yield Symptom(
            "loss falls, tasks are flat",
            f"held-out loss {first:.3f} to {last:.3f}, and of {len(found)} figures of tasks none is better than the "
            f"base's ({', '.join(f'{name} {figures.rise(gain)}' for name, _, gain in found[:3])})",
            "Look whether the tasks ask as the sites' rows do (prompt, form of the answer), whether "
            "evaluation.max_new_tokens cuts answers, and whether the tasks have enough rows to tell.",
        )


def large_gap(log: Sequence[Event]) -> Iterator[Symptom]:
    """The aggregation gap passes `aggregation.gap_warning` in two rounds and more."""
    plans = _of(log, "run_started")
    rounds = {event["round"]: event for event in _of(log, "round_finished")}
    limit = plans[-1]["gap_warning"] if plans else math.inf
    large = [number for number, event in rounds.items() if (event["gap"] or 0.0) > limit]
    if len(large) >= MIN_LARGE_GAPS:
        instead = plans[-1]["without_gap"]
        method = f", or aggregation.method = '{instead}', which has none" if instead else ""
        worst = max((rounds[number] for number in large), key=lambda event: event["gap"])
        error = f" ± {worst['gap_error']:.1%}" if worst.get("gap_error") else ""
        yield Symptom(
            "large aggregation gap",
            f"above {limit:.0%} in {len(large)} of {len(rounds)} rounds, at most {worst['gap']:.0%}{error}",
            f"Take fewer local steps a round{method}.",
        )


def diverging_site(log: Sequence[Event]) -> Iterator[Symptom]:
    """One site's held-out loss rises twice in a row while the mean over all sites falls."""
    events = [event for _, event in sorted(_by_round(log).items())][-(DIVERGING + 1) :]
    if len(events) <= DIVERGING or not _is_falling([event["loss"] for event in events]):
        return
    for site in events[-1]["sites"]:
        losses = [event["sites"].get(site, {}).get("loss") for event in events]
        is_known = None not in losses and not any(site in event["stale"] for event in events)
        if is_known and _is_falling([-loss for loss in losses]):
            mean = [event["loss"] for event in events]
            yield Symptom(
                "a site drifts away",
                f"{site}: loss {losses[0]:.3f} to {losses[-1]:.3f} while the mean went {mean[0]:.3f} to {mean[-1]:.3f}",
                "Look at that site's rows (language, columns, labels); aggregation.weighting = 'uniform' gives small "
                "sites more weight, aggregation.proximal keeps sites together, aggregation.screening.action names "
                "outliers.",
            )


def collapse(log: Sequence[Event]) -> Iterator[Symptom]:
    """A stage of preferences lowers the likelihood of the chosen answers too, or its answers grow or repeat.

    Source: Pal et al. 2024, arXiv:2402.13228 (chosen log-probabilities fall under DPO); Park et al. 2024,
    arXiv:2403.19159 (answers grow).
    """
    for event in _of(log, "polish_finished"):
        before, after = event.get("before", {}), event.get("after", {})
        told = list(_collapsing(before, after))
        if told:
            yield Symptom(
                "preference stage collapses",
                f"stage {event.get('stage', '?')}: {'; '.join(told)}",
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


def merged(log: Sequence[Event]) -> Iterator[Symptom]:
    """Formats of the folder that the run has written lose much of the adapter."""
    found = export.newest(log)
    yield from of_formats(found.get("logits", {}) if found else {})


def of_formats(logits: Mapping[str, Mapping[str, float]]) -> list[Symptom]:
    """Formats of an export whose error is no longer small beside what the adapter does.

    Args:
        logits: Of `server.verify.verify`'s result: by format, and by `base`, the difference from the adapter's logits.
    """
    effect = logits.get("base", {}).get("difference", 0.0)
    return [
        Symptom(
            "merged worse than adapter",
            f"{name} differs from the adapter by {told['difference']:.2e}, the base by {effect:.2e}",
            "Rounding eats what was learnt: serve the adapter beside its base (peft, vllm), or take a finer type.",
        )
        for name, told in logits.items()
        if name != "base" and told["difference"] > MAX_EATEN * effect > 0
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


def _of(log: Sequence[Event], *kinds: str) -> list[Event]:
    """Events of some kinds."""
    return [event for event in log if event["kind"] in kinds]


def _by_round(log: Sequence[Event]) -> dict[int, Event]:
    """The last event `evaluated` after each number of rounds."""
    return {event["num_rounds"]: event for event in _of(log, "evaluated")}


def _against_base(log: Sequence[Event]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, float]]]:
    """Name, figure and difference from the base of the newest adapter; one that a gate went back to is an older one."""
    found = {
        name: event for name, event in figures.stages(log).items() if name not in (figures.BASE, figures.PROMPT_ONLY)
    }
    judged = [event["stage"] for event in words.of_log(log)]
    newest = judged[0] if judged else next(reversed(found), "")
    for event in [found[newest]] if newest in found else []:
        gains = event["gains"].get(figures.BASE, {})
        yield from ((name, figure, gains[name]) for name, figure in event["figures"].items() if name in gains)


def _names(event: Event, words: Sequence[str]) -> bool:
    """Whether an event's reason or code holds one of a few words, as whole ones."""
    text = f"{event.get('reason', '')} {event.get('error', '')}"
    return any(re.search(word, text) for word in words)


def _is_falling(values: Sequence[float]) -> bool:
    """Whether each value is below the one before."""
    return all(after < before for before, after in itertools.pairwise(values))
