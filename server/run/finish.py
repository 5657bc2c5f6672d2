"""After the rounds: any checkpoint of a run folder as a finished adapter."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common import events
from common.adapter import adapter
from common.errors import ConfigError
from common.model import base as model
from common.model import store
from common.run import later as config_later
from common.run.catalogue.methods import FACTS
from common.trust import identity
from server.evaluate import measure
from server.export import adapter as export
from server.export import folder as export_folder
from server.export import kind
from server.export.folder import Exported
from server.folder import checkpoint, lock, run_files
from server.gate import decide
from server.gate.decide import Candidate
from server.polish import addendum, stages
from server.run import export as run_export
from server.run import later
from server.view import gate as words
from server.view import polish
from server.view.run_view import RunView


def export_run(
    run_folder: Path, *, num_rounds: int, output: Path | None, merged: Path | None, base: Path | None
) -> dict[str, str]:
    """Export a checkpoint of a run, finished or not.

    Args:
        run_folder: The run.
        num_rounds: Which checkpoint; 0 is the newest.
        output: For the peft folder; None is `adapter` in the run's folder.
        merged: For a merged bf16 checkpoint; None makes none.
        base: The base's folder; None looks for the run's base in the store.

    Returns:
        Paths of what was written.

    Raises:
        DataError: No such checkpoint.
        ConfigError: The folder for the merged checkpoint holds something, or this kind of adapter cannot be merged.
        ModelError: The checkpoint is damaged, or the base is not here or another one.
        RunBusyError: The run is live and its own folder is to be written into; give `output`.
        StorageError: Disk full or not writable.
    """
    found = stored(run_folder, num_rounds=num_rounds)
    if merged:
        kind.check_mergeable(found.run_manifest.run.adapter.kind)
    adapter_folder = output or run_folder / run_files.EXPORT_FOLDER
    with nullcontext() if output else lock.hold(run_folder):
        export.save_adapter(
            adapter_folder, found.tensors, run_manifest=found.run_manifest, num_rounds=found.num_rounds,
            sites=found.sites, log=found.log,
        )  # fmt: skip
    written = {"adapter": str(adapter_folder)}
    if merged:
        export.merge(
            adapter_folder, base_of(found, base), merged, chat_template=found.run_manifest.run.model.chat_template,
            system_prompt=found.run_manifest.run.data.system_prompt, date=found.run_manifest.date,
        )  # fmt: skip
        written["merged"] = str(merged)
    return written


def export_to(
    run_folder: Path,
    folder: Path,
    *,
    formats: str,
    num_rounds: int,
    base: Path | None,
    llama_cpp: Path | None,
    sign_with: Path | None,
    gguf_type: str = "",
    rows: Path | None = None,
) -> dict[str, object]:
    """Export a checkpoint of a run as a sealed folder, which `verify` can check.

    Args:
        run_folder: The run.
        folder: A new one.
        formats: Some of `seal.FORMATS`, with commas; empty: peft.
        num_rounds: Which checkpoint; 0 is the newest.
        base: The base's folder; None looks for the run's base in the store.
        llama_cpp: A checkout of llama.cpp that writes the GGUF file; None: it is written here.
        sign_with: The operator's key file; None leaves the folder unsigned.
        gguf_type: One of `export_gguf.TYPES`; empty: bf16.
        rows: A file on which merged weights are held against base and adapters side by side; None takes the run's
            `evaluation.server_data` where it is still there.

    Returns:
        The folder, its formats, the signer's public key, empty if there is none, and the file of rows, likewise.

    Raises:
        DataError: No such checkpoint.
        ConfigError: The folder holds something, the key cannot be used, or a format is impossible here.
        ModelError: The checkpoint is damaged, or the base is not here or another one.
        StorageError: Disk full or not writable.
    """
    asked = export_folder.parse_formats(formats or "peft")
    if gguf_type and "gguf" not in asked:
        raise ConfigError("--gguf-type is for the format gguf; add it to --formats")
    is_merged = bool(export_folder.NEED_BASE & set(asked))
    if rows and not is_merged:
        raise ConfigError("--rows is for merged weights; add merged, nf4, int8, gguf or onnx to --formats")
    key = identity.load(sign_with) if sign_with else None
    found = stored(run_folder, num_rounds=num_rounds)
    base_folder = base_of(found, base) if base or is_merged else None
    taken = (rows or _own_rows(found)) if is_merged else None
    export_folder.write(
        folder, found, formats=asked, base=base_folder, llama_cpp=llama_cpp, key=key, gguf_type=gguf_type or "bf16",
        rows=taken,
    )  # fmt: skip
    signer = identity.public_hex(key) if key else ""
    return {"folder": str(folder), "formats": ", ".join(asked), "signer": signer, "rows": str(taken or "")}


def _own_rows(found: Exported) -> Path | None:
    """The coordinator's held-out rows of the run, where they are still there."""
    return run_export.where_there(found.run_manifest.run.evaluation.server_data)


