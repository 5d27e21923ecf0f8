"""How much of the published gain is credit, how much is scale? Runs the tables, prints one, draws a figure.

    python paper/scale_or_credit.py            # about six hours of one core: five seeds, four qualities
    python paper/scale_or_credit.py --show     # from paper/results/scale-*.csv alone

Three steps lead from the team reward as it is to the true individual rewards: dividing it by N changes its scale,
standardising it over the minibatch its scale and its offset; only what is left is credit.
"""

import csv
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import RESULTS, ROOT, t_interval

COLUMNS = {
    "scale-omar-expert": "OMAR, expert",
    "scale-cql-expert": "CQL, expert",
    "scale-cql-medium": "CQL, medium",
    "scale-cql-medium-replay": "CQL, medium-replay",
    "scale-cql-random": "CQL, random",
}
LABELS = {
    "behaviour cloning": "behaviour cloning",
    "team, raw": "team reward R as it is",
    "uniform, raw": "R / N as it is",
    "macca, raw": "MACCA's share as it is",
    "team": "R, standardised (= R / N, standardised)",
    "macca": "MACCA's share, standardised",
    "truth": "true individual rewards, standardised",
}
PAIRS = [("uniform, raw", "team, raw"), ("team", "team, raw"), ("macca", "team"), ("truth", "team")]
COLOURS = ["0.6", "#d95f02", "#e6ab02", "#fdcdac", "#66a61e", "#7570b3", "#1b9e77"]


@dataclass
class Args:
    jobs: int = 2
    """runs side by side, each on one thread"""
    show: bool = False
    """run nothing"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    scores: dict[str, dict[str, list[float]]] = {}
    by_seed: dict[tuple[str, str], dict[str, float]] = {}
    for table in COLUMNS:
        if not args.show:
            command = [sys.executable, str(ROOT / "paper" / "runs.py"), table, "--jobs", str(args.jobs)]
            if subprocess.run(command).returncode:
                raise SystemExit(2)
        if not (RESULTS / f"{table}.csv").exists():
            print(f"scale_or_credit.py: {table} has no results yet; its column is empty", file=sys.stderr)
            continue
        with open(RESULTS / f"{table}.csv") as file:
            for row in csv.DictReader(file):
                scores.setdefault(row["label"], {}).setdefault(table, []).append(float(row["score"]))
                by_seed.setdefault((table, row["label"]), {})[row["seed"]] = float(row["score"])

    print("| what the backbone is told | " + " | ".join(COLUMNS.values()) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    figure, axes = plt.subplots(figsize=(11, 4))
    shown = [label for label in LABELS if label in scores]
    width = 0.85 / len(shown)
    for place, label in enumerate(shown):
        cells = []
        for number, table in enumerate(COLUMNS):
            values = scores[label].get(table, [])
            cells.append(f"{statistics.mean(values):.1f} ± {t_interval(values):.1f}" if len(values) > 1 else "")
            x = number + (place - (len(shown) - 1) / 2) * width
            if len(values) > 1:
                legend = LABELS[label] if number == 0 else None
                colour = COLOURS[list(LABELS).index(label)]
                axes.bar(x, statistics.mean(values), width * 0.92, color=colour, label=legend)
                axes.scatter([x] * len(values), values, s=7, color="black", zorder=3)
        print(f"| {LABELS[label]} | " + " | ".join(cells) + " |")
    print("\n| paired by seed | " + " | ".join(COLUMNS.values()) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    for one, other in PAIRS:
        cells = []
        for table in COLUMNS:
            left, right = by_seed.get((table, one), {}), by_seed.get((table, other), {})
            gaps = [left[seed] - right[seed] for seed in left if seed in right]
            cells.append(f"{statistics.mean(gaps):+.1f} ± {t_interval(gaps):.1f}" if len(gaps) > 1 else "")
        print(f"| {one} minus {other} | " + " | ".join(cells) + " |")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(COLUMNS)), list(COLUMNS.values()))
    axes.set_ylabel("score of the last policy (random 0, expert 100)")
    axes.set_title("Cooperative Navigation: bars are means, dots are seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(RESULTS / "scale-or-credit.png", dpi=110)
    print(f"\nmean and half a 95 % interval over the seeds; figure: {RESULTS / 'scale-or-credit.png'}")
