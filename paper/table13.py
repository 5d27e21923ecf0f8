"""The paper's Table 13: the credit's error on Cooperative Navigation, with the even split's error beside it.

    python paper/table13.py        # from the rows of MACCA-CQL in paper/results/credit-cn-*.csv

An error of credit says nothing alone: the even split R / N has errors too. The skill, 1 - MSE / MSE of the even split,
compares the two: with what agents are paid, as in the paper, and with what they cause. Held-out transitions.
"""

from dataclasses import dataclass

import tyro
from rows import by_label, mean_std, numbers, print_table

PAPER = {"expert": "0.12, 0.65", "medium": "0.24, 1.12", "medium-replay": "0.38, 1.78", "random": "1.60, 4.45"}
COLUMNS = {
    "paid_mse": "MSE",
    "paid_even_mse": "MSE, even split",
    "paid_mae": "MAE",
    "paid_even_mae": "MAE, even split",
    "paid_skill": "skill, paid",
    "cause_skill": "skill, cause",
    "state_density": "state density",
    "action_density": "action density",
    "team_nmse": "team NMSE",
}
TABLES = {"expert": "credit-cn-expert", "random": "credit-cn-random"}
TABLES |= {quality: f"credit-cn-{quality}-cql" for quality in ("medium", "medium-replay")}


@dataclass
class Args:
    pass


if __name__ == "__main__":
    tyro.cli(Args, description=__doc__)
    body = []
    for quality, paper in PAPER.items():
        tables = by_label(TABLES[quality])
        runs = tables.get("MACCA", tables.get("MACCA-CQL", {}))
        cells = [mean_std(numbers(runs, column), 3) for column in COLUMNS]
        body.append([quality, str(len(runs)), *cells, paper])
    print_table(["data", "seeds", *COLUMNS.values(), "paper: MSE, MAE"], body)
