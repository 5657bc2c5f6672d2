"""What an agent asks before it acts, and what it shows before it answers.

`Permissive` is for simulations, where all sites are the researcher's. `client.agent.gatekeeper` is the one that has
rules.
"""

from collections.abc import Callable
from typing import Protocol

from client.policy.figures import FigureNoise
from common.adapter.adapter import Tensors
from common.errors import ConfigError
from common.frame import wire
from common.frame.records import OpenedHead, RoundPlan
from common.frame.wire import Frame
from common.run.manifest import Offer, RunManifest


class Guard(Protocol):
    """The places at which a site may say no; each says it by raising, and nothing is sent.

    Attributes:
        watches_rows: Whether it wants to know to which rows an adapter answers.
    """

    watches_rows: bool

    def before_open(self, offer: Offer) -> None:
        """A run is offered; nothing has been read or loaded for it."""

    def counted(self, head: OpenedHead, *, num_units: tuple[int, int], run: RunManifest) -> OpenedHead:
        """The rows are read: the counts as they may be told, the same for the whole run, from what they are.

        `num_units` are those to train on and those held out.
        """

    def begins(self, make: Callable[[], Tensors], *, num_steps: int, run: RunManifest) -> None:
        """The base is loaded: `make` gives the adapter that the run begins with, made here; a round has `num_steps`."""

    def before_step(self, request: Frame, plan: RoundPlan, tensors: Tensors, *, run: RunManifest) -> None:
        """The run is open and the adapter has the manifest's names and shapes; nothing has been computed."""

    def before_training(self, request: Frame, plan: RoundPlan, *, run: RunManifest) -> Frame | None:
        """Private rows are about to be read: pay for it, or return the answer that was given before."""

    def after_training(self, spread: float | None, answering: tuple[float, str] | None) -> None:
        """Training is done and nothing was sent: over what share of its steps the gradients were spread.

        `answering` is the smallest share of rows to which a direction of the adapter answered, and the module; None
        where `watches_rows` is false, or where the noise covers a unit.
        """

    def before_evaluation(self, plan: RoundPlan, *, run: RunManifest) -> Frame | FigureNoise | None:
        """Held-out rows are about to be scored: the answer that was given, or how to noise figures; None: not."""

    def outgoing(self, request: Frame, reply: Frame, *, run: RunManifest) -> bytes:
        """All that would leave; returns the bytes that do."""

    def take_roster(self, data: bytes) -> int:
        """A signed roster came; returns its epoch where it holds from now on, or held already."""

    def refused(self, reference: str, request: Frame | None, error: Exception) -> None:
        """A request was refused; None if it was no frame."""


class Permissive:
    """Allows everything that the agent itself does."""

    watches_rows = False

    def before_open(self, offer: Offer) -> None:
        """Take any manifest, signed or not."""

    def counted(self, head: OpenedHead, *, num_units: tuple[int, int], run: RunManifest) -> OpenedHead:
        """Tell them as they are."""
        return head

    def begins(self, make: Callable[[], Tensors], *, num_steps: int, run: RunManifest) -> None:
        """Take any adapter."""

    def before_step(self, request: Frame, plan: RoundPlan, tensors: Tensors, *, run: RunManifest) -> None:
        """Take any round."""

    def before_training(self, request: Frame, plan: RoundPlan, *, run: RunManifest) -> Frame | None:
        """Keep no ledger: whose rows these are, nobody promised anything."""
        return None

    def after_training(self, spread: float | None, answering: tuple[float, str] | None) -> None:
        """Send any update."""

    def before_evaluation(self, plan: RoundPlan, *, run: RunManifest) -> Frame | FigureNoise | None:
        """Tell figures as they are."""
        return None

    def outgoing(self, request: Frame, reply: Frame, *, run: RunManifest) -> bytes:
        """Send the reply as it is."""
        return wire.pack(reply)

    def take_roster(self, data: bytes) -> int:
        """A site without a policy reads no roster."""
        raise ConfigError("this site has no policy, so it reads no roster")

    def refused(self, reference: str, request: Frame | None, error: Exception) -> None:
        """Keep no log of its own."""
