"""The perplexity of a merged checkpoint against its base with the adapters side by side, on rows that are given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ModelError
from common.loss import evaluation
from common.model import base as model
from common.model import loading
from common.model.base import Engine
from common.run import config
from common.text.prompts import Encoded, TemplateName
from server.evaluate.figures import bootstrap
from server.evaluate.figures.bootstrap import Scores
from server.export import probe as export_probe
from server.export.probe import Probe

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
        side_by_side: Of base, adapter and side adapter as the sites have them.
        merged: Of the merged checkpoint, whose weights are rounded to bf16.
        low: Merged minus side by side, lower end of its interval of 95 %, by the paired bootstrap over rows.
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


@dataclass(frozen=True)
class SideBySide:
    """Base and adapters side by side, as the run has them.

    Attributes:
        encoded: The rows as tokens; empty: there are none.
        alone: Scores of the base alone on them.
    """

    logits_btv: torch.Tensor
    encoded: Sequence[Encoded] = ()
    alone: Scores | None = None
    scores: Scores | None = None


def side_by_side(
    rows: Path | None, tensors: Tensors, *, run: config.RunConfig, base: Path, date: str = ""
) -> SideBySide:
    """Load a run's base with its adapters, without quantisation, and score it.

    Args:
        rows: A file in the run's columns; its first `MAX_ROWS` rows are read. None: only the probe is taken.
        tensors: The adapter under the run's names, side adapter included.
        base: The base's folder, not quantised.

    Raises:
        DataError: The rows are missing or unusable.
        ModelError: The base cannot be loaded.
    """
    plain = run.model_copy(update={"model": plain_model(base, run.model.chat_template)})
    engine = loading.engine_of(plain, base, num_threads=torch.get_num_threads(), date=date)
    encoded: Sequence[Encoded] = ()
    alone = None
    if rows:
        encoded, _ = model.encode(engine, loading.rows_of(str(rows), run.data)[:MAX_ROWS], run.data)
        alone = _scores(engine, encoded)
    adapter.write(engine.model, tensors)
    scores = _scores(engine, encoded) if rows else None
    return SideBySide(export_probe.logits(engine.model), encoded, alone, scores)


def measure(reference: SideBySide, merged: Path, chat_template: TemplateName) -> Perplexity | None:
    """Score a merged checkpoint on the same rows; None where there are none.

    Raises:
        ModelError: The checkpoint cannot be loaded.
    """
    if reference.alone is None or reference.scores is None:
        return None
    device = model.choose_device("auto")
    network = model.load_base(merged, plain_model(merged, chat_template), device)
    engine = Engine(network, model.load_tokenizer(merged), device, "", (), {})
    scores = _scores(engine, reference.encoded)
    num_tokens = sum(int(row[1]) for row in scores.rows)
    gained = bootstrap.gain(scores, reference.scores)
    values = (reference.alone.value, reference.scores.value, scores.value)
    return Perplexity(len(reference.encoded), num_tokens, *values, gained.low, gained.high)


def plain_model(folder: Path, chat_template: TemplateName) -> config.ModelConfig:
    """A checkpoint in float32, without quantisation."""
    return config.ModelConfig(base=str(folder), quantization="none", dtype="float32", chat_template=chat_template)


def _scores(engine: Engine, encoded: Sequence[Encoded]) -> Scores:
    """Of each row its negative log-likelihood and its answer tokens."""
    rows = tuple(evaluation.held_out_nll(engine, [row], batch_size=1) for row in encoded)
    return Scores(rows, "perplexity", higher_is_better=False)


def in_words(figures: Perplexity | None, probe: Probe, *, quantization: str = "none") -> str:
    """The section of a model card.

    Args:
        figures: The figures; None: not measured.
        probe: What was figures on fixed tokens.
    """
    head = f"## Merged and side by side\n\n{probed(probe)}\n\n"
    if figures is None:
        return f"{head}{NOT_MEASURED}\n"
    trained = (
        ""
        if quantization == "none"
        else f" The run trained on the base in {quantization}, which is another model by the rounding of its weights."
    )
    return (
        f"{head}"
        f"| perplexity of {figures.num_tokens:,} answer tokens in {figures.num_rows:,} rows | |\n|---|---|\n"
        f"| base alone | {figures.base:.4f} |\n"
        f"| base and adapters side by side, float32 | {figures.side_by_side:.4f} |\n"
        f"| merged in float32, rounded to bf16 | {figures.merged:.4f} |\n\n"
        f"Merged / side by side: {figures.ratio:.5f}, difference {figures.low:+.5f} to {figures.high:+.5f} (95 %, "
        f"paired bootstrap over rows); beyond {math.exp(LIMIT):.3f} either way it would not have been "
        f"exported.{trained}\n"
    )


def probed(probe: Probe) -> str:
    """What the probe figures, for a card."""
    return (
        f"On fixed random tokens the adapter moves the logits by {probe.effect:.2e} of their size. The sum of base and "
        f"adapter in float32 is off by {probe.summed:.2e}, what its rounding to bf16 adds is {probe.rounding:.2e}."
    )
