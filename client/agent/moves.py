"""Whether an adapter is one that a round of training could have made of the last one; bounds from the run's settings.

A coordinator that sends the mean of updates sends one that lies near the adapter before it. One that was crafted to
make an update speak of one row does not: its values are moved by as much as a whole run would not move them.

d and k: output and input width of a module, r: rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from client.policy.file import Policy
from client.train import schedule
from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ModelError, PolicyRefusedError, WireError
from common.frame import wire
from common.frame.wire import Frame
from common.privacy import site_level
from common.run import config, packing, trainable
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from common.run.schema.wire import WHOLE

FOLDER: Final = "seen"
MAX_BYTES: Final = 2047 << 20
TOLERANCE: Final = 1e-4  # of the largest value: another machine's last bits
ORTHONORMAL: Final = 0.05  # what an entry of A A^T may be off, 16 bits on the way included
NOISE_STDS: Final = 10.0
SCALE_GROWTH: Final = 1.01  # a scale is rounded up to bfloat16, by less than 2^-7 of it
DIRECT: Final = ("fedavg", "ffa", "rolora", "fedsa")  # each value is the mean of the sites' values
REFACTORED: Final = ("fedsvd", "flexlora")  # the product of two factors is, up to what is cut
_SEEN: Final = "seen"


@dataclass(frozen=True)
class Seen:
    """An adapter that this site took: the state after so many rounds."""

    num_rounds: int
    tensors: Tensors


class Moves:
    """The adapter that a site took last in each run, on its disk, and the bound on the next.

    Args:
        folder: Where it is kept.
        rules: The site's policy.
    """

    def __init__(self, folder: Path, *, rules: Policy) -> None:
        self._folder, self._rules = folder / FOLDER, rules
        self._begun: dict[str, tuple[Callable[[], Tensors], int]] = {}
        self._kept: tuple[str, int] = ("", -1)

    def begin(self, run: RunManifest, make: Callable[[], Tensors], *, num_steps: int) -> None:
        """A run is open: what it begins with, as this site makes it, and the steps of a round here."""
        self._begun = {run.sha256: (make, num_steps)}

    def check(self, run: RunManifest, num_rounds: int, tensors: Tensors) -> None:
        """Refuse an adapter that lies farther from the last one than the rounds between could have brought it.

        After a restart it is held against the last one too. Where that is lost, against the start, over more rounds.

        Args:
            run: The run.
            num_rounds: Behind the adapter; beyond the run's last, polished ones in their order.
            tensors: All that came or that this site made.

        Raises:
            PolicyRefusedError: Names the tensor or module, and what it may have moved by.
        """
        if not is_bounded(run, tensors):
            return
        make, num_steps = self._begun[run.sha256]
        seen = self._read(run, tensors)
        if seen is None or seen.num_rounds > num_rounds:
            seen = Seen(0, make())
        check_step(run.run, seen, Seen(num_rounds, tensors), num_steps=num_steps, rules=self._rules)

    def keep(self, run: RunManifest, num_rounds: int, tensors: Tensors) -> None:
        """Remember an adapter that was taken, the first one of its place in the run; one run at a time is kept.

        Raises:
            StorageError: It cannot be written; then nothing must be answered.
        """
        if self._kept == (run.sha256, num_rounds):
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        body = adapter.encode(tensors, dtype="float32")
        place = self._folder / run.sha256
        storage.write_atomic(place, wire.pack(Frame(_SEEN, {"num_rounds": num_rounds}, body)), mode=storage.PRIVATE)
        for old in self._folder.iterdir():
            if old != place:
                old.unlink()
        self._kept = (run.sha256, num_rounds)

    def _read(self, run: RunManifest, like: Tensors) -> Seen | None:
        """The one that was taken last; None where it is not there or not whole."""
        specs = [spec for spec in run.tensor_specs if spec.name in like]
        try:
            frame = wire.expect((self._folder / run.sha256).read_bytes(), _SEEN, max_body_bytes=MAX_BYTES)
            return Seen(int(frame.head["num_rounds"]), adapter.decode(frame.body, specs, dtype="float32"))
        except (OSError, WireError, ModelError):
            return None


def is_bounded(run: RunManifest, tensors: Tensors) -> bool:
    """Whether a bound is known: for the methods named here, at the run's own rank, with an optimiser that has one.

    A site of a smaller rank of its own gets the first components of factors that turn, which may move by any length.
    """
    settings, training = run.run, run.run.training
    is_whole = all(tuple(tensors[spec.name].shape) == spec.shape for spec in run.tensor_specs if spec.name in tensors)
    is_clipped = training.max_grad_norm > 0 and settings.privacy.mode != "unit"
    has_bound = training.optimizer.kind == "adamw" or is_clipped
    return (
        settings.aggregation.method in (*DIRECT, *REFACTORED)
        and settings.adapter.kind != "adalora"
        and is_whole
        and has_bound
    )


def check_step(run: config.RunConfig, last: Seen, new: Seen, *, num_steps: int, rules: Policy) -> None:
    """See `Moves.check`."""
    end = run.federation.num_rounds
    is_kept_back = run.wire.keeps_residual or run.wire.down_density < 1  # what earlier rounds left out may come now
    rounds = range(0 if is_kept_back else min(last.num_rounds, end), min(new.num_rounds, end))
    is_polished = new.num_rounds > max(end, last.num_rounds)
    per_round = {k: site_move(k, run=run, num_steps=num_steps) for k in (range(end) if is_polished else rounds)}
    factor = rules.train.max_move * (rules.evaluation.max_polish_move if is_polished else 1.0)
    if run.aggregation.method in REFACTORED:
        if run.aggregation.method == "fedsvd" and new.num_rounds <= end:
            _check_orthonormal(new.tensors)
        _check_products(last.tensors, new.tensors, list(per_round.values()), factor=factor, run=run)
        return
    carried = _carried(run, last.num_rounds, num_steps=num_steps)
    for name, tensor in new.tensors.items():
        if trainable.is_side(name) or name not in last.tensors:
            continue
        trained = [move for k, move in per_round.items() if is_polished or _is_sent(run, name, k)]
        trained += [move for k, move in carried.items() if k not in per_round and _is_sent(run, name, k)]
        largest = float(last.tensors[name].abs().max())
        allowed = factor * _by_server(math.fsum(trained), largest, run=run) * (1 + _rounding(run))
        allowed += TOLERANCE * max(largest, 1e-3)
        moved = float((tensor - last.tensors[name]).abs().max())
        _require(moved <= allowed, f"a value of {name}", moved, allowed)


def _rounding(run: config.RunConfig) -> float:
    """What rounding to the nearest integer leaves out of a step, as a share of its row's largest value; at most."""
    if run.wire.down == WHOLE:
        return 0.0
    return SCALE_GROWTH / (2 * packing.largest(run.wire.down))


