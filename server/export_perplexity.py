"""The perplexity of a merged checkpoint against its base with the adapters side by side, on rows that are given."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from common import adapter, config, evaluation, loading, model
from common.adapter import Tensors
from common.errors import ModelError
from common.model import Engine
from common.prompts import Encoded
from server.evaluate import bootstrap
from server.evaluate.bootstrap import Scores

LIMIT: Final = 0.01  # of the logarithm of merged over side by side, nats per answer token
MAX_ROWS: Final = 256  # the first of a file; a float32 base on a CPU takes seconds a row
NOT_MEASURED: Final = (
    "What rounding the merged weights to bf16 does to the perplexity was not measured: no rows were given "
    "(`silotune-server export --rows FILE`)."
)


@dataclass(frozen=True)
class Perplexity:
    """Of answer tokens, as the run reads rows; every arm computes in float32 on the base without quantisation.

    Attributes:
        num_rows: Rows that were read.
        num_tokens: Answer tokens in them.
        base: Of the base alone.
        side_by_side: Of base, adapter and side adapter as the sites have them.
        merged: Of the merged checkpoint, whose weights are rounded to bf16.
        low: Merged minus side by side, lower end of its interval of 95 %, by the paired bootstrap over rows.
        high: Upper end.
    """

    num_rows: int
    num_tokens: int
    base: float
    side_by_side: float
    merged: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """Merged over side by side."""
        return self.merged / self.side_by_side

    def check(self, where: str) -> None:
        """The two must agree to `LIMIT`.

        Args:
            where: For the message.

        Raises:
            ModelError: They do not, or a figure is no positive number.
        """
        figures = (self.base, self.side_by_side, self.merged)
        is_sound = all(math.isfinite(figure) and figure > 0 for figure in figures)
        if not is_sound or abs(math.log(self.ratio)) > LIMIT:
            raise ModelError(
                f"{where}: the merged checkpoint has perplexity {self.merged:.4g}, base and adapters side by side "
                f"{self.side_by_side:.4g} (base alone {self.base:.4g}); a ratio within {math.exp(-LIMIT):.3f} and "
                f"{math.exp(LIMIT):.3f} is allowed. Serve the adapter beside its base (format peft or vllm) instead"
            )


def stored(figures: Mapping[str, Any]) -> Perplexity:
    """The figures of a seal.

    Raises:
        ModelError: They are none.
    """
    try:
        found = Perplexity(**figures)
        values = (float(value) for value in dataclasses.astuple(found))
        if not all(math.isfinite(value) for value in values):
            raise ValueError("not finite")
        return found
    except (TypeError, ValueError) as error:
        raise ModelError("the seal's figures of perplexity are malformed; get the folder again") from error


def measure(
    rows: Path, tensors: Tensors, *, run: config.RunConfig, base: Path, merged: Path, date: str = ""
) -> Perplexity:
    """Score both, one in memory at a time.

    Args:
        rows: A file in the run's columns; its first `MAX_ROWS` rows are read.
        tensors: The adapter under the run's names, side adapter included.
        run: The run.
        base: The base's folder, not quantised.
        merged: The merged checkpoint.
        date: Day of the run, for a chat template that prints one.

    Raises:
        DataError: The rows are missing or unusable.
        ModelError: A checkpoint cannot be loaded.
    """
    alone, beside, encoded = _beside(rows, tensors, run=run, base=base, date=date)
    device = model.choose_device("auto")
    network = model.load_base(merged, _plain(run, merged), device)
    engine = Engine(network, model.load_tokenizer(merged), device, "", (), {})
    found = _scores(engine, encoded)
    num_tokens = sum(int(row[1]) for row in found.rows)
    gained = bootstrap.gain(found, beside)
    return Perplexity(len(encoded), num_tokens, alone.value, beside.value, found.value, gained.low, gained.high)


def _beside(
    rows: Path, tensors: Tensors, *, run: config.RunConfig, base: Path, date: str
) -> tuple[Scores, Scores, Sequence[Encoded]]:
    """Scores of the base alone and with its adapters, and the rows as tokens."""
    plain = run.model_copy(update={"model": _plain(run, base)})
    engine = loading.engine_of(plain, base, num_threads=torch.get_num_threads(), date=date)
    encoded, _ = model.encode(engine, loading.rows_of(str(rows), run)[:MAX_ROWS], run.data)
    alone = _scores(engine, encoded)
    adapter.write(engine.model, tensors)
    return alone, _scores(engine, encoded), encoded


def _plain(run: config.RunConfig, folder: Path) -> config.ModelConfig:
    """A checkpoint in float32, without quantisation."""
    return config.ModelConfig(
        base=str(folder), quantization="none", dtype="float32", chat_template=run.model.chat_template
    )


def _scores(engine: Engine, encoded: Sequence[Encoded]) -> Scores:
    """Of each row its negative log-likelihood and its answer tokens."""
    found = tuple(evaluation.held_out_nll(engine, [row], batch_size=1) for row in encoded)
    return Scores(found, "perplexity", higher_is_better=False)


def in_words(found: Perplexity | None, *, quantization: str = "none") -> str:
    """The section of a model card.

    Args:
        found: The figures; None: not measured.
        quantization: Of the base during training.
    """
    if found is None:
        return f"## Merged and side by side\n\n{NOT_MEASURED}\n"
    trained = (
        ""
        if quantization == "none"
        else f" The run trained on the base in {quantization}, which is another model by the rounding of its weights."
    )
    return (
        "## Merged and side by side\n\n"
        f"| perplexity of {found.num_tokens:,} answer tokens in {found.num_rows:,} rows | |\n|---|---|\n"
        f"| base alone | {found.base:.4f} |\n"
        f"| base and adapters side by side, float32 | {found.side_by_side:.4f} |\n"
        f"| merged in float32, rounded to bf16 | {found.merged:.4f} |\n\n"
        f"Merged / side by side: {found.ratio:.5f}, difference {found.low:+.5f} to {found.high:+.5f} (95 %, paired "
        f"bootstrap over rows); beyond {math.exp(LIMIT):.3f} either way it would not have been "
        f"exported.{trained}\n"
    )
