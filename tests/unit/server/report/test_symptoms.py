"""Symptoms from synthetic events: each is found in a log that shows it, and in its control that does not none is."""

import re

import pytest

from common.errors import code_of
from common.run import config
from common.run.schema import shape
from server.report import report, status, symptoms
from server.verify import verify
from tests.samples.events import LOG, PLAN, evaluated, finished, measured, view, whole


def of_task(mean, *, kind="answers", width=0.05, values=(0.5, 0.5)):
    base, last = (measured(stage, {"a.f1": value}) for stage, value in zip(("base", "final"), values, strict=True))
    for event in (base, last):
        event["figures"]["a.f1"]["kind"] = kind
    last["gains"] = {"base": {"a.f1": {"mean": mean, "low": mean - width, "high": mean + width}}}
    return [base, last]


def failed(site, reason, step="train"):
    return {"kind": "site_failed", "site": site, "step": step, "reason": reason}


def polished(after, before=None):
    before = before or {"logp_chosen": -10.0, "logp_rejected": -12.0, "length": 40.0, "repetition": 0.05}
    return {"kind": "polish_finished", "stage": "align", "number": 1, "before": before, "after": {**before, **after}}


def exported(difference):
    logits = {"merged": {"difference": difference, "limit": 0.8}, "base": {"difference": 0.5}}
    told = {"name": "triage", "signer": "", "num_files": 3, "num_tensors": 2, "formats": ["peft", "merged"]}
    return {"kind": "exported", "folder": "export", "perplexity": {}, "logits": logits, **told}


