"""Models that no step can be priced for: a part of their work has no operation here.

Nothing is priced as something else; statistics of a trace need no prices and work for all models.
"""

from basis.errors import InputError
from traces.model_spec import ModelSpec


def refuse_unpriced(model: ModelSpec) -> None:
    """Refuse a model that does something that the simulator knows no time of.

    Raises
    ------
    InputError
        With all that it does so.
    """
    if model.unpriced:
        raise InputError(
            f"{model.name} ({model.family}): {'; '.join(model.unpriced)} -- the simulator knows no "
            "times for this -- statistics of this model's traces work (moeplan trace stats), "
            "plans and simulations do not; docs/reference/models.md says which models they take"
        )
