"""The cost models that a link may name, told apart by ``model``."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from hwmodels.figures import TransferCost
from hwmodels.kernels.copies import CopyCost
from hwmodels.kernels.exchange import ByTokens, ChannelExchange, PeersCost, TokenExchange
from hwmodels.kernels.rings import DirectCost, RingCost


def model_name(data: Any) -> str:
    """Name the class of an entry: startup and bandwidth, ``transfer``, where none is stated."""
    name = data.get("model") if isinstance(data, dict) else getattr(data, "model", None)
    return "transfer" if name is None else str(name)


TransferModel = Annotated[
    Annotated[TransferCost, Tag("transfer")]
    | Annotated[CopyCost, Tag("copy")]
    | Annotated[RingCost, Tag("ring")]
    | Annotated[DirectCost, Tag("direct")]
    | Annotated[PeersCost, Tag("peers")]
    | Annotated[TokenExchange, Tag("tokens")]
    | Annotated[ChannelExchange, Tag("channels")]
    | Annotated[ByTokens, Tag("by_tokens")],
    Discriminator(model_name),
]
"""An entry of a link's ``costs``."""
