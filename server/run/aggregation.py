"""From a round's updates to the next global adapter: steps on updates, a sum, steps on what it makes.

Both lists are built once a round from the plan, so that no step knows of the others and the loop knows of none (in the
manner of pfl-research's postprocessors, arXiv:2404.06430). Updates go through in this order, each step holding back
what it cannot judge yet:

    screen    hold updates against each other           `aggregation.screening`
    limit     scale one down to a norm, log it          `aggregation.max_update_norm`
    weigh     by rows, held to a share                  `aggregation.weighting`, `max_weight_share`
    sum       the method's own, robust, or noised       `aggregation.method`, `robust`, `privacy`

and the mean then through `server step`, `ranks`, `compress` and `gap`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from common.errors import ConfigError
from common.event_kinds import Screened, SiteTrained
from common.frame.records import UpdateHead
from common.privacy import clipping
from common.privacy.noise import Noise
from common.run.catalogue.kinds import KINDS
from common.run.schema.aggregation import Screening
from common.scores import Seen
from server.aggregate import adalora, gap, noised, optimizer, products, robust, screen
from server.aggregate.method import State, Sum
from server.aggregate.methods import table
from server.aggregate.noised import NoisedSum
from server.aggregate.optimizer import Memory
from server.aggregate.weights import Shares
from server.fleet import broadcast
from server.fleet.broadcast import Step
from server.fleet.run import Run
from server.view.run_view import RunView

WHOLE: Final = "float32"


@dataclass(frozen=True)
class Update:
    """A site's update on its way into the sum.

    Attributes:
        head: What the site says of its training.
        change: Its tensors.
        num_bytes: Of its frame.
        weight: How much it counts.
    """

    head: UpdateHead
    change: State
    num_bytes: int
    weight: float = 1.0


@dataclass(frozen=True)
class Draft:
    """The next global adapter, as far as it is.

    Attributes:
        before: The global adapter before the round.
        mean: What the updates add up to.
        averaged: The adapter with the mean added.
        after: The adapter with what the steps so far made of it.
        memory: The coordinator's.
        steps: See `RoundState`.
        norms: What the adapter misses of each module, and the step; empty where nothing is missed or measured.
    """

    before: State
    mean: State
    averaged: State
    after: State
    memory: Memory
    steps: Sequence[Step]
    norms: Mapping[str, gap.Norms] = field(default_factory=dict)


class UpdateStep(Protocol):
    """A step on updates."""

    def take(self, update: Update) -> Iterable[Update]:
        """Take one; gives those that are ready."""

    def close(self) -> Iterable[Update]:
        """All are in: gives those that were held back."""


class Aggregation(Protocol):
    """How the updates of one round become the next global adapter.

    `Clear` reads each update. One under masks would add what it cannot read, and ask the sites more than once a round.
    """

    bytes_up: int

    def add(self, update: Update) -> None:
        """Take an update that was checked."""

    def close(self) -> None:
        """All are in: judge and add those that were held back."""

    def result(self) -> Draft:
        """The next global adapter; ask once, after `close`."""


class Clear:
    """Adds updates that the coordinator reads; memory does not grow with their number, if no step holds them back.

    Args:
        run: The run.
        round_index: From 0.
        before: The global adapter.
        memory: The coordinator's.
        steps: See `RoundState`.
        source: Of the noise, under differential privacy for sites as a whole.

    Attributes:
        counted: Heads of the updates that were added, each with its weight.
        held_to_share: Sites whose claim was brought down to `aggregation.max_weight_share`.
        bytes_up: Frames received, refused ones included.
    """

    def __init__(
        self, run: Run, *, round_index: int, before: State, memory: Memory, steps: Sequence[Step], source: Noise
    ) -> None:
        plan, settings = run.plan, run.plan.aggregation
        self.counted: list[tuple[UpdateHead, float]] = []
        self.held_to_share: list[str] = []
        self.bytes_up = 0
        self._run, self._round_index = run, round_index
        self._before, self._memory, self._steps = before, memory, steps
        by_rows = settings.weighting == "examples"
        self._update_steps: list[UpdateStep] = []
        if settings.screening.action != "off":
            self._update_steps.append(_Screen(run, round_index, settings.screening))
        self._update_steps.append(_Limit(run, by_rows=by_rows))
        if by_rows and settings.max_weight_share < 1:
            self._update_steps.append(_Weigh(settings.max_weight_share))
        self._meter: gap.GapMeter | None = None
        names = [spec.name for spec in plan.sent(round_index)]
        if plan.privacy.mode == "site":  # and no meter, whose figure no noise would cover
            self._sum: Sum = noised.start(
                before, names, privacy=plan.privacy, expected=plan.num_expected, source=source, memory=memory
            )
        elif settings.robust.rule != "none":
            self._sum = robust.start(names, rule=settings.robust.rule, num_bad=settings.robust.num_bad_sites)
        else:
            self._sum = table.find(plan.method.name).start(before, trained=names)
            if plan.method.has_bias and KINDS[plan.adapter.kind].has_factors:
                self._meter = gap.GapMeter(before, seed=run.manifest.run.seed + round_index)

    def add(self, update: Update) -> None:
        """Take an update that was checked."""
        self._pass([update], self._update_steps)

    def close(self) -> None:
        """All are in: judge and add those that were held back."""
        for number, step in enumerate(self._update_steps, start=1):
            self._pass(step.close(), self._update_steps[number:])

    def _pass(self, updates: Iterable[Update], steps: Sequence[UpdateStep]) -> None:
        """Through the steps that are left, and into the sum."""
        for update in updates:
            if steps:
                self._pass(steps[0].take(update), steps[1:])
                continue
            self._sum.add(update.change, weight=update.weight)
            if self._meter:
                self._meter.add(update.change, weight=update.weight)
            self.counted.append((update.head, update.weight))
            if self._run.plan.aggregation.weighting == "examples" and update.weight < update.head.num_examples:
                self.held_to_share.append(update.head.site)

    def result(self) -> Draft:
        """The next global adapter exactly as sites will hold it.

        Raises:
            ConfigError: A side adapter is too narrow for what it must hold; the finished rounds are on the disk.
        """
        mean = self._sum.result()
        averaged = table.find(self._run.plan.method.name).apply(self._before, mean)
        draft = Draft(self._before, mean, averaged, averaged, self._memory, self._steps)
        for step in _adapter_steps(self._run, self._sum, self._meter, num_done=self._round_index + 1):
            draft = step(draft)
        return draft


class _Screen:
    """Lets none pass before all are there; what was seen is logged."""

    def __init__(self, run: Run, round_index: int, settings: Screening) -> None:
        self._run, self._round_index, self._settings = run, round_index, settings
        self._waiting: dict[str, Update] = {}

    def take(self, update: Update) -> Iterable[Update]:
        self._waiting[update.head.site] = update
        return ()

    def close(self) -> Iterable[Update]:
        changes = {site: update.change for site, update in sorted(self._waiting.items())}
        past = screen.history(RunView.read(self._run.log.path).screened, round_index=self._round_index)
        found = screen.look(changes, past, threshold=self._settings.threshold) if changes else {}
        dropped = screen.left_out(found) if self._settings.action == "drop" else set()
        for site in sorted(dropped):
            self._run.record("screened", round_index=self._round_index, site=site)
        sites = {
            site: Seen(norm=seen.norm, cosine=seen.cosine, reasons=seen.reasons, is_left_out=site in dropped)
            for site, seen in found.items()
        }
        self._run.log.append(Screened(round=self._round_index, sites=sites))
        return [update for site, update in self._waiting.items() if site not in dropped]


class _Limit:
    """Scales an update down to the run's norm, takes the weight that its site claims, and logs it.

    The events tell a site's norm as it came, unless noise is to cover it.
    """

    def __init__(self, run: Run, *, by_rows: bool) -> None:
        self._run, self._by_rows = run, by_rows

    def take(self, update: Update) -> Iterable[Update]:
        plan, head = self._run.plan, update.head
        shorter, length = clipping.scaled(update.change, plan.aggregation.max_update_norm)
        self._run.log.append(
            SiteTrained(
                site=head.site,
                round=head.round_index,
                train_loss=head.train_loss,
                num_examples=head.num_examples,
                num_steps=head.num_steps,
                seconds=None if head.seconds is None else round(head.seconds, 3),
                update_norm=None if plan.privacy.mode == "site" else length,
                bytes_up=update.num_bytes,
            )
        )
        return (replace(update, change=shorter, weight=float(head.num_examples) if self._by_rows else 1.0),)

    def close(self) -> Iterable[Update]:
        return ()


class _Weigh:
    """Holds a site's weight, which is its own claim, to a share."""

    def __init__(self, max_share: float) -> None:
        self._shares = Shares[Update](max_share)

    def take(self, update: Update) -> Iterable[Update]:
        ready = self._shares.take(update.head.site, update.weight, update)
        return [replace(passed, weight=weight) for _, weight, passed in ready]

    def close(self) -> Iterable[Update]:
        return [replace(passed, weight=weight) for _, weight, passed in self._shares.close()]


