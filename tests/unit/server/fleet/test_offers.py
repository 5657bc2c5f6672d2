"""A run that is signed, offered to sites with a policy, and waits where a person has to decide."""

import pytest
import torch

from common.errors import ConfigError, TooFewSitesError
from common.trust import identity
from server.fleet import sites as fleet_sites
from server.fleet import trail
from server.fleet.grid import GridFleet
from server.fleet.run import Run
from server.folder import run_files
from server.run import run as server_run
from simulations.engines.grid import InProcessGrid
from tests import tiny
from tests.samples import vault
from tests.samples.coordinator import Coordinator

SITES = ("north", "south", "west")


@pytest.fixture
def sites(tmp_path, engine):
    """Three sites, each with a policy under which every run needs approval."""
    return [vault.make(tmp_path / name, engine, name=name) for name in SITES]


class Clock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.when: dict[float, object] = {}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at in [at for at in self.when if at <= self.now]:
            self.when.pop(at)()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def fed(sites, tmp_path, clock):
    """A federation of the three that offers a signed run."""
    fleet = GridFleet(InProcessGrid({number: site.agent.answer for number, site in enumerate(sites, start=1)}))
    settings = sites[0].manifest(federation__join_timeout_s="100.0")
    log = run_files.prepare(settings.run, tmp_path / "run")
    run = Run(settings, tmp_path / "run", log, offer=sites[0].offer(settings), clock=clock, sleep=clock.sleep)
    return Coordinator(run, fleet)


def run_of(agents, tmp_path, engine, *, operator=None):
    """A whole run over sites; its adapter."""
    settings = tiny.settings("tiny")
    log = run_files.prepare(settings, tmp_path)
    fleet = GridFleet(InProcessGrid({number: agent.answer for number, agent in enumerate(agents, start=1)}))
    done = server_run.execute(settings, fleet=fleet, engine=engine, folder=tmp_path, log=log, operator=operator)
    return done.tensors


def test_a_signed_run_over_sites_with_a_policy_gives_the_adapter_of_sites_without(sites, tmp_path, engine):
    for site in sites:
        site.approve(site.manifest())
    operator = vault.operator(tmp_path)
    guarded = run_of([site.agent for site in sites], tmp_path / "guarded", engine, operator=operator)
    plain = run_of([tiny.make_agent(name, engine) for name in SITES], tmp_path / "plain", engine)
    assert all(torch.equal(guarded[name], plain[name]) for name in plain)
    assert [len(site.sent()) for site in sites] == [6, 6, 6]


def test_an_unsigned_run_gets_no_site_with_a_policy(sites, tmp_path, engine):
    for site in sites:
        site.approve(site.manifest())
    with pytest.raises(TooFewSitesError, match="PolicyRefusedError"):
        run_of([site.agent for site in sites], tmp_path / "unsigned", engine)
    assert [site.sent() for site in sites] == [[], [], []]


def test_a_run_waits_for_approval_and_asks_seldom(fed, sites, clock):
    for site in sites[:2]:
        site.approve(fed.manifest)
    clock.when[40.0] = lambda: sites[2].approve(fed.manifest)
    fed.wait()
    assert 40.0 <= clock.now <= 40.0 + fleet_sites.APPROVAL_RETRY_S + 1
    assert len(sites[2].errors) == 3  # at 0, 15 and 30 s
    assert sorted(head.site for head in fed.opened.values()) == list(SITES)


def test_a_run_that_nobody_approves_ends_and_says_so(fed, sites, clock):
    with pytest.raises(TooFewSitesError, match="node 1: waits for approval"):
        fed.wait()
    assert clock.now >= 100


def test_a_site_that_denies_is_not_asked_again_and_receives_no_round(fed, sites, clock):
    for site in sites:
        site.approve(fed.manifest, is_approved=site.name != "west")
    with pytest.raises(TooFewSitesError, match="ApprovalDenied"):
        fed.wait()
    assert len(sites[2].errors) == 1
    assert sorted(fed.present().values()) == [1, 2]


def test_a_run_without_key_is_not_signed():
    assert trail.operator("", federation="", days=30) is None


def test_an_operators_key_signs_for_one_federation_and_some_days(tmp_path, sites):
    identity.create(tmp_path / "op.pem")
    with pytest.raises(ConfigError, match="--federation"):
        trail.operator(str(tmp_path / "op.pem"), federation="", days=30)
    assert not (tmp_path / "op-audit").exists()
    operator = trail.operator(str(tmp_path / "op.pem"), federation="onco-eu", days=30)
    assert operator is not None
    signature = operator.make_offer(sites[0].manifest()).signature
    assert signature is not None
    assert signature.signer == identity.public_hex(identity.load(tmp_path / "op.pem"))
