"""What a run needs at a site: policy, base, memory, rows, disk and an audit log that is whole."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from client.agent import gatekeeper
from client.data import check as data_check
from client.data import site_files
from client.memory import consent, history
from client.policy import file as policy_file
from client.policy import rules as policy
from client.policy.file import Policy
from common.doctor import checks
from common.doctor.doctor import Result, check, count, failed, ok, size, skipped, warning
from common.errors import ConfigError, DataError, ModelError, SilotuneError
from common.model import size as base_size
from common.model.size import Work
from common.run import config, manifest, trainable
from common.run.manifest import RunManifest
from common.run.schema import precisions
from common.run.schema.model import FACTORS, LoraAdapter
from common.trust import audit_log, governance, identity, kit

LOG_BYTES: Final = 256 << 20  # offers of up to 4 MiB, and both logs
RUNTIME_BYTES: Final = 1 << 30  # torch and, on a GPU, its context
MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True)
class Device:
    """The processor or GPU that trains.

    Attributes:
        free_bytes: Memory that a run may use.
    """

    name: str
    is_cuda: bool
    free_bytes: int


@check(
    "policy", remedy="correct the policy, raise its serial and sign it: silotune-client sign-policy POLICY --key KEY"
)
def rules(agent: config.AgentConfig, data: config.NodeDataConfig, folder: Path | None) -> Result:
    """Check the policy's form and signature, and that it fits the governance pinned in `folder` and the site's file."""
    if not agent.policy:
        remedy = "edit policy.toml, sign it, and set agent.policy, policy_signer and identity_key"
        return warning("none: every run is taken that a SuperLink sends", remedy)
    signed = policy_file.load(Path(agent.policy), signer=agent.policy_signer)
    pinned = folder / kit.PINNED if folder is not None else None
    if pinned is not None and pinned.exists():
        federation_id = governance.load(pinned).federation_id
        if signed.rules.federation.id != federation_id:
            return failed(f"it is for federation {signed.rules.federation.id}, this site is in {federation_id}")
    policy.check_node(signed.rules, data)
    return ok(f"serial {signed.rules.serial}, signed by {agent.policy_signer[:12]}, allows the site's own file")


@check("audit log", remedy="find out who changed it; restore the log from a backup, and tell the coordinator")
def audited(agent: config.AgentConfig) -> Result:
    """Check every line of the audit log, and that the policy is no older than one that was in force."""
    if not agent.identity_key:
        return skipped("none is kept: the site has no policy", "set agent.policy and agent.identity_key")
    past, num_entries = read_history(agent)
    if not num_entries:
        return ok("none yet; the agent begins it at its first start")
    with suppress(ConfigError):  # which the policy's own check reports
        gatekeeper.check_serial(policy_file.load(Path(agent.policy), signer=agent.policy_signer), past)
    return ok(f"entries: {num_entries:,}, whole; {count(len(past.runs), 'run')}")


@check("policy in force", remedy="restart the agent: systemctl restart silotune-agent")
def in_force(agent: config.AgentConfig, *, is_running: bool) -> Result:
    """Compare the policy's file with the one that the running agent began with, by its audit log."""
    if not agent.policy:
        return skipped("there is no policy")
    signed = policy_file.load(Path(agent.policy), signer=agent.policy_signer)
    if not is_running:
        return ok(f"no agent runs; the next one begins with serial {signed.rules.serial}")
    past, _ = read_history(agent)
    if past.policy_sha256 != signed.sha256:
        began = f"with serial {past.serial}" if past.serial >= 0 else "without a policy"
        return failed(f"the running agent began {began}; the file, with serial {signed.rules.serial}, is another one")
    return ok(f"serial {past.serial}, with which the running agent began")


@check("data", remedy="correct the file; silotune-client check NODE.toml names every problem")
def rows(data: config.NodeDataConfig, allowed: Policy | None) -> Result:
    """Count the rows, and hold the counts against the policy; no text of a row is shown."""
    paths = [path for path in (data.path, data.held_out_path) if path]
    for path in paths:
        if not Path(path).expanduser().exists():  # else it would be taken for the name of a data set
            raise DataError(f"{path}: no such file or folder; correct data.path")
    unit_column = data.unit_column
    read = {path: site_files.read_rows(data, path) for path in paths}
    apart = (data_check.told_apart(rows, path=path, unit_column=unit_column) for path, rows in read.items())
    report = data_check.check([row for rows in apart for row in rows])
    text = f"{count(report.num_rows, 'row')} of {count(report.num_units, 'unit')}"
    text += f"; {count(report.num_duplicates, 'duplicate')}"
    if report.num_units_alike:
        text += f"; {count(report.num_units_alike, 'unit')} whose names a reader may take for another's (see check)"
    if allowed is None:
        return ok(text)
    limits = policy.check_node(allowed, data)
    if report.num_rows > limits.max_rows:
        return failed(f"{text}; the policy allows {limits.max_rows:,}", "raise max_rows in the policy, or remove rows")
    if report.num_rows < allowed.train.min_records:
        least = f"the policy's train.min_records is {allowed.train.min_records:,}"
        return failed(f"{text}; {least}", "every run will be refused: add rows, or lower it and sign the policy again")
    return ok(f"{text}; columns and number as the policy allows")