def _adapter_steps(
    run: Run, combined: Sum, meter: gap.GapMeter | None, *, num_done: int
) -> list[Callable[[Draft], Draft]]:
    """What is made of the mean, in this order: each step takes a draft and gives the next."""
    plan = run.plan
    method, sent = table.find(plan.method.name), plan.tensors.received

    def take_server_step(draft: Draft) -> Draft:
        step, memory = optimizer.step(draft.mean, draft.memory, settings=plan.aggregation.server_optimizer)
        return replace(draft, after=method.apply(draft.before, step), memory=memory)

    def remember_clip_norm(draft: Draft) -> Draft:
        return replace(draft, memory=combined.remembered(draft.memory)) if isinstance(combined, NoisedSum) else draft

    def agree_on_ranks(draft: Draft) -> Draft:
        return replace(draft, after=adalora.agree(draft.after, draft.mean, run=run.manifest.run, num_done=num_done))

    def compress(draft: Draft) -> Draft:
        held, memory, step = broadcast.settle(
            draft.before,
            draft.after,
            draft.memory,
            sent=sent,
            dtype=plan.wire.down,
            density=plan.wire.down_density,
        )
        return replace(draft, after=held, memory=memory, steps=broadcast.light([*draft.steps, step], sent=sent))

    def measure_gap(draft: Draft) -> Draft:
        if meter:
            return replace(draft, norms=meter.per_module(draft.averaged))
        found = gap.of_products(draft.before, products.pairs(draft.mean), draft.averaged)
        return replace(draft, norms=found)

    def require_rank(draft: Draft) -> Draft:
        lost, limit = gap.whole(draft.norms.values()), plan.aggregation.residual_max_lost
        if lost > limit:
            raise ConfigError(
                f"aggregation.residual_rank = {plan.aggregation.residual_rank} cuts {100 * lost:.1f} % of this round's "
                f"step, over residual_max_lost = {limit:g}; raise the rank, or choose another aggregation.method"
            )
        return draft

    chosen = (
        (plan.aggregation.server_optimizer.kind != "none", take_server_step),
        (isinstance(combined, NoisedSum), remember_clip_norm),
        (plan.adapter.kind == "adalora", agree_on_ranks),
        (plan.wire.down != WHOLE, compress),
        (True, measure_gap),
        (plan.method.base_delta == "residual", require_rank),
    )
    return [step for is_on, step in chosen if is_on]


def gap_figures(norms: Mapping[str, gap.Norms]) -> dict[str, Any]:
    """The gap of a round, whole and by module, each with its standard error; None where there is none."""
    each = {name: [pair] for name, pair in norms.items()}
    return {
        "gap": gap.whole(norms.values()) if norms else None,
        "gap_error": gap.error(norms.values()) if norms else None,
        "gap_modules": {name: gap.whole(pair) for name, pair in each.items()},
        "gap_module_errors": {name: gap.error(pair) for name, pair in each.items()},
    }