def refuse_beside_to(**options: Path | None) -> None:
    """What `--to` writes itself, or elsewhere.

    Raises:
        ConfigError: One of the options was given.
    """
    if given := [name for name, value in options.items() if value]:
        raise ConfigError(f"--to writes all formats into one folder; leave --{given[0]} out")


def refuse_without_to(**options: object) -> None:
    """What only a sealed folder has.

    Raises:
        ConfigError: One of the options was given.
    """
    if given := [name.replace("_", "-") for name, value in options.items() if value]:
        raise ConfigError(f"--{given[0]} is for a sealed folder; give --to DIR")


def gate_again(run_folder: Path) -> dict[str, Any]:
    """Judge a run's checkpoints anew by its own gate.

    Returns:
        `passed`: label of what passes, empty if nothing does; `gated`: events; `in_words`: lines for people.

    Raises:
        ConfigError: The run has no gate, or no checkpoint.
        RunBusyError: Another process is at work in the folder.
    """
    judged = decide.judge_again(run_folder, run_files.stored_manifest(run_folder))
    if not judged:
        raise ConfigError(
            f"{run_folder}: the run has no gate or no checkpoint; give rules with --rules FILE, or [gate] in a run file"
        )
    passed = judged[-1].stage if judged[-1].is_passed else ""
    return {"passed": passed, "gated": [event.as_dict() for event in judged], "in_words": words.summary(judged)}


def gate_by(run_folder: Path, rules_file: Path) -> dict[str, Any]:
    """Judge what a run exports by rules that came after its end; see `decide.judge_by`.

    Returns:
        As of `gate_again`.

    Raises:
        ConfigError: The file has problems, its rules do not fit the run, or need figures of sites of an adapter that no
            site has scored.
        GateRefused: The run's own gate lets nothing pass.
        RunBusyError: Another process is at work in the folder.
    """
    gate = config_later.load_rules(rules_file)
    found = stored(run_folder, num_rounds=0, is_judged_later=True)
    settings, view = found.run_manifest.run, RunView.of(found.log)
    polished = [event for event, _ in polish.stages(view)]
    if polished and polished[-1].number not in view.polish_evaluated:
        later.refuse_site_rules(gate.kinds, whose=str(rules_file))
    reached = measure.stage_of(found.num_rounds, last=settings.federation.num_rounds)
    label = polish.label(polished[-1].number, polished[-1].stage) if polished else reached
    names = tuple(event.stage for event in polished)
    newest = Candidate(label, found.num_rounds, found.tensors, names)
    event = decide.judge_by(run_folder, found.run_manifest, gate, newest)
    return {"passed": label if event.is_passed else "", "gated": [event.as_dict()], "in_words": words.later([event])}


def stored(run_folder: Path, *, num_rounds: int, is_judged_later: bool = False) -> Exported:
    """A checkpoint of a run; 0 is the newest, polish stages included, and of a run with a gate the newest that passed.

    Args:
        run_folder: The run.
        num_rounds: Which checkpoint.
        is_judged_later: It is about to be judged by other rules, so that what such rules said of it does not count.

    Raises:
        ConfigError: The sites have adapters of their own, and the coordinator has none.
        DataError: No such checkpoint.
        GateRefused: The run's gate did not let it pass.
        ModelError: It is damaged.
    """
    found = run_files.stored_manifest(run_folder)
    addendum.read(run_folder)  # one that was changed is found
    if FACTS[found.run.aggregation.method].is_personal:
        raise ConfigError(
            f"{run_folder}: under aggregation.method = '{found.run.aggregation.method}' each site has an adapter of "
            "its own, and the coordinator none; at a site: silotune-client export-adapter NODE.toml RUN FOLDER"
        )
    done = run_files.finished(run_folder)
    log = events.read(run_folder / events.FILE)
    view = RunView.of(log)
    passed = None if num_rounds else decide.exported(found.run, view)
    wanted = num_rounds or (passed.num_rounds if passed else done[-1] if done else 0)
    state = checkpoint.load(run_folder, found.tensor_specs, num_rounds=wanted, run_sha256=found.sha256)
    tensors, names = state.tensors, tuple[str, ...]()
    for stage in stages.finished(run_folder, found, state.tensors) if not num_rounds and wanted == done[-1] else ():
        if passed is None or stage.label <= passed.stage:
            tensors, names = stage.tensors, stage.names
    decide.require(found.run, view, adapter_sha256=adapter.digest(tensors), is_judged_later=is_judged_later)
    return Exported(tensors, found, wanted, view.trained_sites(wanted), polish.of_export(log, names))


def base_of(found: Exported, given: Path | None) -> Path:
    """The run's base: the very files that it was trained on.

    Args:
        found: A checkpoint.
        given: The base's folder; None looks for it in the store.

    Raises:
        ModelError: The base is not here, or another one.
    """
    folder = given or store.resolve(found.run_manifest.run.model.base)
    model.check_hash(folder, found.run_manifest.base_sha256)
    return folder
