"""A base is probed where it is loaded: what would end a run later, or spoil it in silence, is refused before round 1.

What its files say is looked at in `common.model.base_files`. Here, layers: are the weights stored as the run claims,
and finite (`check_precision`, also on a skeleton without weights; `check_finite`). Function: is it a causal model
with finite logits, and does plain peft make the same function of a fresh adapter (`attach`).

Cost at load, for a base of 8 billion parameters: two forward passes and a backward pass of 2 rows of 16 tokens, one
read of the weights in memory, and an adapter that is attached three times; figures in docs/performance.md.

B rows, T tokens, V vocabulary, H width of an embedding.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from common.adapter import adapter, peft_config
from common.errors import ModelError
from common.model import base_files, codes, skeleton
from common.run.catalogue.kinds import Quantization
from common.run.schema.model import AdapterConfig, LoraAdapter

MIN_SHARE: Final = 0.5  # bases are at 0 to 13 % (experts, layers of a class of their own) or above 97 %
NUM_TOKENS: Final = 16
MAX_GRADIENT: Final = 1e-4
MAX_MOVED: Final = 0.1
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # of the logits' deviation
_PASSED: Final[set[Hashable]] = set()
_TRIAL_STD: Final = 0.1  # of B: with A of variance 1/3k the adapter's output is then near the layer's own


@dataclass(frozen=True)
class Precision:
    """How the matrices of a base's body are stored: all but embeddings and output head.

    Attributes:
        num_quantised: Values in 4-bit or 8-bit layers.
        num_body: Values in all matrices.
        others: Names of those that are not quantised, as the base calls them.
    """

    num_quantised: int
    num_body: int
    others: tuple[str, ...]

    @property
    def share(self) -> float:
        """Part of the body's values that is quantised; 0 to 1."""
        return self.num_quantised / max(self.num_body, 1)


def precision_of(base: nn.Module) -> Precision:
    """Count what of a base is quantised; a skeleton that was prepared for it will do."""
    quantised, others = 0, {}
    head = base.get_output_embeddings()  # type: ignore[operator]
    left_out = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    for name, module in base.named_modules():
        if codes.is_quantised(module):
            quantised += module.in_features * module.out_features
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in left_out:
                others[f"{name}.{key}"] = parameter.numel()
    return Precision(quantised, quantised + sum(others.values()), tuple(others))


def check_precision(base: nn.Module, claimed: Quantization) -> float:
    """Refuse a base of which most is not stored as the run says.

    bitsandbytes takes the place of plain linear layers alone: experts that are fused into one tensor, and layers of a
    class of their own, stay as they are, and then neither memory nor precision is what a run and a site's policy name.

    Args:
        base: Loaded, without an adapter; or a skeleton from `planned`.

    Returns:
        Part of the body's weights that is quantised; 0 for `none`.

    Raises:
        ModelError: Less than `MIN_SHARE`.
    """
    if claimed == "none":
        return 0.0
    found = precision_of(base)
    if found.share < MIN_SHARE:
        kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in found.others})  # of all layers at once
        raise ModelError(
            f"model.quantization = '{claimed}' reaches {100 * found.share:.0f} % of the weights of this base's layers: "
            f"bitsandbytes does not quantise {', '.join(kinds[:6])}{' and others' if len(kinds) > 6 else ''}; set "
            "model.quantization = 'none', or choose a base of plain linear layers"
        )
    return found.share


def planned_share(folder: Path, quantization: BitsAndBytesConfig | None) -> float:
    """`check_precision` of a base that is not loaded, by what the quantiser would put into its layers.

    Args:
        quantization: bitsandbytes' settings; None: it is not quantised.

    Raises:
        ModelError: The configuration cannot be read, or less than `MIN_SHARE` would be quantised.
    """
    if quantization is None:
        return 0.0
    base = skeleton.build(folder)
    quantiser = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    with torch.device("meta"):
        quantiser.preprocess_model(base, device_map=None)
    return check_precision(base, "nf4" if quantization.load_in_4bit else "int8")


def check_finite(base: nn.Module) -> None:
    """Refuse NaN and infinity among a base's weights; of 4-bit and 8-bit weights their scales are looked at.

    Raises:
        ModelError: Names the first tensor.
    """
    for name, values in _values(base):
        if values.numel() and not all(map(math.isfinite, torch.aminmax(values))):  # 40 times as fast as `isfinite`
            raise ModelError(
                f"the base's tensor {name} holds NaN or infinity; fetch the base again, or choose another: no training "
                "mends that"
            )


