"""Results of checks, and the checks that both doctors share."""

import datetime
import json

import pytest
from rich.console import Console

from common import keyfile
from common.doctor import checks, doctor
from common.doctor.doctor import Result, check, failed, ok, problem_and_remedy, skipped, warning
from common.errors import ConfigError, DataError

NOW = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)


def day(number: float) -> datetime.datetime:
    return NOW + datetime.timedelta(days=number)


@check("thing", remedy="mend it")
def thing(result: Result | Exception) -> Result:
    if isinstance(result, Exception):
        raise result
    return result


@pytest.mark.parametrize(
    ("result", "status", "remedy"),
    [
        (ok("fine"), "ok", ""),
        (warning("soon"), "warning", "mend it"),
        (failed("broken"), "failed", "mend it"),
        (failed("broken", "buy another"), "failed", "buy another"),
        (skipped("no"), "skipped", ""),
        (ConfigError("x.key: mode 0644; run: chmod 600 x.key"), "failed", "run: chmod 600 x.key"),
        (ConfigError("says no remedy"), "failed", "mend it"),
        (DataError("a line 1: bad; b line 2: bad. Remedy: convert it; check it"), "failed", "convert it; check it"),
        (PermissionError(13, "Permission denied", "a.pem"), "failed", "mend it"),
        (ModuleNotFoundError("no", name="torch"), "failed", "mend it"),
    ],
)
def test_every_failure_has_a_remedy(result, status, remedy):
    found = thing(result)
    assert (found.name, found.status, found.remedy) == ("thing", status, remedy)


def test_an_error_that_is_not_ours_is_no_finding():
    with pytest.raises(ZeroDivisionError):
        thing(ZeroDivisionError())


def test_what_python_says_of_an_import_or_a_file_is_not_repeated():
    assert problem_and_remedy(ImportError("secret text", name="torch")) == ("torch cannot be imported", "")
    assert problem_and_remedy(OSError("secret text")) == ("a file: cannot be read (damaged)", "")


def test_the_table_shows_markup_and_remedies_as_text_and_fits():
    results = [Result("a", "failed", "[red]x[/red] " * 30, "do this"), Result("b", "ok", "fine")]
    console = Console(width=100, record=True, highlight=False)
    console.print(doctor.render(results))
    shown = console.export_text()
    assert "[red]x[/red]" in shown
    assert "-> do this" in shown
    assert "1 failed, 0 warning, 1 ok, 0 skipped" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_results_as_json_say_whether_all_is_well():
    assert doctor.as_dict([Result("a", "warning", "x", "y")])["is_healthy"]
    found = json.loads(json.dumps(doctor.as_dict([Result("a", "failed", "x", "y")])))
    assert found == {"is_healthy": False, "checks": [{"name": "a", "status": "failed", "found": "x", "remedy": "y"}]}


@pytest.mark.parametrize("extra", ["client", "server"])
def test_this_environment_is_in_range(extra):
    found = checks.versions(extra)
    assert found.status == "ok", found
    assert "flwr 1.41" in found.found


def test_a_package_out_of_range_or_missing_is_named():
    wanted = ["torch>=99", "no-such-package-of-ours>=1", 'peft>=99; extra == "server"', "numpy>=1"]
    found = checks.versions("client", requirements=wanted)
    assert found.status == "failed"
    assert "torch 2." in found.found
    assert "no-such-package-of-ours is not installed" in found.found
    assert "numpy" not in found.found
    assert "peft" not in found.found
    assert "peft" in checks.versions("server", requirements=wanted).found


def test_an_old_python_is_named():
    assert "Python 3.9.1" in checks.versions("client", python="3.9.1").found


@pytest.mark.parametrize(
    ("skew_s", "status"), [(None, "skipped"), (0.4, "ok"), (-59, "ok"), (61, "failed"), (-3600, "failed")]
)
def test_clocks_may_differ_by_a_minute(skew_s, status):
    assert checks.clock(skew_s).status == status


@pytest.mark.parametrize(
    ("days", "status"), [(90, "ok"), (14.1, "ok"), (13.9, "warning"), (0.1, "warning"), (-0.1, "failed")]
)
def test_certificates_are_renewed_in_time(days, status):
    found = checks.expiry({"a": day(days), "b": day(300)}, now=NOW, remedy="renew it")
    assert found.status == status
    assert found.found.startswith("a:")
    assert found.remedy == ("" if status == "ok" else "renew it")


def test_key_files_of_another_mode_or_missing_ones_are_named(tmp_path):
    good, bad = tmp_path / "good.key", tmp_path / "bad.key"
    for path in (good, bad):
        keyfile.write(path, b"secret")
    assert checks.key_files([good, bad]).status == "ok"
    bad.chmod(0o640)
    found = checks.key_files([good, bad, tmp_path / "gone.key"])
    assert found.status == "failed"
    assert f"chmod 600 {bad}" in found.remedy
    assert "gone.key: there is no such key file" in found.found
    assert "secret" not in str(found)
    assert checks.key_files([]).status == "skipped"


def test_room_and_permission_on_disk(tmp_path):
    assert checks.disk(tmp_path / "made" / "later", need_bytes=1, what="logs").status == "ok"
    assert checks.disk(tmp_path, need_bytes=1 << 60, what="logs").status == "failed"
    (tmp_path / "file").write_text("")
    assert "may write in" in checks.disk(tmp_path / "file", need_bytes=1, what="logs").found
