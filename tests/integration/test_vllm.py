"""Our exports in vLLM itself, which is no dependency: skipped where no program vllm is on the PATH."""

import json
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.model import base, loading
from server.serve import start
from simulations.engines import deployment
from simulations.world.world import EMBEDDED_BASE
from tests import tiny
from tests.samples import exports as drawn

pytestmark = [pytest.mark.slow, pytest.mark.skipif(start.find_vllm() is None, reason="needs vLLM on the PATH")]
TALK = [{"role": "user", "content": "Patient reports chest pain after 12.5 mg."}]
KEY = "a-key-of-some-length"
ATOL = 1e-3  # of a logarithm of a probability, both in float32
MAX_START_S = 400


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    settings = tiny.settings(EMBEDDED_BASE)
    engine = loading.engine_of(settings, EMBEDDED_BASE, device_name="cpu")
    made = (("one", 1, "tokenizer"), ("two", 2, "tokenizer"), ("alpaca", 3, "alpaca"))
    return {
        name: drawn.write(folder / name, engine, EMBEDDED_BASE, seed=seed, template=template)
        for name, seed, template in made
    }


@pytest.fixture(scope="module")
def serve(exports, tmp_path_factory):
    """Start `silotune-server serve` with exports, and give a client of it."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    started, clients = [], []

    def begin(*names):
        port = deployment.free_port()
        command = [sys.executable, "-m", "server.cli.app", "serve", *(str(exports[name]) for name in names)]
        command += ["--base", str(EMBEDDED_BASE), "--port", str(port), "--api-key-file", str(key)]
        started.append(subprocess.Popen([*command, "--engine", "vllm", "--vllm-arg=--dtype=float32"]))
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
        clients.append(client)
        began = time.monotonic()
        while not is_up(client):
            assert started[-1].poll() is None, "vLLM ended"
            assert time.monotonic() - began < MAX_START_S
            time.sleep(1)
        return client

    yield begin
    for client in clients:
        client.close()
    for process in started:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=60)
        assert children
        assert not psutil.wait_procs(children, timeout=60)[1]  # nothing is left behind


def is_up(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def ask(client, name):
    """Ids of the prompt's length and of the answer, and of each of its tokens the most probable ones."""
    body = {"model": name, "messages": TALK, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
    body["return_tokens_as_token_ids"] = True
    answer = client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    told = answer.raise_for_status().json()
    steps = told["choices"][0]["logprobs"]["content"]
    tops = [{id_of(top): top["logprob"] for top in step["top_logprobs"]} for step in steps]
    return told["usage"]["prompt_tokens"], [id_of(step) for step in steps], tops


def id_of(told):
    return int(told["token"].removeprefix("token_id:"))


def prompt_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder or EMBEDDED_BASE)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def worst(folder, prompt, answer, tops):
    """The largest difference to plain peft, of all probabilities that were told."""
    network = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
    with base.quiet_peft(), torch.no_grad():
        network = PeftModel.from_pretrained(network, folder).eval() if folder else network.eval()
        logits_tv = network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    found_tv = logits_tv.log_softmax(-1)
    return max(abs(found_tv[t, id_].item() - told) for t, top in enumerate(tops) for id_, told in top.items())


def test_vllm_answers_each_name_as_peft_does(serve, exports):
    client = serve("one", "two")
    folders = {EMBEDDED_BASE.resolve().name: None, "one": exports["one"] / "peft", "two": exports["two"] / "peft"}
    prompt = prompt_of(None)
    for name, folder in folders.items():
        num_prompt, answer, tops = ask(client, name)
        assert num_prompt == len(prompt)
        assert worst(folder, prompt, answer, tops) < ATOL
        others = [other for label, other in folders.items() if label != name]
        assert min(worst(other, prompt, answer, tops) for other in others) > 100 * ATOL  # control
    assert client.get("/v1/models").status_code == 401


def test_vllm_takes_the_template_of_the_run(serve, exports):
    client, place = serve("alpaca"), exports["alpaca"] / "peft"
    template = (place / "chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, chat_template=template)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt != prompt_of(None)
    num_prompt, answer, tops = ask(client, "alpaca")
    assert num_prompt == len(prompt)
    assert worst(place, prompt, answer, tops) < ATOL
    assert worst(place, prompt_of(None), answer, tops) > 100 * ATOL  # control


def test_what_vllm_is_told_can_be_pasted(exports):
    command = [sys.executable, "-m", "server.cli.app", "serve", str(exports["one"]), "--base", str(EMBEDDED_BASE)]
    told = subprocess.run([*command, "--show-command"], capture_output=True, text=True, check=True).stdout
    assert json.dumps(str(start.find_vllm()))[1:-1] in told
