"""A gate that contradicts itself or the run, one case a rule: key, line of the run file, settings."""


def rules(task: str, private: list[str]) -> list[tuple[str, int, list[str]]]:
    """With a task and the settings of a private run, as the other cases write them."""
    return [
        ("gate.max_probe_drop", 7, ["gate.max_probe_drop = 0.02"]),
        ("gate.min_baseline_gain", 7, ["gate.min_baseline_gain = 0.1"]),
        ("gate.max_site_rise", 8, ["gate.rules = 'loss'", "gate.max_site_rise = 0.1"]),
        ("gate.min_loss_gain", 8, ["gate.rules = 'sites'", "gate.min_loss_gain = 0.1"]),
        ("gate.min_schema_valid", 7, ["gate.min_schema_valid = 0.9"]),
        ("gate.max_exposure", 7, ["gate.max_exposure = 3.0"]),
        ("gate.max_extracted", 7, ["gate.max_extracted = 0.1"]),
        ("gate.max_pii_emission", 7, ["gate.max_pii_emission = 0.1"]),
        ("gate.audit_file", 7, ["gate.audit_file = 'audit.json'"]),
        ("gate.evidence", 7, ["gate.evidence = 'interval'"]),
        ("gate.min_rows", 7, ["gate.min_rows = 5"]),
        ("gate.rules", 7, ["gate.rules = 'probes'"]),
        ("gate.rules", 9, [f"evaluation.tasks = [{task}]", "gate.rules = 'baseline'"]),
        ("gate.rules", 7, ["gate.rules = 'schema'"]),
        ("gate.rules", 7, ["gate.rules = 'exposure, pii'"]),
        ("gate.rules", 8, ["gate.audit_file = 'audit.json'", "gate.rules = 'audit'"]),
        ("gate.audit_file", 11, [*private, "gate.rules = 'audit'"]),
        ("gate.figures", 7, ["gate.figures = [{figure = 'b.acc', bound = 'min', limit = 0.5}]"]),
    ]
