"""How much of the published gain is credit, how much is scale? Runs the tables, prints one, draws a figure.

    python paper/scale_or_credit.py            # about six hours of one core: five seeds, four qualities
    python paper/scale_or_credit.py --show     # from paper/results/scale-*.csv alone

Three steps lead from the team reward as it is to the true individual rewards. Dividing it by N changes its scale,
standardising it over the minibatch its scale and its offset; only what is left is credit.
"""

import statistics

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rows import RESULTS, by_label, mean_interval, numbers, paired, print_table
from runs import Printing, run_missing

COLUMNS = {
    "scale-omar-expert": "OMAR, expert",
    "scale-cql-expert": "CQL, expert",
    "scale-cql-medium": "CQL, medium",
    "scale-cql-medium-replay": "CQL, medium-replay",
    "scale-cql-random": "CQL, random",
}
LABELS = {  # row label -> its name in the table, its colour in the figure
    "behaviour cloning": ("behaviour cloning", "0.6"),
    "team, raw": ("team reward R as it is", "#d95f02"),
    "uniform, raw": ("R / N as it is", "#e6ab02"),
    "macca, raw": ("MACCA's share as it is", "#fdcdac"),
    "team": ("R, standardised (= R / N, standardised)", "#66a61e"),
    "macca": ("MACCA's share, standardised", "#7570b3"),
    "truth": ("true individual rewards, standardised", "#1b9e77"),
}
PAIRS = [("uniform, raw", "team, raw"), ("team", "team, raw"), ("macca", "team"), ("truth", "team")]

if __name__ == "__main__":
    args = tyro.cli(Printing, description=__doc__)
    for table in COLUMNS if not args.show else ():
        run_missing(table, args.jobs)
    tables = [by_label(table) for table in COLUMNS]
    shown = [label for label in LABELS if any(label in runs for runs in tables)]

    figure, axes = plt.subplots(figsize=(11, 4))
    width, body = 0.85 / max(len(shown), 1), []
    for place, label in enumerate(shown):
        name, colour = LABELS[label]
        scores = [numbers(runs.get(label, {}), "score") for runs in tables]
        body.append([name, *(mean_interval(values, sign="") for values in scores)])
        for number, values in enumerate(scores):
            x = number + (place - (len(shown) - 1) / 2) * width
            if len(values) > 1:
                legend = name if number == 0 else None
                axes.bar(x, statistics.mean(values), width * 0.92, color=colour, label=legend)
                axes.scatter([x] * len(values), values, s=7, color="black", zorder=3)
    print_table(["what the backbone is told", *COLUMNS.values()], body)
    print()
    gaps = [[paired(runs.get(one, {}), runs.get(other, {}), "score") for runs in tables] for one, other in PAIRS]
    body = [[f"{one} minus {other}", *map(mean_interval, row)] for (one, other), row in zip(PAIRS, gaps, strict=True)]
    print_table(["paired by seed", *COLUMNS.values()], body)

    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(COLUMNS)), list(COLUMNS.values()))
    axes.set_ylabel("score of the last policy (random 0, expert 100)")
    axes.set_title("Cooperative Navigation: bars are means, dots are seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(RESULTS / "scale-or-credit.png", dpi=110)
    print(f"\nmean and half a 95 % interval over the seeds; figure: {RESULTS / 'scale-or-credit.png'}")