FALLS = [PLAN, evaluated(0, 6.0, north=6.5, south=5.5), evaluated(1, 4.0, north=4.5, south=3.5)]
DRIFTS = [
    PLAN,
    evaluated(0, 6.0, north=6.5, south=5.5),
    evaluated(1, 5.0, north=6.6, south=3.5),
    evaluated(2, 4.0, north=6.7, south=1.5),
]
NO_DRIFT = [*DRIFTS[:3], evaluated(2, 4.0, north=6.4, south=1.5)]
CASES = [
    ("loss falls, tasks are flat", [*FALLS, *of_task(0.0)], [*FALLS, *of_task(0.2)]),
    ("loss falls, tasks are flat", [*FALLS, *of_task(0.02)], [*FALLS[:2], evaluated(1, 5.9, north=5.9), *of_task(0.0)]),
    ("forgetting", of_task(-0.2, kind="probe"), of_task(-0.02, kind="probe")),
    ("forgetting", of_task(-0.2, kind="probe"), of_task(-0.2)),
    ("preference stage collapses", [polished({"logp_chosen": -20.0, "logp_rejected": -40.0})],
     [polished({"logp_chosen": -9.0, "logp_rejected": -40.0})]),
    ("preference stage collapses", [polished({"logp_chosen": -11.5, "logp_rejected": -14.0})],
     [polished({"logp_chosen": -10.5, "logp_rejected": -14.0})]),
    ("preference stage collapses", [polished({"length": 90.0})], [polished({"length": 50.0})]),
    ("preference stage collapses", [polished({"repetition": 0.4})], [polished({"repetition": 0.1})]),
    ("large aggregation gap", [PLAN, finished(0, 0.3), finished(1, 0.2)], [PLAN, finished(0, 0.3), finished(1, 0.05)]),
    ("a site drifts away", DRIFTS, NO_DRIFT),
    ("training diverged", [failed("north", "ModelError: the loss is nan, it diverged")],
     [failed("north", "no answer within 60 s")]),
    ("training diverged", [failed("north", "failed (ModelError); see reference 1")],
     [failed("north", "failed (ModelError); see reference 1", step="open")]),
    ("training diverged", [{"kind": "run_failed", "error": "ModelError", "reason": "the adapter has diverged"}],
     [{"kind": "run_failed", "error": "StorageError", "reason": "the disk is full"}]),
    ("training diverged", [{"kind": "run_failed", "error": "ModelError", "reason": "held-out loss is -inf"}],
     [{"kind": "run_failed", "error": "DataError", "reason": "the file is information for people"}]),
    ("merged worse than adapter", [exported(0.4)], [exported(0.01)]),
    ("merged worse than adapter", [exported(0.4)], [exported(0.4), exported(0.01)]),
    ("out of memory", [failed("north", "failed (OutOfMemory); the site's log has the reason")],
     [failed("north", "failed (InternalError); the site's log has the reason")]),
    ("out of memory", [{"kind": "site_refused", "node": 3, "site": "node 3", "reason": "failed (OutOfMemory)"}],
     [{"kind": "site_refused", "node": 3, "site": "node 3", "reason": "refused by rule (PolicyRefusedError)"}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shows", "control"), CASES)
def test_a_symptom_is_found_where_it_is_and_nowhere_else(name, shows, control):
    found = [one for one in symptoms.symptoms(view(shows)) if one.name == name]
    assert len(found) == 1
    assert found[0].evidence
    assert found[0].remedy
    assert name not in [one.name for one in symptoms.symptoms(view(control))]


def test_every_remedy_names_settings_and_values_that_there_are():
    keys = {*shape.keys_of(config.RunConfig), *shape.keys_of(config.NodeConfig)}
    sections = "|".join({key.split(".")[0] for key in keys if "." in key})
    remedies = {one.remedy for _, shows, _ in CASES for one in symptoms.symptoms(view(shows))}
    named = {match[0] for text in remedies for match in re.finditer(rf"\b(?:{sections})(?:\.[a-z_0-9]+)+", text)}
    assert named <= keys
    assert len(named) >= 8  # control: they are found
    base = 'version = 1\nmodel.base = "embedded"\nprivacy.mode = "none"\n'
    for key, value in {pair for text in remedies for pair in re.findall(r"([a-z_]+\.[a-z_]+) = '(\w+)'", text)}:
        config.parse(f'{base}{key} = "{value}"', name="run.toml")


def test_every_finder_is_tried():
    import inspect

    source = inspect.getsource(symptoms)
    assert all(f'"{name}"' in source for name, _, _ in CASES)
    found = {one.name for _, shows, _ in CASES for one in symptoms.symptoms(view(shows))}
    assert len(found) == len(symptoms.FINDERS)


def test_the_figures_and_the_site_are_named():
    (drift,) = symptoms.symptoms(view(DRIFTS))
    assert "north: loss 6.500 to 6.700 while the mean went 6.000 to 4.000" in drift.evidence
    (memory,) = symptoms.symptoms(view([failed("north", "failed (OutOfMemory); reference 12")]))
    assert "north" in memory.evidence
    (gap,) = symptoms.symptoms(view([PLAN, finished(0, 0.3), finished(1, 0.2)]))
    assert "rolora" in gap.remedy


def test_figures_are_of_the_newest_adapter_and_not_of_one_that_a_gate_went_back_to():
    older = measured("round-00001", {"a.f1": 0.5}, {"base": {"a.f1": {"mean": 0.0, "low": -0.1, "high": 0.1}}})
    gated = [{"kind": "gated", "stage": stage, "is_passed": False} for stage in ("final", "round-00001")]
    forgets = of_task(-0.2, kind="probe")
    assert [one.name for one in symptoms.symptoms(view([*forgets, older, *gated]))] == ["forgetting"]
    assert symptoms.symptoms(view([*forgets, older])) == []  # control: the last stage is another


def test_a_stale_site_or_a_log_of_an_earlier_kind_is_no_symptom():
    stale = [*DRIFTS[:3], evaluated(2, 4.0, stale=["north"], north=6.7, south=1.5)]
    assert symptoms.symptoms(view(stale)) == []
    assert symptoms.symptoms(view([{"kind": "polish_finished", "stage": "x"}])) == []
    assert symptoms.symptoms(view([])) == []
    assert symptoms.symptoms(view(LOG)) == []


def test_a_site_that_runs_out_of_memory_says_so_and_no_more():
    import torch

    assert code_of(torch.OutOfMemoryError("Tried to allocate 2.00 GiB for patient rows")) == "OutOfMemory"
    assert code_of(RuntimeError("CUDA error")) == "InternalError"  # control


def test_a_format_that_loses_the_adapter_is_told_beside_its_figures():
    sound = {"merged": {"difference": 0.01, "limit": 0.1}, "base": {"difference": 0.5}}
    eaten = {"nf4": {"difference": 0.4, "limit": 0.8}, "base": {"difference": 0.5}}
    assert symptoms.of_formats(sound) == []
    assert "nf4 differs" in symptoms.of_formats(eaten)[0].evidence
    result = {"name": "triage", "signer": "", "num_files": 3, "num_tensors": 2}
    assert "merged worse than adapter" in verify.in_words({**result, "logits": eaten})[-1]
    assert "merged worse" not in " ".join(verify.in_words({**result, "logits": sound}))


def test_the_report_of_a_run_that_exported_names_the_folder_and_what_is_wrong_with_it():
    page = report.render(view([PLAN, exported(0.4)]))
    assert "<h2>Export</h2>" in page
    assert "export/ (peft, merged)" in page
    assert "merged worse than adapter" in page
    assert "merged worse than adapter" not in report.render(view([PLAN, exported(0.01)]))
    assert "<h2>Export</h2>" not in report.render(view([PLAN]))


def test_report_and_status_say_what_the_numbers_say(tmp_path):
    from common.events import EventLog

    log = EventLog(tmp_path / "events.jsonl")
    for event in DRIFTS:
        log.append(whole(event))
    assert "What the numbers say" in report.render(view(DRIFTS))
    assert "What the numbers say" not in report.render(view(NO_DRIFT))
    found = status.read(tmp_path)
    assert found["symptoms"][0]["name"] == "a site drifts away"
    assert found["in_words"]["What the numbers say"][0].startswith("a site drifts away: north")
