"""The report of a plan of layouts: the front as a picture, the choice, and why the others lost.

Reads plan.json and nothing else; times in seconds, memory in bytes of the fullest rank.
"""

from typing import Any

from moeplan import figures
from moeplan.front_chart import front_chart
from moeplan.layout_view import MEMORY, is_chosen
from moeplan.page import STATUS, breakdown, render, split_tables


def render_layouts(plan: dict[str, Any]) -> str:
    """Write the report of a plan of layouts as one self-contained HTML page.

    Parameters
    ----------
    plan : dict
        The content of plan.json, with the section ``layouts``.
    """
    found = plan["layouts"]
    proved = found["proof"]["proved"]
    return render(
        "layouts.html.j2",
        plan,
        {
            "badge": ("yes", "Proved best") if proved else ("tie", "Best found"),
            "tiles": _tiles(plan),
            "found": found,
            "picture": front_chart(found["front"], found["chosen"]),
            "front": [(p, is_chosen(p, found["chosen"])) for p in found["front"]],
            "splits": split_tables(plan),
            "steps": breakdown(plan["details"], "seconds_by_cause"),
            "memory": MEMORY,
            "status": STATUS[plan["certificate"]["status"]],
        },
    )


def _tiles(plan: dict[str, Any]) -> list[dict[str, str]]:
    found, proof = plan["layouts"], plan["certificate"]
    chosen, runner = found["chosen"], found["runner_up"]
    ends = (plan["predicted"][f"tokens_per_second_{end}"] for end in ("low", "high"))
    tiles = [
        {
            "label": "Predicted throughput",
            "figure": f"{figures.number(chosen['tokens_per_second'])} tokens/s",
            "below": f"likely {figures.interval(*ends)}",
        },
        {
            "label": "Per GPU",
            "figure": f"{figures.number(chosen['tokens_per_second_per_gpu'])} tokens/s",
            "below": f"{chosen['running_requests']:,} running requests in all",
        },
        {
            "label": "TPOT",
            "figure": figures.seconds(chosen["tpot_s"]),
            "below": f"99th percentile {figures.seconds(chosen['tpot_s_p99'])}",
        },
    ]
    if runner is not None:
        ahead = chosen["tokens_per_second"] / runner["tokens_per_second"] - 1
        tiles.append(
            {
                "label": "Over the runner-up",
                "figure": "tie" if runner["tie"] else figures.percent(ahead, signed=True),
                "below": runner["layout"],
            }
        )
    tiles.append(
        {
            "label": "From the proved optimum",
            "figure": f"≤ {figures.percent(proof['gap'])}" if proof["gap"] else "proved",
            "below": "of all layouts and batch sizes, in the model",
        }
    )
    return tiles
