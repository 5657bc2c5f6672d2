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
from common.model.size import Memory, Work
from common.run import config, manifest
from common.run.manifest import RunManifest
from common.run.schema import precisions
from common.trust import audit_log, governance, identity, kit

LOG_BYTES: Final = 256 << 20  # offers of up to 4 MiB, and both logs
RUNTIME_BYTES: Final = 1 << 30  # torch and, on a GPU, its context
DEFAULTS: Final = 'version = 1\nmodel.base = "any"\nprivacy.mode = "none"'
MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True)
class Device:
    """What is trained on.

    Attributes:
        name: Such as `cpu` or `cuda (NVIDIA T4)`.
        is_cuda: Whether it is a GPU.
        free_bytes: Memory that a run may use.
    """

    name: str
    is_cuda: bool
    free_bytes: int


@check(
    "policy", remedy="correct the policy, raise its serial and sign it: silotune-client sign-policy POLICY --key KEY"
)
def rules(node: config.NodeConfig, folder: Path | None) -> Result:
    """Check the policy's form and signature, and that it fits the pinned federation and the site's own file.

    Args:
        node: The site's own file.
        folder: Of the pinned governance.
    """
    if not node.agent.policy:
        remedy = "edit policy.toml, sign it, and set agent.policy, policy_signer and identity_key"
        return warning("none: every run is taken that a SuperLink sends", remedy)
    signed = policy_file.load(Path(node.agent.policy), signer=node.agent.policy_signer)
    pinned = folder / kit.PINNED if folder is not None else None
    if pinned is not None and pinned.exists():
        federation_id = governance.load(pinned).federation_id
        if signed.rules.federation.id != federation_id:
            return failed(f"it is for federation {signed.rules.federation.id}, this site is in {federation_id}")
    policy.check_node(signed.rules, node.data)
    return ok(f"serial {signed.rules.serial}, signed by {node.agent.policy_signer[:12]}, allows the site's own file")


@check("audit log", remedy="find out who changed it; restore the log from a backup, and tell the coordinator")
def audited(node: config.NodeConfig) -> Result:
    """Check every line of the audit log, and that the policy is no older than one that was in force."""
    if not node.agent.identity_key:
        return skipped("none is kept: the site has no policy", "set agent.policy and agent.identity_key")
    past, num_entries = read_history(node)
    if not num_entries:
        return ok("none yet; the agent begins it at its first start")
    with suppress(ConfigError):  # the policy's own check tells it
        gatekeeper.check_serial(policy_file.load(Path(node.agent.policy), signer=node.agent.policy_signer), past)
    return ok(f"entries: {num_entries:,}, whole; {count(len(past.runs), 'run')}")


@check("policy in force", remedy="restart the agent: systemctl restart silotune-agent")
def in_force(node: config.NodeConfig, *, is_running: bool) -> Result:
    """Hold the policy's file against the one that the running agent has begun with, as its audit log tells."""
    if not node.agent.policy:
        return skipped("there is no policy")
    signed = policy_file.load(Path(node.agent.policy), signer=node.agent.policy_signer)
    if not is_running:
        return ok(f"no agent runs; the next one begins with serial {signed.rules.serial}")
    past, _ = read_history(node)
    if past.policy_sha256 != signed.sha256:
        began = f"with serial {past.serial}" if past.serial >= 0 else "without a policy"
        return failed(f"the running agent began {began}; the file, with serial {signed.rules.serial}, is another one")
    return ok(f"serial {past.serial}, with which the running agent began")


@check("data", remedy="correct the file; silotune-client check NODE.toml names every problem")
def rows(node: config.NodeConfig, allowed: Policy | None) -> Result:
    """Count the rows, and hold the counts against the policy; text of a row is never told."""
    paths = [path for path in (node.data.path, node.data.held_out_path) if path]
    for path in paths:
        if not Path(path).expanduser().exists():  # else it would be taken for the name of a data set
            raise DataError(f"{path}: no such file or folder; correct data.path")
    unit_column = node.data.unit_column
    read = {path: site_files.read_rows(node.data, path) for path in paths}
    apart = (data_check.told_apart(rows, path=path, unit_column=unit_column) for path, rows in read.items())
    report = data_check.check([row for rows in apart for row in rows])
    text = f"{count(report.num_rows, 'row')} of {count(report.num_units, 'unit')}"
    text += f"; {count(report.num_duplicates, 'duplicate')}"
    if report.num_units_alike:
        text += f"; {count(report.num_units_alike, 'unit')} whose names a reader may take for another's (see check)"
    if allowed is None:
        return ok(text)
    limits = policy.check_node(allowed, node.data)
    if report.num_rows > limits.max_rows:
        return failed(f"{text}; the policy allows {limits.max_rows:,}", "raise max_rows in the policy, or remove rows")
    if report.num_rows < allowed.train.min_records:
        least = f"the policy's train.min_records is {allowed.train.min_records:,}"
        return failed(f"{text}; {least}", "every run will be refused: add rows, or lower it and sign the policy again")
    return ok(f"{text}; columns and number as the policy allows")


