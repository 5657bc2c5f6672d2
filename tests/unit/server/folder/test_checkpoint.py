import errno
import json
import os

import pytest
import torch

from common import storage
from common.adapter import adapter
from common.errors import DataError, ModelError, StorageError
from server.folder import checkpoint, run_files

STATE = {"a.lora_A.weight": torch.linspace(0, 1, 6).reshape(2, 3)}
SPECS = adapter.specs(STATE)
RUN = "ab" * 32


def save(folder, num_rounds: int = 1, state=STATE, memory=None) -> str:
    return checkpoint.save(folder, state, memory=memory or {}, num_rounds=num_rounds, run_sha256=RUN)


def load(folder, num_rounds: int = 1, run_sha256: str = RUN):
    return checkpoint.load(folder, SPECS, num_rounds=num_rounds, run_sha256=run_sha256)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path):
    digest = save(tmp_path)
    found = load(tmp_path)
    assert (found.num_rounds, found.sha256) == (1, digest)
    assert torch.equal(found.tensors["a.lora_A.weight"], STATE["a.lora_A.weight"])


def test_what_the_optimizer_remembers_comes_back_to_the_bit(tmp_path):
    memory = {"m/a": torch.randn(3, 2), "v/a": torch.rand(3, 2)}
    save(tmp_path, memory=memory)
    found = load(tmp_path).memory
    assert found.keys() == memory.keys()
    assert all(torch.equal(found[name], memory[name]) for name in memory)


def test_without_an_optimizer_there_is_no_file_for_it(tmp_path):
    save(tmp_path)
    assert {path.name for path in checkpoint.folder_of(tmp_path, 1).iterdir()} == {
        "adapter_model.safetensors",
        "round.json",
    }
    assert load(tmp_path).memory == {}


def test_a_changed_memory_is_not_gone_on_from(tmp_path):
    save(tmp_path, memory={"m/a": torch.zeros(2)})
    path = checkpoint.folder_of(tmp_path, 1) / checkpoint.MEMORY_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="use an earlier round"):
        load(tmp_path)


def test_the_file_has_the_name_that_peft_reads(tmp_path):
    save(tmp_path, 12)
    assert (tmp_path / "rounds" / "00012" / "adapter_model.safetensors").is_file()


def test_only_rounds_with_a_record_count(tmp_path):
    assert run_files.finished(tmp_path) == []
    for number in (2, 10, 1):
        save(tmp_path, number)
    (tmp_path / "rounds" / "00010" / "round.json").unlink()
    assert run_files.finished(tmp_path) == [1, 2]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_fills_up_leaves_earlier_rounds_and_no_half_one(tmp_path, monkeypatch, failing):
    """Either the adapter or the record after it cannot be written."""
    save(tmp_path, 1)
    calls = []
    real = os.replace

    def replace(*given):
        calls.append(given)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*given)

    monkeypatch.setattr(storage.os, "replace", replace)
    with pytest.raises(StorageError, match="what was finished before is intact"):
        save(tmp_path, 2)
    assert run_files.finished(tmp_path) == [1]
    assert load(tmp_path, 1).num_rounds == 1


def test_a_missing_round_is_an_error_that_names_those_there_are(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(DataError, match=r"finished rounds are \[1\]"):
        load(tmp_path, 2)


def test_an_adapter_that_was_changed_is_refused(tmp_path):
    save(tmp_path)
    path = tmp_path / "rounds" / "00001" / "adapter_model.safetensors"
    path.write_bytes(adapter.encode({"a.lora_A.weight": torch.zeros(2, 3)}, dtype="float32"))
    with pytest.raises(ModelError, match="differs from its record"):
        load(tmp_path)


def test_an_adapter_of_another_run_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(ModelError, match="another run"):
        load(tmp_path, run_sha256="cd" * 32)


@pytest.mark.parametrize("record", ["", "{", "{}", "[]", "7", '{"adapter_sha256": "x"}'])
def test_a_record_that_is_none_is_refused(tmp_path, record):
    save(tmp_path)
    (tmp_path / "rounds" / "00001" / "round.json").write_text(record)
    with pytest.raises((DataError, ModelError), match="00001"):
        load(tmp_path)


def test_the_record_says_what_it_is_of(tmp_path):
    digest = save(tmp_path, 3)
    record = json.loads((tmp_path / "rounds" / "00003" / "round.json").read_text())
    assert record == {"num_rounds": 3, "adapter_sha256": digest, "memory_sha256": "", "run_sha256": RUN}


@pytest.mark.parametrize(("num_kept", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, num_kept, left):
    for number in range(1, 5):
        save(tmp_path, number)
    checkpoint.prune(tmp_path, num_kept=num_kept)
    assert run_files.finished(tmp_path) == left
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir()) == [f"{number:05d}" for number in left]


def test_a_stray_folder_is_not_taken_for_a_round(tmp_path):
    save(tmp_path, 1)
    stray = tmp_path / "rounds" / "old copy"
    stray.mkdir()
    (stray / "round.json").write_text("{}")
    assert run_files.finished(tmp_path) == [1]
