"""The paper's Table 13: the credit's error on Cooperative Navigation, with a yardstick beside it.

    python paper/table13.py        # from the rows "macca" of paper/results/scale-cql-*.csv

An error of credit says nothing alone: the even split R / N has errors too, and skill = 1 - MSE / MSE of the even split
tells the two apart. The figures are those of the last evaluation of MACCA-CQL, on transitions held out of training.
"""

import csv
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import RESULTS

PAPER = {"expert": "0.12, 0.65", "medium": "0.24, 1.12", "medium-replay": "0.38, 1.78", "random": "1.60, 4.45"}
COLUMNS = {
    "credit_mse": "MSE",
    "even_mse": "MSE, even split",
    "credit_mae": "MAE",
    "even_mae": "MAE, even split",
    "credit_skill": "skill",
    "credit_rank": "rank correlation",
    "state_density": "state density",
    "action_density": "action density",
    "team_nmse": "team NMSE",
}


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
        raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)
    print(
        "| data | seeds | "
        + " | ".join(COLUMNS.values())
        + " | paper: MSE, MAE |\n"
        + "|---" * (len(COLUMNS) + 3)
        + "|"
    )
    for quality, paper in PAPER.items():
        path = RESULTS / f"scale-cql-{quality}.csv"
        if not path.exists():
            print(f"table13.py: {path} is missing; paper/scale_or_credit.py makes it", file=sys.stderr)
            continue
        with open(path) as file:
            rows = [row for row in csv.DictReader(file) if row["label"] == "macca"]
        cells = [cell([float(row[column]) for row in rows]) for column in COLUMNS]
        print(f"| {quality} | {len(rows)} | " + " | ".join(cells) + f" | {paper} |")
