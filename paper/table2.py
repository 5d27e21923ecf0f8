"""The paper's Table 2 on another simulator: battles on SMAX, with the paper's figures for StarCraft's SMAC beside them.

    python paper/table2.py            # what is missing of paper/results/smax-*.csv: an hour of two idle cores
    python paper/table2.py --show     # from those files alone

Win rate and the team's return (20 for a battle that is won) of the last policy over 100 battles, mean and standard
deviation over seeds; then how far the credit is from the damage that each agent did. Needs jaxmarl (data/smax.py).
"""

import csv
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import RESULTS, ROOT, TABLES, t_interval

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


@dataclass
class Args:
    jobs: int = 2
    """runs side by side, each on one thread"""
    show: bool = False
    """run nothing"""


def spread(values: list[float], digits: int = 2) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.show:
        for name in PAPER:
            arguments = [f"smax-{name}", "--jobs", str(args.jobs)]
            if subprocess.run([sys.executable, str(ROOT / "paper" / "runs.py"), *arguments]).returncode:
                raise SystemExit(2)
    tables: dict[str, dict[str, list[dict[str, str]]]] = {}  # dataset -> row label -> runs
    for name in PAPER:
        if (path := RESULTS / f"smax-{name}.csv").exists():
            with open(path) as file:
                rows = sorted(csv.DictReader(file), key=lambda row: int(row["seed"]))
            tables[name] = {label: [r for r in rows if r["label"] == label] for label in TABLES[f"smax-{name}"][1]}
    if not tables:
        print("table2.py: no results yet; run it without --show", file=sys.stderr)
        raise SystemExit(2)
    labels = list(dict.fromkeys(label for runs in tables.values() for label in runs if runs[label]))

    print("Win rate (team return):\n")
    print(f"| | {' | '.join(labels)} |\n|---|{'---|' * len(labels)}")
    for name, runs in tables.items():
        cells = []
        for label in labels:
            won = [float(row["won"]) for row in runs.get(label, [])]
            team = [AGENTS[name.rsplit("-", 1)[0]] * float(row["return"]) for row in runs.get(label, [])]
            cells.append(f"{spread(won)} ({statistics.mean(team):.1f})" if won else "")
        print(f"| {name} | {' | '.join(cells)} |")

    print("\nThe paper's Table 2, on SMAC:\n")
    print("| | MACCA-CQL | MACCA-OMAR | MACCA-ICQ | I-CQL | OMAR | MA-ICQ |\n|---|---|---|---|---|---|---|")
    for name in tables:
        print(f"| {name} | {' | '.join(PAPER[name])} |")

    print("\nPaired differences of win rates over all datasets and seeds, with Student's 95 % interval:\n")
    first = next((label for label in labels if label.endswith(", uniform")), "BC")
    for other in labels:
        pairs = [
            float(a["won"]) - float(b["won"])
            for runs in tables.values()
            for a in runs.get(other, [])
            for b in runs.get(first, [])
            if a["seed"] == b["seed"]
        ]
        if other != first and len(pairs) > 1:
            half = f" ± {t_interval(pairs):.3f}" if len(pairs) <= 12 else ""
            print(f"- {other} minus {first}: {statistics.mean(pairs):+.3f}{half} ({len(pairs)} pairs)")

    print("\nCredit against each agent's damage, on held-out battles (reward units; 20 is a battle won):\n")
    print("| | mean error | of the even split | skill | rank correlation | team reward's error |")
    print("|---|---|---|---|---|---|")
    for name, runs in tables.items():
        rows = runs["MACCA-OMAR"]  # in the others the same causal model learns from the same minibatches
        if rows:
            mean = {
                key: statistics.mean(float(row[key]) for row in rows)
                for key in ("credit_mae", "even_mae", "credit_rank", "team_nmse")
            }
            skill = spread([float(row["credit_skill"]) for row in rows])
            errors = f"{mean['credit_mae']:.3f} | {mean['even_mae']:.3f}"
            print(f"| {name} | {errors} | {skill} | {mean['credit_rank']:.2f} | {mean['team_nmse']:.2f} |")
