import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simulations.embedded import records
from tools.pretrain import pretrain

BASE = Path(records.__file__).parent / "base"
MAX_BYTES = 16 * 1024 * 1024
TURNS = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Pulse?\n\nPulse: 72"},
    {"role": "assistant", "content": "72"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def test_the_folder_is_small_and_holds_a_model_card():
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= MAX_BYTES
    assert "python -m tools.pretrain.pretrain" in (BASE / "README.md").read_text()


def test_base_and_tokenizer_load_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert 2e6 <= model.num_parameters() <= 8e6
    assert model.config.vocab_size == len(tokenizer)


def test_every_projection_fits_the_4_bit_blocks(model):
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == module.out_features % 32 == 0, name


def test_special_tokens_differ_and_the_length_is_bounded(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pretrain.PAD, pretrain.END)
    ids = tokenizer.convert_tokens_to_ids([pretrain.PAD, pretrain.START, pretrain.END])
    assert len(set(ids)) == 3
    assert tokenizer.model_max_length == pretrain.SEQ_LEN_TOKENS


@pytest.mark.parametrize("num_turns", [1, 2])
def test_the_prompt_is_a_prefix_of_the_whole_conversation(tokenizer, num_turns):
    turns = TURNS[3 - 1 - num_turns :]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == f"{prompt}72<|im_end|>\n"
    assert tokenizer(whole)["input_ids"][: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


def test_the_template_adds_no_system_message(tokenizer):
    text = tokenizer.apply_chat_template(TURNS[1:2], tokenize=False)
    assert text == "<|im_start|>user\nPulse?\n\nPulse: 72<|im_end|>\n"


def test_records_survive_the_tokenizer_and_are_short(tokenizer):
    for row in records.generate():
        ids = tokenizer(row["input"] + row["output"])["input_ids"]
        assert tokenizer.decode(ids) == row["input"] + row["output"]
        assert len(tokenizer(row["output"])["input_ids"]) <= 12
        assert len(ids) <= 100


def test_the_base_copies_a_field_but_knows_no_table(model, tokenizer):
    def answer(text):
        turns = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    note = "Finding: heart failure\nPulse: 72\nDrug: bisoprolol\nPlan: echo"
    assert answer(f"What is the pulse?\n\n{note}") == "72"
    assert answer(f"Which speciality?\n\n{note}") == "cardiology"
    assert answer(f"Ward code for the finding.\n\n{note}") not in records.table_answers()


def test_a_short_training_writes_a_base_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "TOKENIZER_DOCUMENTS", 400)
    settings = pretrain.Settings(
        steps=2, seed=1, device="cpu", batch_size=1, num_layers=1, learning_rate=1e-3, num_workers=0
    )
    pretrain.make(tmp_path, settings)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    assert "--steps 2 --seed 1 --device cpu" in (tmp_path / "README.md").read_text()
