import logging
import subprocess
import sys
from pathlib import Path

from common import quiet


def test_switches_win_over_what_was_set():
    environ = {"FLWR_TELEMETRY_ENABLED": "1", "HF_HUB_OFFLINE": "0"}
    quiet.hush(environ)
    assert environ == {**quiet.SWITCHES, **quiet.OFFLINE}


def test_the_hub_can_be_allowed():
    environ = {"HF_HUB_OFFLINE": "0"}
    quiet.hush(environ, allow_hub=True)
    assert environ["HF_HUB_OFFLINE"] == "0"
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_flower_reads_the_switches():
    code = (
        "from common import quiet; quiet.hush()\n"
        "from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    root = Path(__file__).parents[3]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert told.stdout.strip() == "0"


def test_only_the_harmless_warning_is_dropped(caplog):
    quiet.hush({})
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
