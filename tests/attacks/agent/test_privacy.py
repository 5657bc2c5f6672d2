"""What a coordinator may try on a site that demands differential privacy, and what becomes of its ledger.

Names carry the numbers of the attack table. Each case has a control that succeeds.
"""

import shutil

import pytest

from client.ledger.budget import Budget
from client.memory import site_ledger
from client.memory.history import AUDIT_FILE, History
from client.train import private
from common.trust.audit_log import AuditLog
from tests.samples import vault

POLICY = "PolicyRefusedError"
PRIVATE = {
    "privacy__mode": '"unit"',
    "privacy__sampling_prob": "0.5",
    "privacy__noise_multiplier": "4.0",
    "training__local_steps": "3",
    "training__local_epochs": "0.0",
}


def run_of(site, **changes):
    return site.manifest(**{**PRIVATE, **changes})


def create_ledger(site, *, num_units: int = 6) -> None:
    """As `silotune-client ledger create` does."""
    history = History()
    log = AuditLog(site.folder / AUDIT_FILE, key=vault.SITE, on_entry=history.take, clock=lambda: site.now)
    own = vault.node(site.folder, site.name)
    site_ledger.create(own, rules=site.gate.policy, key=vault.SITE, history=history, log=log, num_units=num_units)


@pytest.fixture
def strict(make):
    """A site that demands privacy and has a ledger."""
    site = make(mode='"required"')
    create_ledger(site)
    return site


def ledger_file(site):
    return next(site.folder.glob("*.ledger"))


def paid(site) -> Budget:
    """What the ledger says, which must be what the audit log knows of it."""
    history = History()
    AuditLog(site.folder / AUDIT_FILE, key=vault.SITE, on_entry=history.take, clock=lambda: site.now)
    own = vault.node(site.folder, site.name)
    return site_ledger.open_site(own, rules=site.gate.policy, key=vault.SITE, history=history).budget()


def charges(site, purpose: str = "train") -> int:
    """Reservations for rounds, or for something else."""
    return sum(one.purpose == purpose for one in paid(site).reservations)


def test_control_a_private_run_trains_and_is_charged_before_it_leaves(strict):
    assert strict.open(run_of(strict)).kind == "opened"
    answer = strict.step(run=run_of(strict))
    assert answer.kind == "update"
    assert (answer.head["train_loss"], answer.head["num_tokens"], answer.head["seconds"]) == (None, None, None)
    assert charges(strict) == 1
    kinds = [entry.kind for entry in strict.log()]
    assert kinds.index("ledger", kinds.index("opened")) < len(kinds) - 1 - kinds[::-1].index("left")


@pytest.mark.parametrize("noise", ["0.1", "0.79"])
def test_a05_noise_below_the_sites_floor(strict, noise):
    run = run_of(strict, privacy__noise_multiplier=noise)
    assert strict.refused(strict.open(run)) == (POLICY, "privacy.min_noise_multiplier")
    assert strict.num_reads == 0


def test_a05_no_noise_at_all(strict):
    run = run_of(strict, privacy__noise_multiplier="0.0", privacy__epsilon="8.0")
    assert strict.refused(strict.open(run)) == (POLICY, "privacy.min_noise_multiplier")


def test_a06_clip_norm_above_the_maximum(strict):
    run = run_of(strict, privacy__clip_norm="1.5")
    assert strict.refused(strict.open(run)) == (POLICY, "privacy.max_clip_norm")


def test_a06_a_delta_above_the_sites(strict):
    run = run_of(strict, privacy__dp_delta="1e-3")
    assert strict.refused(strict.open(run)) == (POLICY, "privacy.dp_delta")


def test_a06_a_plan_above_the_sites_epsilon(strict):
    run = run_of(strict, privacy__noise_multiplier="0.9")
    assert strict.refused(strict.open(run)) == (POLICY, "privacy.max_epsilon")


def test_a06_a_budget_that_earlier_runs_have_spent(strict):
    first = run_of(strict, privacy__noise_multiplier="1.2")
    strict.open(first)
    assert [strict.step(run=first, round_index=number).kind for number in (0, 1)] == ["update", "update"]
    second = run_of(strict, privacy__noise_multiplier="1.2", name='"second"')
    assert strict.refused(strict.open(second)) == ("BudgetExhausted", "privacy.max_epsilon")
    assert charges(strict) == 2


