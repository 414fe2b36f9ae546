"""Router replay of Megatron-Core (``moe_enable_routing_replay``), format megatron-replay.

A source is a .pt file with what ``RouterReplay.get_recorded_data()`` returned: a list with one
tensor ``[T, K]`` of logical ids per router, in the order in which the routers were made, which is
that of the MoE layers. Under pipeline parallelism each rank has some of the layers; join the lists
first. Rows are tokens of a batch; requests, positions and padding are not recorded.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.layers import Routing, asked_routing, token_cells
from traces.importers.rows import (
    CHUNK_ROWS,
    LONE_TOKENS,
    UNRECORDED,
    chunks,
    count_dropped,
    lone_tokens,
)
from traces.importers.tensorrt import stacked
from traces.importers.torch_files import integers, load_torch, peek_pickle
from traces.parquet_columns import Columns


class MegatronReplay:
    """A list of tensors."""

    name = "megatron-replay"
    title = "Megatron-Core RouterReplay.get_recorded_data() saved by torch.save"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the file is a list (a pickle of protocol 2 that begins with one) of tensors."""
        names = peek_pickle(source, head)
        return names.startswith(b"\x80\x02]") and b"_rebuild_tensor_v2" in names[:4096]

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the tensors as layers."""
        routing = asked_routing(asked, source)
        layers = _layers(load_torch(source), routing, source)
        meta = routing.meta(source, self.name, asked)
        dropped: Counter[str] = Counter()
        return Tokens(
            meta=meta,
            domains=(asked.domain,),
            weights=False,
            chunks=chunks(_pieces(layers, routing, source, dropped), meta, asked.domain),
            dropped=dropped,
            notes=[LONE_TOKENS],
        )


FORMATS_MEGATRON: tuple[Format, ...] = (MegatronReplay(),)


def _layers(data: Any, routing: Routing, source: Path) -> list[NDArray[Any]]:
    if not isinstance(data, list) or not data:
        raise InputError(f"{source}: a {type(data).__name__} -- a list of tensors, one per router")
    missing = [place for place, tensor in enumerate(data) if tensor is None]
    if missing:
        raise InputError(
            f"{source}: routers {missing[:8]} recorded nothing -- set the action RECORD, run a "
            "forward pass, then save"
        )
    wanted = len(routing.moe_layer_ids)
    if len(data) != wanted:
        raise InputError(
            f"{source}: {len(data)} layers recorded, {routing.name} has {wanted} MoE layers -- "
            "give the config.json of the model that was recorded; join the lists of pipeline "
            "ranks, leave out routers of multi-token prediction"
        )
    return [integers(tensor, 2, f"{source}: router {n}") for n, tensor in enumerate(data)]


def _pieces(
    layers: list[NDArray[Any]], routing: Routing, source: Path, dropped: Counter[str]
) -> Iterator[Columns]:
    tokens = 0
    lengths = {len(layer) for layer in layers}
    for first in range(0, max(lengths), CHUNK_ROWS):
        parts = [layer[first : first + CHUNK_ROWS] for layer in layers]
        where = f"{source}: rows from {first}"
        ids = stacked(list(parts), where)
        cells, recorded = token_cells(ids, routing, "moe", where, blank=-1)
        count_dropped(dropped, UNRECORDED, recorded)
        yield lone_tokens(tokens, 0, cells)
        tokens += len(cells)
