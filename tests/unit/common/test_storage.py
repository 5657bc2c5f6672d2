import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import storage
from common.errors import StorageError

ROOT = Path(__file__).parents[3]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_whole_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_a_kill_left_is_removed_and_what_is_being_written_stays(tmp_path):
    left, foreign = tmp_path / "rounds" / ".round.json.ab_12xyz", tmp_path / ".keep.me"
    left.parent.mkdir()
    written = left.with_name(".round.json.ab_34xyz")
    for path in (left, foreign, written):
        path.write_bytes(b"{")
    with written.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert storage.remove_leftovers(tmp_path) == 1
    assert not left.exists()
    assert written.exists()
    assert foreign.exists()
    assert storage.remove_leftovers(tmp_path) == 1  # control: its writer is gone


def test_a_file_that_is_being_written_survives_a_start_beside_it(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (storage.remove_leftovers(tmp_path), fsync(file)))
    storage.write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(StorageError, match=r"file: cannot write \(No space left on device\); free space") as caught:
        storage.write_atomic(path, b"new")
    assert caught.value.exit_code == 8
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_interruption_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    storage.write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for step in ("fsync", "replace"):
        real = getattr(os, step)
        monkeypatch.setattr(os, step, lambda *given, step=step, real=real: calls.append(step) or real(*given))
    storage.write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match="taken"):
        storage.write_atomic(tmp_path / "taken" / "file", b"new")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_what_the_umask_leaves_and_private_ones_are_private_anyway(tmp_path, umask, mode):
    program = (
        f"import os; os.umask({umask}); from pathlib import Path; from common import storage\n"
        "storage.write_atomic(Path('shared'), b'')\n"
        "storage.write_atomic(Path('one/two/own'), b'', mode=storage.PRIVATE)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("shared", "one", "one/two", "one/two/own")}
    assert modes == {"shared": mode, "one": 0o700, "one/two": 0o700, "one/two/own": 0o600}
