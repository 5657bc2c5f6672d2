"""Tiny random bases of the architectures that people fine-tune: two layers each, all with the tokenizer of `tiny`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests import tiny

_PLAIN: Final = {  # a configuration takes any name, so each gets only those that its architecture has
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
_NAMED: Final = _PLAIN | {"intermediate_size": 128, "num_key_value_heads": 2}
_GPT: Final = {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
_GEMMA: Final = _NAMED | {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}
SHAPES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "llama": ("Llama", _NAMED),
    "mistral": ("Mistral", _NAMED | {"sliding_window": 32}),
    "qwen2": ("Qwen2", _NAMED),
    "qwen3": ("Qwen3", _NAMED | {"head_dim": 16}),
    "phi3": ("Phi3", _NAMED | {"original_max_position_embeddings": 256}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA),
    "gpt2": ("GPT2", _GPT | {"n_positions": 256}),
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}),
    "opt": ("OPT", _PLAIN | {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "gpt_neox": ("GPTNeoX", _PLAIN | {"intermediate_size": 128}),
    "falcon": ("Falcon", _PLAIN | {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("Mixtral", _NAMED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        _NAMED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    ),
}
NAMES: Final = tuple(SHAPES)


def make(name: str, folder: Path, **changes: object) -> Path:
    """Write a base of one architecture with random weights and a byte-level tokenizer with a chat template.

    Args:
        name: One of `NAMES`.
        folder: Where config.json, weights and tokenizer go.
        changes: Other values of the configuration, such as `num_hidden_layers=1`.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(folder)
    family, shape = SHAPES[name]
    kind = "Gemma3Text" if family == "Gemma3" else family
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = getattr(transformers, f"{kind}Config")(**{"vocab_size": len(tokenizer), **shape, **ids, **changes})
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        getattr(transformers, f"{family}{head}")(settings).save_pretrained(folder)
    if name == "qwen2":  # of this type transformers takes its own class whatever tokenizer_config.json names
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder
