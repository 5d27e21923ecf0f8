"""Draw the learning curves of a table: mean return over seeds, with the range, against iterations.

python paper/curves.py credit-cn-expert     # paper/results/credit-cn-expert.csv -> .png beside it
"""

from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rows import RESULTS, by_label, fail


def main(table: Annotated[str, tyro.conf.Positional], labels: tuple[str, ...] = (), references: tuple[float, ...] = ()):
    """Draw one line per row label of a table.

    Args:
        table: a file name in paper/results, without .csv.
        labels: the rows to draw; none means all.
        references: returns to mark by dotted lines, such as random and expert.
    """
    runs = {label: seeds for label, seeds in by_label(table).items() if not labels or label in labels}
    if not runs:
        fail(f"paper/results/{table}.csv has none of the rows; run paper/runs.py {table}")
    plt.figure(figsize=(7, 4))
    for label, seeds in runs.items():
        curves = [[point.split(":") for point in row["curve"].split()] for row in seeds.values()]
        points = np.array(curves, float)  # [seeds, evaluations, 2]
        iterations, returns = points[0, :, 0], points[..., 1]
        name = f"{label}, {len(curves)} seed{'s' * (len(curves) > 1)}"
        (line,) = plt.plot(iterations, returns.mean(0), marker=".", label=name)
        plt.fill_between(iterations, returns.min(0), returns.max(0), alpha=0.15, color=line.get_color())
    for value in references:
        plt.axhline(value, color="gray", linestyle=":")
    plt.xlabel("iterations")
    plt.ylabel("return per agent and episode")
    plt.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(RESULTS / f"{table}.png", dpi=110)
    print(RESULTS / f"{table}.png")


if __name__ == "__main__":
    tyro.cli(main)
