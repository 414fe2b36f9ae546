"""Slow tiers that hold every expert of a decoder: host memory, or a file.

A home is called with MoE layer, logical expert and a slot, as `ExpertCache` does it, and returns
when the weights are there. From a file they go through a buffer of the file's own, since a direct
read ends in whole pages; the copy out of it is part of the fetch.
Shape suffixes: L MoE layers, E experts, N elements of one expert.
"""

import torch
from torch import Tensor

from kernels_ref.copies import copy_host, to_device
from kernels_ref.decoder_weights import expert_records
from kernels_ref.expert_file import ExpertFile
from traces.model_spec import ModelSpec


class MemoryHome:
    """Experts in host memory; one copy brings an expert into a slot, on the host or on CUDA.

    Parameters
    ----------
    model
    dtype, seed
        Of the experts (`expert_record`).
    pinned
        Keep them in page-locked memory (CUDA only).
    """

    def __init__(
        self, model: ModelSpec, *, dtype: torch.dtype, seed: int = 0, pinned: bool = False
    ) -> None:
        experts = model.num_experts
        shape = (model.num_moe_layers, experts, model.expert_matrix_params)
        self._records_LEN = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        for at, record_N in enumerate(expert_records(model, dtype, seed)):
            self._records_LEN[at // experts, at % experts].copy_(record_N)

    def __call__(self, layer: int, expert: int, slot_N: Tensor) -> None:
        """Copy an expert into a slot."""
        _copy(self._records_LEN[layer, expert], slot_N)


class FileHome:
    """Experts in a file that `write_expert_file` made of `expert_records`.

    Parameters
    ----------
    model
    file
        Open; its ``tier`` says whether reads come from the disk.

    Raises
    ------
    ValueError
        If the file has another number or size of experts.
    """

    def __init__(self, model: ModelSpec, file: ExpertFile) -> None:
        experts, size = model.num_moe_layers * model.num_experts, model.expert_matrix_params
        if (file.records, file.shape) != (experts, (size,)):
            raise ValueError(
                f"file of {file.records} records of shape {list(file.shape)} -- {model.name} has "
                f"{experts} experts of [{size}] -- write the file for this geometry"
            )
        self._file, self._experts = file, model.num_experts

    def __call__(self, layer: int, expert: int, slot_N: Tensor) -> None:
        """Read an expert and copy it into a slot."""
        _copy(self._file.read(layer * self._experts + expert), slot_N)


def _copy(record_N: Tensor, slot_N: Tensor) -> None:
    if slot_N.device.type == "cpu":
        copy_host(slot_N, record_N)
    else:
        to_device(record_N, slot_N, pinned=record_N.is_pinned())
