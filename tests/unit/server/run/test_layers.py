"""Spectrum: the ratio worked by hand, the choice by type, and a run that trains just the layers that were chosen."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from common.errors import ModelError
from server.cli.app import app
from server.run import layers


def test_the_edge_is_as_wide_as_the_middle_half_and_a_layer_twice_as_large_has_half_the_ratio():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(weight)
    low, high = values.quantile(0.25), values.quantile(0.75)
    edge = (high - low) / 1.349 * (1 + (48 / 64) ** 0.5)
    signal, noise = values[values > edge].sum(), values[values <= edge].sum()
    assert 0 < float(noise) < float(signal)
    assert layers.snr(weight) == pytest.approx(float(signal / noise / values[0]), rel=1e-5)
    assert layers.snr(2 * weight) == pytest.approx(layers.snr(weight) / 2, rel=1e-5)


def test_the_ratio_is_that_of_a_spectrum_worked_by_hand():
    """9 | 3 2.9 2.8 | 0.1: quartiles 2.8 and 3, edge 0.2 / 1.349 * 2 = 0.297; (9 + 3 + 2.9 + 2.8) / 0.1 / 9."""
    assert layers.snr(torch.diag(torch.tensor([9.0, 3.0, 2.9, 2.8, 0.1]))) == pytest.approx(17.7 / 0.1 / 9, rel=1e-5)
    assert layers.snr(torch.diag(torch.tensor([9.0, 3.0, 2.9, 2.8, 2.7]))) == float("inf")
    assert layers.snr(torch.diag(torch.tensor([9.0, 8.0, 3.0, 0.5, 0.4]))) == 0


def test_the_command_prints_targets_that_a_run_takes_and_only_those_are_trained(tiny_base, load_tiny):
    told = json.loads(CliRunner().invoke(app, ["layers", str(tiny_base), "--share", "0.5", "--json"]).stdout)
    names = told["targets"]
    assert (len(names), told["num_layers"]) == (7, 14)
    best = {name.rpartition(".")[2]: name for name in sorted(told["snr"], key=lambda name: told["snr"][name] or 1e9)}
    assert sorted(names) == sorted(best.values())
    engine = load_tiny({"adapter.targets": json.dumps(names)})
    trained = {spec.name.removeprefix("base_model.model.").rpartition(".lora_")[0] for spec in engine.tensor_specs}
    assert trained == set(names)


def test_a_base_without_linear_layers_is_refused(tiny_base, tmp_path):
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if "proj" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no linear layer"):
        layers.measure(tmp_path)
