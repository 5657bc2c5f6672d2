"""What tests share: the network guard, one thread a process, and the tiny base."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # idle threads of OpenMP spin, and starve whoever shares the cores

import pytest
from hypothesis import settings as hypothesis_settings

from common import quiet
from tests import tiny
from tests.guard import pytest_configure, pytest_unconfigure, refused_connections

if TYPE_CHECKING:
    from common.model.base import Engine

__all__ = ["pytest_configure", "pytest_unconfigure", "refused_connections"]

quiet.hush()
hypothesis_settings.register_profile("silotune", deadline=None, max_examples=40, derandomize=True)
hypothesis_settings.load_profile("silotune")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of whole federations, so that no process is left with them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/integration"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with random weights."""
    return tiny.make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def load_tiny(tiny_base: Path) -> Callable[..., "Engine"]:
    """Load the tiny base as a run file says; `changes` are as on the command line."""
    from common.model import loading

    def load(changes: Mapping[str, str] | None = None, *, folder: Path = tiny_base) -> "Engine":
        settings = tiny.settings(folder, changes)
        device_name = os.environ.get("SILOTUNE_TEST_DEVICE", "cpu")
        return loading.engine_of(settings, folder, device_name=device_name, num_threads=1, trains=True)

    return load


@pytest.fixture(scope="session")
def shared_engine(load_tiny: Callable[..., "Engine"]) -> "Engine":
    """The tiny base in float32, loaded once; take `engine` instead."""
    return load_tiny()


@pytest.fixture
def engine(shared_engine: "Engine") -> "Engine":
    """The tiny base in float32 with its adapter as attached."""
    from common.adapter import adapter

    adapter.write(shared_engine.model, shared_engine.initial)
    shared_engine.model.zero_grad()
    return shared_engine
