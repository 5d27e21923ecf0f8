"""The paper's Table 2 on another simulator: battles on SMAX, with the paper's numbers for StarCraft's SMAC beside them.

    python paper/table2.py            # run what paper/results/smax-*.csv lack, then print
    python paper/table2.py --show     # print what these files hold

Win rate and the team's return (20 for a battle that is won) of the last policy over 100 battles, mean and standard
deviation over seeds; then how far the credit is from the damage that each agent did. Needs jaxmarl (data/smax.py).
"""

import statistics

import tyro
from rows import by_label, fail, mean_interval, mean_std, numbers, paired, print_table
from runs import Printing, run_missing

# Win rates of the paper's Table 2: MACCA-CQL, MACCA-OMAR, MACCA-ICQ; then its I-CQL, OMAR, MA-ICQ.
PAPER = {
    "2s3z-expert": ("0.88", "0.99", "0.95", "0.70", "0.86", "0.80"),
    "2s3z-medium": ("0.27", "0.55", "0.51", "0.20", "0.17", "0.16"),
    "5m_vs_6m-expert": ("0.63", "0.73", "0.88", "0.02", "0.44", "0.38"),
    "5m_vs_6m-medium": ("0.19", "0.20", "0.15", "0.01", "0.14", "0.11"),
    "6h_vs_8z-expert": ("0.59", "0.75", "0.60", "0.00", "0.18", "0.04"),
    "6h_vs_8z-medium": ("0.17", "0.20", "0.22", "0.01", "0.12", "0.01"),
}
AGENTS = {"2s3z": 5, "5m_vs_6m": 5, "6h_vs_8z": 6}
LABELS = ["BC", "MACCA-CQL", "MACCA-OMAR", "MACCA-ICQ", "ICQ, team", "ICQ, uniform"]
CREDIT = ["paid_mae", "paid_even_mae", "paid_skill", "team_nmse"]

if __name__ == "__main__":
    args = tyro.cli(Printing, description=__doc__)
    if not args.show:
        run_missing([f"smax-{name}" for name in PAPER], args.jobs)
    tables = {name: runs for name in PAPER if (runs := by_label(f"smax-{name}"))}  # dataset -> row label -> runs
    if not tables:
        fail("there are no results in paper/results/smax-*.csv yet; run it without --show")

    print("Win rate (team return):\n")
    body = []
    for name, runs in tables.items():
        body.append([name])
        for label in LABELS:
            won, mean = numbers(runs.get(label, {}), "won"), numbers(runs.get(label, {}), "return")
            team = AGENTS[name.rsplit("-", 1)[0]] * statistics.mean(mean) if mean else 0
            body[-1].append(f"{mean_std(won, 2)} ({team:.1f})" if won else "")
    print_table(["", *LABELS], body)

    print("\nThe paper's Table 2, on SMAC:\n")
    columns = ["", "MACCA-CQL", "MACCA-OMAR", "MACCA-ICQ", "I-CQL", "OMAR", "MA-ICQ"]
    print_table(columns, [[name, *PAPER[name]] for name in tables])

    print("\nPaired differences of win rates over all datasets and seeds, with Student's 95 % interval:\n")
    for label in LABELS[:-1]:
        gaps = [paired(runs.get(label, {}), runs.get(LABELS[-1], {}), "won") for runs in tables.values()]
        pairs = [gap for seeds in gaps for gap in seeds]
        if len(pairs) > 1:
            print(f"- {label} minus {LABELS[-1]}: {mean_interval(pairs, 3)} ({len(pairs)} pairs)")

    # Of MACCA-OMAR: in the other scripts the causal model learns in the same way.
    print("\nCredit against each agent's damage, on held-out battles (reward units; 20 is a battle won):\n")
    body = []
    for name, runs in tables.items():
        columns = [numbers(runs.get("MACCA-OMAR", {}), column) for column in CREDIT]
        body.append([name, *(mean_std(c, digits) for c, digits in zip(columns, (3, 3, 2, 2), strict=True))])
    print_table(["", "mean error", "of the even split", "skill", "team reward's error"], body)
