"""The finished adapter as a peft folder, and merged into a bf16 checkpoint."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.data import overlap
from common.errors import ConfigError, ModelError
from common.event_kinds import Event
from common.model import base as model
from common.privacy import cost
from common.privacy import site_level as site_privacy
from common.run import config
from common.run.catalogue.kinds import KINDS
from common.run.manifest import RunManifest
from common.run.trainable import is_side
from common.text import prompts
from server.aggregate import factored
from server.evaluate import measure
from server.export import canonical, probe
from server.export import kind as export_kind
from server.export import tokenizer as export_tokenizer
from server.export.probe import Probe
from server.view import figures, gate
from server.view import polish as polish_view
from server.view.run_view import RunView

_CARDS = jinja2.Environment(  # noqa: S701  Markdown, no HTML
    loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined
)


def save_adapter(
    folder: Path,
    tensors: Tensors,
    *,
    run_manifest: RunManifest,
    num_rounds: int,
    sites: Mapping[str, int],
    log: Sequence[Event] = (),
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and a model card that plain peft loads.

    LoRA is written canonical (`server/export/canonical.py`), any other kind as peft saves it (`server/export/kind.py`).

    Args:
        log: The run's events: the card tells what was evaluated in it.

    Raises:
        StorageError: Disk full or not writable.
    """
    run = run_manifest.run
    base = shared_base(run.model.base)
    saved, made = finished(tensors, run.adapter, base=base)
    text = card(run_manifest, num_rounds=num_rounds, sites=sites, log=log, kind="adapter")
    canonical.save(folder, saved, base=base, card=text, made=made)


def finished(tensors: Tensors, settings: config.AdapterConfig, *, base: str) -> tuple[Tensors, PeftConfig | None]:
    """An adapter as peft's files have it: LoRA canonical, any other kind with the configuration that it needs.

    Args:
        base: See `shared_base`.
    """
    if settings.kind == "lora":
        return canonical.canonical(tensors, settings), None
    return export_kind.parts(tensors, settings, base=base or None)


def card(
    run_manifest: RunManifest,
    *,
    num_rounds: int,
    sites: Mapping[str, int],
    log: Sequence[Event],
    kind: str,
    licence: str = "",
    formats: Sequence[str] = (),
) -> str:
    """The model card.

    Args:
        kind: `adapter` for a peft folder, `folder` for a whole export.
        licence: What the base's own card says of its licence; empty: nothing.
    """
    settings = run_manifest.run
    is_lora = settings.adapter.kind == "lora"
    specs = canonical.specs(run_manifest.tensor_specs) if is_lora else run_manifest.tensor_specs
    view = RunView.of(log)
    polish = polish_view.stages(view)
    asked = view.polish_evaluated.get(polish[-1][0].number) if polish else None
    reached = measure.stage_of(num_rounds, last=settings.federation.num_rounds)
    label = polish_view.label(polish[-1][0].number, polish[-1][0].stage) if polish else reached
    spent = None  # what the rounds cost a site as a whole, where the run promises that
    if settings.privacy.mode == "site":
        num_updates = [view.rounds[each].num_updates if each in view.rounds else None for each in range(num_rounds)]
        spent = site_privacy.spent_by(settings, num_updates, num_taken=max(view.num_trainings.values(), default=0))
    text: str = _CARDS.get_template("card.md.j2").render(
        run=settings, manifest=run_manifest, sites=sites, num_rows=sum(sites.values()), num_rounds=num_rounds,
        rank=next((spec.shape[0] for spec in specs if is_lora and spec.name.endswith(factored.A_SUFFIX)), 0),
        title=KINDS[settings.adapter.kind].title, trained=trained(settings.adapter),
        has_side=any(is_side(spec.name) for spec in run_manifest.tensor_specs),
        num_parameters=adapter.num_parameters(specs),
        base=base_name(settings.model.base), is_path=is_path(settings.model.base),
        before=view.evaluated.get(0), after=asked or view.evaluated.get(num_rounds), is_asked=asked is not None,
        kind=kind, licence=licence, formats=formats,
        measured=view.measured.get(label) or view.measured.get(reached), view=figures,
        measured_before=view.measured.get(figures.BASE), privacy_wording=cost.wording(settings),
        epsilon=cost.epsilon(settings) if settings.privacy.mode == "unit" else None,
        spent=spent,
        gated=gate.of_export(list(view.gated.values()), view.stopped, stage=label),
        overlap=overlap.sentence(vars(view.overlap)) if view.overlap else "",
        task_overlaps=view.tasks_overlap.reasons if view.tasks_overlap else [],
        overlaps=[f"{stage.stage} {line}" for stage, _ in polish for line in polish_view.overlaps(stage)],
        system_prompt=settings.data.system_prompt, polish=polish, stage_kind=polish_view.kind,
        polish_private=polish_view.PRIVATE, polish_own=polish_view.OWN_DATA,
        gated_later=gate.later(event for event in view.gated_later if event.stage == label),
        derived=polish_view.derived_in_words(view.derived),
        has_own_gate=bool(view.derived and view.derived.has_own_gate),
    )  # fmt: skip
    return text