def _carried(run: config.RunConfig, num_rounds: int, *, num_steps: int) -> dict[int, float]:
    """How much of the moves of rounds before the last adapter may come only now: steps are rounded, and what that
    leaves out goes into the next one, a share of it into the one after that, and so on, trained or not.
    """
    share, end = _rounding(run), min(num_rounds, run.federation.num_rounds)
    if not share:
        return {}
    return {k: share ** (end - k) * site_move(k, run=run, num_steps=num_steps) for k in range(end)}


def site_move(round_index: int, *, run: config.RunConfig, num_steps: int) -> float:
    """How far a round of local training can move a value at most, weight decay aside.

    AdamW moves a value by `rate |m| / sqrt(v)` at most, both means corrected for their start. By Cauchy and Schwarz
    `|m_t| / sqrt(v_t)` is at most `c_t`, which is 1 at the first step and 7.3 after thousands with the default decays.
    SGD moves all values together by the rate times the clipped norm, with momentum over 1 - momentum.

    Source: Kingma and Ba 2015, arXiv:1412.6980, section 2.1; (1 - beta1) / sqrt(1 - beta2) is of one gradient alone.

    Example:
        >>> round(adam_constant(1, beta1=0.9, beta2=0.999), 6), round(adam_constant(100_000, beta1=0.9, beta2=0.999), 2)
        (1.0, 7.27)
    """
    training = run.training
    rates = schedule.rates(round_index, num_rounds=run.federation.num_rounds, num_steps=num_steps, training=training)
    if training.optimizer.kind == "sgd":
        return math.fsum(rates) * training.max_grad_norm / (1 - training.optimizer.momentum)
    beta1, beta2 = training.optimizer.beta1, training.optimizer.beta2
    return math.fsum(rate * adam_constant(step, beta1=beta1, beta2=beta2) for step, rate in enumerate(rates, start=1))


def adam_constant(step: int, *, beta1: float, beta2: float) -> float:
    """`c_t` of `site_move`: largest `|m_t| / sqrt(v_t)`, both corrected for their start; infinite where beta2 is 0."""
    if not beta2:
        return math.inf
    ratio = beta1**2 / beta2
    terms = float(step) if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    corrected = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(terms) * corrected


