"""An exported folder for people: lines from the figures that `server/verify/verify.py` gives."""

from collections.abc import Mapping
from typing import Any

from common.event_kinds import Exported


def lines(result: Mapping[str, Any]) -> list[str]:
    """The folder, each format's difference from the adapter, and the perplexity of merged weights."""
    signer = f"signed by {result['signer']}" if result["signer"] else "NOT SIGNED: anybody could have written it"
    text = [f"{result['name']}: {result['num_files']} files whole, {result['num_tensors']} tensors sound; {signer}"]
    if later := result.get("addendum_sha256"):
        text.append(f"polished after the end of its run: addendum {later}")
    logits = result.get("logits", {})
    text += [
        f"{name:<7} differs from the adapter by {figures['difference']:.2e}, limit {figures['limit']:.0e}"
        for name, figures in logits.items()
        if name != "base"
    ]
    if logits:
        text.append(f"base    differs from the adapter by {logits['base']['difference']:.2e}: what it does")
    if probe := result.get("probe"):
        text.append(
            f"merged  in float32 off by {probe['summed']:.2e} of the logits, where the adapter moves them by "
            f"{probe['effect']:.2e}; rounding to bf16 {probe['rounding']:.2e}"
        )
    if merged := result.get("perplexity"):
        text.append(
            f"merged  perplexity {merged['merged']:.4f}, side by side {merged['side_by_side']:.4f} (difference "
            f"{merged['low']:+.4f} to {merged['high']:+.4f}), base {merged['base']:.4f}, on {merged['num_rows']} rows "
            "when it was exported"
        )
    return text


def summary(event: Exported | None) -> list[str]:
    """Lines on the folder that a run has written."""
    return [f"{event.folder}/ ({', '.join(event.formats)})", *lines(vars(event))] if event else []
