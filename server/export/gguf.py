"""A merged checkpoint as one GGUF file, and an Ollama Modelfile beside it.

Written here: Llama with plain rotary positions and a byte-level BPE tokenizer that llama.cpp knows. Everything else is
for the converter in a llama.cpp checkout of the user's own, which is run as it is.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import gguf
import jinja2
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, LlamaFileType, TokenType
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from common.errors import ConfigError, ModelError
from common.model import skeleton
from common.storage import storage_error
from common.text import prompts, templates
from server.export import tokenizer as export_tokenizer

MODEL_FILE: Final = "model.gguf"
SCRIPT: Final = "convert_hf_to_gguf.py"
REQUIREMENTS: Final = "requirements/requirements-convert_hf_to_gguf.txt"
TYPES: Final = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
_QUANTIZERS: Final = ("build/bin/llama-quantize", "llama-quantize")
_REMEDY: Final = "give --llama-cpp DIR, a checkout of llama.cpp whose own converter is then run"
_DIGITS: Final = ({"type": "Digits", "individual_digits": True}, {"type": "Split", "pattern": {"Regex": r"\d"}})
_PLAIN: Final = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_CHATML: Final = '''TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
'''
_STOPS: Final = re.compile(r'(?:PARAMETER stop "[^\n]*"\n)*')
_NO_TEMPLATE: Final = (
    f"# No TEMPLATE: the chat template is in {MODEL_FILE}; compare with: ollama show --template NAME\n"
)


def convert(merged: Path, output: Path, *, name: str) -> None:
    """Write `output` (GGUF, bf16 matrices, float32 norms) from a merged checkpoint.

    Args:
        merged: Folder with config.json, safetensors and tokenizer files.

    Raises:
        ConfigError: Another architecture, rotary scaling, biases, or a tokenizer that llama.cpp has no name for.
        ModelError: A tensor that GGUF has no name for.
        StorageError: Disk full or not writable.
    """
    check(merged)
    settings = skeleton.settings(merged).to_dict()
    writer = gguf.GGUFWriter(output, "llama")
    try:
        # The shape of a Llama, as llama.cpp's converter names it.
        num_heads = settings["num_attention_heads"]
        head_size = settings.get("head_dim") or settings["hidden_size"] // num_heads
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(LlamaFileType.MOSTLY_BF16)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(settings["max_position_embeddings"])
        writer.add_embedding_length(settings["hidden_size"])
        writer.add_block_count(settings["num_hidden_layers"])
        writer.add_feed_forward_length(settings["intermediate_size"])
        writer.add_head_count(num_heads)
        writer.add_head_count_kv(settings.get("num_key_value_heads") or num_heads)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_rope_dimension_count(head_size)
        writer.add_rope_freq_base((settings.get("rope_parameters") or {}).get("rope_theta", 10000.0))
        writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
        writer.add_vocab_size(settings["vocab_size"])
        _add_tokenizer(writer, merged, num_tokens=settings["vocab_size"])
        for tensor_name, values, kind in _tensors(merged, settings):
            writer.add_tensor(tensor_name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise storage_error(output, error) from error
    finally:
        writer.close()


def run_converter(llama_cpp: Path, merged: Path, output: Path, *, name: str) -> None:
    """Let the converter of a llama.cpp checkout write `output`; its own words go to stderr.

    Raises:
        ConfigError: The folder is no checkout of llama.cpp.
        ModelError: The converter failed, or wrote nothing.
    """
    check_checkout(llama_cpp, "bf16")
    script = llama_cpp / SCRIPT
    order = [
        sys.executable,
        str(script),
        str(merged),
        "--outfile",
        str(output),
        "--outtype",
        "bf16",
        "--model-name",
        name,
    ]
    done = subprocess.run(order, stdout=2, check=False)
    if done.returncode or not output.is_file():
        raise ModelError(
            f"{script} could not convert {merged} (its own words are above); install what {REQUIREMENTS} there names"
        )


def check_checkout(llama_cpp: Path | None, kind: str) -> None:
    """Whether a file of this type can be written; asked before anything is merged.

    Args:
        llama_cpp: A checkout of llama.cpp; None: there is none.

    Raises:
        ConfigError: No checkout, no converter in it or a package that it needs, or no llama-quantize; or no such type.
    """
    if kind not in TYPES:
        raise ConfigError(f"--gguf-type {kind}: is none of {', '.join(TYPES)}")
    if kind != "bf16" and not llama_cpp:
        raise ConfigError(f"--gguf-type {kind} is written by llama-quantize; give --llama-cpp DIR, a checkout with it")
    if llama_cpp and not (llama_cpp / SCRIPT).is_file():
        raise ConfigError(f"--llama-cpp {llama_cpp}: has no {SCRIPT}; give a checkout of llama.cpp")
    if llama_cpp and (missing := _missing(llama_cpp / REQUIREMENTS)):
        raise ConfigError(f"{SCRIPT} there needs {', '.join(missing)}, which this Python has not; install it here")
    if llama_cpp and kind != "bf16":
        _quantizer(llama_cpp)


def _missing(requirements: Path) -> list[str]:
    """Packages named by a requirements file, and by those that it includes, that are not installed; versions aside."""
    if not requirements.is_file():
        return []
    lines = [line.split("#")[0].split() for line in requirements.read_text(encoding="utf-8").splitlines()]
    included = [_missing(requirements.parent / words[1]) for words in lines if words[:1] == ["-r"] and len(words) > 1]
    named = [match[0] for words in lines if words and (match := re.match(r"\w[\w.-]*", words[0]))]
    missing = set(itertools.chain.from_iterable(included))
    for name in named:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.add(name)
    return sorted(missing)


def _quantizer(llama_cpp: Path) -> Path:
    """The built llama-quantize of a checkout."""
    for name in _QUANTIZERS:
        if (llama_cpp / name).is_file():
            return llama_cpp / name
    raise ConfigError(
        f"--llama-cpp {llama_cpp}: has no {_QUANTIZERS[0]}; build it there: "
        "cmake -B build && cmake --build build --target llama-quantize"
    )


def run_quantize(llama_cpp: Path, output: Path, *, kind: str) -> None:
    """Let llama-quantize replace `output` by one of another type; its own words go to stderr.

    Raises:
        ConfigError: It is not built.
        ModelError: It failed, or wrote nothing.
    """
    program, partial = _quantizer(llama_cpp), output.with_suffix(".partial")
    done = subprocess.run([str(program), str(output), str(partial), kind.upper()], stdout=2, check=False)
    if done.returncode or not partial.is_file():
        raise ModelError(f"{program} could not write {kind} (its own words are above); export --gguf-type bf16 instead")
    partial.replace(output)


def modelfile(merged: Path, *, system_prompt: str = "") -> str:
    """What `ollama create` reads, for a checkpoint in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    return modelfile_of(tokenizer, export_tokenizer.generation_of(merged), system_prompt=system_prompt)


