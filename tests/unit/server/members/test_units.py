"""The systemd units of coordinator and sites: what systemd itself says of them, and what must stand in each."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.members import founding
from tests.samples.federations import Federation, start

BIN = Path(sys.executable).parent
WALLS = ("ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "LimitCORE=0", "ProtectHome=yes")
LIMITS = ("MemoryMax=", "MemorySwapMax=0", "TasksMax=")
NAMES = ("superlink", "gateway", "agent", "courier", "link")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> Federation:
    federation = start(tmp_path_factory.mktemp("federation"))
    federation.join("alder")
    return federation


def unit(joined: Federation, name: str) -> Path:
    own = joined.folder / "units" / f"silotune-{name}.service"
    return own if own.exists() else joined.folder / "kits" / "alder" / own.name


def verify(path: Path) -> str:
    """What `systemd-analyze verify` complains of; empty for a unit that it takes."""
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr if done.returncode or done.stderr else ""


def test_provisioning_writes_the_coordinators_units(joined):
    written = {path.name: path.read_bytes() for path in (joined.folder / "units").iterdir()}
    assert written == {path.name: path.read_bytes() for path in founding.UNITS.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_each_unit_has_a_user_of_its_own_and_the_walls(joined, name):
    lines = unit(joined, name).read_text().splitlines()
    assert set(WALLS) <= set(lines)
    assert all(any(line.startswith(limit) for line in lines) for limit in LIMITS)
    assert any(line.startswith("User=silotune-") for line in lines)
    assert not any("root" in line for line in lines if line.startswith(("User=", "Group=")))


def test_only_gateway_and_link_may_reach_other_machines(joined):
    for name in NAMES:
        lines = unit(joined, name).read_text().splitlines()
        assert ("IPAddressDeny=any" in lines) == (name not in ("gateway", "link"))


@pytest.mark.parametrize("name", ["superlink", "courier"])
def test_what_flower_starts_by_its_name_is_found(joined, name):
    """SuperLink and SuperNode start `flower-superexec`, which starts `flwr-serverapp` or `flwr-clientapp`."""
    assert "PATH=/opt/silotune/bin:" in unit(joined, name).read_text()
    for program in ("flower-superexec", "flwr-serverapp", "flwr-clientapp"):
        assert (BIN / program).exists()


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_systemd_takes_each_unit_and_finds_its_program(joined, tmp_path, name):
    text = unit(joined, name).read_text().replace("/opt/silotune/bin", str(BIN))
    path = tmp_path / f"silotune-{name}.service"
    path.write_text(text)
    assert verify(path) == ""
    path.write_text(text.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))  # control: a word that systemd lacks
    assert "NoNewPrivilege" in verify(path)
