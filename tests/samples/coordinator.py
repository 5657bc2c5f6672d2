"""A run and its sites in one object, for tests that look at a coordinator between its steps."""

import dataclasses

from server.fleet import held_out
from server.fleet.fleet import Fleet
from server.fleet.run import Run
from server.fleet.sites import Sites
from server.run import rounds
from server.run import state as states
from server.run.state import Phase, RoundState

PRIVATE = ("doubtful", "names", "refused", "told_names")  # of `Sites`


class Coordinator:
    """What `Run` and `Sites` have is an attribute here; setting one of a run makes another run of it."""

    def __init__(self, run: Run, fleet: Fleet) -> None:
        self.sites = Sites(run, fleet)
        self.memory, self.steps = {}, ()

    def __getattr__(self, name: str):
        sites = self.__dict__["sites"]
        if name in PRIVATE:
            return getattr(sites, f"_{name}")
        return getattr(sites if hasattr(sites, name) else sites.run, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("sites", "memory", "steps"):
            object.__setattr__(self, name, value)
        elif name in PRIVATE:
            setattr(self.sites, f"_{name}", value)
        elif name in {field.name for field in dataclasses.fields(Run)}:
            self.sites.run = dataclasses.replace(self.sites.run, **{name: value})
        else:
            setattr(self.sites, name, value)

    def play(self, tensors, *, round_index: int):
        """One round from an adapter to the next, without scores."""
        state = RoundState(Phase.DRAW, round_index, tensors, self.memory, self.steps)
        while state.phase in (Phase.DRAW, Phase.COLLECT):
            state = rounds.advance(self.run, self.sites, state)
        self.memory, self.steps = state.memory, state.steps
        return state.tensors

    def play_all(self, tensors):
        """All rounds, as a run plays them."""
        return rounds.play(self.run, self.sites, RoundState(Phase.SCORE, 0, tensors, self.memory)).tensors

    def evaluate(self, tensors, *, num_rounds: int, generate: bool = False):
        """The mean held-out loss."""
        return held_out.evaluate(self.sites, tensors, num_rounds=num_rounds, generate=generate, steps=self.steps)


def is_kept(folder) -> list[str]:
    """Names of the updates that are kept of an interrupted round."""
    return sorted(path.name for path in (folder / states.UPDATES).glob("*"))