@check("base models", remedy="copy the base into the store, or fetch it: silotune-sim base NAME --store STORE")
def bases(bases: Mapping[str, Path], allowed: Policy | None, *, store: str) -> Result:
    """Hold the bases that are here, hash of their files to folder, against the policy; None allows any base."""
    from common.model import base_files  # loads transformers

    if not bases:
        return failed(f"no base model in {store}")
    listed = {base.sha256 for base in allowed.models.allow} if allowed else set(bases)
    shown = {sha256: sha256[:12] if sha256 in listed else sha256 for sha256 in bases}  # whole, to be listed
    here = ", ".join(f"{folder.name} ({shown[sha256]})" for sha256, folder in bases.items())
    for folder in [folder for sha256, folder in bases.items() if sha256 in listed]:
        base_files.tokenizer_of(folder)
        base_files.check_unquantised(folder)
    if allowed is None:
        return ok(f"{here} in {store}")
    if not allowed.models.allow:
        return warning(f"{here} here; the policy allows none", "list one under models.allow, and sign the policy again")
    missing = [f"{base.name} ({base.sha256[:12]})" for base in allowed.models.allow if base.sha256 not in bases]
    text = f"{here} here; the policy allows {', '.join(f'{b.name} ({b.sha256[:12]})' for b in allowed.models.allow)}"
    if len(missing) == len(allowed.models.allow):
        return failed(text)
    return warning(f"{text}; {', '.join(missing)} is not here") if missing else ok(text)


@check("memory", remedy="use a smaller base or a machine with more memory")
def memory(folder: Path | None, work: Work, device: Device) -> Result:
    """Estimate what training on the base in a folder needs, and compare it with what is free."""
    import torch

    from common.model import base as model
    from common.model import probe

    if folder is None:
        return skipped("there is no base to estimate it for")
    shape = base_size.read(folder)
    most = base_size.estimate(shape, work)
    least = base_size.estimate(shape, replace(work, num_rows=1, is_checkpointing=True)).total + RUNTIME_BYTES
    parts = f"base {size(most.base)} ({work.quantization}), adapter {size(most.adapter)} (rank {work.r})"
    text = (
        f"{folder.name}: about {size(most.total + RUNTIME_BYTES)} of {size(device.free_bytes)} on {device.name} for "
        f"{work.num_rows} rows of {work.num_tokens} tokens: {parts}, activations {size(most.activations)}, runtime "
        f"{size(RUNTIME_BYTES)}. Estimated from the shapes in its safetensors files"
    )
    if not device.is_cuda:
        text += ". No GPU is used: that works, and is slow"
    # A base of which little would be quantised is an error.
    settings = config.ModelConfig.model_validate({"base": str(folder), "quantization": work.quantization})
    if share := probe.planned_share(folder, model.quantization_config(settings, torch.float32)):
        text += f". {work.quantization} reaches {100 * share:.0f} % of the weights of its layers"
    if least > device.free_bytes:
        return failed(f"{text}. Even one row with checkpointing needs {size(least)}")
    if most.total + RUNTIME_BYTES > device.free_bytes:
        remedy = "the run must set training.micro_batch_size = 1 and gradient_checkpointing = true, or shorter rows"
        return warning(f"{text}. One row with checkpointing needs {size(least)}", remedy)
    return ok(text)


@check("memory", remedy="set hardware.device to what this machine has; see: silotune-client runs NODE.toml")
def memory_of(
    run: str,
    agent: config.AgentConfig,
    allowed: Policy | None,
    bases: Mapping[str, Path],
    *,
    device_name: str,
    agent_pid: int | None,
    site: str,
) -> Result:
    """Estimate memory for the run that was named, or for the largest that is allowed."""
    device = device_of(device_name, agent_pid=agent_pid)
    if run:
        asked = offered(agent, run)
        settings = asked.run
        work = work_of(
            settings.model,
            settings.adapter,
            settings.training,
            num_tokens=settings.data.max_length_tokens,
            device=device,
            site=site,
        )
        num_trained = trainable.num_values(asked.tensor_specs)
        return memory(bases.get(asked.base_sha256), replace(work, num_trained=num_trained), device)
    listed = [base.sha256 for base in allowed.models.allow] if allowed else list(bases)
    folders = [bases[sha256] for sha256 in listed if sha256 in bases]
    largest = max(folders, key=lambda folder: sum(f.stat().st_size for f in folder.glob("*.safetensors")), default=None)
    return memory(largest, largest_work(allowed, device), device)


