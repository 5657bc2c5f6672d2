"""Attacks by a site's update: the agent answers as it should, and what goes out in its place is something else."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from client.agent.agent import Agent
from client.train import schedule
from common.adapter import compact
from common.adapter.adapter import Tensors
from common.frame import wire
from common.run.manifest import RunManifest

SCALE: Final = 10.0
FREE_RIDER_STD: Final = 1e-3  # about what a value of an honest update is
MAX_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Cheat:
    """An attacker's material.

    Attributes:
        trained: Its update, honestly trained.
        copied: The honest update of another site in the same round.
    """

    trained: Tensors
    copied: Callable[[], Tensors]
    seed: int


def sign_flip(cheat: Cheat) -> Tensors:
    """The opposite way (Li et al. 2019, arXiv:1811.03761)."""
    return {name: -tensor for name, tensor in cheat.trained.items()}


def scaled(cheat: Cheat) -> Tensors:
    """Ten times the opposite way (the factor of Bagdasaryan et al. 2020, arXiv:1807.00459, with another aim)."""
    return {name: -SCALE * tensor for name, tensor in cheat.trained.items()}


def free_rider(cheat: Cheat) -> Tensors:
    """No training, only noise that looks like some (Fraboni et al. 2021, arXiv:2006.11901)."""
    generator = torch.Generator().manual_seed(cheat.seed)
    return {name: FREE_RIDER_STD * torch.randn(t.shape, generator=generator) for name, t in cheat.trained.items()}


def lazy_copy(cheat: Cheat) -> Tensors:
    """Another site's update as one's own (Ma et al. 2020, arXiv:2012.02044)."""
    return cheat.copied()


@dataclass(frozen=True)
class CheatingSite:
    """An agent whose updates are replaced on their way out.

    Attributes:
        agent: The site's own, which does all that an honest one does.
        victim: An honest site's, for those who copy; trained from the same frame it gives the very update it sends.
    """

    agent: Agent
    victim: Agent
    manifest: RunManifest
    change: Callable[[Cheat], Tensors]

    def answer(self, frame: bytes) -> bytes:
        """The agent's answer, its update replaced."""
        reply = wire.unpack(self.agent.answer(frame), max_body_bytes=MAX_BYTES)
        if reply.kind != "update":
            return wire.pack(reply)
        round_index = reply.head["round_index"]
        cheat = Cheat(
            trained=self._decode(reply),
            copied=lambda: self._decode(wire.unpack(self.victim.answer(frame), max_body_bytes=MAX_BYTES)),
            seed=schedule.derive_seed(self.manifest.run.seed, self.agent.site, round_index, "attack"),
        )
        draws = compact.dice(self.manifest.sha256, self.agent.site, round_index)
        body = compact.encode_update(self.change(cheat), self.manifest.run.wire, draws=draws)
        return wire.pack(replace(reply, body=body))

    def _decode(self, reply: wire.Frame) -> Tensors:
        """The tensors of an update, float32."""
        specs = self.manifest.plan.for_site(reply.head["site"]).sent(reply.head["round_index"])
        sent = compact.decode_update(reply.body, specs, self.manifest.run.wire)
        return {name: tensor.float() for name, tensor in sent.items()}