def trial_rows(tokenizer: PreTrainedTokenizerBase, base: Any) -> Tensor:
    """Two rows of which the first half is the same and the second half is not. Shape (2, T)."""
    limit = base_files.num_positions(base.config) or NUM_TOKENS
    text = [i for i in base_files.ids_of(tokenizer, base_files.TEXT) if i < base_files.num_rows(base.config)]
    half = max(1, min(NUM_TOKENS, limit) // 2)
    first = text[:half]
    later = text[half : 2 * half]
    other = [next((i for i in text[n:] + text[:n] if i != later[n]), later[n]) for n in range(len(later))]
    return torch.tensor([first + later, first + other], device=base.get_input_embeddings().weight.device)


def check_function(model: Any, ids_bt: Tensor) -> Tensor:
    """Refuse a model whose logits are not finite, or depend on tokens that come later: then it is no causal one.

    The gradient of the first half's logits in the embeddings of the second half is exactly zero in a causal model, in
    every precision: masked weights of attention are zeros. In a random encoder of two layers it is 0.4 % of the
    gradient in the first half's own and more (see the tests); the bound is 0.01 %. What no gradient sees, such as
    experts that choose among tokens, moves the logits of the first half between two rows that differ in the second:
    in a causal model by the rounding of sums in another order alone, for which 10 % of their deviation is allowed.

    Returns:
        The logits of these rows. Shape (B, T, V).

    Raises:
        ModelError: Which of the two it is.
    """
    logits_btv, gradient_bth = _with_gradient(model, ids_bt)
    if not bool(torch.isfinite(logits_btv).all()):
        raise ModelError(
            "the base's logits are not finite, though its weights are: the type of computation is too narrow "
            "for them; set model.dtype to 'bfloat16' or 'float32'"
        )
    half = ids_bt.shape[1] // 2
    reached = _rms(gradient_bth[0, half:]) / max(_rms(gradient_bth[0, :half]), torch.finfo(torch.float32).tiny)
    moved = _rms(logits_btv[0, :half] - logits_btv[1, :half]) / float(logits_btv.std())
    if reached > MAX_GRADIENT or moved > MAX_MOVED:
        raise ModelError(
            f"the logits of this base depend on later tokens (gradient {reached:.1g} of that of earlier ones, moved "
            f"{moved:.1g} of their deviation): it is an encoder, or masks nothing, and cannot be trained to write; "
            "choose a causal language model"
        )
    return logits_btv


def attach(
    base: Any,
    ids_bt: Tensor,
    *,
    fresh: Callable[[Any], Any],
    settings: AdapterConfig,
    dtype: torch.dtype,
    key: Hashable,
) -> Any:
    """Attach a fresh adapter to a base that is found to be a causal model, and that plain peft can have it on too.

    LoRA is attached, given values, taken off, and attached again by peft's own means from what an export says of it:
    the same logits must come out. No second base is loaded, and no file is written. Other kinds name their layers in
    full from the start, in training as in an export, so they are attached once.

    Args:
        fresh: Attaches the run's adapter to a base.
        key: All that decides how this ends; what passed once in a process is not tried again.

    Returns:
        The base with the adapter as `fresh` attaches it.

    Raises:
        ModelError: Weights or logits are not finite, logits not causal, or plain peft refuses the adapter or makes
            another function of it.
    """
    if key in _PASSED:
        return fresh(base)
    check_finite(base)
    model = fresh(base)
    was_training = model.training
    model.eval()
    if settings.kind != "lora":
        check_function(model, ids_bt)
        _PASSED.add(key)
        return model.train(was_training)
    with torch.random.fork_rng(), torch.no_grad():  # values for B, so that the adapter changes what the base does
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape) * _TRIAL_STD)
    ours_btv = check_function(model, ids_bt)
    pair = adapter.read(model)
    theirs = _by_plain_peft(model.unload(), pair, settings)
    is_exact = codes.quantization_of(base) != "int8"
    with torch.no_grad():
        theirs_btv = _logits(theirs, ids_bt)
    check_same(theirs_btv, ours_btv, dtype=dtype, is_exact=is_exact)
    _PASSED.add(key)
    return fresh(theirs.unload()).train(was_training)


