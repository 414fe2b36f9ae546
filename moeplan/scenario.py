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
from hwmodels.engines import PriceMode, priced_by
from moeplan.workload import ScenarioWorkload
from planner.options import PlanOptions
from simulator.deployment import Workload
from simulator.placement import check_slots
from simulator.serving import ServingOptions
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
    engine: str | None = None
    """Serving engine whose kernels run (trtllm, sglang, vllm); engine-neutral without it."""
    prices: PriceMode = "fitted"
    """What an engine's kernels are priced by: ``fitted`` parameters of the device; the
    ``measured`` table, for shapes that it holds; ``transfer``, parameters of other devices and
    this one's data sheet; ``auto``, measured where covered, else fitted, else transfer."""
    workload: ScenarioWorkload
    """Tokens in a step, or requests."""
    serving: ServingOptions = ServingOptions()
    """How requests are scheduled; for workloads of requests."""
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
    def step(self) -> Workload:
        """Tokens of a step.

        Raises
        ------
        InputError
            If the workload is one of requests.
        """
        step = self.file.workload.step
        if step is None:
            raise InputError(
                f"{self.name}: this question needs the tokens of a step -- give workload "
                "decode_batch or prefill_tokens (requests: moeplan simulate, or a plan with "
                "layouts: all)"
            )
        return step


def open_scenario(
    path: Path,
    *,
    model: Path | None = None,
    trace: Path | None = None,
    cluster: Path | None = None,
) -> Scenario:
    """Read a scenario and its facts; those that are given replace those that it names.

    Of another ``cluster`` one rank is taken.

    Raises
    ------
    InputError
        If a file is missing or bad, or the facts disagree.
    """
    file = load(path, ScenarioFile)
    geometry = load_model(model or resolve(path.parent, file.model, "model"))
    routing = read_trace(trace or resolve(path.parent, file.trace, "trace"))
    check_against_model(routing, geometry)
    if cluster is None:
        hardware = open_cluster(file.cluster, path.parent, file.gpus, file.engine, file.prices)
    else:
        hardware = load_cluster(cluster, gpus=1)
    if file.plan.layouts == "dp_ep":  # other layouts have slots of their own
        slots = geometry.num_experts + file.plan.redundant_experts
        check_slots(slots, geometry.num_experts, hardware.num_ranks)
    return Scenario(
        name=path.stem,
        file=file,
        folder=path.parent,
        model=geometry,
        trace=routing,
        cluster=hardware,
    )


def open_cluster(
    name: str,
    folder: Path,
    gpus: int | None = None,
    engine: str | None = None,
    prices: PriceMode = "fitted",
) -> Cluster:
    """Load a cluster by catalog name or by a path relative to ``folder``, with engine's kernels."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        cluster = load_cluster(resolve(folder, name, "cluster"), gpus=gpus)
    else:
        cluster = load_cluster(name, gpus=gpus)
    return priced_by(cluster, engine, prices)


def resolve(folder: Path, text: str, key: str) -> Path:
    """Return the path of a file that a scenario names.

    Raises
    ------
    InputError
        If there is no such file.
    """
    path = folder / text
    if not path.is_file():
        raise InputError(
            f"{key}: {path} does not exist -- give a path relative to the scenario's file"
        )
    return path
