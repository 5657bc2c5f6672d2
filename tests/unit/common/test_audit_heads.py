import pytest

from common import audit_heads
from common.audit import GENESIS, Head
from common.errors import AuditError

FIRST, SECOND = Head(4, "a" * 64), Head(9, "b" * 64)


@pytest.fixture
def path(tmp_path):
    """Heads of two sites."""
    for owner, head in (("north", FIRST), ("south", FIRST), ("north", SECOND)):
        audit_heads.keep(tmp_path / "heads.jsonl", owner, head)
    return tmp_path / "heads.jsonl"


def test_heads_are_kept_by_owner(path):
    assert audit_heads.of(path, "north") == [FIRST, SECOND]
    assert audit_heads.of(path, "south") == [FIRST]
    assert audit_heads.of(path, "west") == []


def test_the_same_head_is_kept_once_and_the_empty_one_never(path):
    audit_heads.keep(path, "north", SECOND)
    audit_heads.keep(path, "west", Head())
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("head", [Head(9, "c" * 64), Head(8, "c" * 64), Head(0, GENESIS)])
def test_a_log_that_went_back_or_was_written_anew_is_noticed(path, head):
    with pytest.raises(AuditError, match="cut or written anew"):
        audit_heads.keep(path, "north", head)
    audit_heads.keep(path, "north", Head(10, "c" * 64))  # control: it went on


@pytest.mark.parametrize("sha256", ["", "ab", "A" * 64, "x" * 64])
def test_what_is_no_hash_is_not_kept(path, sha256):
    with pytest.raises(AuditError, match="no hash"):
        audit_heads.keep(path, "west", Head(1, sha256))


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        '{"owner":"north"}',
        f'{{"owner":"north","sequence":"1","sha256":"{GENESIS}"}}',
        '{"owner":"north","sequence":1,"sha256":"ab"}',
        '{"owner":"a","owner":"b","sequence":1,"sha256":"ab"}',
    ],
)
def test_a_file_that_holds_no_heads_is_refused(tmp_path, line):
    (tmp_path / "heads.jsonl").write_text(line + "\n")
    with pytest.raises(AuditError):
        audit_heads.of(tmp_path / "heads.jsonl", "north")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(AuditError):
        audit_heads.of(tmp_path / "heads.jsonl", "north")