def _by_server(move: float, largest: float, *, run: config.RunConfig) -> float:
    """How far the coordinator's arithmetic can bring a value, from how far the sites' training can."""
    training, privacy = run.training, run.privacy
    if not move:
        return 0.0
    sum_rates = move if training.optimizer.kind == "adamw" else move / training.max_grad_norm  # c_t is 1 at least
    decayed = move + training.optimizer.weight_decay * sum_rates * (largest + move)
    if privacy.mode == "site":  # sums over an expected number of sites, and noise
        expected = site_level.num_expected(run)
        shares = run.federation.num_sites / run.federation.min_sites if privacy.noise_at == "sites" else 1.0
        noise = NOISE_STDS * privacy.noise_multiplier * privacy.clip_norm * math.sqrt(shares) / expected
        decayed = min(decayed, privacy.clip_norm) / privacy.sampling_prob + noise
    server = run.aggregation.server_optimizer
    if server.kind == "none":
        return decayed
    return server.learning_rate * decayed / ((1 - server.beta1) if server.kind == "fedavgm" else server.tau)


def _is_sent(run: config.RunConfig, name: str, round_index: int) -> bool:
    """Whether updates of a round hold this tensor."""
    turns = FACTS[run.aggregation.method].sends
    factor = trainable.factor_of(name)
    return factor not in ("A", "B") or factor in turns[round_index % len(turns)]


def _check_products(last: Tensors, new: Tensors, moves: list[float], *, factor: float, run: config.RunConfig) -> None:
    """The product B A of each module, by its Frobenius norm, for methods that turn the factors.

    A site's B + dB and A + dA move it by |dB| |A| + |B| |dA| + |dB| |dA| at most, the norms of B and A spectral; what
    is cut to rank r is at most as much again, since the last product is of that rank.
    """
    for module, (b_dr, a_rk) in _pairs(new).items():
        old_b_dr, old_a_rk = _pairs(last)[module]
        norm_a, norm_b = _spectral(old_a_rk), _spectral(old_b_dr)
        size_b, size_a = math.sqrt(b_dr.numel()), math.sqrt(a_rk.numel())
        allowed = 0.0
        for move in moves:
            step_b = _by_server(move, norm_b, run=run) * size_b
            if run.aggregation.method == "fedsvd":
                allowed += step_b * max(1.0, norm_a if not allowed else 1.0)
                continue
            step_a = _by_server(move, norm_a, run=run) * size_a
            allowed += 2 * (step_b * norm_a + norm_b * step_a + step_b * step_a)
            norm_b = norm_a = max(1.0, math.sqrt(norm_a * norm_b + allowed))  # what the method makes of both
        moved = _product_distance((b_dr, a_rk), (old_b_dr, old_a_rk))
        whole = _product_distance((b_dr, a_rk), (torch.zeros_like(b_dr), a_rk))
        _require(
            moved <= factor * allowed + TOLERANCE * max(whole, 1e-3),
            f"the product of {module}",
            moved,
            factor * allowed,
        )


def _check_orthonormal(tensors: Tensors) -> None:
    """FedSVD's A has orthonormal rows, so that no row of it can answer to one text alone with any strength."""
    for module, (_, a_rk) in _pairs(tensors).items():
        rows = a_rk.double()
        off = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
        _require(off <= ORTHONORMAL, f"the rows of A of {module}, from orthonormal ones,", off, ORTHONORMAL)


def _pairs(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors by module."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        if trainable.factor_of(name) == "B":
            found[name.rpartition(".lora_B")[0]] = (tensor, tensors[name.replace(".lora_B", ".lora_A")])
    return found


def _spectral(matrix: Tensor) -> float:
    """Largest singular value, by the Gram matrix of the thin side."""
    thin = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return math.sqrt(max(float(torch.linalg.eigvalsh(thin @ thin.T)[-1]), 0.0))


def _product_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Frobenius norm of B A - B' A' by Gram matrices of thin ones, never of d x k."""
    left_dm = torch.cat([one[0].double(), -other[0].double()], dim=1)
    right_mk = torch.cat([one[1].double(), other[1].double()], dim=0)
    return math.sqrt(max(float(((left_dm.T @ left_dm) * (right_mk @ right_mk.T)).sum()), 0.0))


def _require(is_near: bool, what: str, moved: float, allowed: float) -> None:
    """Refuse by the rule; NaN is not near."""
    if not is_near:
        raise PolicyRefusedError(
            f"train.max_move: {what} moved by {moved:.3g}, and training could have moved it by {allowed:.3g}",
            rule="train.max_move",
        )