def modelfile_of(tokenizer: Any, generation: GenerationConfig, *, system_prompt: str = "") -> str:
    """What `ollama create` reads; the template is written where the model's is plain ChatML.

    Args:
        generation: Of the base or of the merged checkpoint.
        system_prompt: `data.system_prompt` of the run, which Ollama gives to conversations without their own.

    Raises:
        ModelError: The template cannot be used for training.
    """
    texts = [tokenizer.decode([number]) for number in prompts.stop_ids(tokenizer, generation)]
    stops = "".join(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}\n" for text in texts if text.strip())
    # Whether conversations come out as ChatML, whatever the template's source says; a default system prompt is not, but
    # for the run's own, which the line SYSTEM has.
    template = str(tokenizer.chat_template or "").removeprefix(export_tokenizer.system_default(system_prompt))
    talk = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user")]
    is_chatml = bool(tokenizer.chat_template)
    for part in (talk, talk[1:]) if is_chatml else ():
        render = partial(tokenizer.apply_chat_template, part, tokenize=False, add_generation_prompt=True)
        try:
            is_chatml = is_chatml and render(chat_template=template) == render(chat_template=templates.CHATML)
        except jinja2.TemplateError:  # it refuses some of these roles, as no ChatML does
            is_chatml = False
    return f"FROM ./{MODEL_FILE}\n{_system(system_prompt)}{_CHATML if is_chatml else _NO_TEMPLATE}{stops}"


def is_modelfile(text: str, *, system_prompt: str = "") -> bool:
    """Whether `modelfile_of` may have written it: its file, this system prompt, its template or none, stop words."""
    head = f"FROM ./{MODEL_FILE}\n{_system(system_prompt)}"
    rests = [text.removeprefix(head + part) for part in (_CHATML, _NO_TEMPLATE) if text.startswith(head + part)]
    return any(_STOPS.fullmatch(rest) for rest in rests)


def _system(system_prompt: str) -> str:
    """The line of a Modelfile that holds the run's system prompt, or none."""
    return f'SYSTEM """{system_prompt}"""\n' if system_prompt else ""


def check(base: Path) -> None:
    """Whether `convert` can write this base; a fact that it left out would make another model.

    Raises:
        ConfigError: Another architecture, rotary scaling, biases, or a tokenizer that llama.cpp has no name for.
        ModelError: No readable config.json or tokenizer.json.
    """
    network = skeleton.build(base)
    settings = network.config.to_dict()
    # Only what the tensors and facts of `convert` say in full.
    for key, wanted in _PLAIN.items():
        given = [type(network).__name__] if key == "architectures" else settings.get(key, wanted)
        if given != wanted:
            raise ConfigError(f"gguf: the base has {key} = {given}, written here is {wanted}; {_REMEDY}")
    rope = settings.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"gguf: the base has rotary scaling '{rope['rope_type']}', written here is none; {_REMEDY}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, settings["num_hidden_layers"])
    for name in network.state_dict():
        _name(names, name)
    if not (base / "tokenizer.json").is_file():
        raise ConfigError(f"gguf: the base has no tokenizer.json, from which tokens are written here; {_REMEDY}")
    pre_tokenizer_name(_json(base / "tokenizer.json"))


