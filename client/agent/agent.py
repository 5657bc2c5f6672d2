"""The vault: holds a site's data and the loaded base for its whole life, and answers frames. Read this file first.

`answer` is the site's whole surface. Whatever goes wrong inside crosses as a code and a reference, never as text.
"""

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.agent import protect, residual
from client.agent.guard import Guard, Permissive
from client.agent.shelf import Shelf
from client.policy import figures, rules
from client.policy.figures import FigureNoise
from client.train import answering, coupling, loop, schedule
from common.adapter import adapter, broadcast, compact, ranks, start
from common.adapter.broadcast import Held
from common.data.problems import at_site
from common.data.rows import Row
from common.errors import AuthError, ConfigError, ProtocolError, SilotuneError, code_of
from common.frame import wire
from common.frame.records import OpenedHead, RoundPlan, SiteMetrics, UpdateHead, read_plan, to_head
from common.frame.wire import Frame
from common.loss import evaluation, objectives, preference_score
from common.loss.objectives import Example
from common.model import codes
from common.model.base import Engine, initial_of
from common.privacy.noise import Noise, SystemNoise
from common.run import manifest
from common.run.manifest import RunManifest
from common.run.plan import Plan
from common.run.schema import precisions
from common.run.schema.privacy import Protection
from common.run.schema.section import MAX_MESSAGE_MIB
from common.text import prompts
from common.trust import roster

MAX_BODY_BYTES: Final = MAX_MESSAGE_MIB << 20
MAX_OPEN: Final = 4  # runs; the one that was idle for longest must be offered anew
NOT_OPEN: Final = "this run is not open at this site; the server must send its manifest first"
PERMISSIVE: Final = Permissive()


def fresh_noise(run_manifest: RunManifest, round_index: int) -> Noise:
    """Noise that nobody can foresee, whatever run and round."""
    return SystemNoise()


