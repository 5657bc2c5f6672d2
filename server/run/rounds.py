"""The round loop: score, draw, collect, and again, until the last round. Read this file first.

    score     the sites score the adapter, where the schedule says so
    draw      offer the run again to sites that were away, and draw the round's
    collect   ask them to train, keep and add up their updates, write the next checkpoint
    done

A run between two phases is a value (`RoundState`), which is saved after each; so a coordinator that is killed goes on
where it stood, within a round with the updates that it has.
"""

from dataclasses import replace
from typing import Any

from common.errors import SilotuneError, TooFewSitesError
from common.event_kinds import RoundFinished, RoundStarted
from common.frame.records import RoundPlan
from common.privacy import site_level as site_privacy
from server.aggregate import adalora
from server.evaluate import measure
from server.fleet import held_out, sampling
from server.fleet.run import Run
from server.fleet.sites import Sites
from server.folder import checkpoint
from server.gate import stopping
from server.run import state as states
from server.run.aggregation import Clear, Update, gap_figures
from server.run.state import Phase, RoundState
from server.view.run_view import RunView


def play(run: Run, sites: Sites, state: RoundState) -> RoundState:
    """Play all rounds that are left, fewer if `gate.stop_after` ends them; each is on disk before the next begins.

    Raises:
        TooFewSitesError: A round got fewer valid updates than `federation.min_sites`.
        ModelError: An update that was kept of an interrupted round was changed.
        StorageError: A checkpoint or event could not be written.
    """
    held_out.recall(sites, num_rounds=state.num_rounds)
    while state.phase != Phase.DONE:
        state = advance(run, sites, state)
        states.save(run, state)
    states.forget(run)
    return state


def advance(run: Run, sites: Sites, state: RoundState) -> RoundState:
    """One phase."""
    if state.phase == Phase.SCORE:
        return _score(run, sites, state)
    return _draw(run, sites, state) if state.phase == Phase.DRAW else collect(run, sites, state)


def _score(run: Run, sites: Sites, state: RoundState) -> RoundState:
    """The figures that are due after so many rounds, unless the run was interrupted and has the sites' already.

    None is asked for that the schedule does not have: a site that went on to the next round refuses it, and would
    refuse every later try to resume.
    """
    num_rounds, settings = state.num_rounds, run.plan.evaluation
    if num_rounds in run.plan.evaluated_rounds:
        last, every = run.plan.federation.num_rounds, run.manifest.run.evaluation.tasks_every_rounds
        if not held_out.is_told(run, state.tensors, num_rounds=num_rounds):
            generate = num_rounds == last and settings.exact_match_rows > 0
            held_out.evaluate(sites, state.tensors, num_rounds=num_rounds, generate=generate, steps=state.steps)
        if run.suite and (num_rounds in (0, last) or (every and num_rounds % every == 0)):
            measure.measure(run.suite, state.tensors, stage=measure.stage_of(num_rounds, last=last))
    return replace(state, phase=Phase.DRAW)


def _draw(run: Run, sites: Sites, state: RoundState) -> RoundState:
    """The round's sites, drawn by name, since a node's number is the link's own; or the end of the rounds.

    A site whose update is here already can be drawn whether it is connected or not.
    """
    federation, privacy = run.plan.federation, run.plan.privacy
    if state.num_rounds == federation.num_rounds or stopping.ends(
        run.manifest.run, run.log, num_rounds=state.num_rounds
    ):
        return replace(state, phase=Phase.DONE)
    sites.rejoin()
    received = states.received(run, state)
    present, source = sorted({*sites.present(), *received}), run.make_noise(state.num_rounds)
    if len(present) < federation.min_sites:
        raise TooFewSitesError(
            f"{len(present)} sites are connected, federation.min_sites is {federation.min_sites}; "
            f"rounds up to {state.num_rounds} are on disk"
        )
    if privacy.mode == "site":
        cohort = sampling.poisson(present, sampling_prob=privacy.sampling_prob, source=source)
    else:
        cohort = sampling.choose(
            present,
            num_sites=federation.sites_per_round,
            seed=run.manifest.run.seed,
            round_index=state.num_rounds,
        )
    return replace(state, phase=Phase.COLLECT, cohort=tuple(cohort), received=received, source=source)