def check_targets(model: Any, settings: LoraAdapter, *, remedy: str) -> None:
    """Refuse LoRA on anything but linear layers, and a name that matches none: peft is content with one that does.

    Experts that are fused into one tensor get factors for all of them at once (peft's `target_parameters`). No plain
    adapter, method of aggregation or export has these.

    Raises:
        ModelError: Names the tensor or the target.
    """
    if fused := sorted(model.targeted_parameter_names):
        raise ModelError(
            f"adapter.targets = '{', '.join(settings.targets)}' would train {len(fused)} tensors that are no linear "
            f"layers, such as {fused[0]}, and no export can hold such an adapter; {remedy}"
        )
    if odd := [name for name in adapter.parameters(model) if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ModelError(f"adapter.targets = '{', '.join(settings.targets)}' would train {odd[0]}; {remedy}")
    matched = {f".{name}" for name in model.targeted_module_names}
    for wanted in settings.targets:
        if wanted != "all-linear" and not any(name.endswith(f".{wanted}") for name in matched):
            raise ModelError(f"adapter.targets: '{wanted}' matches no module; {remedy}")


def linear_names(base: Any) -> list[str]:
    """Last names of the linear modules that an adapter could target, the output head aside."""
    kinds, head = (nn.Linear, Conv1D), base.get_output_embeddings()
    linears = [name for name, module in base.named_modules() if isinstance(module, kinds) and module is not head]
    return sorted({name.rpartition(".")[2] for name in linears})


def check_same(theirs_btv: Tensor, ours_btv: Tensor, *, dtype: torch.dtype, is_exact: bool = True) -> None:
    """Refuse an adapter of which plain peft makes another function.

    Args:
        theirs_btv: Logits with the adapter as plain peft loads it.
        ours_btv: Logits with the run's.
        is_exact: Whether the base computes in that type, and not in 8-bit integers.

    Raises:
        ModelError: They differ by more than rounding.
    """
    apart = _rms(theirs_btv.float() - ours_btv.float()) / float(ours_btv.float().std())
    if not apart <= (TOLERANCE[dtype] if is_exact else TOLERANCE[torch.bfloat16]):
        raise ModelError(
            f"plain peft makes another function of this adapter (logits differ by {100 * apart:.1f} % of their "
            "deviation), so no export of it would be right; choose other adapter.targets"
        )


def _by_plain_peft(base: Any, pair: adapter.Tensors, settings: LoraAdapter) -> Any:
    """A base with LoRA as peft loads it from an export: scale 1, every module named in full."""
    scaled = {name: settings.scale * value if ".lora_B." in name else value for name, value in pair.items()}
    modules = adapter.module_names(adapter.specs(pair))
    try:
        model = get_peft_model(base, peft_config.canonical(settings.r, modules), low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
        adapter.check_specs(adapter.specs(saved), adapter.specs(pair))
        set_peft_model_state_dict(model, scaled, low_cpu_mem_usage=True)
    except (ValueError, KeyError, RuntimeError, ModelError) as error:
        raise ModelError(
            f"adapter.targets = '{', '.join(settings.targets)}': plain peft cannot load such an adapter on this base "
            f"({type(error).__name__}); choose other layers"
        ) from error
    return model.eval()


def _logits(model: Any, ids_bt: Tensor) -> Tensor:
    """Logits of some rows, without those of virtual tokens, float32. Shape (B, T, V)."""
    found_btv: Tensor = model(input_ids=ids_bt, attention_mask=torch.ones_like(ids_bt), use_cache=False).logits
    return found_btv[:, -ids_bt.shape[1] :].float()


def _with_gradient(model: Any, ids_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the first half of the first row's in its embeddings. Shapes (B, T, V), (B, T, H)."""
    seen: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, made: seen.append(made.requires_grad_()))
    try:
        with torch.enable_grad():  # whoever loads a base may have turned gradients off
            logits_btv = _logits(model, ids_bt)
            aim = logits_btv[0, : ids_bt.shape[1] // 2].square().mean()
    finally:
        hook.remove()
    (gradient_bth,) = torch.autograd.grad(aim, seen[-1])
    return logits_btv.detach(), gradient_bth.float()


def _rms(values: Tensor) -> float:
    """Root of the mean square."""
    return float(values.square().mean().sqrt())


def _values(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor that a base computes with, under the name of its weight."""
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point():
            yield name, parameter.detach()
    layers: Any = base.named_modules()
    for name, module in layers:
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state
            yield f"{name}.weight", state.state2.absmax if state.nested else state.absmax
            if state.nested:
                yield f"{name}.weight", state.offset
        elif codes.is_quantised(module):
            yield f"{name}.weight", module.weight.SCB if module.state.SCB is None else module.state.SCB
