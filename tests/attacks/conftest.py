"""Sites under attack."""

import pytest

from tests import vault


@pytest.fixture
def make(tmp_path, engine):
    """Sites, each with a folder of its own; arguments change lines of the policy."""
    made = []

    def build(**changes) -> vault.Vault:
        made.append(vault.make(tmp_path / str(len(made)), engine, **changes))
        return made[-1]

    return build


@pytest.fixture
def site(make):
    return make()


@pytest.fixture
def open_site(site):
    """A site that takes part in the run."""
    assert site.open().kind == "opened"
    return site
