"""A healthy site of a federation, for the doctor, and one that has its kit and has not installed it."""

import pytest

from tests.samples import federations, machines


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    federation = federations.start(tmp_path_factory.mktemp("federation"))
    for name in ("alder", "birch"):
        federation.join(name)
    federation.install(federation.folder / "kits" / "alder", "alder")
    return federation


@pytest.fixture
def site(joined, tmp_path, tiny_base, engine):
    federation = joined.copy(tmp_path / "federation")
    return machines.make(tmp_path / "site", federation, base=tiny_base, base_sha256=engine.base_sha256)


@pytest.fixture(scope="module")
def with_alder(tmp_path_factory) -> federations.Federation:
    federation = federations.start(tmp_path_factory.mktemp("with-alder"))
    federation.unpack(federation.join("alder"), federation.root / "unpacked")
    return federation


@pytest.fixture
def federation(with_alder, tmp_path) -> federations.Federation:
    return with_alder.copy(tmp_path)


@pytest.fixture
def offered(federation):
    """Alder's kit, unpacked, not installed."""
    return federation.root / "unpacked" / "alder"
