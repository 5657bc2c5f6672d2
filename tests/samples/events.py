"""Events of a run of two sites, as its log holds them, for what is drawn from events."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence

from common import event_kinds
from common.event_kinds import Event
from server.view import fairness
from server.view.run_view import RunView

BLANKS = {str: "", int: 0, float: 0.0, bool: False}

PLAN = {
    "kind": "run_started",
    "name": "tiny",
    "base": "org/base",
    "run_sha256": "ab" * 32,
    "quantization": "nf4",
    "method": "fedavg",
    "privacy": "none",
    "num_rounds": 2,
    "num_base_parameters": 39072,
    "num_trained_parameters": 1024,
    "num_tensors": 28,
    "bytes_down_per_site": 4096,
    "bytes_up_per_site": 2048,
    "guarding": "secure aggregation: off; robust aggregation: krum against 1 bad site",
    "gap_warning": 0.1,
    "without_gap": "rolora",
}


def event(kind: str, **fields) -> Event:
    """An event of a kind; what is not given is blank."""
    return whole({"kind": kind, **fields})


def whole(told: Mapping) -> Event:
    """The event of a line in which only a few fields are given."""
    kind = event_kinds.KINDS.get(told["kind"])
    fields = _filled(kind, told) if kind else told
    return event_kinds.parse(json.dumps(fields, default=dict).encode())


def view(log) -> RunView:
    """The view of events, or of lines in which only a few fields are given."""
    return RunView.of(one if isinstance(one, Event) else whole(one) for one in log)


def raw(path) -> list[dict]:
    """The lines of a log, as they are on disk."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _filled(record: type, told: Mapping) -> dict:
    """The fields of a record, blank where they are not given, and those of the records in it."""
    hints, found = typing.get_type_hints(record), dict(told)
    for each in dataclasses.fields(record):
        is_needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if each.name in found:
            found[each.name] = _deep(hints[each.name], found[each.name])
        elif is_needed:
            found[each.name] = _blank(hints[each.name])
    return found


def _deep(kind, value):
    """A given value, with the records in it filled."""
    if dataclasses.is_dataclass(kind) and value is not None:
        return _filled(kind, value)
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType) and value is not None:
        return next((_deep(one, value) for one in inner if dataclasses.is_dataclass(one)), value)
    if typing.get_origin(kind) is Mapping:
        return {name: _deep(inner[1], each) for name, each in value.items()}
    return [_deep(inner[0], each) for each in value] if typing.get_origin(kind) is Sequence else value


def _blank(kind):
    """A value of a type that says nothing."""
    if isinstance(kind, types.UnionType):
        return None
    if dataclasses.is_dataclass(kind):
        return _filled(kind, {})
    return (
        BLANKS[kind]
        if kind in BLANKS
        else typing.get_origin(kind) and ({} if typing.get_origin(kind) is Mapping else [])
    )


HOSTILE = "<script>alert(1)</script>"


def joined(site: str) -> dict:
    return {
        "kind": "site_joined",
        "node": 1,
        "site": site,
        "num_examples": 1200,
        "num_held_out": 30,
        "num_truncated": 1,
        "num_dropped": 0,
        "num_steps": 3,
    }


def trained(site: str, number: int, loss: float = 2.5) -> dict:
    return {"kind": "site_trained", "site": site, "round": number, "train_loss": loss}


def finished(number: int, gap: float = 0.25, **modules: float) -> dict:
    return {
        "kind": "round_finished",
        "round": number,
        "gap": gap,
        "gap_modules": modules,
        "held_to_share": [],
        "bytes_down": 8000,
        "bytes_up": 4000,
        "seconds": 1.25,
    }


def evaluated(number: int, loss: float, stale=(), **sites: float) -> dict:
    figures = {
        site: {"loss": value, "num_rows": 5, "exact_match": None, "change": None} for site, value in sites.items()
    }
    return {
        "kind": "evaluated",
        "num_rounds": number,
        "loss": loss,
        "trimmed_loss": fairness.trimmed(sites),
        "outliers": fairness.outliers(sites),
        "exact_match": None,
        "server_loss": None,
        "stale": list(stale),
        "sites": figures,
        "fairness": fairness.of_sites(sites, dict.fromkeys(sites)),
        "worse_than_base": [],
    }


def measured(stage: str, values: dict[str, float], gains: dict | None = None, higher_is_better: bool = True) -> dict:
    figures = {
        name: {
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
            "num_rows": 9,
            "higher_is_better": higher_is_better,
            "kind": "answers",
        }
        for name, value in values.items()
    }
    return {"kind": "measured", "stage": stage, "figures": figures, "gains": gains or {}, "seconds": 1.5}


LOG = [
    PLAN,
    joined("north"),
    joined("south"),
    evaluated(0, 6.0, north=6.5, south=5.5),
    {"kind": "round_started", "round": 0, "sites": ["north", "south"]},
    trained("north", 0),
    trained("south", 0, 3.5),
    finished(0),
    evaluated(1, 4.0, north=4.5, south=3.5),
]
