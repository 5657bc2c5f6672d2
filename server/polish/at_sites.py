"""The polished adapters on the sites' held-out rows, by the same request as after a round."""

from collections.abc import Sequence
from typing import Any

from common.adapter import adapter
from common.event_kinds import NotEvaluated, PolishEvaluated
from common.frame.records import RoundPlan
from common.run.config import RunConfig
from server.fleet import federation, sites
from server.fleet.federation import Federation
from server.polish.stages import Finished


def ask(fed: Federation, played: Sequence[Finished]) -> None:
    """Have the sites score what the last stages have left; one event `polish_evaluated` each, or
    `not_evaluated` where no site tells held-out figures.

    A run that goes on asks again, as after a round: a site gives the same answer to the same adapter.

    Args:
        fed: The run; its stages are done.
        played: Its stages, in their order.

    Raises:
        ProtocolError: No site has ever answered.
        StorageError: An event could not be written.
    """
    asked = numbers(fed.manifest.run)
    for place, number in enumerate(asked, start=1):
        federation.rejoin(fed)  # polish may have taken hours
        tensors, is_last = played[number - 1].tensors, number == asked[-1]
        told = sites.ask(fed, tensors, plan_of(fed, place=place, is_last=is_last))
        stage: dict[str, Any] = {
            "stage": played[number - 1].names[-1],
            "number": number,
            "adapter_sha256": adapter.digest(tensors),
        }
        fed.log.append((PolishEvaluated if "sites" in told else NotEvaluated)(**stage, **told))


def numbers(run: RunConfig) -> list[int]:
    """The stages, from 1, after which the sites are asked: the last `evaluation.num_polish_stages` that train."""
    training = [number for number, stage in enumerate(run.polish, start=1) if stage.changes_adapter]
    count = run.evaluation.num_polish_stages
    return training[-count:] if count else []


def plan_of(fed: Federation, *, place: int, is_last: bool) -> RoundPlan:
    """The request for the adapter that is at this place after the last planned round; answers are generated once."""
    settings = fed.manifest.run
    generate = is_last and settings.evaluation.exact_match_rows > 0
    return RoundPlan(fed.manifest.sha256, settings.federation.num_rounds + place, generate)
