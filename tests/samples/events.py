"""Events of a run of two sites, as its log holds them, for what is drawn from events."""

from server.view import fairness

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
