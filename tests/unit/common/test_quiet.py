import logging
import os
import subprocess
import sys
from pathlib import Path

from common import quiet

ROOT = Path(__file__).parents[3]


def test_switches_win_over_what_was_set():
    environ = {"FLWR_TELEMETRY_ENABLED": "1", "HF_HUB_OFFLINE": "0"}
    quiet.hush(environ)
    assert environ == {**quiet.SWITCHES, **quiet.OFFLINE, **quiet.SHARED_CORES}


def test_a_user_may_choose_how_long_threads_spin():
    environ = {"GOMP_SPINCOUNT": "7"}
    quiet.hush(environ)
    assert environ["GOMP_SPINCOUNT"] == "7"


def test_the_hub_can_be_allowed():
    environ = {"HF_HUB_OFFLINE": "0"}
    quiet.hush(environ, allow_hub=True)
    assert environ["HF_HUB_OFFLINE"] == "0"
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def send_an_event(environ: dict[str, str], *, first: str) -> None:
    code = f"{first}\nfrom flwr.supercore.telemetry import EventType, create_event\ncreate_event(EventType.PING, {{}})"
    environ = {**os.environ, **environ}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, env=environ)


def test_flower_tells_nobody(tmp_path, refused_connections):
    send_an_event({"FLWR_HOME": str(tmp_path)}, first="from common import quiet; quiet.hush()")
    assert refused_connections.read_text() == ""


def test_control_flower_would_tell(tmp_path, refused_connections):
    send_an_event({"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "1"}, first="")
    assert "telemetry.flower" in refused_connections.read_text()
    refused_connections.write_text("")


def test_only_the_harmless_warnings_are_dropped(caplog):
    quiet.hush({})
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
    logger.warning("something else")
    cast = logging.getLogger("bitsandbytes.autograd._functions")
    cast.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", "float32")
    cast.warning("MatMul8bitLt is gone")
    assert [record.getMessage() for record in caplog.records] == ["something else", "MatMul8bitLt is gone"]
