"""Verifiable rewards, and the sandbox in which tests run."""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.run.schema.polish import GrpoStage
from server.evaluate.figures import patterns
from server.polish import rewards, sandbox

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def shut_in():
    """The sandbox; only a kernel that gives nobody a namespace excuses it, and that is not asked of the sandbox."""
    walls = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "true"]
    if subprocess.run(["unshare", *walls], capture_output=True, check=False).returncode:
        with pytest.raises(ConfigError, match="sandbox is not available here"):  # and it is not offered then
            sandbox.require()
        pytest.skip("this kernel or container refuses namespaces")
    sandbox.require()
    return lambda code, tests="", timeout_s=10.0: sandbox.passes(code, tests, timeout_s=timeout_s)


def check(reward: str, **settings):
    return rewards.check_of(GrpoStage(name="trial", kind="grpo", data="x", reward=reward, **settings))


def test_rules_accept_what_they_should_and_nothing_else(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["code"]}))
    for score, good, bad in [
        (check("exact"), " ACHE\n", "ache"),
        (check("regex", pattern="[A-Z]+"), "ACHE ", "ACHE ache"),
        (check("json", json_schema=str(schema)), '{"code": 1}', '{"cod": 1}'),
    ]:
        assert (score(good, "ACHE"), score(bad, "ACHE")) == (1.0, 0.0)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="pattern is no regular expression"):
        check("regex", pattern="[")


def test_a_pattern_that_goes_back_without_end_earns_nothing_after_its_time(monkeypatch):
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.1)
    score = check("regex", pattern="(a|aa)+")
    before = time.monotonic()
    assert score(60 * "a" + "!", "") == 0.0
    assert time.monotonic() - before < 10
    assert score(60 * "a", "") == 1.0


def test_rewards_take_each_row_s_own_reference():
    reward = rewards.Verified(GrpoStage(name="trial", kind="grpo", data="x", reward="exact"))
    assert reward(prompts=[], completions=["A", "B"], wanted=["A", "A"], completion_ids=[]) == [1.0, 0.0]


def test_code_that_meets_its_tests_earns_the_reward(shut_in):
    score = check("unit_test")
    tests = "assert double(2) == 4"
    assert score("Sure:\n```python\ndef double(x):\n    return 2 * x\n```", tests) == 1.0
    assert score("def double(x):\n    return x", tests) == 0.0
    assert score("not Python at all", tests) == 0.0


def test_code_that_ends_before_its_tests_earns_nothing(shut_in):
    assert not shut_in("import os\nos._exit(0)", "assert False")
    assert not shut_in("raise SystemExit(0)", "assert False")


def test_code_reaches_no_network(shut_in):
    program = "import socket\nsocket.create_connection(('127.0.0.1', {}), 2)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 2).close()  # the control: somebody is there
        assert not shut_in(program.format(port))


def test_code_sees_no_files_of_ours_and_writes_none(shut_in, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert not shut_in(f"open({str(secret)!r}).read()")
    assert not shut_in(f"import os\nos.listdir({str(REPOSITORY)!r})")
    for place in ("/usr/hole", "/hole", sys.base_prefix + "/hole"):
        assert not shut_in(f"open({place!r}, 'w')")
        assert not os.path.exists(place)
    assert shut_in("open('/tmp/own', 'w').write('x')")  # the control: a place of its own
    assert not os.path.exists("/tmp/own")


def test_code_has_no_rights_to_undo_the_walls(shut_in):
    assert not shut_in("import os\nos.chroot('/tmp')")
    assert not shut_in("import ctypes\nassert ctypes.CDLL(None).mount(0, b'/usr', 0, 0x1020, 0) == 0")
    assert not shut_in(f"import os\nos.kill({os.getpid()}, 0)")
    assert not shut_in("import os\nassert 'HOME' in os.environ")


def test_code_that_takes_too_much_is_ended(shut_in):
    began = time.monotonic()
    assert not shut_in("import os\nos.fork()\nwhile True: pass", timeout_s=2.0)
    assert time.monotonic() - began < 60
    assert not shut_in("x = bytearray(2 << 30)")
    assert not shut_in("open('/tmp/large', 'wb').write(bytes(2 << 20))")
    assert not shut_in("while True: print('x' * 1000)")


def test_a_fork_bomb_in_an_answer_does_not_begin(shut_in):
    """Limits are of one process each; many would share the machine between them. Control: no filter of calls."""
    bomb = (
        "import os\nfor _ in range(3):\n    os.fork()\nprint('many', flush=True)\n"
        "try:\n    while True:\n        os.wait()\nexcept ChildProcessError:\n    pass"  # the first ends last
    )
    assert sandbox._run(bomb, timeout_s=10, refused={})[1].count(b"many") == 8
    assert sandbox._run(bomb, timeout_s=10) == (1, b"")
    threads = "import threading\nfor _ in range(9):\n    threading.Thread(target=threading.Event().wait).start()"
    assert not shut_in(threads)
    assert not shut_in("import os, sys\nos.execv(sys.executable, [sys.executable, '-c', '0'])")


def test_memory_that_no_limit_counts_cannot_be_had(shut_in):
    segment = "import ctypes\nassert ctypes.CDLL(None).shmget(0, 4096, 0o1600) != -1"
    for hoard in (segment, "import os\nos.memfd_create('own')"):
        assert sandbox._run(hoard, timeout_s=10, refused={})[0] == 0  # control
        assert not shut_in(hoard)
    assert not shut_in("for number in range(5000):\n    open(f'/tmp/{number}', 'w').close()")
    assert shut_in("for number in range(500):\n    open(f'/tmp/{number}', 'w').close()")  # control


@pytest.mark.parametrize("wall", ["--net", "--pid", "filter"])
def test_a_sandbox_without_one_of_its_walls_is_not_offered(shut_in, monkeypatch, wall):
    if wall == "filter":
        monkeypatch.setitem(sandbox.REFUSED, platform.machine(), {})
    monkeypatch.setattr(sandbox, "NAMESPACES", tuple(name for name in sandbox.NAMESPACES if name != wall))
    sandbox._missing.cache_clear()
    try:
        with pytest.raises(ConfigError, match="a probe could do what it must not"):
            sandbox.require()
    finally:
        sandbox._missing.cache_clear()


HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", sandbox.REFUSED)
def test_the_filter_names_the_kernels_own_numbers(machine):
    header = Path("/usr/include") / HEADERS[machine]
    if not header.exists():
        pytest.skip(f"{header} is not here")
    told = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text()))
    assert {name: int(told[name]) for name in sandbox.REFUSED[machine] if name in told} == {
        name: number for name, number in sandbox.REFUSED[machine].items() if name in told
    }
    assert len(told.keys() & sandbox.REFUSED[machine].keys()) > 40


def test_without_a_sandbox_unit_tests_are_refused():
    """The tools are looked for on the path; a child with an empty one has none."""
    program = "from server.polish import sandbox; sandbox.require()"
    found = subprocess.run(
        [sys.executable, "-c", program], env={"PATH": "/nonexistent"}, cwd=REPOSITORY, capture_output=True, check=False
    )
    assert found.returncode == 1
    assert b"the sandbox is not available here: unshare is missing; install util-linux" in found.stderr
