"""A healthy site of a federation, for the doctor."""

import pytest

from tests import federations, patients


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
    return patients.make(tmp_path / "site", federation, base=tiny_base, base_sha256=engine.base_sha256)