def trained(settings: config.AdapterConfig) -> str:
    """Kind and settings of the adapter, for people."""
    if settings.kind == "lora":
        title = f"LoRA r = {settings.r}, alpha = {settings.alpha}, {', '.join(settings.targets)}"
        return title + (", rsLoRA" if settings.use_rslora else "")
    values = {key: getattr(settings, key) for key in type(settings).model_fields if key != "kind"}
    shown = (f"{key} = {','.join(value) if key == 'targets' else value}" for key, value in values.items())
    return ", ".join([KINDS[settings.kind].title, *shown])


def is_path(base: str) -> bool:
    """Whether `model.base` is a folder of this machine and no name in a store or on a hub."""
    return base.startswith(("/", ".", "~")) or Path(base).is_dir()


def shared_base(base: str) -> str:
    """The base's name in peft's files: one that means the same elsewhere, or nothing."""
    return "" if is_path(base) else base


def base_name(base: str) -> str:
    """The base's name in what others read: of a path only its last part.

    Example:
        >>> base_name("/srv/models/eight-billion"), base_name("org/name")
        ('eight-billion', 'org/name')
    """
    return Path(base).name if is_path(base) else base


def merge(
    adapter_folder: Path,
    base_folder: Path,
    output_folder: Path,
    *,
    chat_template: prompts.TemplateName = "tokenizer",
    system_prompt: str = "",
    date: str = "",
    beside_btv: torch.Tensor | None = None,
) -> Probe:
    """Add an adapter to its base in float32, save the sum as a bf16 checkpoint, and hold its logits to the adapter's.

    Never merged into a quantised base: a small change is lost when it is quantised again. A layer that shares its
    weights with another, as the head of a tied base does, gets weights of its own (`server.export.probe.add_up`).

    Args:
        base_folder: The base, not quantised.
        output_folder: For the checkpoint; new or empty.
        chat_template: `model.chat_template` of the run: the tokenizer is saved with the template that was trained on.
        system_prompt: `data.system_prompt` of the run, which the template gives to conversations without their own.
        date: Day of the run, for a template that prints one.
        beside_btv: Probe logits (`server.export.probe.logits`) of base and adapters as the run has them; None: the
            folder's.

    Returns:
        What the probe found.

    Raises:
        ConfigError: The output folder holds something.
        ModelError: Base or adapter cannot be loaded, or do not fit, or the checkpoint is another function.
        StorageError: Disk full or not writable.
    """
    if output_folder.is_dir() and any(output_folder.iterdir()):
        raise ConfigError(f"{output_folder}: holds files already; give another folder")
    tokenizer = export_tokenizer.of_base(base_folder, chat_template, system_prompt=system_prompt, date=date)
    with _fitting(adapter_folder, base_folder), model.quiet_peft():
        network = PeftModel.from_pretrained(_float32(base_folder), str(adapter_folder))
        with network.disable_adapter():
            alone_btv = probe.logits(network)
        wanted_btv = probe.logits(network) if beside_btv is None else beside_btv
        merged = probe.add_up(network)
    summed_btv = probe.logits(merged)
    probe.round_weights(merged)
    rounded_btv = probe.logits(merged)
    merged.generation_config.eos_token_id = list(prompts.stop_ids(tokenizer, merged.generation_config))
    # Beside the target first, so that a half-written checkpoint never bears its name.
    partial = output_folder.with_name(f".{output_folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.to(torch.bfloat16).save_pretrained(partial)
        export_tokenizer.save(tokenizer, base_folder, partial)
        del network, merged  # before the next one: each is the whole base in float32
        with _fitting(adapter_folder, base_folder):
            saved_btv = probe.logits(_float32(partial))
        measured = Probe(
            effect=probe.difference(alone_btv, wanted_btv),
            summed=probe.difference(summed_btv, wanted_btv),
            rounding=probe.difference(rounded_btv, summed_btv),
            saved=probe.difference(saved_btv, rounded_btv),
        )
        measured.check(str(adapter_folder))
        partial.rename(output_folder)
    except OSError as error:
        raise storage.storage_error(output_folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return measured


@contextmanager
def _fitting(adapter_folder: Path, base_folder: Path) -> Iterator[None]:
    """Errors of transformers, peft and safetensors as one of ours."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = type(error).__name__
        raise ModelError(f"{adapter_folder}: does not fit the base in {base_folder} ({what})") from error


def _float32(folder: Path) -> Any:
    """A checkpoint as its users load it, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