def disk(log_folder: Path) -> Result:
    """Check that offers and logs can be written."""
    return checks.disk(log_folder, need_bytes=LOG_BYTES, what="offers and logs")


@check("disk of bases", remedy="free space, or set model.store to a folder on another disk")
def store_disk(bases: Mapping[str, Path], store: Path) -> Result:
    """Check that another base as large as the largest one here has room; a warning only, as none may be needed."""
    if not bases:
        return skipped("there is no base to go by")
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in bases.values()]
    result = checks.disk(store, need_bytes=max(sizes), what="another base like the largest here")
    status = "warning" if result.status == "failed" else result.status
    return replace(result, status=status)


def load_policy(agent: config.AgentConfig) -> Policy | None:
    """The policy, if there is one that can be used."""
    if agent.policy:
        with suppress(SilotuneError):  # which the policy's own check reports
            return policy_file.load(Path(agent.policy), signer=agent.policy_signer).rules
    return None


def read_history(agent: config.AgentConfig) -> tuple[history.History, int]:
    """What the audit log says, and the number of its entries; the file is only read.

    Raises:
        AuditError: The log is not whole.
        ConfigError: The key cannot be read.
    """
    past, num_entries = history.History(), 0
    path = Path(agent.log_folder) / history.AUDIT_FILE
    public = identity.public_hex(identity.load(Path(agent.identity_key)))
    if path.exists():
        for entry in audit_log.read(path, public):
            past.take(entry)
            num_entries += 1
    return past, num_entries


def offered(agent: config.AgentConfig, name: str) -> RunManifest:
    """The manifest of a run that was offered."""
    if not agent.identity_key:
        raise ConfigError("--run: without a policy no offer is kept; leave it out")
    past, _ = read_history(agent)
    return manifest.parse(consent.load(Path(agent.log_folder), consent.find(past, name)).manifest)


def find_bases(model: config.NodeModelConfig) -> dict[str, Path]:
    """The bases here, by the hash of their files; what is no whole base is left out."""
    from common.model.base import hash_base  # loads torch

    folders: dict[str, Path] = {}
    for folder in site_files.base_folders(model):
        with suppress(ModelError):
            folders[hash_base(folder)] = folder
    return folders


def device_of(name: str, *, agent_pid: int | None) -> Device:
    """What the site trains on.

    Args:
        name: `hardware.device`.
        agent_pid: The running agent; it may hold a base, so its memory counts as free, and a GPU's is counted whole.

    Raises:
        ModelError: CUDA was asked for by name and is not there.
    """
    import torch

    from common.model.base import choose_device

    if choose_device(name).type == "cpu":
        return Device("cpu", False, _kib(MEMINFO, "MemAvailable:") + _kib(Path(f"/proc/{agent_pid}/status"), "VmRSS:"))
    free, whole = torch.cuda.mem_get_info()
    return Device(f"cuda ({torch.cuda.get_device_name()})", True, free if agent_pid is None else whole)


def work_of(
    model: config.ModelConfig,
    adapter: config.AdapterConfig,
    training: config.TrainingConfig,
    *,
    num_tokens: int,
    device: Device,
    site: str = "",
) -> Work:
    """What a run does with its base, at a site of this name, on rows of so many tokens."""
    automatic = "bfloat16" if device.is_cuda else "float32"
    return Work(
        quantization=precisions.of_site(model, site),
        double_quantization=model.double_quantization,
        dtype=automatic if model.dtype == "auto" else model.dtype,
        targets=adapter.layers,
        r=adapter.r if isinstance(adapter, FACTORS) else LoraAdapter().r,
        num_rows=max(1, training.micro_batch_tokens // num_tokens)
        if training.micro_batch_tokens
        else training.micro_batch_size or training.batch_size,
        num_tokens=num_tokens,
        is_checkpointing=training.gradient_checkpointing,
        is_adam=training.optimizer.kind == "adamw",
    )


def largest_work(allowed: Policy | None, device: Device) -> Work:
    """What the policy allows at most, at the run file's default batch; without a policy, the defaults."""
    sections = (config.ModelConfig(base="any"), LoraAdapter(), config.TrainingConfig())
    work = work_of(*sections, num_tokens=config.DataConfig().max_length_tokens, device=device)
    if allowed is None:
        return work
    listed = [quantization for base in allowed.models.allow for quantization in base.quantization]
    return replace(
        work,
        quantization=next((name for name in ("nf4", "int8") if name in listed), "none"),
        targets=allowed.lora.targets,
        r=allowed.lora.r[1],
        num_tokens=allowed.train.max_length_tokens,
    )


def _kib(path: Path, field: str) -> int:
    """A figure that the kernel gives in KiB, as bytes; 0 where there is no such process."""
    try:
        fields = (line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    return next((int(words[1]) << 10 for words in fields if words and words[0] == field), 0)
