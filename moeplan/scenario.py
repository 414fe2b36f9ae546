"""A scenario: the three facts (model, trace, cluster) and the question, as one YAML file.

Paths are relative to the scenario's file. Reading is in three named steps: load the text,
validate it, open the facts; every file is checked before any work begins.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from basis.errors import InputError
from basis.schema import Strict, load
from hwmodels.cluster import Cluster, load_cluster
from planner.options import PlanOptions
from simulator.deployment import Workload
from simulator.placement import check_slots
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace, check_against_model, read_trace


class ScenarioFile(Strict):
    """What a scenario file may hold."""

    model: str
    """Path of a Hugging Face config.json."""
    trace: str
    """Path of a routing trace (Parquet)."""
    cluster: str
    """Catalog name, such as hgx-h100-8, or path of a cluster YAML."""
    gpus: int | None = Field(default=None, ge=1)
    """Use the first N GPUs of the cluster; all of them without it."""
    workload: Workload
    """Tokens in a step."""
    plan: PlanOptions = PlanOptions()
    """What to plan."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A scenario with its facts opened and checked against one another."""

    name: str
    file: ScenarioFile
    folder: Path
    model: ModelSpec
    trace: RoutingTrace
    cluster: Cluster

    @property
    def num_slots(self) -> int:
        """Slots per MoE layer over all ranks."""
        return self.model.num_experts + self.file.plan.redundant_experts


def open_scenario(path: Path) -> Scenario:
    """Read a scenario and its facts.

    Raises
    ------
    InputError
        If a file is missing or bad, or the facts disagree.
    """
    file = load(path, ScenarioFile)
    model = load_model(_resolve(path.parent, file.model, "model"))
    trace = read_trace(_resolve(path.parent, file.trace, "trace"))
    check_against_model(trace, model)
    cluster = open_cluster(file.cluster, path.parent, file.gpus)
    check_slots(
        model.num_experts + file.plan.redundant_experts, model.num_experts, cluster.num_ranks
    )
    return Scenario(
        name=path.stem, file=file, folder=path.parent, model=model, trace=trace, cluster=cluster
    )


def open_cluster(name: str, folder: Path, gpus: int | None = None) -> Cluster:
    """Load a cluster by catalog name, or by a path relative to ``folder``."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return load_cluster(_resolve(folder, name, "cluster"), gpus=gpus)
    return load_cluster(name, gpus=gpus)


def _resolve(folder: Path, text: str, key: str) -> Path:
    path = folder / text
    if not path.is_file():
        raise InputError(
            f"{key}: {path} does not exist -- give a path relative to the scenario's file"
        )
    return path
