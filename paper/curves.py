"""Draw the learning curves of a table: mean return over seeds, with the range, against iterations.

python paper/curves.py cn-pilot-length     # paper/results/cn-pilot-length.csv -> .png beside it
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def main(table: Annotated[str, tyro.conf.Positional], labels: tuple[str, ...] = (), references: tuple[float, ...] = ()):
    """Draw one line per row label of a table.

    Args:
        table: a file name in paper/results, without .csv.
        labels: the rows to draw; none means all.
        references: returns to mark by dotted lines, such as random and expert.
    """
    path = RESULTS / f"{table}.csv"
    if not path.exists():
        print(f"curves.py: {path} does not exist; make it with paper/runs.py {table}", file=sys.stderr)
        raise SystemExit(2)
    curves = defaultdict(list)  # label -> one list of (iteration, return) per seed
    with open(path) as file:
        for row in csv.DictReader(file):
            if not labels or row["label"] in labels:
                curves[row["label"]].append([tuple(map(float, point.split(":"))) for point in row["curve"].split()])
    plt.figure(figsize=(7, 4))
    for label, runs in curves.items():
        points = np.array(runs)  # [seeds, evaluations, 2]
        mean = points[..., 1].mean(0)
        line = plt.plot(points[0, :, 0], mean, marker=".", label=f"{label}, {len(runs)} seed{'s' * (len(runs) > 1)}")[0]
        plt.fill_between(
            points[0, :, 0], points[..., 1].min(0), points[..., 1].max(0), alpha=0.15, color=line.get_color()
        )
    for value in references:
        plt.axhline(value, color="gray", linestyle=":")
    plt.xlabel("iterations")
    plt.ylabel("return per agent and episode")
    plt.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path.with_suffix(".png"), dpi=110)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
