"""`silotune-server layers`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from common import cli


def layers(
    base: Annotated[str, typer.Argument(help="The base: a folder, or a name in the local store.")],
    share: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the layers of each type to keep.")] = 0.25,
    json: cli.JsonOption = False,
) -> None:
    """Choose the layers to train by the signal in the base's weights (Spectrum, arXiv:2406.06623).

    Prints them as adapter.targets for the run file; no row is read and nothing is trained.

    \b
    Examples:
      silotune-server layers smollm2 --share 0.25
      silotune-server layers /srv/models/eight-billion --share 0.5 --json
    """
    from common.model import store

    folder = Path(base) if Path(base).is_dir() else store.resolve(base)  # told before torch is loaded

    from server.run import layers as spectrum

    measured = spectrum.measure(folder)
    chosen = spectrum.choose(measured, share=share)
    lines = [f"{measured[name]:>10.4f}  {name}" for name in sorted(chosen, key=lambda name: -measured[name])]
    quoted = ", ".join(f'"{name}"' for name in chosen)
    line = f"adapter.targets = [{quoted}]"
    ratios = {name: value if math.isfinite(value) else None for name, value in sorted(measured.items())}
    result = {"targets": list(chosen), "num_layers": len(measured), "snr": ratios}
    cli.emit(result, as_json=json, show=lambda: cli.show(*lines, f"{len(chosen)} of {len(measured)} layers", line))