def _json(path: Path) -> dict[str, Any]:
    """One of the base's files."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"gguf: {path} cannot be read; {_REMEDY}") from error
    return content


def _add_tokenizer(writer: gguf.GGUFWriter, merged: Path, *, num_tokens: int) -> None:
    """Tokens, kinds and merges of a byte-level BPE; special tokens and chat template by the gguf package."""
    stored = _json(merged / "tokenizer.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(stored))
    writer.add_add_space_prefix(False)
    added = {token["id"]: token for token in stored["added_tokens"]}
    texts = {number: text for text, number in stored["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    kinds |= {n: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for n, token in added.items()}
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(num_tokens)])
    writer.add_token_types([kinds.get(number, TokenType.UNUSED) for number in range(num_tokens)])
    special = gguf.SpecialVocab(merged, load_merges=True, n_vocab=num_tokens)
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    # What ends an answer, in the three fields that GGUF has for it: end of text, of a turn and of a message. llama.cpp
    # stops at each of them, and at tokens whose name it knows.
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    if tokenizer.chat_template:
        turn_end = prompts.turn_end_id(tokenizer)
        ends = {turn_end if tokenizer.eos_token_id is None else tokenizer.eos_token_id: "eos"}
        ends.setdefault(turn_end, "eot")
        stops = prompts.stop_ids(tokenizer, export_tokenizer.generation_of(merged))
        ends |= dict.fromkeys([number for number in stops if number not in ends][:1], "eom")
        special.special_token_ids |= {name: number for number, name in ends.items()}
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(stored: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a tokenizer cuts text before its merges.

    Args:
        stored: The tokenizer.json.

    Raises:
        ConfigError: Another one than GPT-2's, with or without single digits.

    Source: llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_GPT2 and _SMOLLM. The latter cuts at every numeral of
    Unicode, a tokenizer of single decimal digits at those only: they differ in signs such as one half.

    Example:
        >>> pieces = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        >>> pre_tokenizer_name({"model": {"type": "BPE"}, "normalizer": None, "pre_tokenizer": pieces})
        'gpt-2'
    """
    cut = stored["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [cut])
    is_plain = (
        stored["model"]["type"] == "BPE" and stored["normalizer"] is None and steps[-1].get("type") == "ByteLevel"
    )
    if is_plain and not steps[-1].get("add_prefix_space") and steps[-1].get("use_regex", True):
        if len(steps) == 1:
            return "gpt-2"
        if len(steps) == 2 and any(steps[0].items() >= digits.items() for digits in _DIGITS):
            return "smollm"
    raise ConfigError(f"gguf: the base's tokenizer cuts text in a way that is not written here; {_REMEDY}")


def _tensors(
    merged: Path, settings: dict[str, Any]
) -> Iterator[tuple[str, "np.ndarray[Any, Any]", GGMLQuantizationType]]:
    """Every weight under GGUF's name; one that llama.cpp ties itself, the head, is left out where the base ties it."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, settings["num_hidden_layers"])
    num_heads = settings["num_attention_heads"]
    heads = {"q_proj": num_heads, "k_proj": settings.get("num_key_value_heads") or num_heads}
    for file in sorted(merged.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                gguf_name = _name(names, name)
                values = opened.get_tensor(name).to(torch.float32).numpy()
                part = name.split(".")[-2]
                if part in heads:
                    values = interleave(values, num_heads=heads[part])
                kind = GGMLQuantizationType.BF16 if values.ndim > 1 else GGMLQuantizationType.F32
                yield gguf_name, gguf.quantize(values, kind), kind


def _name(names: Any, name: str) -> str:
    """GGUF's name of a weight."""
    gguf_name: str | None = names.get_name(name, try_suffixes=(".weight",))
    if gguf_name is None:
        raise ConfigError(f"gguf: the base's tensor {name} has no place in a Llama; {_REMEDY}")
    return gguf_name


def interleave(weight_dk: "np.ndarray[Any, Any]", *, num_heads: int) -> "np.ndarray[Any, Any]":
    """Rows of a head from (all first halves, all second halves) to pairs, as llama.cpp rotates neighbours.

    Source: llama.cpp, `LlamaModel.permute` of its converter.
    """
    halves = weight_dk.reshape(num_heads, 2, weight_dk.shape[0] // num_heads // 2, *weight_dk.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight_dk.shape)
