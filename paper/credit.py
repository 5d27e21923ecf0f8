"""Does credit pay, and whose? Runs the tables credit-*-medium* of paper/tables.py and prints them as one.

    python paper/credit.py            # what paper/results/credit-*.csv lack (a day of two cores), then the table
    python paper/credit.py --show     # from those files alone

Every row trains the same backbone on the same data and differs in what it tells the agents. All but R are standardised
alike, by one deviation, so scale is no part of the differences.
"""

import statistics

import tyro
from rows import (
    better,
    by_label,
    fail,
    hierarchical_interval,
    mean_interval,
    mean_std,
    numbers,
    paired,
    print_table,
)
from runs import Printing, run_missing
from table1 import PAPER
from tables import TABLES

NAMES = [name for name in TABLES if name.startswith("credit-") and "medium" in name]
if __name__ == "__main__":
    args = tyro.cli(Printing, description=__doc__)
    if not args.show:
        run_missing(NAMES, args.jobs)
    there = {table: runs for table in NAMES if (runs := by_label(table))}
    if not there:
        fail("there are no results in paper/results/credit-*.csv yet; run it without --show")
    labels = list(dict.fromkeys(label for name in NAMES for label in TABLES[name][1]))

    head, scores, gaps = ["data, backbone"], [], []
    for table, runs in there.items():
        _, rest = table.split("-", 1)
        dataset, backbone = rest.rsplit("-", 1)
        paper = PAPER[dataset][3 + ["cql", "omar", "icq"].index(backbone)]
        first = runs.get("R / N", {})
        cells = [mean_std(numbers(runs.get(label, {}), "score")) for label in labels]
        scores.append([rest, *cells, str(paper)])
        cells = [mean_interval(paired(runs.get(label, {}), first, "score")) for label in labels[1:]]
        skill = [mean_std(numbers(runs.get("MACCA", {}), name), 2) for name in ("team_nmse", "cause_skill")]
        gaps.append([rest, str(len(first)), *cells, *skill])
    print_table([*head, *labels, "the paper's MACCA"], scores)
    print("\nDifference to R / N, paired by seed, with 95 % intervals:\n")
    print_table([*head, "seeds", *labels[1:], "team NMSE", "cause skill"], gaps)

    others = []
    for table, runs in there.items():
        even = better(runs, "R / N", "R / N, its best setting")
        ours = better(runs, "MACCA", "MACCA, R / N's best setting")
        rest = [runs.get(label, {}) for label in ("oracle", "MACCA, slots (Eq. 6)")]
        cells = [mean_interval(paired(runs.get("MACCA", {}), seeds, "score")) for seeds in rest]
        others.append([table.removeprefix("credit-"), mean_interval(paired(ours, even, "score")), *cells])
    print("\nMACCA minus:\n")
    print_table([*head, "R / N, both at their better settings", "oracle", "slots (Eq. 6)"], others)
    print("\nMean difference to R / N over the tables that have both, with a 95 % bootstrap of tables and seeds:\n")
    for label in labels[1:]:
        pairs = [paired(runs.get(label, {}), runs.get("R / N", {}), "score") for runs in there.values()]
        pairs = [seeds for seeds in pairs if seeds]
        if len(pairs) > 1:  # one table alone says nothing about other data
            mean, (low, high) = statistics.mean(map(statistics.mean, pairs)), hierarchical_interval(pairs)
            counts = f"{len(pairs)} tables, {sum(map(len, pairs))} pairs of seeds"
            print(f"- {label}: {mean:+.1f} ({low:+.1f} to {high:+.1f}; {counts})")
