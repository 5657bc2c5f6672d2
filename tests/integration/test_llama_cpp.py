"""Our GGUF file in llama.cpp itself, by the wheel xllamacpp, which is no dependency: skipped where it is absent."""

import json
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import export_gguf
from simulations.world import EMBEDDED_BASE

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow
PROMPTS = (
    "Patient reports chest pain after 12.5 mg.",
    "Ärztlicher Befund: Übelkeit, 38.9 °C, seit 3 Tagen.",
    "What is it?",
)


def start(file):
    """llama.cpp's own server on one thread; every number kept in float32 that can be."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 512, 1, 0, False
    settings.cpuparams.n_threads = 1
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(settings)


def post(server, path, **body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def next_logits(server, ids, size):
    """Of the whole vocabulary, but for a constant."""
    found = post(server, "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=size, cache_prompt=False)
    logits_v = torch.zeros(size)
    for entry in found["completion_probabilities"][0]["top_logprobs"]:
        logits_v[entry["id"]] = entry["logprob"]
    return logits_v - logits_v.mean()


def test_llama_cpp_reads_the_same_model(tmp_path):
    export_gguf.convert(EMBEDDED_BASE, tmp_path / "model.gguf", name="embedded")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    network = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32).eval()
    server, before = start(tmp_path / "model.gguf"), None
    for prompt in PROMPTS:
        talk = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert post(server, "/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
        with torch.no_grad():
            wanted_v = network(torch.tensor([ids])).logits[0, -1]
        wanted_v = wanted_v - wanted_v.mean()
        found_v = next_logits(server, ids, len(wanted_v))
        assert float((found_v - wanted_v).norm() / wanted_v.norm()) < 0.03
        assert before is None or float((before - wanted_v).norm() / wanted_v.norm()) > 0.1  # control: another prompt's
        before = found_v
