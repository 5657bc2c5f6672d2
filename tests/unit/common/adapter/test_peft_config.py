"""A configuration's file has one order, and peft reads it as its own."""

import json

from peft import LoraConfig, PeftConfig

from common.adapter import peft_config

NAMES = [f"model.layers.{number}.q_proj" for number in range(30)]


def test_a_file_has_its_modules_in_order_and_is_what_peft_writes(tmp_path):
    made = LoraConfig(r=4, target_modules=NAMES, task_type="CAUSAL_LM")
    peft_config.write(tmp_path / "ours", made)
    made.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / side / peft_config.FILE).read_bytes()) for side in ("ours", "theirs"))
    assert ours["target_modules"] == sorted(NAMES)
    assert theirs["target_modules"] != sorted(NAMES)  # control: a set's order, which each process has for itself
    assert ours == {**theirs, "target_modules": sorted(theirs["target_modules"])}
    assert PeftConfig.from_pretrained(str(tmp_path / "ours")) == made
