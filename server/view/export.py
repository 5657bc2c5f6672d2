"""What people are told of an exported folder: lines from the figures that `server/verify/verify.py` found."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.event_kinds import Event


def lines(result: Mapping[str, Any]) -> list[str]:
    """The folder, each format's difference from the adapter, and the perplexity of merged weights."""
    signer = f"signed by {result['signer']}" if result["signer"] else "NOT SIGNED: anybody could have written it"
    told = [f"{result['name']}: {result['num_files']} files whole, {result['num_tensors']} tensors sound; {signer}"]
    if later := result.get("addendum_sha256"):
        told.append(f"polished after the end of its run: addendum {later}")
    logits = result.get("logits", {})
    told += [
        f"{name:<7} differs from the adapter by {figures['difference']:.2e}, limit {figures['limit']:.0e}"
        for name, figures in logits.items()
        if name != "base"
    ]
    if logits:
        told.append(f"base    differs from the adapter by {logits['base']['difference']:.2e}: what it does")
    if probe := result.get("probe"):
        told.append(
            f"merged  in float32 off by {probe['summed']:.2e} of the logits, where the adapter moves them by "
            f"{probe['effect']:.2e}; rounding to bf16 {probe['rounding']:.2e}"
        )
    if found := result.get("perplexity"):
        told.append(
            f"merged  perplexity {found['merged']:.4f}, side by side {found['side_by_side']:.4f} (difference "
            f"{found['low']:+.4f} to {found['high']:+.4f}), base {found['base']:.4f}, on {found['num_rows']} rows "
            "when it was exported"
        )
    return told


def newest(log: Sequence[Event]) -> Event | None:
    """The folder that a run has written, after the last of its starts; None: it has written none."""
    found = [event for event in log if event["kind"] == "exported"]
    return found[-1] if found else None


def summary(log: Sequence[Event]) -> list[str]:
    """Lines on the newest folder."""
    event = newest(log)
    return [f"{event['folder']}/ ({', '.join(event['formats'])})", *lines(event)] if event else []
