"""One size of `bench scale`: a run with many virtual sites."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from client.agent.agent import SiteData
from common.data import read
from common.event_kinds import Evaluated, Event
from common.run import config
from server.folder import run_files
from simulations.bench.arms import process
from simulations.embedded import records
from simulations.world import run, world
from simulations.world.world import Source, World

RUN_FILE = Path(__file__).parents[2] / "configs" / "bench-scale.toml"
PATIENTS_PER_SITE = 4
NUM_KINDS = 10


def main(num_sites: str, num_rounds: str, base: str) -> dict[str, Any]:
    """Return the clocks at the start and at the end of every round, evaluation included, and the peak memory."""
    numbers = dict.fromkeys(("data.num_sites", "federation.num_sites", "federation.min_sites"), num_sites)
    overrides = {**numbers, "federation.num_rounds": num_rounds, "model.base": f'"{base}"'}
    settings = config.load(RUN_FILE, overrides=overrides)
    engine = world.load_engine(settings, num_threads=1)
    sites = make_sites(Source.of(settings), settings.data.num_sites)
    marks: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Evaluated):
            marks.append((process.cpu_s(), time.monotonic()))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        log = run_files.prepare(settings, folder)
        log.listeners.append(watch)
        run.in_process(World(settings, engine, sites, folder), log=log)
    return {"marks": marks, "peak_rss_mib": process.peak_rss_mib()}


def make_sites(source: Source, num_sites: int) -> dict[str, SiteData]:
    """Sites of a few patients each, of ten kinds in turn.

    So the mean work a site is the same at 10, 100 and 1,000 sites. Every site's rows are copies of their own, as
    they would be if they were read from its file.
    """
    rows, kinds = records.generate(), []
    patients = list(dict.fromkeys(row["patient_id"] for row in rows))
    for kind in range(NUM_KINDS):
        chosen = patients[kind::NUM_KINDS][:PATIENTS_PER_SITE]
        kinds.append(json.dumps([row for row in rows if row["patient_id"] in chosen]))
    sites: dict[str, SiteData] = {}
    for number in range(num_sites):  # each alone, since the copies of a row belong to several
        table = json.loads(kinds[number % NUM_KINDS])
        sites |= source.split({f"site-{number:05d}": read.to_rows(table, source.columns)})
    return sites
