import os
import stat
import threading
from contextlib import closing

import pytest

from common.errors import StorageError
from common.journal import Journal


def test_a_journal_gives_whole_lines_from_a_byte_on(tmp_path):
    path = tmp_path / "new" / "log"
    with closing(Journal(path)) as journal:
        journal.append(b"one\n")
        offset = journal.size_bytes
        journal.append(b"two\nthree\n")
        os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"fo")
        assert list(journal.lines()) == [b"one", b"two", b"three"]
        assert list(journal.lines(offset)) == [b"two", b"three"]
        assert journal.cut() == 2
        assert journal.cut() == 0
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_others_may_read_is_left_to_the_umask(tmp_path):
    mask = os.umask(0o022)
    try:
        Journal(tmp_path / "log", mode=None).close()
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_lines_that_do_not_fit_on_the_disk_are_taken_back(tmp_path, monkeypatch, call):
    write = os.write

    def full(file, data=b""):
        if data:
            return write(file, data[:5])
        raise OSError(28, "No space left on device")

    with closing(Journal(tmp_path / "log")) as journal:
        journal.append(b"whole\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(StorageError, match="No space left"):
                journal.append(b"lost\nlost\n")
        assert list(journal.lines()) == [b"whole"]
        journal.append(b"space again\n")
        assert list(journal.lines()) == [b"whole", b"space again"]


def test_a_second_writer_waits_or_is_refused(tmp_path):
    path = tmp_path / "log"
    with closing(Journal(path)) as first:
        with pytest.raises(StorageError, match="another session"):
            Journal(path, lock="refuse")
        writer = threading.Thread(target=lambda: Journal(path).append(b"second\n"))
        writer.start()
        writer.join(0.05)
        assert writer.is_alive()
        first.append(b"first\n")
    writer.join()
    assert path.read_bytes() == b"first\nsecond\n"