def collect(run: Run, sites: Sites, state: RoundState) -> RoundState:
    """The updates of the round's sites, and from them the next adapter, which is on the disk when this returns."""
    # long, as this is the round itself: from the request to the checkpoint, in the order in which it happens
    began, present = run.clock(), sites.present()
    missing = [site for site in state.cohort if site not in state.received]
    if not present.keys() >= set(missing):
        return replace(state, phase=Phase.DRAW)  # the round was interrupted, and not all of its sites came back
    plan = RoundPlan(run.manifest.sha256, state.num_rounds)
    run.log.append(RoundStarted(round=plan.round_index, sites=list(state.cohort)))
    total = Clear(
        run,
        round_index=plan.round_index,
        before=state.tensors,
        memory=state.memory,
        steps=state.steps,
        source=state.source or run.make_noise(plan.round_index),
    )
    for update in states.kept(run, state):
        total.bytes_up += update.num_bytes
        total.add(update)
    nodes = [present[site] for site in missing]
    frames = sites.request("train", plan, state.tensors, nodes=nodes, steps=state.steps)
    for answer in sites.ask(frames, kind="train"):
        num_bytes = len(answer.frame or b"")
        total.bytes_up += num_bytes
        try:
            head, change = sites.read_update(answer, plan)
        except SilotuneError as error:  # missing or wrong: the round goes on without it
            sites.fail(answer, error, step="train")
            continue
        sites.received(answer, plan, step="train")
        if answer.frame is not None and states.keeps_updates(run):
            states.keep(run, state, head.site, answer.frame)
        total.add(Update(head, change, num_bytes))
    total.close()
    _require_quorum(run, total, plan.round_index, num_drawn=len(state.cohort))
    draft, num_rounds = total.result(), state.num_rounds + 1
    digest = checkpoint.save(
        run.folder, draft.after, memory=draft.memory, num_rounds=num_rounds, run_sha256=run.manifest.sha256
    )
    run.record("aggregated", round_index=plan.round_index, num_updates=len(total.counted), adapter_sha256=digest)
    checkpoint.prune(run.folder, num_kept=run.manifest.run.output.keep_checkpoints)
    costs: dict[str, Any] = {}
    if run.plan.privacy.mode == "site":
        # this event is written before the adapter goes out, and a resumed run looks for it
        view = RunView.read(run.log.path)
        counts = {number: event.num_updates for number, event in view.rounds.items()}
        counts[plan.round_index] = len(total.counted)
        num_updates = [counts.get(number) for number in range(num_rounds)]
        num_taken = max(view.num_trainings.values(), default=0)
        costs = site_privacy.spent_by(run.manifest.run, num_updates, num_taken=num_taken)
    losses = [(head.train_loss, weight) for head, weight in total.counted if head.train_loss is not None]
    mean_loss = sum(loss * weight for loss, weight in losses) / sum(weight for _, weight in losses) if losses else None
    run.log.append(
        RoundFinished(
            round=plan.round_index,
            adapter_sha256=digest,
            num_updates=len(total.counted),
            train_loss=mean_loss,
            held_to_share=sorted(total.held_to_share),
            **gap_figures(draft.norms),
            rank=adalora.left(draft.after),
            bytes_down=sum(map(len, frames.values())),
            bytes_up=total.bytes_up,
            seconds=round(run.clock() - began, 3),
            **costs,
        )
    )
    after = RoundState(Phase.SCORE, num_rounds, draft.after, draft.memory, draft.steps)
    states.received(run, after)  # of the round that is done none is kept
    return after


def _require_quorum(run: Run, total: Clear, round_index: int, *, num_drawn: int) -> None:
    """A round with too few updates does not count.

    Where the coordinator noises the sum of sites that were drawn in secret, a round counts whoever was drawn, even
    nobody; only one in which all of them failed does not.
    """
    needed = run.plan.federation.min_sites
    limit = f"federation.min_sites is {needed}"
    if run.plan.privacy.mode == "site" and run.plan.privacy.noise_at == "server":
        needed, limit = min(1, num_drawn), f"{num_drawn} sites were drawn"
    if len(total.counted) < needed:
        raise TooFewSitesError(
            f"round {round_index + 1} got {len(total.counted)} valid updates, {limit}; "
            f"the events say why the others failed; rounds up to {round_index} are on disk"
        )
