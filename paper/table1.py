"""The paper's Table 1: twelve particle datasets, every system, from the files of the tables credit-*.

    python paper/table1.py            # run what paper/results lacks (days of two cores), then print
    python paper/table1.py --show     # print what is there; both draw paper/results/credit-pays.png

R: CQL and OMAR are told the raw team reward, as in the paper; MA-ICQ learns from it through a mixer, in units of its
deviation. R / N: the control, in the same units as MACCA's shares. Scores are those of last policies over 100 episodes;
of several settings the better one counts, for R / N and for MACCA.
"""

import statistics
from dataclasses import dataclass

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rows import (
    RESULTS,
    Runs,
    better,
    by_label,
    hierarchical_interval,
    mean_interval,
    mean_std,
    numbers,
    paired,
    print_table,
)
from runs import Printing, run_missing
from tables import TABLES

PAPER = {  # I-CQL, OMAR, MA-ICQ, MACCA-CQL, MACCA-OMAR, MACCA-ICQ
    "cn-expert": (33.6, 44.7, 45.0, 85.4, 111.7, 90.4),
    "pp-expert": (63.4, 99.9, 87.0, 94.9, 111.0, 114.4),
    "world-expert": (54.4, 98.7, 43.2, 89.3, 107.4, 93.2),
    "cn-medium": (19.7, 49.6, 30.8, 45.0, 67.9, 70.3),
    "pp-medium": (50.0, 57.4, 59.4, 61.1, 87.1, 77.4),
    "world-medium": (25.7, 33.4, 35.6, 54.7, 63.6, 55.1),
    "cn-medium-replay": (10.8, 26.8, 22.4, 15.9, 33.2, 28.6),
    "pp-medium-replay": (18.3, 56.3, 44.2, 32.5, 69.0, 64.3),
    "world-medium-replay": (4.5, 28.9, 10.7, 34.8, 50.9, 39.9),
    "cn-random": (12.4, 22.9, 6.0, 22.2, 32.8, 28.1),
    "pp-random": (5.5, 12.0, 15.6, 14.7, 20.9, 30.3),
    "world-random": (0.1, 6.2, 0.6, 8.7, 15.8, 10.1),
}
BACKBONES = ["CQL", "OMAR", "ICQ"]


def systems(dataset: str) -> dict[str, Runs]:
    """The runs of every column of a dataset. Expert and random data have one file, the others one per backbone."""
    if f"credit-{dataset}" in TABLES:
        runs = by_label(f"credit-{dataset}")
        told = {f"{name}, R": runs.get(f"R, {name}", {}) for name in BACKBONES[:2]}
        even = {f"{name}, R / N": runs.get(f"R / N, {name}", {}) for name in BACKBONES}
        return {
            "cloning": runs.get("behaviour cloning", {}),
            **told,
            "MA-ICQ, R": runs.get("MA-ICQ", {}),
            **even,
            **{f"MACCA-{name}": runs.get(f"MACCA-{name}", {}) for name in BACKBONES},
            **{f"MACCA-{name}, rolled": runs.get(f"MACCA-{name}, rolled", {}) for name in BACKBONES},
        }
    cql, omar, icq = files = [by_label(f"credit-{dataset}-{name.lower()}") for name in BACKBONES]
    each = list(zip(BACKBONES, files, strict=True))
    return {
        "cloning": icq.get("behaviour cloning", {}),
        "CQL, R": cql.get("R", {}),
        "OMAR, R": omar.get("R", {}),
        "MA-ICQ, R": icq.get("MA-ICQ", {}),
        **{f"{name}, R / N": better(runs, "R / N", "R / N, its best setting") for name, runs in each},
        **{f"MACCA-{name}": better(runs, "MACCA", "MACCA, R / N's best setting") for name, runs in each},
        **{f"MACCA-{name}, rolled": runs.get("MACCA, rolled", {}) for name, runs in each},
    }


def draw(datasets: dict[str, dict[str, Runs]]) -> None:
    """What the agents are told, a panel for each backbone: means as bars, seeds as dots."""
    figure, panels = plt.subplots(3, sharex=True, sharey=True, figsize=(10, 8), layout="constrained")
    for axes, x in zip(panels, BACKBONES, strict=True):
        kinds = {f"{x}, R / N": "R / N", f"MACCA-{x}": "MACCA", f"MACCA-{x}, rolled": "MACCA, rolled"}
        kinds |= {"MA-ICQ, R" if x == "ICQ" else f"{x}, R": "R", "cloning": "cloning"}
        for place, (kind, label) in enumerate(kinds.items()):
            scores = {number: numbers(runs[kind], "score") for number, runs in enumerate(datasets.values())}
            shown = {number + 0.16 * (place - 2): values for number, values in scores.items() if values}
            axes.bar([*shown], [statistics.mean(values) for values in shown.values()], 0.14, label=label)
            for where, values in shown.items():
                axes.scatter([where] * len(values), values, s=4, color="black", zorder=3)
        axes.set_ylabel("MA-ICQ (R), ICQ" if x == "ICQ" else x)
    panels[0].legend(ncols=5, frameon=False, fontsize=8, loc="upper right")
    panels[0].set_title("Scores of last policies (random 0, expert 100), by what the agents are told", fontsize=10)
    panels[2].set_xticks(
        range(len(datasets)), [name.replace("-", " ", 1) for name in datasets], rotation=30, ha="right"
    )
    figure.savefig(RESULTS / "credit-pays.png", dpi=100)
    plt.close(figure)


