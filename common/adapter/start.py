"""The adapter that a run starts from, as far as it follows from the manifest alone."""

from common.adapter import orthonormal
from common.adapter.adapter import Tensors
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest


def fixed(run_manifest: RunManifest) -> Tensors:
    """The tensors that coordinator and sites each make themselves, and that no message carries.

    Raises:
        ModelError: A module is too narrow for the rank.
    """
    run = run_manifest.run
    which = FACTS[run.aggregation.method].fixed
    return orthonormal.factors(run_manifest.tensor_specs, seed=run.seed, which=which)


def initial(run_manifest: RunManifest, attached: Tensors) -> Tensors:
    """The global adapter before the first round: no change to the base, B or the core being zero.

    Args:
        attached: The adapter as peft attaches it, A from the run's seed.

    Raises:
        ModelError: A module is too narrow for the rank.
    """
    run = run_manifest.run
    facts = FACTS[run.aggregation.method]
    if not facts.has_orthonormal_start:
        return attached
    which = facts.fixed or "A"
    return {**attached, **orthonormal.factors(run_manifest.tensor_specs, seed=run.seed, which=which)}
