"""The arm of `bench gpu` that is a whole run: which part of its time the card is at work."""

import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoTokenizer

from common.event_kinds import Event, RoundFinished, RoundStarted, SiteTrained
from simulations.bench.arms import gpu, llama
from simulations.bench.arms.llama import SHAPES
from simulations.commands import commands
from simulations.world import run

RUN_FILE: Final = Path(__file__).parents[2] / "configs" / "bench-gpu.toml"
TOKENIZER: Final = Path(__file__).parents[2] / "embedded" / "base"
NUM_ROWS: Final = 9 * 100
PERIOD_S: Final = 0.05
STEPS: Final = 90  # of a round, of all sites together


def main(shape_name: str, num_sites: str) -> dict[str, Any]:
    """Play the run with a base of random weights.

    Args:
        shape_name: One of `llama.SHAPES`.
        num_sites: Sites of the run; steps of all together stay the same.

    Returns:
        `start_s` until the first round, `rounds_s` of all rounds, `busy` (share of the rounds' time in which the card
        ran something; NaN without one) and `second_wait_s`: from the second round's start to its first answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        base, rows = Path(folder) / "base", Path(folder) / "rows.jsonl"
        _write_base(shape_name, base)
        _write_rows(base, rows)
        sites = int(num_sites)
        overrides = {
            "data.num_sites": num_sites,
            "federation.num_sites": num_sites,
            "federation.min_sites": num_sites,
            "training.local_steps": str(STEPS // sites),
            "model.quantization": '"nf4"',
            "model.base": json.dumps(str(base)),
            "data.source": json.dumps(str(rows)),
        }
        marks: list[tuple[str, float]] = []

        def watch(event: Event) -> None:
            if isinstance(event, RoundStarted | RoundFinished | SiteTrained):
                marks.append((type(event).__name__, time.perf_counter()))

        began = time.perf_counter()
        order = commands.Order(RUN_FILE, overrides, output=Path(folder) / "run", as_json=True)
        shared = order.world()
        log = order.log(shared)
        log.listeners.append(watch)
        with _Busy() as busy:
            run.in_process(shared, log=log)
    starts = [at for name, at in marks if name == "RoundStarted"]
    ends = [at for name, at in marks if name == "RoundFinished"]
    first = next(at for name, at in marks if name == "SiteTrained" and at > starts[1])
    return {
        "start_s": starts[0] - began,
        "rounds_s": sum(end - start for start, end in zip(starts, ends, strict=True)),
        "busy": busy.share(list(zip(starts, ends, strict=True))),
        "second_wait_s": first - starts[1],
    }


def _write_base(shape_name: str, folder: Path) -> None:
    """A base's files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = llama.make_base(SHAPES[shape_name], device, is_quantised=False)
    base.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)


def _write_rows(base: Path, path: Path) -> None:
    """Rows of drawn words, as long as the rows of the other arms."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    decoded = [str(tokenizer.decode([number])) for number in range(len(tokenizer))]
    words = [
        text[1:] for text in decoded if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()
    ]  # a token each
    with path.open("w", encoding="utf-8") as file:
        for row in gpu.rows(NUM_ROWS, len(words), is_full=False):
            num_prompt = row.is_answer.index(True)
            prompt, answer = (
                " ".join(words[number] for number in ids)
                for ids in (row.input_ids[:num_prompt], row.input_ids[num_prompt:])
            )
            file.write(json.dumps({"instruction": prompt, "output": answer}) + "\n")


class _Busy:
    """Samples whether the card is at work, by the driver's own figure."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Busy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while torch.cuda.is_available() and not self._stop.wait(PERIOD_S):
            self._samples.append((time.perf_counter(), torch.cuda.utilization() / 100))

    def share(self, spans: list[tuple[float, float]]) -> float:
        """Mean over the samples within these spans."""
        inside = [share for at, share in self._samples if any(start <= at <= end for start, end in spans)]
        return sum(inside) / len(inside) if inside else float("nan")