@check("base models", remedy="copy the base into the store, or fetch it: silotune-sim base NAME --store STORE")
def bases(found: Mapping[str, Path], allowed: Policy | None, *, store: str) -> Result:
    """Hold the bases that are here against the policy, by the hash of their files.

    Args:
        found: Hash to folder.
        allowed: The policy; None: any base.
        store: Where they were looked for.
    """
    from common.model import files  # loads transformers

    if not found:
        return failed(f"no base model in {store}")
    listed = {base.sha256 for base in allowed.models.allow} if allowed else set(found)
    shown = {sha256: sha256[:12] if sha256 in listed else sha256 for sha256 in found}  # whole, to be listed
    here = ", ".join(f"{folder.name} ({shown[sha256]})" for sha256, folder in found.items())
    for folder in [folder for sha256, folder in found.items() if sha256 in listed]:
        files.tokenizer_of(folder)
        files.check_unquantised(folder)
    if allowed is None:
        return ok(f"{here} in {store}")
    if not allowed.models.allow:
        return warning(f"{here} here; the policy allows none", "list one under models.allow, and sign the policy again")
    missing = [f"{base.name} ({base.sha256[:12]})" for base in allowed.models.allow if base.sha256 not in found]
    text = f"{here} here; the policy allows {', '.join(f'{b.name} ({b.sha256[:12]})' for b in allowed.models.allow)}"
    if len(missing) == len(allowed.models.allow):
        return failed(text)
    return warning(f"{text}; {', '.join(missing)} is not here") if missing else ok(text)


@check("memory", remedy="use a smaller base or a machine with more memory")
def memory(folder: Path | None, work: Work, device: Device) -> Result:
    """Estimate what training needs, and compare it with what is free.

    Args:
        folder: The base's; None: there is none to look at.
        work: What is done with it.
        device: Where.
    """
    if folder is None:
        return skipped("there is no base to estimate it for")
    shape = base_size.read(folder)
    most = base_size.estimate(shape, work)
    least = base_size.estimate(shape, replace(work, num_rows=1, is_checkpointing=True)).total + RUNTIME_BYTES
    text = f"{folder.name}: {_told(most, work, device)}{_precision(folder, work)}"
    if least > device.free_bytes:
        return failed(f"{text}. Even one row with checkpointing needs {size(least)}")
    if most.total + RUNTIME_BYTES > device.free_bytes:
        remedy = "the run must set training.micro_batch_size = 1 and gradient_checkpointing = true, or shorter rows"
        return warning(f"{text}. One row with checkpointing needs {size(least)}", remedy)
    return ok(text)


def _precision(folder: Path, work: Work) -> str:
    """How much of the base is quantised, for people; a base of which little would be is an error."""
    import torch

    from common.model import base as model
    from common.model import probe

    settings = config.ModelConfig.model_validate({"base": str(folder), "quantization": work.quantization})
    share = probe.planned_share(folder, model.quantization_config(settings, torch.float32))
    return f". {work.quantization} reaches {100 * share:.0f} % of the weights of its layers" if share else ""


def _told(most: Memory, work: Work, device: Device) -> str:
    """An estimate for people, and how it was made."""
    need = f"about {size(most.total + RUNTIME_BYTES)} of {size(device.free_bytes)} on {device.name}"
    parts = f"base {size(most.base)} ({work.quantization}), adapter {size(most.adapter)} (rank {work.r})"
    rest = f"activations {size(most.activations)}, runtime {size(RUNTIME_BYTES)}"
    how = "Estimated from the shapes in its safetensors files"
    slow = "" if device.is_cuda else ". No GPU is used: that works, and is slow"
    return f"{need} for {work.num_rows} rows of {work.num_tokens} tokens: {parts}, {rest}. {how}{slow}"