def test_a07_a_run_without_privacy(strict):
    assert strict.refused(strict.open()) == (POLICY, "privacy.mode")


def test_a28_no_ledger(make):
    site = make(mode='"required"')
    assert site.refused(site.open(run_of(site))) == ("LedgerError", "privacy.ledger")


def test_a28_a_ledger_that_was_lost(strict):
    ledger_file(strict).unlink()
    assert strict.refused(strict.open(run_of(strict))) == ("LedgerError", "privacy.ledger")


def test_a28_a_ledger_with_one_changed_byte(strict):
    path = ledger_file(strict)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert strict.refused(strict.open(run_of(strict))) == ("LedgerError", "privacy.ledger")


def test_a28_a_ledger_restored_from_a_backup_in_the_midst_of_a_run(strict, tmp_path):
    run = run_of(strict)
    strict.open(run)
    shutil.copy2(ledger_file(strict), tmp_path / "backup")
    assert strict.step(run=run).kind == "update"
    shutil.copy2(tmp_path / "backup", ledger_file(strict))
    assert strict.refused(strict.step(run=run, round_index=1)) == ("LedgerError", "privacy.ledger")
    assert ("train", 1) not in strict.sent()


def test_a13_a_private_round_that_is_asked_again_is_the_same_release_and_costs_nothing(strict):
    run = run_of(strict)
    strict.open(run)
    first = strict.step(run=run)
    strict.start()  # another process
    strict.open(run, approve=False)
    again = strict.step(run=run)
    assert again.body == first.body
    assert charges(strict) == 1


def test_an_answer_that_is_not_kept_any_more_is_not_made_anew(strict):
    run = run_of(strict)
    strict.open(run)
    strict.step(run=run)
    shutil.rmtree(strict.folder / "answers")
    assert strict.refused(strict.step(run=run)) == (POLICY, "rounds")
    assert charges(strict) == 1


def test_a_round_that_died_after_it_was_paid_stays_charged(strict, monkeypatch):
    run = run_of(strict)
    strict.open(run)

    def dies(*args, **more):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(private, "clipped_sum", dies)
        assert strict.step(run=run).kind == "refused"
    assert charges(strict) == 1
    assert strict.step(run=run).kind == "update"
    assert charges(strict) == 2


def test_two_sites_with_the_same_rows_send_other_updates_as_each_draws_its_own_noise(make):
    bodies = []
    for _ in range(2):
        site = make(mode='"required"')
        create_ledger(site)
        site.open(run_of(site))
        bodies.append(site.step(run=run_of(site)).body)
    assert bodies[0] != bodies[1]


def test_control_without_privacy_the_same_rows_give_the_same_update(make):
    sites = [make(), make()]
    assert all(site.open().kind == "opened" for site in sites)
    assert sites[0].step().body == sites[1].step().body


AT_SITES = {
    "privacy__mode": '"site"',
    "privacy__noise_at": '"sites"',
    "privacy__sampling_prob": "1.0",
    "privacy__noise_multiplier": "4.0",
    "aggregation__weighting": '"uniform"',
}


def test_a13_an_update_under_the_sites_own_share_of_the_noise_is_never_made_anew(make):
    """Two draws of noise on one update would average out; no unit is promised anything, so no ledger is asked."""
    site = make(mode='"required"\nsite_level = ["sites"]')
    run = site.manifest(**AT_SITES)
    assert site.open(run).kind == "opened"
    first = site.step(run=run)
    assert (first.kind, first.head["train_loss"]) == ("update", None)
    site.start()  # another process
    site.open(run, approve=False)
    assert site.step(run=run).body == first.body
    next((site.folder / "answers").iterdir()).unlink()
    site.start()
    site.open(run, approve=False)
    assert site.refused(site.step(run=run)) == (POLICY, "rounds")


def test_a07_noise_for_whole_sites_where_the_policy_demands_it_for_units(strict):
    assert strict.refused(strict.open(strict.manifest(**AT_SITES))) == (POLICY, "privacy.site_level")
