"""The base model and its adapter: what `[model]` and `[adapter]` say, and nothing silent.

B batch, T tokens, V vocabulary.
"""

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from common import quiet, storage
from common.adapter import adapter
from common.data.rows import Row
from common.errors import ModelError
from common.frame.records import TensorSpec
from common.model import base_files, codes, core_layers, kernels, peft_kinds, probe, varlen
from common.run import config
from common.run.catalogue.kinds import KINDS, Quantization
from common.run.schema.model import LoraAdapter
from common.text import prompts, templates

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOTES: Final = (
    "Unsupported layer type", "Position ids are not supported",
    "fan_in_fan_out is set to", "The following rank_pattern keys", "The following alpha_pattern keys",
    "Model has `tie_word_embeddings=True`",
)  # fmt: skip
_BASE_SUFFIXES: Final = (".safetensors", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Engine:
    """A loaded base with a trainable adapter; lives as long as the process that trains.

    Attributes:
        model: peft model; the base is frozen, the adapter float32.
        tokenizer: Of the base, with the chat template that `[model]` names.
        device: Where the model is.
        base_sha256: Hash of the base's files.
        tensor_specs: The adapter's tensors.
        initial: The adapter as attached: A from the seed, B zero.
        codes_sha256: Hash of the base's 4-bit codes; empty where it has none.
        folder: Where the base's files are.
        quantised_share: Part of the values in the body's matrices that are 4-bit or 8-bit codes.
        date: Day that the chat template prints, YYYY-MM-DD; empty: it prints none.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    base_sha256: str
    tensor_specs: tuple[TensorSpec, ...]
    initial: adapter.Tensors
    codes_sha256: str = ""
    folder: Path = Path()
    quantised_share: float = 0.0
    date: str = ""

    @property
    def quantization(self) -> Quantization:
        """The precision that the base really has."""
        return codes.quantization_of(self.model)

    @property
    def pad_id(self) -> int:
        """The pad token's id; masks go by position, so any id would do."""
        return int(self.tokenizer.pad_token_id)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; see `prompts.stop_ids`."""
        return prompts.stop_ids(self.tokenizer, getattr(self.model, "generation_config", None))

    @property
    def num_base_parameters(self) -> int:
        """Parameters of the frozen base; packed 4-bit weights count as what they stand for."""
        num_trainable, num_all = self.model.get_nb_trainable_parameters()  # type: ignore[operator]
        beside = (p for name, p in self.model.named_parameters() if f".{adapter.SIDE}." in name or ".ranknum." in name)
        num_beside = sum(parameter.numel() for parameter in beside)
        return int(num_all - num_trainable - num_beside)


def load(
    folder: Path,
    *,
    model: config.ModelConfig,
    adapter_settings: config.AdapterConfig,
    seed: int,
    device_name: str = "auto",
    num_threads: int = 0,
    gradient_checkpointing: bool = False,
    residual_rank: int = 0,
    num_heads: int = 0,
    date: str = "",
) -> Engine:
    """Load a base and attach a fresh adapter (B = 0, and cores of zero).

    Args:
        device_name: `auto`, `cpu` or `cuda`.
        num_threads: CPU threads of torch; 0 = every core that this process may use.
        residual_rank: Rank of the frozen side adapter (zero at first); 0: none.
        num_heads: Heads of the cores between A and B; 0: no cores.
        date: Day, YYYY-MM-DD, for a chat template that prints one; empty: the day on which it is rendered.

    Raises:
        ModelError: Files missing, hash differs, precision impossible here, targets match nothing, or a
            chat template that cannot be used for training.
    """
    quiet.hush()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
    base_sha256 = check_hash(folder, model.sha256)
    device = choose_device(device_name)
    _check_dtype(model, adapter_settings, device)
    tokenizer = load_tokenizer(folder)
    is_dated = model.chat_template == "tokenizer" and templates.needs_date(str(tokenizer.chat_template))
    prompts.turn_end_id(prompts.use_template(tokenizer, model.chat_template, date=date))  # or no answer would ever end
    base = load_base(folder, model, device)
    share = probe.precision_of(base).share
    codes_sha256 = codes.sha256_of(base)
    with quiet_peft():
        peft_model = probe.attach(
            base,
            probe.trial_rows(tokenizer, base),
            fresh=functools.partial(attach, settings=adapter_settings, seed=seed),
            settings=adapter_settings,
            dtype=resolve_dtype(model, device),
            key=(base_sha256, model, adapter_settings, device),
        )
    if residual_rank:
        _attach_side(peft_model, adapter_settings, rank=residual_rank)
    if num_heads:
        core_layers.attach(peft_model, num_heads=num_heads)
    kernels.install(peft_model, device)
    varlen.traits_of(peft_model)  # now: asked once the adapter has diverged, it would not be packed
    if gradient_checkpointing:
        checkpoint(base)
    initial = adapter.read(peft_model)
    specs, day = adapter.specs(initial), date if is_dated else ""
    return Engine(peft_model, tokenizer, device, base_sha256, specs, initial, codes_sha256, folder, share, day)


def checkpoint(base: Any) -> None:
    """Recompute activations in the backward pass."""
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        ModelError: CUDA was asked for by name and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("hardware.device is 'cuda' but torch sees no CUDA device; use 'cpu' or install a driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def hash_base(folder: Path) -> str:
    """SHA-256 over the names and hashes of a base's weights, configuration and tokenizer files.

    Raises:
        ModelError: No `config.json` or no safetensors file.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: not a base model; it needs config.json and *.safetensors")
    files = sorted(path for path in folder.iterdir() if path.suffix in _BASE_SUFFIXES)
    listing = "".join(f"{path.name} {storage.sha256(path)}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def check_hash(folder: Path, expected: str) -> str:
    """The base's hash, which must be `expected` unless that is empty.

    Raises:
        ModelError: The hash differs.
    """
    found = hash_base(folder)
    if expected and found != expected:
        raise ModelError(f"{folder}: base model has hash {found}, the run wants {expected}; fetch that base")
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer as its file has it, from local files only; see `common.model.base_files.tokenizer_of`.

    Raises:
        ModelError: No tokenizer, or one that does not fit the base.
    """
    return base_files.tokenizer_of(folder)


def resolve_dtype(settings: config.ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` computes in bfloat16 on CUDA and in float32 on the CPU, where bfloat16 is slower."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[settings.dtype]


def load_base(folder: Path, settings: config.ModelConfig, device: torch.device) -> Any:
    """The frozen base, quantised as told, without an adapter.

    Raises:
        ModelError: Files missing or damaged, or this precision is impossible here.
    """
    dtype = resolve_dtype(settings, device)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization_config(settings, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: transformers cannot load this base with model.quantization = '{settings.quantization}' "
            f"on {device.type} ({type(error).__name__})"
        ) from error
    base, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random values
        raise ModelError(
            f"{folder}: the base's files lack {len(missing)} weights, such as {missing[0]}; fetch it again"
        )
    probe.check_precision(base, settings.quantization)
    base.requires_grad_(False)
    base.config.use_cache = False
    # On processors with AVX512-BF16 bitsandbytes (seen in 0.50.2) repacks 4-bit weights at the first forward in
    # evaluation mode, computes in bfloat16 whatever was asked for, and does not repack them for training: from then on
    # no gradient passes through the layer, with nothing but a warning of torch's.
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return base


def quantization_config(settings: config.ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings; QLoRA's NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314)."""
    if settings.quantization == "none":
        return None
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def lora_config(settings: LoraAdapter) -> LoraConfig:
    """peft's configuration of `[adapter]`."""
    names = list(settings.targets)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        use_rslora=settings.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without what peft 0.21 warns of and what is meant or harmless here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        for told in _NOTES:
            warnings.filterwarnings("ignore", message=told)
        yield


def attach(base: Any, settings: config.AdapterConfig, *, seed: int) -> nn.Module:
    """Base with a float32 adapter; A from the seed, B zero. Other kinds than LoRA start as peft starts them."""
    if settings.kind != "lora":
        with quiet_peft():
            return peft_kinds.attach(base, settings, seed=seed)
    remedy = f"choose among the linear layers of this base: {', '.join(probe.linear_names(base))}"
    with torch.random.fork_rng(), quiet_peft():
        try:
            model = get_peft_model(base, lora_config(settings), autocast_adapter_dtype=True)
        except ValueError as error:
            raise ModelError(
                f"adapter.targets = '{', '.join(settings.targets)}' cannot have an adapter; {remedy}"
            ) from error
    probe.check_targets(model, settings, remedy=remedy)
    own = adapter.parameters(model)
    for name, values in _drawn(own, seed=seed).items():
        own[name].data = values.to(own[name].device)
    return model


def _check_dtype(settings: config.ModelConfig, adapter_settings: config.AdapterConfig, device: torch.device) -> None:
    """Some kinds put float32 weights into the base's own path, where 16-bit layers cannot follow."""
    is_half = resolve_dtype(settings, device) != torch.float32
    if is_half and settings.quantization in KINDS[adapter_settings.kind].float32_on:
        raise ModelError(
            f"adapter.kind = '{adapter_settings.kind}' computes in float32 only with model.quantization = "
            f"'{settings.quantization}'; set model.dtype = 'float32'"
        )


def _attach_side(model: Any, settings: config.AdapterConfig, *, rank: int) -> None:
    """A second, frozen adapter of zeros beside the first, of the same scale."""
    if settings.kind != "lora":
        raise ModelError(f"adapter.kind = '{settings.kind}': a side adapter stands beside factors of lora only")
    beside = lora_config(settings.model_copy(update={"r": rank, "dropout": 0.0, "use_rslora": False}))
    beside.lora_alpha = settings.scale * rank  # type: ignore[assignment]
    with torch.random.fork_rng(), quiet_peft():
        model.add_adapter(adapter.SIDE, beside)
    model.base_model.set_adapter(["default", adapter.SIDE])
    for parameter in adapter.side_parameters(model).values():
        parameter.data = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.requires_grad_(False)


def initial_of(engine: Engine, run: config.RunConfig) -> adapter.Tensors:
    """The adapter as it would be attached for this run; the engine may have been loaded for another seed."""
    if run.adapter.kind != "lora" or run.aggregation.num_core_heads:
        return engine.initial  # drawn from no seed, or its engine was loaded for this one
    return {**engine.initial, **_drawn(engine.initial, seed=run.seed)}


def _drawn(own: Mapping[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """A as peft draws it (Kaiming, a = sqrt 5), but on the CPU: the same values whatever the base's device or type."""
    drawn: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for name in sorted(name for name in own if name.endswith((".lora_A.weight", ".lora_B.weight"))):
            drawn[name] = torch.zeros(own[name].shape, dtype=torch.float32)
            if name.endswith(".lora_A.weight"):
                nn.init.kaiming_uniform_(drawn[name], a=math.sqrt(5))
    return drawn


def encode(
    engine: Engine, rows: Sequence[Row], data: config.DataConfig
) -> tuple[list[prompts.Encoded], prompts.EncodingReport]:
    """Rows to tokens and masks as `[data]` says.

    Raises:
        DataError: No row is left, or one is too long and `data.too_long` is `error`.
    """
    found, report = prompts.encode_all(
        rows,
        engine.tokenizer,
        max_length_tokens=data.max_length_tokens,
        too_long=data.too_long,
        system_prompt=data.system_prompt,
    )
    base_files.check_token_ids((max(row.input_ids) for row in found), engine.model)
    return found, report


def answer(engine: Engine, prompt_ids: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts, special tokens removed."""
    ids = answer_ids(engine, prompt_ids, max_new_tokens=max_new_tokens)
    return engine.tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def answer_ids(engine: Engine, prompt_ids: Sequence[Sequence[int]], *, max_new_tokens: int) -> torch.Tensor:
    """Tokens of greedy answers (B, T); after the first of `Engine.stop_ids` in a row there is padding.

    Raises:
        ModelError: A prompt has a token, or needs a position, that the base has not.
    """
    tokenizer = engine.tokenizer
    width = max(len(ids) for ids in prompt_ids)
    base_files.check_token_ids((i for ids in prompt_ids for i in ids), engine.model)
    base_files.check_room(engine.model.config, width, num_new=max_new_tokens)
    padded = [[tokenizer.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    engine.model.eval()
    with quiet_peft():
        output_bt = engine.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=engine.device),
            attention_mask=torch.tensor(mask, device=engine.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(engine.stop_ids),
        )
    found_bt: torch.Tensor = output_bt[:, width:]
    return found_bt
