"""Sites under attack."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.attacks import running
from tests.samples import rosters, vault

if TYPE_CHECKING:
    from tests.attacks.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> "Iterator[World]":
    """A SuperLink with the gateway before it."""
    from tests.attacks import world as worlds  # Flower, for those who need it only

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", worlds.PATHS)
        with worlds.running(tmp_path_factory.mktemp("k"), tmp_path_factory.mktemp("logs")) as running:
            yield running


@pytest.fixture
def make(tmp_path, engine):
    """Sites, each with a folder of its own; arguments change lines of the policy."""
    made: list[running.Running] = []

    def build(**changes) -> vault.Vault:
        made.append(vault.make(tmp_path / str(len(made)), engine, made_of=running.Running, **changes))
        return made[-1]

    yield build
    for one in made:
        one.stop()


@pytest.fixture
def site(make):
    return make()


@pytest.fixture
def open_site(site):
    """A site that takes part in the run."""
    assert site.open().kind == "opened"
    return site


@pytest.fixture
def join(make, tmp_path):
    """Sites that read a roster; arguments change lines of the policy."""
    folder = rosters.write(tmp_path / "kit")
    return lambda **changes: make(roster_folder=folder, **changes)


@pytest.fixture
def member(join):
    """A site that takes part in a run."""
    found = join()
    assert found.open().kind == "opened"
    return found
