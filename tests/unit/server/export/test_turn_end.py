"""A base whose end token is not what ends a turn: everything that writes answers stops at both."""

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.model import base as model
from common.run import config
from server.export import folder as export_folder
from server.export import gguf as export_gguf
from server.export import tokenizer
from server.export.folder import Exported
from server.run.run import manifest_of
from server.serve import engine as serving
from server.serve import folders, start
from server.serve.engine import Answer, Sampling
from server.verify import verify
from tests import tiny

FORMATS = ("peft", "vllm", "merged", "gguf")
TURN_END, END, OTHER = 0, 2, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """ChatML under the end token <|endoftext|>; its authors name a third token. It answers with <|im_end|> at once."""
    control = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|other|>", "<|pad|>")
    folder = tiny.make_base(tmp_path_factory.mktemp("turns") / "base", control=control, end="<|endoftext|>")
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # whatever was read, the hidden state points where the first token's row does
        network.model.embed_tokens.weight[:, 0] += 10
        network.lm_head.weight[TURN_END] = 10 * torch.eye(64)[0]
    network.generation_config = GenerationConfig(eos_token_id=[END, OTHER])
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(load_tiny, base):
    return load_tiny(folder=base)


@pytest.fixture(scope="module")
def export(engine, base, tmp_path_factory):
    source = Exported(engine.initial, manifest_of(tiny.settings(base), engine), 1, {"north": 5}, [])
    folder = tmp_path_factory.mktemp("export") / "export"
    export_folder.write(folder, source, formats=FORMATS, base=base, llama_cpp=None, key=None)
    return folder


def test_evaluation_and_serve_stop_at_the_end_of_a_turn(engine, base, export):
    assert engine.stop_ids == (TURN_END, END, OTHER)
    ids = engine.tokenizer("north", add_special_tokens=False)["input_ids"]
    assert model.answer_ids(engine, [ids], max_new_tokens=8).tolist() == [[TURN_END]]
    settings = config.ModelConfig(base=str(base), quantization="none")
    models = serving.Models(base, folders.verified([str(export)], base), settings=settings, device_name="cpu")
    for name in models.names:
        answer = Answer(len(ids))
        assert "".join(models.answer(name, ids, Sampling(8, temperature=0), answer)) == ""
        assert (answer.num_tokens, answer.finish) == (1, "stop")


def test_every_export_names_what_ends_an_answer(base, export):
    for folder in (export / "peft", export / "vllm" / "tiny", export / "merged"):
        found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert found == [TURN_END, END, OTHER], folder
    merged = AutoModelForCausalLM.from_pretrained(export / "merged", dtype=torch.float32)
    ids = torch.tensor([[40, 41, 42]])
    assert merged.generate(ids, attention_mask=ids > 0, max_new_tokens=8, do_sample=False).tolist()[0][3:] == [TURN_END]
    fields = gguf.GGUFReader(export / "gguf" / "model.gguf").fields.values()
    facts = {field.name.removeprefix("tokenizer.ggml."): field.contents() for field in fields}
    assert [facts[f"{name}_token_id"] for name in ("eos", "eot", "eom")] == [END, TURN_END, OTHER]
    stops = [line for line in (export / "gguf" / "Modelfile").read_text().splitlines() if line.startswith("PARAMETER")]
    assert stops == [f'PARAMETER stop "{text}"' for text in ("<|im_end|>", "<|endoftext|>", "<|other|>")]


def test_verify_knows_the_modelfile_s_stops(base, export):
    verify.verify(export, base=base)
    text = (export / "gguf" / "Modelfile").read_text()
    assert export_gguf.is_modelfile(text)
    assert not export_gguf.is_modelfile(text + "PARAMETER temperature 2\n")
    assert not export_gguf.is_modelfile(text.replace('stop "<|other|>"', "stop other"))


def test_vllm_is_told_what_ends_an_answer(base, export):
    served = folders.verified([str(export)], base)
    command = start.vllm_command(base, served, start.Address())
    assert command[-2:] == ["--generation-config", str(export / "peft")]


def test_the_base_s_own_settings_are_read_from_either_file(base, tmp_path):
    assert tokenizer.generation_of(base).eos_token_id == [END, OTHER]
    plain = tiny.make_base(tmp_path / "plain")
    (plain / "generation_config.json").unlink()
    assert tokenizer.generation_of(plain).eos_token_id == AutoTokenizer.from_pretrained(plain).eos_token_id
