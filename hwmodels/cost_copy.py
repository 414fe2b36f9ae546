"""What moving bytes between memories takes, in seconds: over the fewest links that join them.

Blocks are pipelined over the links and through the memories between them, so startups add and
the slowest link or memory sets the rate; within one memory a copy is a read and a write. Every
copy is priced as if alone: of two on one link, the schedule makes one wait for the other.
"""

import numpy as np

from basis.evidence import Evidence, weakest
from hwmodels.cost_compute import peaks, price_compute
from hwmodels.device import Processor
from hwmodels.kernels.copies import copy_rate
from hwmodels.ops import Copy, Elementwise, Floats
from hwmodels.prices import Price, priced
from hwmodels.topology import Cluster


def price_copy(op: Copy, cluster: Cluster) -> Price:
    """Price each row of a copy: startups of the path + bytes / slowest achieved rate.

    A memory passes blocks on at its full bandwidth: other traffic in it is the schedule's. The
    interval is that of the slowest link.

    Raises
    ------
    InputError
        A memory that the cluster lacks, or no path between the two.
    """
    size = np.asarray(op.bytes, dtype=np.float64)
    if op.source == op.target:
        return _within(size, op.source, cluster)
    links = cluster.path(op.source, op.target)
    rates = [copy_rate(link.copy_cost(), link.bandwidth.value) for link in links]
    rate = min(rates)
    cost = links[rates.index(rate)].copy_cost()
    evidence: list[Evidence] = [link.copy_cost().evidence for link in links]
    evidence += peaks(*(link.bandwidth for link in links))
    narrow = min(
        (cluster.memory(end).bandwidth for link in links for end in link.ends or ()),
        key=lambda bandwidth: bandwidth.value,
    )
    if narrow.value < rate:
        rate = narrow.value
        evidence += peaks(narrow)
    startup = sum(link.copy_cost().startup for link in links)
    seconds = np.where(size > 0, startup + size / rate, 0.0)
    return priced(seconds, cost, weakest(evidence))


def _within(size: Floats, name: str, cluster: Cluster) -> Price:
    """Read and write with the processor that works on the memory, else with the device's first."""
    bandwidth = cluster.memory(name).bandwidth
    return price_compute(Elementwise(bytes=2 * size), _worker(name, cluster), bandwidth)


def _worker(name: str, cluster: Cluster) -> Processor:
    everyone = [*cluster.device.processors.values(), *cluster.node.processors.values()]
    return next((p for p in everyone if p.memory == name), cluster.device.processor)
