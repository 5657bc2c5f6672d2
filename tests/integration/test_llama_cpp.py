"""Our GGUF file in llama.cpp itself: the same tokens of a prompt, the same logits and the same greedy answers."""

import json
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.export import folder as export_folder
from simulations.world.world import EMBEDDED_BASE
from tests import tiny
from tests.samples import exports

xllamacpp = pytest.importorskip("xllamacpp")  # of the extra dev
PROMPTS = (
    "Patient reports chest pain after 12.5 mg.",
    "Ärztlicher Befund: Übelkeit, 38.9 °C, seit 3 Tagen.",
    "What is it?",
)
SYSTEM = 'Say "unclear" where it is.\nÄußerst kurz: {{ x }} \\ {% y %}'
NUM_TOKENS = 24
CLEAR = 0.03  # of the logits' deviation, by which the first is ahead: llama.cpp rounds activations to bf16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded base with an adapter that was drawn, as merged checkpoint and as GGUF."""
    changes = {"data.system_prompt": json.dumps(SYSTEM, ensure_ascii=False)}
    _, source = exports.drawn(tiny.settings(EMBEDDED_BASE, changes), EMBEDDED_BASE, size=0.05)
    made = tmp_path_factory.mktemp("gguf") / "export"
    export_folder.write(made, source, formats=("merged", "gguf"), base=EMBEDDED_BASE, llama_cpp=None, key=None)
    return made


@pytest.fixture(scope="module")
def server(folder):
    """llama.cpp's own server on one thread; every number kept in float32 that can be."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "gguf/model.gguf")
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 512, 1, 0, False
    settings.cpuparams.n_threads = 1
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(settings)


@pytest.fixture(scope="module")
def merged(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()


def post(server, path, **body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def asked(folder, prompt):
    """A conversation as its user renders it, and its tokens."""
    tokenizer, talk = AutoTokenizer.from_pretrained(folder / "merged"), [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return talk, text, tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def centred(network, ids):
    """Logits of the next token, without their mean."""
    found_v = network(torch.tensor([ids])).logits[0, -1]
    return found_v - found_v.mean()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_llama_cpp_renders_and_cuts_a_conversation_as_we_do(folder, server, prompt):
    talk, text, ids = asked(folder, prompt)
    assert SYSTEM in text
    assert post(server, "/apply-template", messages=talk)["prompt"] == text
    assert post(server, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids


def test_llama_cpp_gives_the_logits_of_the_merged_checkpoint(folder, server, merged):
    base, before = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32).eval(), None
    for prompt in PROMPTS:
        _, _, ids = asked(folder, prompt)
        wanted_v = centred(merged, ids)
        size = len(wanted_v)
        found = post(server, "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=size, cache_prompt=False)
        found_v = torch.zeros(size)
        for entry in found["completion_probabilities"][0]["top_logprobs"]:
            found_v[entry["id"]] = entry["logprob"]
        found_v -= found_v.mean()
        assert float((found_v - wanted_v).norm() / wanted_v.norm()) < 0.03
        assert float((centred(base, ids) - wanted_v).norm() / wanted_v.norm()) > 0.1  # control: the base alone
        assert before is None or float((before - wanted_v).norm() / wanted_v.norm()) > 0.1  # and another prompt
        before = found_v


def test_llama_cpp_answers_as_we_do_token_by_token(folder, server, merged):
    end, num_compared, num_ended = AutoTokenizer.from_pretrained(folder / "merged").eos_token_id, 0, 0
    for prompt in PROMPTS:
        _, _, ids = asked(folder, prompt)
        order = {"prompt": ids, "n_predict": NUM_TOKENS, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        for entry in post(server, "/completion", **order)["completion_probabilities"]:
            wanted_v = centred(merged, ids)
            first, second = wanted_v.topk(2).values.tolist()
            if first - second < CLEAR * float(wanted_v.std()):
                break  # a draw: what follows is another text
            assert entry["id"] == int(wanted_v.argmax())
            ids = [*ids, entry["id"]]
            num_compared += 1
        num_ended += ids[-1] == end
    assert num_compared >= 10
    assert num_ended >= 1  # of three: it stops where we do
