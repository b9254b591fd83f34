"""GPUs, networks, and a cluster of them, from the names that a user gives.

In: names and counts. Out: a Cluster. All rates are those of data sheets; `step_time.py` says which share of them a
step is assumed to reach. Refuses unknown names with the nearest known one, and counts below 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.losses.checks import nearest_hint


@dataclass(frozen=True)
class Gpu:
    flops: float  # dense bf16 FLOPs per second
    memory_rate: float  # bytes per second
    host_rate: float  # bytes per second to the host's memory, and as many back


@dataclass(frozen=True)
class Network:
    name: str
    rate: float  # bytes per second that a GPU can send while it receives as many


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 32e9),
    "h100": Gpu(989e12, 3.35e12, 64e9),
    "h200": Gpu(989e12, 4.8e12, 64e9),
    "b200": Gpu(2250e12, 8e12, 64e9),
    "l40s": Gpu(362e12, 0.864e12, 32e9),
    "rtx4090": Gpu(165e12, 1.008e12, 32e9),
}
# nvlink: of generation 4 (H100); ib: InfiniBand with one port for each GPU; ethernet: one port for each GPU
NETWORKS = {
    name: Network(name, rate)
    for name, rate in {
        "nvlink3": 300e9,
        "nvlink": 450e9,
        "nvlink5": 900e9,
        "pcie4": 32e9,
        "pcie5": 64e9,
        "ib200": 25e9,
        "ib400": 50e9,
        "ib800": 100e9,
        "eth25": 3.125e9,
        "eth100": 12.5e9,
    }.items()
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `gpus` GPUs each."""

    gpus: int
    nodes: int
    memory: int  # bytes of a GPU
    gpu: Gpu
    inside: Network  # between the GPUs of a node
    between: Network  # between nodes

    @property
    def num_gpus(self) -> int:
        return self.gpus * self.nodes

    def network(self, crosses_nodes: bool) -> Network:
        """The slowest network of a group of processes."""
        return self.between if crosses_nodes else self.inside


def find_gpu(name: str) -> Gpu:
    """Raises:
    ValueError: the name is unknown.
    """
    if name.lower() not in GPUS:
        raise ValueError(f"gpu must be one of {sorted(GPUS)}, got {name!r}{nearest_hint(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def make_cluster(gpus: int, nodes: int, memory: int, gpu: str, interconnect: str) -> Cluster:
    """Args:
        gpus: of each node.
        interconnect: names of the networks inside a node and between nodes, such as "nvlink,ib400"; the second may be
            left out for one node.
    Raises:
        ValueError: a count is below 1, a name is unknown, or the network between nodes is missing.
    """
    for name, value in (("gpus", gpus), ("nodes", nodes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    names = [name.strip().lower() for name in interconnect.split(",")]
    for name in names:
        if name not in NETWORKS:
            raise ValueError(
                f"interconnect must hold names of {sorted(NETWORKS)}, got {name!r}{nearest_hint(name, NETWORKS)}"
            )
    if len(names) > 2 or (len(names) == 1 and nodes > 1):
        raise ValueError(
            "interconnect must name the network inside a node and the one between nodes, such as nvlink,ib400, got"
            f" {interconnect!r} for {nodes} nodes"
        )
    return Cluster(gpus, nodes, memory, find_gpu(gpu), NETWORKS[names[0]], NETWORKS[names[-1]])
