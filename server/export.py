"""The finished adapter as a peft folder, and merged into a bf16 checkpoint."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import jinja2
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import adapter, config, model, privacy_plan, storage
from common.adapter import Tensors
from common.errors import ConfigError, ModelError
from common.manifest import RunManifest
from server.aggregate import factored

CARD_TEMPLATE = Path(__file__).with_name("card.md.j2")


def save_adapter(
    folder: Path, tensors: Tensors, *, run_manifest: RunManifest, num_rounds: int, sites: Mapping[str, int]
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and a model card that plain peft loads.

    Args:
        folder: Where to.
        tensors: The adapter, under peft's names.
        run_manifest: The run that made it.
        num_rounds: Rounds behind it.
        sites: Training rows by site.

    Raises:
        StorageError: Disk full or not writable.
    """
    settings = run_manifest.run
    found, shape = _as_one(tensors, settings.adapter)
    storage.write_atomic(folder / "adapter_model.safetensors", adapter.encode(found, dtype="float32"))
    _save_peft_config(folder, settings, shape, adapter.module_names(run_manifest.tensor_specs))
    card = jinja2.Template(CARD_TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined).render(
        run=settings, shape=shape, manifest=run_manifest, sites=sites, num_rows=sum(sites.values()),
        num_rounds=num_rounds,
        num_parameters=adapter.num_parameters(adapter.specs(found)), base=base_name(settings.model.base),
        is_path=is_path(settings.model.base), privacy_wording=privacy_plan.FIXED_WORDING,
        epsilon=privacy_plan.epsilon(settings) if privacy_plan.is_private(settings) else None,
    )  # fmt: skip
    storage.write_atomic(folder / "README.md", card.encode())


def is_path(base: str) -> bool:
    """Whether `model.base` is a folder of this machine and no name in a store or on a hub."""
    return base.startswith(("/", ".", "~")) or Path(base).is_dir()


def base_name(base: str) -> str:
    """What others are told of the base: of a path only its last part.

    Example:
        >>> base_name("/srv/models/eight-billion"), base_name("org/name")
        ('eight-billion', 'org/name')
    """
    return Path(base).name if is_path(base) else base


def merge(adapter_folder: Path, base_folder: Path, output_folder: Path) -> None:
    """Add an adapter to its base in float32 and save the sum as a bf16 checkpoint.

    Never merged into a quantised base: a small change is lost when it is quantised again.

    Raises:
        ConfigError: The output folder holds something.
        ModelError: Base or adapter cannot be loaded, or do not fit.
        StorageError: Disk full or not writable.
    """
    if output_folder.is_dir() and any(output_folder.iterdir()):
        raise ConfigError(f"{output_folder}: holds files already; give another folder")
    try:
        base = AutoModelForCausalLM.from_pretrained(
            base_folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        with model.quiet_peft():
            merged = PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = type(error).__name__
        raise ModelError(f"{adapter_folder}: does not fit the base in {base_folder} ({what})") from error
    _save_merged(merged.to(torch.bfloat16), base_folder, output_folder)


def _save_merged(merged: torch.nn.Module, base_folder: Path, output_folder: Path) -> None:
    """Into a folder beside the target first, so that a half-written checkpoint never bears its name."""
    partial = output_folder.with_name(f".{output_folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.save_pretrained(partial)  # type: ignore[operator]
        AutoTokenizer.from_pretrained(base_folder, local_files_only=True).save_pretrained(partial)
        partial.rename(output_folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise storage.storage_error(output_folder, error) from error


def _as_one(tensors: Tensors, settings: config.AdapterConfig) -> tuple[Tensors, config.AdapterConfig]:
    """An adapter with what was kept beside it as one adapter of both ranks: B A + U V = [B, U] [A; V]."""
    beside = factored.side(tensors)
    if not beside:
        return tensors, settings
    pairs = factored.effective(tensors)
    rank = settings.r + next(iter(beside.values()))[1].shape[0]
    shape = settings.model_copy(update={"r": rank, "alpha": settings.scale * rank, "use_rslora": False})
    return {name: tensor for module in pairs for name, tensor in factored.named(module, *pairs[module]).items()}, shape


def _save_peft_config(
    folder: Path, settings: config.RunConfig, shape: config.AdapterConfig, modules: list[str]
) -> None:
    """peft's own file, targets spelt out, without a path of this machine."""
    lora = model.lora_config(shape)
    if settings.adapter.targets == "all-linear":
        lora.target_modules = sorted({name.rsplit(".", 1)[-1] for name in modules})
    lora.base_model_name_or_path = None if is_path(settings.model.base) else settings.model.base
    lora.inference_mode = True
    try:
        lora.save_pretrained(str(folder))
    except OSError as error:
        raise storage.storage_error(folder, error) from error
