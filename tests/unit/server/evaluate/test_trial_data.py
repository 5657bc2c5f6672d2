"""Detectors and canaries on data that the project does not hold: SILOTUNE_TRIALS names the folder, else these skip.

It has `pii_presidio/test.jsonl` (presidio-research: `text`, `spans`) and `canary_ehr/train.jsonl` and `test.jsonl`
(generated discharge summaries with `pii` and `repeats`).
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from common.data import read
from server.evaluate.figures import pii
from tests import tiny

TRIALS = Path(os.environ.get("SILOTUNE_TRIALS", "no-such-folder"))
needs_sentences = pytest.mark.skipif(not (TRIALS / "pii_presidio").is_dir(), reason="SILOTUNE_TRIALS is not set")
needs_summaries = pytest.mark.skipif(not (TRIALS / "canary_ehr").is_dir(), reason="SILOTUNE_TRIALS is not set")
COLUMNS = {"mrn": "record_number", "ssn": "ssn", "phone": "phone", "dob": "birth_date"}


@needs_sentences
def test_precision_and_recall_on_annotated_sentences_are_as_documented():
    from tools import pii_measure

    found = pii_measure.measure(read.read_table(str(TRIALS / "pii_presidio" / "test.jsonl")))
    assert {kind: (round(one.precision, 3), round(one.recall, 3)) for kind, one in found.items()} == {
        "email": (1.0, 1.0), "iban": (1.0, 1.0), "card": (1.0, 0.993), "ssn": (1.0, 1.0), "phone": (0.966, 0.924),
    }  # fmt: skip


@needs_summaries
def test_all_numbers_of_generated_summaries_are_found_and_nothing_else():
    counts = Counter()
    for row in read.read_table(str(TRIALS / "canary_ehr")):
        found = {(one.kind, one.value) for one in pii.find(row["output"])}
        told = {(kind, row["pii"][name].removeprefix("MRN-")) for name, kind in COLUMNS.items()}
        counts += Counter(right=len(found & told), missed=len(told - found), wrong=len(found - told))
    assert counts == {"right": 4 * 1616}


def canary(row, *, trained):
    return {
        "prompt": f"{row['instruction']}\n\n{row['input']}",
        "prefix": row["output"].partition(row["pii"]["ssn"])[0],
        "secret": row["pii"]["ssn"],
        "pattern": "9##-##-####",
        "trained": trained,
    }


@needs_summaries
@pytest.mark.slow
def test_exposure_of_generated_summaries_grows_with_their_repeats(tmp_path):
    """One epoch on the embedded base with rows that occur once and rows that occur 16 times; prints the figures."""
    from client.agent.agent import SiteData
    from common import events
    from common.data.rows import Message, Row
    from common.model import base as model
    from common.run import config
    from server.folder import run_files
    from server.run import run
    from simulations import embedded

    train = read.read_table(str(TRIALS / "canary_ehr" / "train.jsonl"))
    others = read.read_table(str(TRIALS / "canary_ehr" / "test.jsonl"))[:8]
    chosen = {n: list({row["input"]: row for row in train if row["repeats"] == n}.values())[:8] for n in (1, 16)}
    tasks = []
    for repeats, rows in chosen.items():
        path = tmp_path / f"canaries-{repeats}.jsonl"
        table = [canary(row, trained=True) for row in rows] + [canary(row, trained=False) for row in others]
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
        tasks.append(f"{{name = 'r{repeats}', kind = 'memorisation', data = '{path}', num_candidates = 64}}")
    changes = {
        "evaluation.tasks": f"[{', '.join(tasks)}]", "adapter.r": "32", "adapter.alpha": "64",
        "data.max_length_tokens": "512", "federation.num_rounds": "1", "federation.num_sites": "1",
        "federation.min_sites": "1", "training.learning_rate": "5e-3",
    }  # fmt: skip
    settings = config.parse(tiny.RUN_FILE.format(base="embedded"), name="run.toml", overrides=changes)
    base = Path(embedded.__file__).parent / "base"
    engine = model.load(
        base, model=settings.model, adapter_settings=settings.adapter, seed=5, device_name="cpu", num_threads=1
    )
    inputs = {row["input"] for rows in chosen.values() for row in rows}
    rows = [
        Row(
            (Message("user", f"{row['instruction']}\n\n{row['input']}"), Message("assistant", row["output"])),
            unit=row["input"],
            row_id=row["id"],
        )
        for row in train
        if row["input"] in inputs
    ]
    agent = tiny.make_agent("north", engine, data=SiteData(rows, rows[:4]))
    log = run_files.prepare(settings, tmp_path / "run")
    run.execute(settings, fleet=tiny.fleet({1: agent.answer}), engine=engine, folder=tmp_path / "run", log=log)
    measured = [event for event in events.read(log.path) if event["kind"] == "measured"]
    before, after = ({name: figure["value"] for name, figure in event["figures"].items()} for event in measured)
    print(before, after, sep="\n")
    assert after["r16.exposure_mean"] > after["r1.exposure_mean"]
    assert after["r16.exposure_mean"] > 5 > 3 > before["r16.exposure_mean"]  # of 6
    assert after["r16.auc"] > 0.8 > before["r16.auc"]
