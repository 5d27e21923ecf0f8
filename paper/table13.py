"""The paper's Table 13: the credit's error on Cooperative Navigation, with the even split's error beside it.

    python paper/table13.py        # from the rows "macca" of paper/results/scale-cql-*.csv

An error of credit says nothing alone: the even split R / N has errors too. The skill, 1 - MSE / MSE of the even split,
compares the two. The numbers are those of the last evaluation of MACCA-CQL, on transitions held out of training.
"""

from dataclasses import dataclass

import tyro
from rows import by_label, mean_std, numbers, print_table

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


@dataclass
class Args:
    pass


if __name__ == "__main__":
    tyro.cli(Args, description=__doc__)
    body = []
    for quality, paper in PAPER.items():
        runs = by_label(f"scale-cql-{quality}").get("macca", {})
        cells = [mean_std(numbers(runs, column), 3) for column in COLUMNS]
        body.append([quality, str(len(runs)), *cells, paper])
    print_table(["data", "seeds", *COLUMNS.values(), "paper: MSE, MAE"], body)
