"""Federations on disk, made once a module and copied for each test."""

import pytest

from tests.federations import Federation, start


@pytest.fixture(scope="module")
def first_day(tmp_path_factory) -> Federation:
    return start(tmp_path_factory.mktemp("first-day"))


@pytest.fixture(scope="module")
def with_sites(first_day, tmp_path_factory) -> Federation:
    federation = first_day.copy(tmp_path_factory.mktemp("with-sites"))
    for name in ("alder", "birch"):
        federation.join(name)
    return federation


@pytest.fixture
def founded(first_day, tmp_path) -> Federation:
    return first_day.copy(tmp_path)


@pytest.fixture
def joined(with_sites, tmp_path) -> Federation:
    """With the sites alder and birch."""
    return with_sites.copy(tmp_path)
