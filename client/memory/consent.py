"""Offers that a site was made, and who said yes: offers are files, decisions are signed entries of the audit log.

A decision is about a manifest's hash, so a manifest that changed by a byte is another run and needs another one.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from client.memory.history import History, Refusal, RunHistory
from client.policy.file import Policy
from common import storage
from common.errors import ApprovalDenied, ApprovalRequired, DataError, WireError
from common.frame import wire
from common.run import config, manifest
from common.run.manifest import Offer, RunManifest
from common.trust.audit_log import AuditLog

FOLDER: Final = "offers"
REFUSED: Final = "refused"  # within the log's folder: offers that the policy turned away, kept to be read
MAX_OFFERS: Final = 1000
MIN_PREFIX: Final = 6
FREE: Final = ("name", "seed", "date")  # what may differ under `approval = "changed_runs"`


def store(folder: Path, offer: Offer) -> None:
    """Keep an offer, so that it can be reviewed.

    Raises:
        StorageError: It cannot be written.
        ApprovalRequired: So many wait already that no other is kept.
    """
    path = folder / FOLDER / f"{offer.sha256}.frame"
    if path.exists():
        return
    if len(list((folder / FOLDER).glob("*.frame"))) >= MAX_OFFERS:
        raise ApprovalRequired(f"{MAX_OFFERS} offers are kept already; remove old files from {folder / FOLDER}")
    storage.write_atomic(path, wire.pack(offer.to_frame()), mode=storage.PRIVATE)


def load(folder: Path, run_sha256: str) -> Offer:
    """An offer that was kept.

    Raises:
        DataError: There is none of that hash, or its file was changed.
    """
    try:
        frame = wire.unpack((folder / FOLDER / f"{run_sha256}.frame").read_bytes(), max_body_bytes=manifest.MAX_BYTES)
        offer = manifest.read_offer(frame)
    except (OSError, WireError) as error:
        raise DataError(f"no readable offer of run {run_sha256} in {folder / FOLDER}") from error
    if offer.sha256 != run_sha256:
        raise DataError(f"the offer in {run_sha256}.frame is of another run; remove the file")
    return offer


def find(history: History, name: str, *, with_refused: bool = False) -> str:
    """The hash of the run that a person means: its first digits, or its name; runs that were refused on request.

    Raises:
        DataError: None or several.
    """
    is_prefix = len(name) >= MIN_PREFIX
    known: dict[str, RunHistory | Refusal] = {**(history.refusals if with_refused else {}), **history.runs}
    hashes = [sha256 for sha256, run in known.items() if run.name == name or (is_prefix and sha256.startswith(name))]
    if len(hashes) != 1:
        shown = ", ".join(sha256[:12] for sha256 in hashes) or "none"
        raise DataError(f"'{name}' names {len(hashes)} runs ({shown}); see: silotune-client runs")
    return hashes[0]


def decide(log: AuditLog, run_sha256: str, *, is_approved: bool, by: str) -> None:
    """Write a person's decision into the log; the newest counts."""
    log.append("approved" if is_approved else "denied", run=run_sha256, by=by)


def require(policy: Policy, history: History, run_manifest: RunManifest, *, folder: Path) -> str:
    """Let a run through if somebody approved it, or the policy's rule did.

    Returns:
        Who approved: `person`, or the policy's rule.

    Raises:
        ApprovalDenied: Somebody said no.
        ApprovalRequired: Nobody has said yes.
    """
    decision = history.run(run_manifest.sha256).decision
    if decision == "denied":
        raise ApprovalDenied(f"run '{run_manifest.run.name}' was denied at this site")
    if decision == "approved":
        return "person"
    if policy.runs.approval == "none":
        return "runs.approval = none"
    if policy.runs.approval == "changed_runs" and _is_approved_but_for_name(history, run_manifest, folder):
        return "runs.approval = changed_runs"
    raise ApprovalRequired(
        f"run '{run_manifest.run.name}' waits for approval; see: silotune-client review {run_manifest.sha256[:12]}"
    )


def differences(old: RunManifest, new: RunManifest) -> dict[str, tuple[Any, Any]]:
    """What differs between two manifests: dotted key to old and new value."""
    before, after = _flat(old), _flat(new)
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _is_approved_but_for_name(history: History, run_manifest: RunManifest, folder: Path) -> bool:
    """Whether a run that a person approved differs in name, seed and day of launch at most."""
    for sha256 in reversed(history.approved):
        with suppress(DataError):  # its file was removed: then it speaks for no other run
            approved = manifest.parse(load(folder, sha256).manifest)
            if differences(approved, run_manifest).keys() <= set(FREE):
                return True
    return False


def _flat(run_manifest: RunManifest) -> dict[str, Any]:
    """A manifest as dotted keys; the tensors count as one."""
    run = json.loads(config.resolved_json(manifest.public_part(run_manifest.run)))
    flat: dict[str, Any] = {"base_sha256": run_manifest.base_sha256, "tensors": run_manifest.tensor_specs}
    flat |= {"codes_sha256": run_manifest.codes_sha256, "date": run_manifest.date}
    for name, value in run.items():
        flat.update(
            {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat
