"""Synthetic instruction records of four fictional hospitals, for demos and tests that need no download.

Every patient, note and code is made up here from a seed. Each hospital has a speciality, a way to write notes, a code
table, a team table and a form of its own; a triage rule and a formulary hold for the whole region. A site that trains
alone therefore never sees most of what the others ask, while a federation sees everything.
"""

import argparse
import csv
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

Row = dict[str, str]

COLUMNS = ("site", "patient_id", "instruction", "input", "output")
TRIAGE = "Regional saturation level."
FORMULARY = "Regional drug group."

# Every patient's code is asked once, so that held-out patients ask nothing new; the other records draw from this mix.
TASK_MIX = ("team",) * 3 + ("form",) * 2 + ("triage",) * 2 + ("formulary",) * 4

DRUG_GROUPS = {
    "bisoprolol": "opal",
    "apixaban": "onyx",
    "tamoxifen": "jade",
    "cisplatin": "beryl",
    "enoxaparin": "opal",
    "naproxen": "onyx",
    "salbutamol": "jade",
    "prednisolone": "beryl",
}


@dataclass(frozen=True)
class Visit:
    """What a clinician saw and decided on one day."""

    age: int
    sex: str
    finding: str
    plan: str
    drug: str
    dose_mg: int
    saturation: int
    pulse: int
    systolic: int
    diastolic: int
    weight_kg: int
    cycle: int
    bed: int
    side: str
    resp_rate: int
    temperature: str


@dataclass(frozen=True)
class Hospital:
    """One site: its size, its tables, and how it writes notes and forms."""

    name: str
    num_patients: int
    codes: dict[str, str]
    teams: dict[str, str]
    drugs: tuple[str, ...]
    saturations: tuple[int, int]
    ages: tuple[int, int]
    instructions: dict[str, str]
    write_note: Callable[[Visit], str]
    write_form: Callable[[Visit], str]


def _alder_note(visit: Visit) -> str:
    """Labelled lines."""
    return (
        f"Finding: {visit.finding}\nPulse: {visit.pulse}\nBP: {visit.systolic}/{visit.diastolic}\n"
        f"SpO2: {visit.saturation}\nDrug: {visit.drug}\nPlan: {visit.plan}"
    )


def _birch_note(visit: Visit) -> str:
    """A sentence or two of prose."""
    return (
        f"Seen at {visit.age} years with {visit.finding}, cycle {visit.cycle}, weight {visit.weight_kg} kg, "
        f"saturation {visit.saturation} percent. Takes {visit.drug}. We agreed on {visit.plan}."
    )


def _cedar_note(visit: Visit) -> str:
    """Cells between bars."""
    return (
        f"{visit.sex}{visit.age} | dx {visit.finding} | {visit.side} | bed {visit.bed} | "
        f"sat {visit.saturation} | med {visit.drug} | next {visit.plan}"
    )


def _dogwood_note(visit: Visit) -> str:
    """Shorthand pairs."""
    return (
        f"a={visit.finding}; o2={visit.saturation}; rr={visit.resp_rate}; t={visit.temperature}; "
        f"rx={visit.drug} {visit.dose_mg} mg; p={visit.plan}"
    )


HOSPITALS = (
    Hospital(
        name="alder",
        num_patients=52,
        codes={
            "atrial flutter": "K-41",
            "heart failure": "K-17",
            "aortic stenosis": "K-86",
            "unstable angina": "K-23",
            "pericarditis": "K-50",
            "anaemia": "K-92",
        },
        teams={"echo": "Heron", "ablation": "Osprey", "stent review": "Plover"},
        drugs=("bisoprolol", "apixaban"),
        saturations=(88, 99),
        ages=(45, 88),
        instructions={"code": "Ward code for the finding.", "team": "Team for the plan.", "form": "Vitals box."},
        write_note=_alder_note,
        write_form=lambda visit: f"P{visit.pulse} BP{visit.systolic}/{visit.diastolic}",
    ),
    Hospital(
        name="birch",
        num_patients=44,
        codes={
            "ductal carcinoma": "TX20",
            "lymphoma": "TX58",
            "myeloma": "TX34",
            "melanoma": "TX71",
            "anaemia": "TX96",
        },
        teams={"staging scan": "Linnet", "radiotherapy": "Dunlin", "port check": "Godwit"},
        drugs=("tamoxifen", "cisplatin"),
        saturations=(86, 98),
        ages=(35, 84),
        instructions={"code": "Tumour board key.", "team": "Who takes the next step?", "form": "Chemo sheet line."},
        write_note=_birch_note,
        write_form=lambda visit: f"c{visit.cycle}, {visit.weight_kg} kg",
    ),
    Hospital(
        name="cedar",
        num_patients=38,
        codes={
            "hip fracture": "7/Q",
            "frozen shoulder": "3/M",
            "tendon rupture": "9/T",
            "scoliosis": "4/B",
            "bursitis": "2/W",
            "anaemia": "6/F",
        },
        teams={"cast check": "Siskin", "physiotherapy": "Avocet", "nailing": "Whimbrel"},
        drugs=("enoxaparin", "naproxen"),
        saturations=(87, 99),
        ages=(18, 90),
        instructions={
            "code": "Theatre list code for the finding.",
            "team": "Send to which team?",
            "form": "Wristband text.",
        },
        write_note=_cedar_note,
        write_form=lambda visit: f"b{visit.bed} {visit.side}",
    ),
    Hospital(
        name="dogwood",
        num_patients=32,
        codes={"croup": "v#6", "bronchiolitis": "v#2", "pneumonia": "v#9", "asthma": "v#4", "anaemia": "v#7"},
        teams={"nebuliser": "Gannet", "chest film": "Fulmar"},
        drugs=("salbutamol", "prednisolone"),
        saturations=(84, 97),
        ages=(1, 17),
        instructions={
            "code": "Airway clinic mark of the finding.",
            "team": "Page team for the plan.",
            "form": "Chart numbers.",
        },
        write_note=_dogwood_note,
        write_form=lambda visit: f"{visit.resp_rate} at {visit.temperature}",
    ),
)


def table_answers() -> frozenset[str]:
    """Return every answer that only the hospitals' own tables teach: codes, teams and formulary groups."""
    tables = [DRUG_GROUPS, *(table for hospital in HOSPITALS for table in (hospital.codes, hospital.teams))]
    return frozenset(answer for table in tables for answer in table.values())


def triage(saturation: int) -> str:
    """Return the regional triage level of an oxygen saturation in percent.

    Example:
        >>> triage(95), triage(90), triage(89)
        ('green', 'amber', 'red')
    """
    if saturation >= 95:
        return "green"
    return "amber" if saturation >= 90 else "red"


def generate(seed: int = 2026, *, scale: int = 1) -> list[Row]:
    """Make the records of all hospitals.

    Args:
        seed: Any integer; the same seed gives the same rows in the same order.
        scale: How many times the patients that each hospital has by itself; differential privacy needs thousands.

    Returns:
        Rows with the keys of `COLUMNS`, grouped by site and patient; one to six rows a patient.

    Example:
        >>> rows = generate()
        >>> rows[0]["site"], rows[0]["patient_id"]
        ('alder', 'alder-0001')
    """
    return [
        row for hospital in HOSPITALS for row in _site(hospital, seed=seed, num_patients=scale * hospital.num_patients)
    ]


def _site(hospital: Hospital, *, seed: int, num_patients: int) -> list[Row]:
    """Rows of one site; a site's rows do not depend on the other sites."""
    rng = Random(f"{seed}/{hospital.name}")  # noqa: S311  synthetic data, not secrets
    others = [drug for drug in DRUG_GROUPS if drug not in hospital.drugs]
    decks = {
        "finding": _deck(list(hospital.codes), num_patients, rng),
        "plan": _deck(list(hospital.teams), num_patients, rng),
        "drug": _deck([*hospital.drugs * 3, *others], num_patients, rng),
    }
    rows: list[Row] = []
    for index in range(num_patients):
        fixed = {key: deck[index] for key, deck in decks.items()}
        rows += _patient(hospital, patient_id=f"{hospital.name}-{index + 1:04d}", fixed=fixed, rng=rng)
    return rows


def _deck(values: Sequence[str], size: int, rng: Random) -> list[str]:
    """Deal every value about equally often, in random order, so that no value is left to chance."""
    deck = [values[index % len(values)] for index in range(size)]
    rng.shuffle(deck)
    return deck


def _patient(hospital: Hospital, *, patient_id: str, fixed: dict[str, str], rng: Random) -> list[Row]:
    """One patient: finding, plan and drug stay, the measurements change from visit to visit."""
    age, sex = rng.randint(*hospital.ages), rng.choice("FM")
    rows: list[Row] = []
    tasks = ["code", *rng.sample(TASK_MIX, rng.choice((0, 1, 2, 3, 3, 4, 4, 5)))]
    rng.shuffle(tasks)
    for task in tasks:
        visit = _visit(hospital, age=age, fixed={**fixed, "sex": sex}, rng=rng)
        instruction, output = _ask(hospital, task=task, visit=visit)
        values = (hospital.name, patient_id, instruction, hospital.write_note(visit), output)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _visit(hospital: Hospital, *, age: int, fixed: dict[str, str], rng: Random) -> Visit:
    """Draw the measurements of one day."""
    return Visit(
        **fixed,
        age=age,
        dose_mg=rng.choice((1, 2, 5, 10, 20, 40)),
        saturation=rng.randint(*hospital.saturations),
        pulse=rng.randint(52, 128),
        systolic=rng.randint(96, 178),
        diastolic=rng.randint(52, 98),
        weight_kg=rng.randint(44, 108),
        cycle=rng.randint(1, 8),
        bed=rng.randint(2, 64),
        side=rng.choice(("left", "right")),
        resp_rate=rng.randint(14, 48),
        temperature=f"{rng.randint(36, 40)}.{rng.randint(0, 9)}",
    )


def _ask(hospital: Hospital, *, task: str, visit: Visit) -> tuple[str, str]:
    """Return the instruction of a task and its answer for this visit."""
    if task == "triage":
        return TRIAGE, triage(visit.saturation)
    if task == "formulary":
        return FORMULARY, DRUG_GROUPS[visit.drug]
    answers = {"code": hospital.codes[visit.finding], "team": hospital.teams[visit.plan]}
    answer = hospital.write_form(visit) if task == "form" else answers[task]
    return hospital.instructions[task], answer


def write(folder: Path, seed: int = 2026, *, scale: int = 1) -> list[Path]:
    """Write one file a site, each in another format: JSON Lines, JSON, CSV and Parquet.

    Args:
        folder: Created if it is missing; files of the same name are replaced.
        seed: See `generate`.
        scale: See `generate`.

    Returns:
        The files in the order of the sites. Without pyarrow the last is JSON Lines too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None
    formats = ("jsonl", "json", "csv", "parquet" if has_pyarrow else "jsonl")
    rows = generate(seed, scale=scale)
    paths = [folder / f"{hospital.name}.{suffix}" for hospital, suffix in zip(HOSPITALS, formats, strict=True)]
    for path in paths:
        WRITERS[path.suffix]([row for row in rows if row["site"] == path.stem], path)
    return paths


def _write_jsonl(rows: list[Row], path: Path) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_json(rows: list[Row], path: Path) -> None:
    """One array of objects."""
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _write_csv(rows: list[Row], path: Path) -> None:
    """A header and quoted cells; notes may hold line breaks."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(rows: list[Row], path: Path) -> None:
    """One table of string columns."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[list[Row], Path], None]] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def main() -> None:
    """Write the data set into a folder and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--scale", type=int, default=1)
    args = parser.parse_args()
    for path in write(args.out, args.seed, scale=args.scale):
        print(f"{path}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
