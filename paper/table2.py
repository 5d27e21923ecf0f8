"""The paper's Tables 2 and 3 on another simulator: battles on SMAX, with the paper's numbers for StarCraft beside them.

    python paper/table2.py            # run what paper/results/smax-*.csv lack, then print
    python paper/table2.py --show     # print what these files hold

SMAX is not SMAC: its units, maps and opponent resemble StarCraft's, its win rates cannot be compared. Its units cannot
heal, so there is no MMM2. Win rate of the last policy over 100 battles, mean and standard deviation over seeds. MACCA
with `--graph fixed`. Needs jaxmarl (data/smax.py).
"""

import statistics

import tyro
from rows import by_label, mean_interval, mean_std, numbers, paired, print_table
from runs import Printing, run_missing
from tables import TABLES

PAPER = {  # win rates of its Table 2: I-CQL, OMAR, MA-ICQ, MACCA-CQL, MACCA-OMAR, MACCA-ICQ
    "2s3z-expert": ("0.70", "0.86", "0.80", "0.88", "0.99", "0.95"),
    "2s3z-medium": ("0.20", "0.17", "0.16", "0.27", "0.55", "0.51"),
    "2s3z-medium-replay": ("0.11", "0.35", "0.31", "0.25", "0.53", "0.59"),
    "5m_vs_6m-expert": ("0.02", "0.44", "0.38", "0.63", "0.73", "0.88"),
    "5m_vs_6m-medium": ("0.01", "0.14", "0.11", "0.19", "0.20", "0.15"),
    "5m_vs_6m-medium-replay": ("0.12", "0.09", "0.18", "0.15", "0.14", "0.28"),
    "6h_vs_8z-expert": ("0.00", "0.18", "0.04", "0.59", "0.75", "0.60"),
    "6h_vs_8z-medium": ("0.01", "0.12", "0.01", "0.17", "0.20", "0.22"),
    "6h_vs_8z-medium-replay": ("0.03", "0.01", "0.07", "0.14", "0.22", "0.25"),
}
COLUMNS = ["CQL, R", "OMAR, R", "MA-ICQ, R", "MACCA-CQL", "MACCA-OMAR", "MACCA-ICQ"]
PAPER3 = {  # of its Table 3: SHAQ, SQDDPG, SHAQ-CQL, QMIX-CQL
    "2s3z-expert": ("0.10", "0.05", "0.79", "0.73"),
    "2s3z-medium": ("0.05", "0.07", "0.24", "0.22"),
    "5m_vs_6m-expert": ("0.02", "0.00", "0.10", "0.03"),
    "5m_vs_6m-medium": ("0.00", "0.00", "0.06", "0.01"),
    "6h_vs_8z-expert": ("0.00", "0.00", "0.02", "0.00"),
    "6h_vs_8z-medium": ("0.00", "0.00", "0.04", "0.00"),
}
COLUMNS3 = ["SHAQ", "SQDDPG", "SHAQ-CQL", "QMIX-CQL"]
BACKBONES = ["CQL", "OMAR", "ICQ"]
AGENTS = {"2s3z": 5, "5m_vs_6m": 5, "6h_vs_8z": 6}
CREDIT = ["paid_mae", "paid_even_mae", "paid_skill", "team_nmse"]

if __name__ == "__main__":
    args = tyro.cli(Printing, description=__doc__)
    if not args.show:
        run_missing([f"smax-{name}" for name in PAPER], args.jobs)
    tables = {name: runs for name in PAPER if (runs := by_label(f"smax-{name}"))}  # dataset -> row label -> runs

    print("Win rate, team return (20 for a won battle), seeds; the paper's win rate on SMAC:\n")
    body = []
    for name, runs in tables.items():
        paper = dict(zip(COLUMNS, PAPER[name], strict=True)) | dict(zip(COLUMNS3, PAPER3.get(name, ()), strict=False))
        for label in TABLES[f"smax-{name}"][1]:
            won, mean = numbers(runs.get(label, {}), "won"), numbers(runs.get(label, {}), "return")
            if won:
                team = AGENTS[name.split("-")[0]] * statistics.mean(mean)
                body.append([name, label, mean_std(won, 2), f"{team:.1f}", str(len(won)), paper.get(label, "")])
    print_table(["", "", "won", "team return", "seeds", "the paper's, on SMAC"], body)

    print("\nMACCA minus R / N: difference of win rates, paired by seed, with 95 % intervals:\n")
    body, means = [], []
    for name, runs in tables.items():
        cells = [paired(runs.get(f"MACCA-{x}", {}), runs.get(f"{x}, R / N", {}), "won") for x in BACKBONES]
        body.append([name, *(mean_interval(cell, 2) for cell in cells)])
        if all(len(cell) > 1 for cell in cells):
            means.append([statistics.mean(cell) for cell in cells])
    columns = zip(*means, strict=True)
    body.append([f"mean of {len(means)} datasets", *(mean_interval(column, 3) for column in columns)])
    print_table(["", *BACKBONES], body)
    print(f"\nOver these datasets, of all three: {mean_interval([statistics.mean(three) for three in means], 3)}.")

    # Of MACCA-OMAR: in the other scripts the causal model learns in the same way.
    print("\nCredit against each agent's damage, on held-out battles (reward units; 20 is a battle won):\n")
    body = []
    for name, runs in tables.items():
        columns = [numbers(runs.get("MACCA-OMAR", {}), column) for column in CREDIT]
        body.append([name, *(mean_std(c, digits) for c, digits in zip(columns, (3, 3, 2, 2), strict=True))])
    print_table(["", "mean absolute error", "of the even split", "skill", "team reward's error"], body)
