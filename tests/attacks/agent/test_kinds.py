"""A site with a policy, and adapters of other kinds than LoRA: played where listed, refused where not."""

import pytest
import torch

from tests import tiny
from tests.samples import vault

LISTED = '[2, 16]\n[adapter]\nkinds = ["adalora", "ia3", "prefix_tuning"]\nmax_parameters = 20_000'


def site_of(load_tiny, folder, kind: str, rules: str = LISTED):
    """A site on an engine with such an adapter, and the run that it is offered."""
    site = vault.make(folder, load_tiny(tiny.of_kind(kind)), r=rules)
    return site, site.manifest(**{key.replace(".", "__"): value for key, value in tiny.of_kind(kind).items()})


@pytest.mark.parametrize("kind", ["adalora", "ia3", "prefix_tuning"])
def test_a_listed_kind_is_played_through_guard_probes_and_egress(load_tiny, tmp_path, kind):
    site, run = site_of(load_tiny, tmp_path, kind)
    assert site.open(run).kind == "opened"
    assert site.step("evaluate", run).kind == "metrics"
    assert site.step("train", run).kind == "update"
    assert site.step("evaluate", run, round_index=1).kind == "metrics"
    assert [step for step, _ in site.sent()] == ["open", "evaluate", "train", "evaluate"]
    assert not site.errors


def test_a_kind_that_is_not_listed_is_refused_before_a_row_is_read(load_tiny, tmp_path):
    site, run = site_of(load_tiny, tmp_path, "ia3", "[2, 16]")
    assert site.refused(site.open(run)) == ("PolicyRefusedError", "adapter.kinds")
    assert site.num_reads == 0


@pytest.mark.parametrize(
    ("name", "value", "rule"), [("ia3_l", 1e5, "train.max_tensor_norm"), ("lora_A", 0.0, "train.adapter")]
)
def test_a_global_adapter_that_reads_rows_is_refused_for_other_kinds_too(load_tiny, tmp_path, name, value, rule):
    kind = "ia3" if name == "ia3_l" else "adalora"
    site, run = site_of(load_tiny, tmp_path, kind)
    assert site.open(run).kind == "opened"
    trap = dict(site.engine.initial)
    chosen = next(one for one in trap if one.endswith(name))
    trap[chosen] = torch.full_like(trap[chosen], value)
    assert site.refused(site.step("train", run, state=trap)) == ("PolicyRefusedError", rule)
    assert site.step("train", run).kind == "update"
