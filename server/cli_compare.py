"""`silotune-server compare`: pairs of answers for people who rank them blind."""

from pathlib import Path
from typing import Annotated

import typer

from common import cli


def compare(
    run_folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN_FOLDER")],
    rows: Annotated[Path, typer.Option(help="Rows to answer, in the run's columns.")],
    out: Annotated[Path, typer.Option(help="New .jsonl file of pairs, for raters.")],
    key: Annotated[
        Path | None, typer.Option(help="New .json file that tells the sides; default: in RUN_FOLDER/compare-keys.")
    ] = None,
    against: Annotated[str, typer.Option(help="Whose answers stand beside: base or prompt-only.")] = "base",
    prompt: Annotated[str, typer.Option(help="With prompt-only: the system message that the base is given.")] = "",
    max_rows: Annotated[int, typer.Option(min=0, help="Answer the first so many rows; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of sides and order.")] = 0,
    round_: Annotated[int, typer.Option("--round", help="Number of finished rounds; 0: the newest checkpoint.")] = 0,
    base: Annotated[Path | None, typer.Option(help="Folder of the base; default: model.base, in the store.")] = None,
    json: cli.JsonOption = False,
) -> None:
    """Answer rows with a run's adapter and with its base, for blind ranking.

    Each line has `prompt`, `left` and `right`; the adapter is on the left of half of them, drawn by --seed. Which side
    is which is in the key alone: keep it from raters. Equal answers are left out, and counted.

    \b
    Examples:
      silotune-server compare runs/triage --rows held-out.jsonl --out rate/pairs.jsonl
      silotune-server compare runs/triage --rows held-out.jsonl --out rate/pairs.jsonl --against prompt-only
          --prompt "Answer with the code alone."
    """
    from common.errors import ConfigError
    from server import compare as comparing

    if against not in ("base", "prompt-only"):
        raise ConfigError(f"--against {against}: is none of base, prompt-only")
    order = comparing.Order(str(rows), against, prompt, max_rows, seed)  # type: ignore[arg-type]
    result = comparing.compare(run_folder, order, out=out, key=key, num_rounds=round_, base=base)
    told = (
        f"{result['pairs']}: {result['num_pairs']} pairs; {result['num_left_out']} rows left out (equal answers)",
        f"{result['key']}: which side is which; keep it from raters",
    )
    cli.emit(result, as_json=json, show=lambda: cli.show(*told))
