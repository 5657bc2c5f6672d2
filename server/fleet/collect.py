"""Replies of a fleet, one at a time, until all are in or the deadline has passed; and what makes an update valid."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from common.adapter import compact
from common.adapter.adapter import Tensors
from common.errors import RemoteError, SilotuneError, WireError
from common.frame import site_states
from common.frame.records import RoundPlan, UpdateHead, from_head
from common.frame.wire import Frame
from common.run.plan import Plan
from server.fleet.fleet import SMALL_REPLY_BYTES, Fleet, Reply

POLL_S: Final = 0.2


@dataclass(frozen=True)
class Answer:
    """One node's reply: a frame, or why there is none.

    Attributes:
        node_id: Whose.
        frame: The reply's bytes; None if there is none.
        reason: A short code in words; empty with a frame.
        is_late: Nothing at all came before the deadline.
    """

    node_id: int
    frame: bytes | None
    reason: str
    is_late: bool = False


def ask(
    fleet: Fleet,
    frames: Mapping[int, bytes],
    *,
    kind: str,
    timeout_s: float,
    max_reply_bytes: int = SMALL_REPLY_BYTES,
    suspects: Collection[int] = (),
    grace_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Answer]:
    """Send one frame to each node and yield the answers as they come; at last those that never came.

    Only one answer is held at a time, so memory does not grow with the number of nodes.

    Args:
        fleet: The nodes.
        frames: What each node is sent.
        kind: Of all these frames.
        timeout_s: From sending to giving up.
        max_reply_bytes: Largest answer of one node.
        suspects: Nodes that were silent the last time: once all others have answered, they are waited for only as long
            again, and not less than `grace_s`. Where there are no others, they are waited for like them.
        grace_s: See there.
        clock: Seconds, monotonic.
        sleep: Waits between polls.
    """
    began = clock()
    deadline, are_others_in = began + timeout_s, set(frames) <= set(suspects)
    tickets = {
        fleet.send(node, frame, kind=kind, ttl_s=timeout_s, max_reply_bytes=max_reply_bytes): node
        for node, frame in frames.items()
    }
    while tickets:
        num_before = len(tickets)
        for reply in fleet.receive(tuple(tickets)):
            yield _answer(tickets.pop(reply.ticket), reply)
        if not are_others_in and set(tickets.values()) <= set(suspects):
            are_others_in = True
            deadline = min(deadline, clock() + max(grace_s, clock() - began))
        if tickets and clock() >= deadline:
            break
        if len(tickets) == num_before:
            sleep(POLL_S)
    for node in tickets.values():
        yield Answer(node, None, f"no answer within {round(deadline - began, 1):g} s", is_late=True)


def read_update(frame: Frame, plan: RoundPlan, *, expected: Plan) -> tuple[UpdateHead, Tensors]:
    """An update whose head, names, shapes, dtype, size and values were found right.

    Args:
        frame: What arrived.
        plan: What was asked.
        expected: The site's own plan: the update has exactly its tensors, at its rank.

    Raises:
        WireError: Malformed, or for another run or round.
        ModelError: Tensors differ from the manifest, or are not finite.
    """
    head = from_head(UpdateHead, frame.head)
    check_round(head.run_sha256, head.round_index, plan)
    if not head.num_examples:
        raise WireError("update claims to rest on no rows")
    if (head.train_loss is None) != (expected.privacy.mode != "none"):
        raise WireError("update tells a training loss where the run's privacy forbids it, or none where it is due")
    return head, compact.decode_update(frame.body, expected.sent(plan.round_index), expected.wire)


def check_round(run_sha256: str, round_index: int, plan: RoundPlan) -> None:
    """Refuse an answer to another question.

    Raises:
        WireError: Another run or round.
    """
    if (run_sha256, round_index) != (plan.run_sha256, plan.round_index):
        raise WireError(f"answer is for another run, or for round {round_index} instead of {plan.round_index}")


def reason_of(error: SilotuneError, fleet: Fleet) -> str:
    """Why an answer does not count, fit for the run's events: a peer's refusal, or what was wrong with its bytes.

    That somebody has yet to decide is no failure, so nothing but that is told. A peer tells a code alone; the reason
    behind it stands in the place of where to look for it, if the fleet may know it.
    """
    if not isinstance(error, RemoteError):
        return f"{type(error).__name__}: {error}"
    if state_of(error) == site_states.WAITS:
        return site_states.WAITS
    reason = fleet.explain(error.reference)
    return f"{state_of(error)} ({error.code}): {reason}" if reason else str(error)


def state_of(error: SilotuneError) -> str:
    """The state of the site whose answer does not count: what its refusal means, else that it failed."""
    return site_states.of_code(error.code) if isinstance(error, RemoteError) else site_states.FAILED


def _answer(node_id: int, reply: Reply) -> Answer:
    """A fleet's reply under the node's id."""
    return Answer(node_id, reply.frame, reply.failure)
