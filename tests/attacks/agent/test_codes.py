"""A site whose quantised base is another one than the run's: refused, logged with its rule, no row read."""

import dataclasses

import pytest
from bitsandbytes.nn.modules import Linear4bit

from client.memory import consent
from client.review import review
from common.errors import CodesDifferError
from common.frame import wire
from common.model import codes
from common.run.manifest import Offer, RunManifest
from tests import tiny
from tests.samples import vault

NF4 = {"model.quantization": "nf4"}


@pytest.fixture(scope="module")
def engine(load_tiny):
    return load_tiny(NF4)


@pytest.fixture(scope="module")
def elsewhere(load_tiny):
    """The same files, read as another type before they were quantised."""
    return load_tiny({**NF4, "model.dtype": "bfloat16"})


def test_a_base_with_other_codes_than_the_manifests_is_refused(make, elsewhere):
    site = make()
    run = site.manifest(model__quantization="nf4")
    own, site.engine = site.engine, elsewhere
    assert elsewhere.base_sha256 == own.base_sha256  # the files' hash does not tell them apart
    assert site.refused(site.open(run)) == ("CodesDifferError", "model.codes")
    assert (site.num_reads, site.sent()) == (0, [])
    site.engine = own
    assert site.open(run).kind == "opened"  # control


def test_a_manifest_with_invented_codes_is_refused(make):
    site = make()
    run = site.manifest(model__quantization="nf4")
    invented = dataclasses.replace(run, codes_sha256="ab" * 32)
    assert site.refused(site.open(invented)) == ("CodesDifferError", "model.codes")
    without = dataclasses.replace(run, codes_sha256="")
    assert site.refused(site.open(without)) == ("WireError", "WireError")
    beside = dataclasses.replace(site.manifest(), codes_sha256=run.codes_sha256)
    assert site.refused(site.open(beside)) == ("WireError", "WireError")
    assert site.open(run).kind == "opened"  # control


def test_without_a_policy_other_codes_are_an_error(engine, elsewhere, tiny_base):
    told: list[Exception] = []
    run = RunManifest(tiny.settings(tiny_base, NF4), engine.base_sha256, engine.tensor_specs, engine.codes_sha256)
    frame = wire.pack(Offer(run.to_bytes()).to_frame())
    answers = [tiny.make_agent("north", loaded, errors=told).answer(frame) for loaded in (elsewhere, engine)]
    assert [wire.unpack(answer, max_body_bytes=1 << 20).kind for answer in answers] == ["refused", "opened"]
    assert [type(error) for error in told] == [CodesDifferError]


def test_one_changed_code_changes_the_hash(load_tiny, engine):
    other = load_tiny(NF4)
    base = other.model.get_base_model()
    before = codes.sha256_of(base)
    layer = [module for module in base.modules() if isinstance(module, Linear4bit)][-1]
    layer.weight.data[5] ^= 1
    changed = codes.sha256_of(base)
    layer.weight.data[5] ^= 1
    assert (changed != before, codes.sha256_of(base)) == (True, before)  # control: flipped back, it is the same


MIXED = {"model__quantization": "nf4", "model__site_quantization__north": "int8"}


def test_a_policy_judges_the_precision_of_its_own_site(make, load_tiny, engine):
    allowed = f'"{engine.base_sha256}"\nquantization = '
    own, others = (make(sha256=allowed + names) for names in ('["int8"]', '["nf4", "none"]'))
    run = own.manifest(**MIXED)
    assert others.refused(others.open(run)) == ("PolicyRefusedError", "models.allow.quantization")
    own.engine = load_tiny({"model.quantization": "int8"})
    assert own.open(run).kind == "opened"
    alike = make(sha256=allowed + '["int8"]')  # control: the same policy, and a run that leaves the site at nf4
    elsewhere = alike.manifest(model__quantization="nf4", model__site_quantization__south="int8")
    assert alike.refused(alike.open(elsewhere)) == ("PolicyRefusedError", "models.allow.quantization")


def test_a_site_that_loaded_another_precision_than_its_own_reads_no_row(make, load_tiny, engine):
    site = make()
    run = site.manifest(**MIXED)
    for wrong in (engine, load_tiny()):  # the run's own precision; and one that no hash tells from 8 bits
        site.engine = wrong
        assert site.refused(site.open(run)) == ("CodesDifferError", "model.codes")
    assert (site.num_reads, site.sent()) == (0, [])
    site.engine = load_tiny({"model.quantization": "int8"})
    assert site.open(run).kind == "opened"  # control


def told_of_base(site, run: RunManifest, *, name: str) -> str:
    """What a site of this name reads about the base before it decides."""
    node, gate = vault.node(site.folder, name), site.gate
    desk = review.Desk(node, gate.policy, vault.SITE, gate._log, gate.history, gate._policy_seen)
    return review.review(desk, run.sha256).facts["base as quantised"]


def test_a_review_shows_the_sites_own_precision_and_that_others_differ(make):
    site = make()
    run = site.manifest(**MIXED)
    assert site.open(run, approve=False).head["code"] == "ApprovalRequired"
    pages = {name: told_of_base(site, run, name=name) for name in ("north", "south")}
    assert pages["north"].startswith("to 8 bits")
    assert pages["north"].endswith("; other sites train beside it as nf4")
    assert pages["south"] == f"4-bit codes {run.codes_sha256}; other sites train beside it as int8"


def test_a_review_shows_the_codes_and_that_they_changed(make, engine):
    site = make()
    run = site.manifest(model__quantization="nf4")
    assert site.open(run, approve=False).head["code"] == "ApprovalRequired"
    differing = consent.differences(run, dataclasses.replace(run, codes_sha256="ab" * 32))
    assert differing == {"codes_sha256": (engine.codes_sha256, "ab" * 32)}
    assert told_of_base(site, run, name=site.name) == f"4-bit codes {engine.codes_sha256}"