@dataclass
class Args(Printing):
    gains: bool = False
    """of what is there print only the README's table"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not (args.show or args.gains):
        run_missing([name for name in TABLES if name.startswith("credit-")], args.jobs)
    datasets = {dataset: systems(dataset) for dataset in PAPER}
    pairs = [(f"MACCA-{x}", f"{x}, R / N") for x in BACKBONES]
    pairs += [(f"MACCA-{x}", other) for x, other in zip(BACKBONES, ("CQL, R", "OMAR, R", "MA-ICQ, R"), strict=True)]
    gaps = {(x, y): [paired(runs[x], runs[y], "score") for runs in datasets.values()] for x, y in pairs}
    arrows = []
    for number, (name, runs) in enumerate(datasets.items()):
        task, quality = name.split("-", 1)
        arrows.append([f"{task.upper()} {quality}"])
        for x in ("OMAR", "CQL", "ICQ"):
            means = [numbers(runs[label], "score") for label in (f"{x}, R / N", f"MACCA-{x}")]
            arrow = " → ".join(f"{statistics.mean(scores):.0f}" for scores in means if scores)
            gap = mean_interval(gaps[f"MACCA-{x}", f"{x}, R / N"][number])
            arrows[-1].append(f"{arrow} ({gap})" if gap else arrow)
    if args.gains:
        print_table(["R / N → MACCA", "OMAR", "CQL", "ICQ"], arrows)
        raise SystemExit

    draw(datasets)
    columns = [name for name in systems("cn-expert") if "rolled" not in name]
    print_table(
        ["dataset", *columns],
        [[name, *(mean_std(numbers(runs[x], "score")) for x in columns)] for name, runs in datasets.items()],
    )

    print("\nMACCA minus R / N and minus R, paired by seed, with 95 % intervals; the last three as printed:\n")
    body = []
    for number, (name, (*told, cql, omar, icq)) in enumerate(PAPER.items()):
        printed = [f"{x - y:+.1f}" for x, y in zip((cql, omar, icq), told, strict=True)]
        body.append([name, *(mean_interval(gaps[pair][number]) for pair in pairs), *printed])
    print_table(["dataset", *(f"{x} - ({y})" for x, y in pairs), "paper: CQL", "paper: OMAR", "paper: ICQ"], body)

    print("\nR / N → MACCA (the README's table):\n")
    print_table(["dataset", "OMAR", "CQL", "ICQ"], arrows)

    print("\nMACCA's shares told to the next agent (the control `paper/rolled.py`):\n")
    rolled = [f"MACCA-{x}, rolled" for x in BACKBONES]
    body = [[name, *(mean_std(numbers(runs[x], "score")) for x in rolled)] for name, runs in datasets.items()]
    print_table(["dataset", *rolled], [cells for cells in body if any(cells[1:])])

    print("\nMACCA, here / in the paper (on its own datasets):\n")
    body, above, run = [], 0, 0
    for name, runs in datasets.items():
        body.append([name])
        for backbone, paper in zip(BACKBONES, PAPER[name][3:], strict=True):
            ours = numbers(runs[f"MACCA-{backbone}"], "score")
            run, above = run + bool(ours), above + bool(ours and statistics.mean(ours) > paper)
            body[-1].append(f"{statistics.mean(ours):.1f} / {paper}" if ours else f"/ {paper}")
    print_table(["dataset", *(f"MACCA-{x}" for x in BACKBONES)], body)
    print(f"\nMACCA's mean is above the paper's in {above} of the {run} cells that were run, of 36.")

    print("\nMean over datasets, with a 95 % bootstrap of datasets and seeds:\n")
    for x in BACKBONES:  # not paired: CQL's seeds are others
        clones = [
            (numbers(runs[f"MACCA-{x}"], "score"), numbers(runs["cloning"], "score")) for runs in datasets.values()
        ]
        lists = [[score - statistics.mean(cloned) for score in scores] if cloned else [] for scores, cloned in clones]
        gaps[f"MACCA-{x}", "the mean of cloning"] = lists
    for (one, other), lists in gaps.items():
        there = [seeds for seeds in lists if seeds]
        if len(there) > 1:
            mean, (low, high) = statistics.mean(map(statistics.mean, there)), hierarchical_interval(there)
            print(f"- {one} minus {other}: {mean:+.1f} ({low:+.1f} to {high:+.1f}; {len(there)} datasets)")