def unwatched(round_index: int, step: int, num_steps: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class SiteData:
    """A site's rows; no unit has rows in both."""

    train: Sequence[Row]
    held_out: Sequence[Row]


@dataclass(frozen=True)
class OpenRun:
    """A run that this site takes part in.

    `fixed` are tensors that it makes itself, `start` is what the run begins with, of the tensors that are sent,
    `plan` is this site's own.
    """

    manifest: RunManifest
    opened: OpenedHead
    engine: Engine
    train: Sequence[Example]
    held_out: Sequence[Example]
    held_out_rows: Sequence[Row]
    fixed: adapter.Tensors
    start: Held | None
    plan: Plan

    @property
    def sha256(self) -> str:
        """Hash of the manifest."""
        return self.opened.run_sha256

    @property
    def is_of_answers(self) -> bool:
        """Whether rows are learnt as they are, with no reference beside them."""
        return self.manifest.run.training.objective.kind == "sft"

    @functools.cached_property
    def train_preferences(self) -> Sequence[Example]:
        """`train` with references; what is in the engine is overwritten the first time.

        Under differential privacy each example is scored alone, so that its reference depends on no other.
        """
        settings = self.manifest.run
        return self._referenced(self.train, 1 if settings.privacy.mode == "unit" else settings.evaluation.batch_size)

    @functools.cached_property
    def held_out_preferences(self) -> Sequence[Example]:
        """`held_out`, likewise."""
        return self._referenced(self.held_out, self.manifest.run.evaluation.batch_size)

    def _referenced(self, examples: Sequence[Example], batch_size: int) -> Sequence[Example]:
        """Once a run; the start is made here, whatever adapter was sent."""
        begun = _begun(self.manifest, self.engine)
        return preference_score.with_references(self.engine, examples, begun, batch_size=batch_size)


class Agent:
    """One site.

    Several runs may be open, but only the one that was asked for last has its base and rows in memory, since two bases
    may not fit: a step of another one loads them again.

    Args:
        site: Its name.
        load_data: Reads and splits the site's rows as a manifest's `[data]` says.
        load_engine: Loads the base and attaches the adapter that a manifest names; called whenever another run's turn
            comes, and free to return the engine that it already has.
        report: Told every failure with its reference; the site's own log.
        max_body_bytes: Largest adapter or manifest that is taken.
        make_noise: Source of draws and noise of one round; a seeded one is for simulations only.
        guard: Asked before the agent acts and before it answers.
        state_folder: Where what sparse updates left out is kept; None takes no run that needs it.
        shelf: Where tensors are kept that stay at the site; None: no run that needs it is opened.
        watch: Told after each training step: round, steps done, steps of the round. It stays at the site.
    """

    def __init__(
        self,
        site: str,
        *,
        load_data: Callable[[RunManifest], SiteData],
        load_engine: Callable[[RunManifest], Engine],
        report: Callable[[str, Exception], None],
        max_body_bytes: int = MAX_BODY_BYTES,
        guard: Guard = PERMISSIVE,
        make_noise: Callable[[RunManifest, int], Noise] = fresh_noise,
        state_folder: Path | None = None,
        shelf: Shelf | None = None,
        watch: Callable[[int, int, int], None] = unwatched,
    ) -> None:
        self.site = site
        self._load_data = load_data
        self._load_engine = load_engine
        self._report = report
        self._max_body_bytes = max_body_bytes
        self._guard = guard
        self._make_noise = make_noise
        self._state_folder = state_folder
        self._shelf = shelf
        self._watch = watch
        self._run: OpenRun | None = None
        self._opened: dict[str, RunManifest] = {}
        self._held: dict[str, Held] = {}
        self._steps = {"open": self._open, "train": self._train, "evaluate": self._evaluate}

    def answer(self, frame: bytes) -> bytes:
        """Answer one frame with one frame; never raises for what the frame holds."""
        request = None
        try:
            request = wire.unpack(frame, max_body_bytes=self._max_body_bytes)
            if request.kind == roster.KIND:
                return wire.pack(Frame("taken", {"epoch": self._guard.take_roster(bytes(request.body))}))
            if request.kind not in self._steps:
                raise ProtocolError(f"no such request: '{wire.shown(request.kind)}'")
            reply = self._steps[request.kind](request)
            return self._guard.outgoing(request, reply, run=self._open_run().manifest)
        except Exception as error:  # noqa: BLE001  the site's edge: no text of any error may cross
            return wire.pack(self._refuse(error, request))

    def sent_away(self, user_id: int) -> None:
        """Another local user was at the socket; nothing of theirs was read."""
        self._refuse(AuthError(f"user id {user_id} may not use the agent's socket"), None)

    def _refuse(self, error: Exception, request: Frame | None) -> Frame:
        """Code and reference cross; the text stays in the site's log, and if that cannot be written, nowhere."""
        reference = uuid.uuid4().hex[:12]
        try:
            self._report(reference, error)
            self._guard.refused(reference, request, error)
        except SilotuneError as failure:
            error = failure
        return Frame("refused", {"code": code_of(error), "reference": reference})

    def _open(self, request: Frame) -> Frame:
        """Read the manifest, load base and rows, and say how many rows take part."""
        offer = manifest.read_offer(request)
        self._guard.before_open(offer)
        run_manifest = manifest.parse(offer.manifest)
        rules.check_message_size(run_manifest, max_mib=self._max_body_bytes >> 20)
        run = self._take_up(run_manifest)
        self._opened[run.sha256] = run_manifest
        for sha256 in list(self._opened)[:-MAX_OPEN]:
            del self._opened[sha256]
            self._held.pop(sha256, None)
        held = self._held.get(run.sha256, run.start)
        return Frame("opened", {**to_head(run.opened), "adapter_sha256": held.sha256 if held else ""})

    def _take_up(self, run_manifest: RunManifest) -> OpenRun:
        """The run, with its base and rows in memory and those of another one let go."""
        sha256 = run_manifest.sha256
        if sha256 in self._opened:
            self._opened[sha256] = self._opened.pop(sha256)  # to the end: used last
        if self._run is None or self._run.sha256 != sha256:
            self._run = None  # lets go of its base, of which two may not fit into memory
            self._run = self._prepare(run_manifest)
        return self._run

    def _prepare(self, run_manifest: RunManifest) -> OpenRun:
        """Check the base against the manifest, then turn rows into tokens once for the whole run."""
        if self._shelf is None and run_manifest.plan.tensors.kept:
            raise ConfigError("this run keeps tensors at the site, and this agent was given no folder for them")
        engine = self._load_engine(run_manifest)
        codes.check_quantization(engine.quantization, precisions.of_site(run_manifest.run.model, self.site))
        codes.check(engine.codes_sha256, run_manifest.codes_at(self.site))
        adapter.check_specs(engine.tensor_specs, run_manifest.tensor_specs)
        privacy = run_manifest.run.privacy
        if privacy.mode == "unit":
            coupling.check_once(engine, method=privacy.clipping, objective=run_manifest.run.training.objective)
        site_plan, begun = run_manifest.plan.for_site(self.site), None
        if not site_plan.wire.is_adapter_sparse:  # else no request names what it builds on
            sent = ranks.cut(_begun(run_manifest, engine), site_plan.tensors.received)
            begun = broadcast.kept_once(Held(adapter.digest(sent), sent))
        with at_site(self.site):
            data = self._load_data(run_manifest)
            train, train_report = objectives.encode(engine, data.train, run_manifest.run)
            held_out, held_out_report = objectives.encode(engine, data.held_out, run_manifest.run)
        opened = OpenedHead(
            site=self.site,
            run_sha256=run_manifest.sha256,
            num_examples=len(train),
            num_held_out=len(held_out),
            num_truncated=train_report.num_truncated + held_out_report.num_truncated,
            num_dropped=train_report.num_dropped + held_out_report.num_dropped,
            num_steps=schedule.num_local_steps(len(train), run_manifest.run.training),
        )
        self._guard.begins(lambda: _begun(run_manifest, engine), num_steps=opened.num_steps, run=run_manifest)
        num_units = len({row.unit for row in train}), len({row.unit for row in held_out})
        opened = self._guard.counted(opened, num_units=num_units, run=run_manifest)
        if run_manifest.run.privacy.mode == "unit":  # no noise covers these, and nothing needs them
            opened = dataclasses.replace(opened, num_truncated=None, num_dropped=None)
        asked = _asked(engine, data.held_out, run_manifest)
        fixed = start.fixed(run_manifest)
        return OpenRun(run_manifest, opened, engine, train, held_out, asked, fixed, begun, site_plan)

    def _train(self, request: Frame) -> Frame:
        """Train from the global adapter that came; answer with the protected delta."""
        run, plan, before = self._receive(request)
        answered = self._guard.before_training(request, plan, run=run.manifest)
        if answered is not None:
            return answered
        source = self._make_noise(run.manifest, plan.round_index)
        is_watched = self._guard.watches_rows and run.manifest.run.privacy.mode != "unit"
        with answering.watching(run.engine.model) if is_watched else contextlib.nullcontext() as seen:
            result = self._fit(run, plan, before, source)
        self._guard.after_training(result.spread, seen.share() if seen else None)
        after = adapter.read(run.engine.model)
        body = self._protect(run, plan, before, after, trained_with=result.protection, source=source)
        if self._shelf and run.plan.tensors.kept:
            self._shelf.keep(run.manifest, plan.round_index, after)
        head = UpdateHead(
            site=self.site,
            run_sha256=run.sha256,
            round_index=plan.round_index,
            num_examples=run.opened.num_examples,
            num_steps=result.num_steps,
            num_tokens=result.num_tokens,
            train_loss=result.train_loss,
            seconds=result.seconds,
        )
        return Frame("update", to_head(head), body)

    def _fit(self, run: OpenRun, plan: RoundPlan, start: adapter.Tensors, source: Noise) -> loop.LocalResult:
        """Local training from an adapter; what it became is in the engine."""
        settings = run.manifest.run
        rows = run.train if run.is_of_answers else run.train_preferences  # scored by the whole adapter, so beforehand
        adapter.write(run.engine.model, start)
        with adapter.training_only(run.engine.model, [spec.name for spec in run.plan.trained(plan.round_index)]):
            return loop.train(
                run.engine,
                rows,
                training=settings.training,
                privacy=settings.privacy,
                round_index=plan.round_index,
                num_rounds=settings.federation.num_rounds,
                seed=schedule.derive_seed(settings.seed, self.site),
                source=source,
                proximal=settings.aggregation.proximal,
                watch=functools.partial(self._watch, plan.round_index),
            )

    def _protect(
        self,
        run: OpenRun,
        plan: RoundPlan,
        before: adapter.Tensors,
        after: adapter.Tensors,
        *,
        trained_with: Protection,
        source: Noise,
    ) -> bytes:
        """The update's body; what a sparse one leaves out is on the disk before it leaves."""
        settings, folder = run.manifest.run, self._residual_folder(run)
        raw_delta = protect.subtract(after, {spec.name: before[spec.name] for spec in run.plan.sent(plan.round_index)})
        specs = run.plan.tensors.leaving
        left_out = residual.load(folder, run.sha256, plan.round_index, specs) if folder else None
        outgoing = protect.protect(
            raw_delta,
            privacy=settings.privacy,
            trained_with=trained_with,
            num_shares=settings.federation.min_sites,
            source=source,
            settings=settings.wire,
            draws=compact.dice(run.sha256, self.site, plan.round_index),
            left_out=left_out,
        )
        if folder:
            residual.save(folder, run.sha256, plan.round_index, outgoing.left_out)
        return outgoing.body

    def _residual_folder(self, run: OpenRun) -> Path | None:
        """Where a run's residuals are kept; None for a run that has none."""
        if not run.manifest.run.wire.keeps_residual:
            return None
        if self._state_folder is None:
            raise ConfigError(
                "this run's sparse updates need a folder at the site for what they leave out; it has none"
            )
        return self._state_folder

    def _evaluate(self, request: Frame) -> Frame:
        """Score the global adapter that came, with what the site keeps of its own, on this site's held-out rows."""
        run, plan, tensors = self._receive(request)
        noised_by = self._guard.before_evaluation(plan, run=run.manifest)
        if isinstance(noised_by, Frame):
            return noised_by
        rows = run.held_out if run.is_of_answers else run.held_out_preferences
        adapter.write(run.engine.model, tensors)
        if self._shelf and run.plan.tensors.kept:
            self._shelf.note(run.manifest, plan.round_index, tensors)
        score = _score(run, rows, generate=plan.generate, noised_by=noised_by)
        metrics = SiteMetrics(
            site=self.site,
            run_sha256=run.sha256,
            round_index=plan.round_index,
            num_rows=run.opened.num_held_out,
            **dataclasses.asdict(score),
        )
        return Frame("metrics", to_head(metrics))

    def _receive(self, request: Frame) -> tuple[OpenRun, RoundPlan, adapter.Tensors]:
        """Plan and adapter, for the run that is open and for one of its rounds."""
        plan = read_plan(request.head)
        if plan.run_sha256 not in self._opened:
            raise ProtocolError(NOT_OPEN)
        run = self._take_up(self._opened[plan.run_sha256])
        last = run.plan.federation.num_rounds - 1 if request.kind == "train" else run.plan.last_scored
        if plan.round_index > last:
            raise ProtocolError(f"round {plan.round_index} is beyond the manifest's last, {last}")
        specs, known = run.plan.down(plan.round_index), (self._held.get(run.sha256), run.start)
        received = broadcast.receive(request, specs, settings=run.plan.wire, held=known)
        if not run.plan.wire.is_adapter_sparse:
            self._held[run.sha256] = received
        tensors = {**run.fixed, **received.tensors}
        self._guard.before_step(request, plan, tensors, run=run.manifest)
        if self._shelf and run.plan.tensors.kept:
            tensors |= self._shelf.before(run.manifest, plan.round_index)
        return run, plan, tensors

    def _open_run(self) -> OpenRun:
        """The run that was asked for last."""
        if self._run is None:
            raise ProtocolError(NOT_OPEN)
        return self._run


def _asked(engine: Engine, rows: Sequence[Row], run_manifest: RunManifest) -> Sequence[Row]:
    """Held-out rows that are answered, with the input that their loss is of."""
    settings, data = run_manifest.run.evaluation, run_manifest.run.data
    if data.too_long != "truncate_input":
        return rows[: settings.exact_match_rows]
    limit, prompt = data.max_length_tokens, data.system_prompt
    return [
        prompts.shorten(row, engine.tokenizer, max_length_tokens=limit, system_prompt=prompt)
        for row in rows[: settings.exact_match_rows]
    ]


def _score(run: OpenRun, rows: Sequence[Example], *, generate: bool, noised_by: FigureNoise | None) -> evaluation.Score:
    """Held-out figures of the adapter that is in the engine."""
    settings, objective = run.manifest.run.evaluation, run.manifest.run.training.objective
    if noised_by:
        return figures.score(
            run.engine,
            rows,
            objective=objective,
            batch_size=settings.batch_size,
            num_rows=run.opened.num_held_out,
            noised_by=noised_by,
        )
    if objective.kind != "sft":
        return preference_score.score(run.engine, rows, objective, batch_size=settings.batch_size)
    return evaluation.score(
        run.engine,
        [row for example in rows for row in example.rows],
        run.held_out_rows if generate else (),
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        system_prompt=run.manifest.run.data.system_prompt,
    )


def _begun(run_manifest: RunManifest, engine: Engine) -> adapter.Tensors:
    """The whole adapter that a run begins with; the engine may have been loaded for a run of another seed."""
    return start.initial(run_manifest, initial_of(engine, run_manifest.run))