def disk(node: config.NodeConfig) -> Result:
    """Tell whether offers and logs can be written."""
    return checks.disk(Path(node.agent.log_folder), need_bytes=LOG_BYTES, what="offers and logs")


@check("disk of bases", remedy="free space, or set model.store to a folder on another disk")
def store_disk(found: Mapping[str, Path], store: Path) -> Result:
    """Tell whether another base as large as the largest one here has room; a warning only, as none may be needed."""
    if not found:
        return skipped("there is no base to go by")
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in found.values()]
    result = checks.disk(store, need_bytes=max(sizes), what="another base like the largest here")
    status = "warning" if result.status == "failed" else result.status
    return replace(result, status=status)


def load_policy(node: config.NodeConfig) -> Policy | None:
    """The policy, if there is one that can be used."""
    if not node.agent.policy:
        return None
    with suppress(SilotuneError):  # the policy's own check tells it
        return policy_file.load(Path(node.agent.policy), signer=node.agent.policy_signer).rules
    return None


def read_history(node: config.NodeConfig) -> tuple[history.History, int]:
    """Fold the audit log without touching it; the number of its entries, too.

    Raises:
        AuditError: The log is not whole.
        ConfigError: The key cannot be read.
    """
    past, num_entries = history.History(), 0
    path = Path(node.agent.log_folder) / history.AUDIT_FILE
    public = identity.public_hex(identity.load(Path(node.agent.identity_key)))
    if path.exists():
        for entry in audit_log.read(path, public):
            past.take(entry)
            num_entries += 1
    return past, num_entries


def offered(node: config.NodeConfig, name: str) -> RunManifest:
    """The manifest of a run that was offered.

    Raises:
        ConfigError: The site keeps no audit log.
        DataError: No such run.
    """
    if not node.agent.identity_key:
        raise ConfigError("--run: without a policy no offer is kept; leave it out")
    past, _ = read_history(node)
    return manifest.parse(consent.load(Path(node.agent.log_folder), consent.find(past, name)).manifest)


def find_bases(node: config.NodeConfig) -> dict[str, Path]:
    """The bases here, by the hash of their files; what is no whole base is left out."""
    from common.model.base import hash_base  # loads torch

    found: dict[str, Path] = {}
    for folder in site_files.base_folders(node.model):
        with suppress(ModelError):
            found[hash_base(folder)] = folder
    return found


def device_of(node: config.NodeConfig, *, agent_pid: int | None) -> Device:
    """What the site trains on.

    Args:
        node: The site's own file.
        agent_pid: The running agent; it may hold a base, so its memory counts as free, and a GPU's is counted whole.

    Raises:
        ModelError: CUDA was asked for by name and is not there.
    """
    import torch

    from common.model.base import choose_device

    if choose_device(node.hardware.device).type == "cpu":
        return Device("cpu", False, _kib(MEMINFO, "MemAvailable:") + _kib(Path(f"/proc/{agent_pid}/status"), "VmRSS:"))
    free, whole = torch.cuda.mem_get_info()
    return Device(f"cuda ({torch.cuda.get_device_name()})", True, free if agent_pid is None else whole)


def work_of(run: config.RunConfig, device: Device, *, site: str = "") -> Work:
    """What a run does with its base, at a site of this name."""
    automatic = "bfloat16" if device.is_cuda else "float32"
    return Work(
        quantization=precisions.of_site(run.model, site),
        double_quantization=run.model.double_quantization,
        dtype=automatic if run.model.dtype == "auto" else run.model.dtype,
        targets=run.adapter.targets,
        r=run.adapter.r,
        num_rows=run.training.micro_batch_size or run.training.batch_size,
        num_tokens=run.data.max_length_tokens,
        is_checkpointing=run.training.gradient_checkpointing,
        is_adam=run.training.optimizer.kind == "adamw",
    )


def largest_work(allowed: Policy | None, device: Device) -> Work:
    """What the policy allows at most, at the run file's default batch; without a policy, the defaults."""
    work = work_of(config.parse(DEFAULTS, name="the defaults"), device)
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
    """A figure of the kernel's in KiB, as bytes; 0 where there is no such process."""
    try:
        fields = (line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    return next((int(words[1]) << 10 for words in fields if words and words[0] == field), 0)
