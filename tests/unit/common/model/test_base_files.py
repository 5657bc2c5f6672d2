import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, BloomConfig, GPT2Config, LlamaConfig

from client.cli import rows as site_rows
from client.cli.rows import Asked
from common.errors import ModelError
from common.model import base, base_files, loading
from common.model.base_files import TEXT
from common.run import config
from common.text import prompts
from server.export import adapter, canonical, gguf
from tests import tiny


@pytest.fixture
def own_base(tiny_base, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(path: Path, **values: object) -> None:
    """Other values in a JSON file; None takes a key away."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def merged_digits(folder: Path) -> Tokenizer:
    """Let a base's file cut numbers into digits, under the name of a class that does not; "20" is one of its merges."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    first, second = "2", "0"
    replaced = stored["model"]["merges"][-1]
    stored["model"]["vocab"][first + second] = stored["model"]["vocab"].pop("".join(replaced))
    stored["model"]["merges"][-1] = [first, second]
    digits = {"type": "Digits", "individual_digits": True}
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, stored["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_tokens_are_those_of_the_file_whatever_class_the_configuration_names(own_base):
    core = merged_digits(own_base)
    wanted = core.encode(TEXT, add_special_tokens=False).ids
    by_class = AutoTokenizer.from_pretrained(own_base, local_files_only=True)
    assert by_class(TEXT, add_special_tokens=False)["input_ids"] != wanted  # control: what transformers makes of it
    found = base.load_tokenizer(own_base)
    assert found(TEXT, add_special_tokens=False)["input_ids"] == wanted
    assert found.get_vocab() == core.get_vocab()
    assert (found.pad_token, found.eos_token) == ("<|pad|>", "<|im_end|>")
    assert found.chat_template == by_class.chat_template


def test_a_merged_checkpoint_and_its_gguf_carry_the_tokenizer_of_the_file(own_base, load_tiny, tmp_path):
    core = merged_digits(own_base)
    engine = load_tiny(folder=own_base)
    tensors = canonical.canonical(engine.initial, tiny.settings(own_base).adapter)
    canonical.save(tmp_path / "adapter", tensors, base="", card="")
    adapter.merge(tmp_path / "adapter", own_base, tmp_path / "merged")
    stored = json.loads((tmp_path / "merged" / "tokenizer.json").read_text())
    assert stored["pre_tokenizer"] == json.loads(core.to_str())["pre_tokenizer"]
    assert gguf.pre_tokenizer_name(stored) == "smollm"
    again = AutoTokenizer.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert again(TEXT, add_special_tokens=False)["input_ids"] == core.encode(TEXT, add_special_tokens=False).ids


def test_a_class_that_cannot_read_the_file_does_not_matter(own_base):
    core = Tokenizer.from_file(str(own_base / "tokenizer.json"))
    change(own_base / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert base_files.ids_of(base.load_tokenizer(own_base), TEXT) == core.encode(TEXT, add_special_tokens=False).ids


def test_a_base_without_tokenizer_json_has_no_tokenizer(own_base):
    (own_base / "tokenizer.json").unlink()
    change(own_base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ModelError, match=r"no tokenizer: .* does not come back; fetch the base again with its tokeniz"):
        base.load_tokenizer(own_base)


def test_vocabulary_and_merges_alone_are_a_tokenizer_too(own_base):
    stored = json.loads((own_base / "tokenizer.json").read_text())
    (own_base / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    (own_base / "merges.txt").write_text("\n".join(" ".join(pair) for pair in stored["model"]["merges"]))
    expected = base_files.ids_of(base.load_tokenizer(own_base), TEXT)
    (own_base / "tokenizer.json").unlink()
    change(
        own_base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token="<|pad|>", bos_token="<|pad|>"
    )
    assert base_files.ids_of(base.load_tokenizer(own_base), TEXT) == expected


def add_token(folder: Path, token: str, *, special: bool) -> None:
    """A token beyond the embedding of 320 rows, as left behind by a tokenizer that was extended alone."""
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    add = core.add_special_tokens if special else core.add_tokens
    add([AddedToken(token, special=special, normalized=False)])
    core.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(("token", "special"), [("<extra>", False), ("<|im_start|>2", False), ("<|turn|>", True)])
def test_tokens_beyond_the_embedding_are_refused_with_both_numbers(own_base, token, special):
    add_token(own_base, token, special=special)
    if special:  # a control token matters where the template writes it
        template = own_base / "chat_template.jinja"
        template.write_text(f"{template.read_text()}{{# {token} #}}")
    with pytest.raises(ModelError, match=r"with id 320, and the embedding of .* has 320 rows; use the base's"):
        base.load_tokenizer(own_base)


def test_a_pad_token_beyond_the_embedding_is_refused_with_a_remedy(own_base):
    add_token(own_base, "[PAD]", special=True)
    change(own_base / "tokenizer_config.json", pad_token="[PAD]")
    with pytest.raises(ModelError, match=r"pad_token \[PAD\] has id 320.* 320 rows; set pad_token in tokenizer_config"):
        base.load_tokenizer(own_base)


def test_a_control_token_for_pictures_may_have_no_embedding_but_no_template_may_write_it(own_base, load_tiny):
    add_token(own_base, "<image>", special=True)
    engine, data = load_tiny(folder=own_base), tiny.settings(own_base).data
    assert len(base.encode(engine, tiny.rows(4), data)[0]) == 4
    spelt = [tiny.Row((tiny.Message("user", "<image>"), tiny.Message("assistant", "YES")), unit="u", row_id="row 1")]
    assert max(base.encode(engine, spelt, data)[0][0].input_ids) < 320  # what a row spells is text
    engine.tokenizer.chat_template = "{{ '<image>' }}" + engine.tokenizer.chat_template
    with pytest.raises(ModelError, match=r"token 320, and the base's embedding ends at 319"):
        base.encode(engine, spelt, data)
    asked, _ = prompts.prompt_ids(spelt[0], engine.tokenizer)
    with pytest.raises(ModelError, match="token 320"):
        base.answer(engine, [asked], max_new_tokens=2)


def test_a_tokenizer_with_neither_pad_nor_end_token_is_refused(own_base):
    change(own_base / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match=r"neither a pad token nor an end token; set eos_token"):
        base.load_tokenizer(own_base)


def test_rows_longer_than_the_positions_are_refused_before_a_weight_is_read(own_base, load_tiny):
    (own_base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"data\.max_length_tokens = 257: .* has 256 positions; set it to at most 256"):
        load_tiny({"data.max_length_tokens": "257"}, folder=own_base)
    with pytest.raises(ModelError, match=r"with 4 virtual tokens .* at most 252"):
        load_tiny(tiny.of_kind("prompt_tuning", **{"data.max_length_tokens": "253"}), folder=own_base)
    with pytest.raises(ModelError, match="not a base model"):  # control: one token less goes on to the weights
        load_tiny({"data.max_length_tokens": "256"}, folder=own_base)


def test_an_answer_that_needs_more_positions_than_there_are_is_refused(engine):
    with pytest.raises(ModelError, match=r"250 tokens and an answer of up to 7 .* the 256 positions"):
        base.answer(engine, [[5] * 250], max_new_tokens=7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (GPT2Config(n_positions=1024), 1024),
        (BloomConfig(), None),
        (LlamaConfig(max_position_embeddings=4096, rope_scaling={"rope_type": "linear", "factor": 4.0}), 16384),
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
        ),
    ],
    ids=["rotary", "learned", "alibi", "linear scaling", "scaling that is counted already"],
)
def test_positions_are_those_of_the_architecture(settings, expected):
    assert base_files.num_positions(settings) == expected


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_base_that_is_quantised_already_is_refused_and_the_way_out_is_named(own_base, load_tiny, stored, named):
    change(own_base / "config.json", quantization_config=stored)
    with pytest.raises(ModelError, match=rf"\({named}\).*never be merged.*original.*model\.quantization = 'nf4'"):
        load_tiny(folder=own_base)


def test_a_site_that_checks_its_rows_hears_what_is_wrong_with_the_base(own_base, tmp_path):
    source = tiny.write_table(tmp_path / "rows.jsonl")
    node = config.NodeConfig.model_validate({"site": {"name": "north"}, "data": {"path": str(source)}})
    assert (
        site_rows.check(node.data, node.model, Asked(base=str(own_base), max_length_tokens=256), site="north").report
        is not None
    )
    with pytest.raises(ModelError, match=r"257.*256 positions"):
        site_rows.check(node.data, node.model, Asked(base=str(own_base), max_length_tokens=257), site="north")
    change(own_base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantised already"):
        site_rows.check(node.data, node.model, Asked(base=str(own_base)), site="north")


def test_what_needs_no_weights_is_known_without_them(own_base):
    (own_base / "model.safetensors").unlink()
    assert loading.check(tiny.settings(own_base, {"model.quantization": "nf4"}), own_base) == 1.0
    with pytest.raises(ModelError, match=r"'no_such' cannot have an adapter; choose among .* q_proj"):
        loading.check(tiny.settings(own_base, {"adapter.targets": '["no_such"]'}), own_base)
