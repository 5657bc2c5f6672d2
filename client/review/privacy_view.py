"""What a site's ledger says, for the people of the site: promise, spent, per run, what comes next, what is not covered.

The wording of what is covered is fixed here, so that page, review and documentation cannot promise different things.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.ledger.budget import MAX_ROUNDS, TRAIN, Budget, Reservation
from client.memory import consent, site_ledger
from client.review.review import Desk
from common.errors import DataError
from common.run import manifest

ACCOUNTANT: Final = "privacy loss distribution (dp-accounting), rounded up, confirmed by Renyi differential privacy"
MAX_POINTS: Final = 20
COVERED: Final = (
    "The updates, counts and held-out figures that left this site in all runs charged to this ledger, taken together: "
    "whether all rows with one "
    "value of '{unit}' were among the rows of '{dataset}' changes the probability of any outcome by a factor "
    "of e^epsilon at most, but for a probability of delta.",
    "It holds against everybody outside this site, the coordinator and the other sites included, whatever they know "
    "and however they compute, and for every model that is made from those updates.",
)
NOT_COVERED: Final = (
    "A person with rows at several sites: the promise is per site, and the epsilons of the sites add up.",
    "A person whom the rows of others tell about, and what is true of many people alike.",
    "Figures that leave beside the updates where the policy does not require differential privacy: rounded, no noise.",
    "Runs without differential privacy: they have no epsilon here, and rows can be rebuilt from their updates.",
    "This site itself: its staff, machines, logs and backups.",
)


@dataclass(frozen=True)
class Page:
    """The page.

    Attributes:
        promise: Data set, unit, adjacency, budget, delta and accountant.
        spent: Epsilon of all charges together.
        remaining: Budget less that.
        runs: Each with its hash, name, rounds, steps, own epsilon (None: unprotected) and bytes that left.
        next_round: What one more round like the last one would cost, and how many fit; None before the first.
        curve: Epsilon of the whole data set after some of a run's rounds; those to come are planned.
    """

    promise: dict[str, Any]
    reads: dict[str, Any]
    required: dict[str, str]
    spent: float
    remaining: float
    runs: list[dict[str, Any]]
    next_round: dict[str, Any] | None
    curve: list[dict[str, Any]]
    covered: list[str]
    not_covered: list[str]


def page(desk: Desk, run: str = "") -> Page:
    """Read ledger and audit log.

    Args:
        run: Hash, its first digits, or name of the run whose curve is shown; empty: of the last one charged.

    Raises:
        LedgerError: The ledger cannot be trusted.
        DataError: No such run, or it was never charged.
    """
    budget = site_ledger.open_site(desk.node, rules=desk.policy, key=desk.key, history=desk.history).budget()
    trained = [charge for charge in budget.reservations if charge.purpose == TRAIN]
    last_sha256 = trained[-1].run_sha256 if trained else ""
    sha256 = consent.find(desk.history, run) if run else last_sha256
    charged = [charge for charge in trained if charge.run_sha256 == sha256]
    if run and not charged:
        raise DataError(
            f"run {sha256[:12]} was never charged to this ledger; see: silotune-client privacy without --run"
        )
    next_round = None
    if charged:
        event = charged[-1].event
        cost, num_left = budget.cost_of(event), budget.rounds_left(event)
        next_round = {**asdict(event), "epsilon": round(cost, 4), "num_rounds_left": num_left}
    header, data = budget.header, desk.node.data
    columns = (data.instruction_column, data.input_column, data.output_column, data.unit_column)
    names = {"unit": header.unit, "dataset": header.dataset}
    return Page(
        promise={**asdict(header), "accountant": ACCOUNTANT},
        reads={"rows": data.path, "columns": [column for column in columns if column]},
        required={"differential_privacy": desk.policy.privacy.mode, "secure_aggregation": desk.policy.privacy.secagg},
        spent=round(budget.spent(), 4),
        remaining=round(budget.remaining, 4),
        runs=_runs(desk, budget),
        next_round=next_round,
        curve=_curve(desk, budget, charged) if charged else [],
        covered=[text.format(**names) for text in COVERED],
        not_covered=list(NOT_COVERED),
    )


def render(shown: Page) -> RenderableType:
    """The page for a terminal."""
    promise = shown.promise
    facts = {
        "unit": f"{promise['unit']}; {promise['adjacency']}",
        "budget": f"epsilon {promise['max_epsilon']:g} at delta {promise['dp_delta']:g}, for all runs together",
        "spent": f"epsilon {shown.spent:.3f}",
        "remaining": f"epsilon {shown.remaining:.3f}",
        "accountant": promise["accountant"],
        "rows that are read": f"all of {shown.reads['rows']}",
        "columns that are read": ", ".join(shown.reads["columns"]),
        "policy demands": f"differential privacy: {shown.required['differential_privacy']}; secure aggregation: "
        f"{shown.required['secure_aggregation']}",
    }
    table = Table("question", "answer", title=f"privacy of '{promise['dataset']}'", show_lines=True)
    for question, answer in facts.items():
        table.add_row(question, Text(answer))
    parts: list[RenderableType] = [table]
    if shown.runs:
        head = ("run", "name", "rounds", "steps", "epsilon", "bytes out", "last charge (UTC)")
        table = Table(*head, title="runs, each by itself")
        for run in shown.runs:
            epsilon = "none" if run["epsilon"] is None else f"{run['epsilon']:.3f}"
            last = "-" if run["last_time"] is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(run["last_time"]))
            numbers = (str(run["num_rounds_charged"]), str(run["num_steps"]), epsilon, f"{run['bytes_out']:,}", last)
            table.add_row(run["run"][:12], Text(run["name"]), *numbers)
        parts.append(table)
    if shown.curve:
        table = Table("rounds", "epsilon", "", title="epsilon of the data set after so many rounds of the run")
        for point in shown.curve:
            kind = "planned" if point["is_planned"] else "charged"
            table.add_row(str(point["num_rounds"]), f"{point['epsilon']:.3f}", kind)
        following = shown.next_round or {}
        kind = "{num_steps} steps, noise {noise_multiplier:g}, sampling {sampling_prob:g}".format(**following)
        num_left = following["num_rounds_left"]
        fit = f"{num_left} more fit" if num_left < MAX_ROUNDS else f"{MAX_ROUNDS} and more fit"
        following_text = (
            f"One more round like the last ({kind}) costs epsilon {following['epsilon']:.4f}; {fit}. Rounds do not "
            "cost the same: the first cost the most, so the budget divided by the rounds says nothing."
        )
        parts += [table, Text(following_text)]
    for heading, lines in (("covered", shown.covered), ("not covered", shown.not_covered)):
        parts += [Text(heading, style="bold"), *(Text(f"- {line}") for line in lines)]
    return Group(*parts)


def _runs(desk: Desk, budget: Budget) -> list[dict[str, Any]]:
    """Runs that were charged, then those that trained here and were not."""
    costs = {cost.run_sha256: cost for cost in budget.per_run()}
    unprotected = [
        sha256
        for sha256, run in desk.history.runs.items()
        if sha256 not in costs and any(kind == "train" for kind, _ in run.steps)
    ]
    table = []
    for sha256 in [*costs, *unprotected]:
        known, cost = desk.history.run(sha256), costs.get(sha256)
        table.append(
            {
                "run": sha256,
                "name": known.name,
                "num_rounds_charged": cost.num_reservations if cost else 0,
                "num_steps": cost.num_steps if cost else 0,
                "num_evaluations_charged": cost.num_evaluations if cost else 0,
                "epsilon": round(cost.epsilon, 4) if cost else None,
                "bytes_out": known.bytes_out,
                "last_time": cost.last_time if cost else None,
            }
        )
    return table


def _curve(desk: Desk, budget: Budget, charged: Sequence[Reservation]) -> list[dict[str, Any]]:
    """Epsilon after rounds that were charged, and after those that the run still plans, if each is like the last."""
    run_sha256 = charged[-1].run_sha256
    ends = [
        number
        for number, charge in enumerate(budget.reservations, 1)
        if (charge.run_sha256, charge.purpose) == (run_sha256, TRAIN)
    ]
    points = []
    for number in _some(len(ends)):
        so_far = Budget(budget.header, budget.reservations[: ends[number - 1]])
        points.append({"num_rounds": number, "epsilon": round(so_far.spent(), 4), "is_planned": False})
    num_planned = 0  # where the run's offer is no longer kept
    with suppress(DataError):
        num_rounds = manifest.parse(consent.load(desk.folder, run_sha256).manifest).run.federation.num_rounds
        num_planned = max(0, num_rounds - len({charge.round_index for charge in charged}))
    for number in _some(num_planned):
        spent = budget.spent([charged[-1].event.times(number)])  # rounds alone: evaluations to come are in the review
        points.append({"num_rounds": len(ends) + number, "epsilon": round(spent, 4), "is_planned": True})
    return points


def _some(count: int) -> list[int]:
    """Rounds to show: all of a few, else the first, the last and some between.

    Example:
        >>> _some(3), len(_some(1000)), _some(1000)[-1]
        ([1, 2, 3], 20, 1000)
    """
    if count <= MAX_POINTS:
        return list(range(1, count + 1))
    return [1 + index * (count - 1) // (MAX_POINTS - 1) for index in range(MAX_POINTS)]
