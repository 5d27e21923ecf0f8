"""The paper's Table 1: twelve particle datasets, OMAR with and without credit, and behaviour cloning beside it.

    python paper/table1.py            # what is missing of paper/results/table1-*.csv: some three hours of one core
    python paper/table1.py --show     # from those files alone
    python paper/table1.py --local    # the tasks in which a predator is rewarded for what it does itself

The headline is the last policy over 100 episodes. Over tasks: the interquartile mean of all runs, with the 95 %
interval of a bootstrap that draws seeds within each dataset (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).
"""

import csv
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import RESULTS, ROOT, TABLES, t_interval

# Mean and standard deviation of the paper's Table 1: OMAR, MACCA-OMAR.
PAPER = {
    "simple_spread-expert": ("44.7 ± 46.6", "111.7 ± 4.3"),
    "simple_tag-expert": ("99.9 ± 14.2", "111.0 ± 21.5"),
    "simple_world-expert": ("98.7 ± 18.7", "107.4 ± 11.0"),
    "simple_spread-medium": ("49.6 ± 14.9", "67.9 ± 16.9"),
    "simple_tag-medium": ("57.4 ± 13.9", "87.1 ± 12.2"),
    "simple_world-medium": ("33.4 ± 12.8", "63.6 ± 8.7"),
    "simple_spread-medium-replay": ("26.8 ± 15.2", "33.2 ± 12.6"),
    "simple_tag-medium-replay": ("56.3 ± 16.6", "69.0 ± 19.3"),
    "simple_world-medium-replay": ("28.9 ± 17.2", "50.9 ± 14.2"),
    "simple_spread-random": ("22.9 ± 10.4", "32.8 ± 9.5"),
    "simple_tag-random": ("12.0 ± 5.2", "20.9 ± 8.3"),
    "simple_world-random": ("6.2 ± 6.7", "15.8 ± 6.1"),
}
LOCAL = ["simple_tag_local-expert", "simple_world_local-expert"]


@dataclass
class Args:
    local: bool = False
    """the tasks with individual rewards of a predator's own making, instead of the paper's"""
    jobs: int = 2
    """runs side by side, each on one thread"""
    show: bool = False
    """run nothing"""


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the last axis; runs at its borders count in part."""
    ordered, n = np.sort(scores, axis=-1), scores.shape[-1]
    places = np.arange(n)
    weights = np.clip(np.minimum(places + 1, 0.75 * n) - np.maximum(places, 0.25 * n), 0, 1)
    return (ordered * weights).sum(axis=-1) / weights.sum()


def bootstrap_interval(by_dataset: list[list[float]], draws: int = 20_000) -> tuple[float, float]:
    """95 % interval of the interquartile mean, seeds drawn with replacement within each dataset."""
    rng = np.random.default_rng(0)
    drawn = [np.array(scores)[rng.integers(len(scores), size=(draws, len(scores)))] for scores in by_dataset]
    low, high = np.quantile(interquartile_mean(np.concatenate(drawn, axis=1)), [0.025, 0.975])
    return float(low), float(high)


def read(dataset: str, column: str) -> dict[str, list[float]]:
    """The scores of every row label of a dataset's table, by seed."""
    path, scores = RESULTS / f"table1-{dataset}.csv", {}
    if path.exists():
        with open(path) as file:
            for row in sorted(csv.DictReader(file), key=lambda row: int(row["seed"])):
                if row[column]:
                    scores.setdefault(row["label"], []).append(float(row[column]))
    return scores


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""


def show(datasets: list[str], column: str) -> None:
    """One table of a score: datasets down, methods across, interquartile means at the bottom."""
    tables = {dataset: scores for dataset in datasets if (scores := read(dataset, column))}
    labels = list(TABLES[f"table1-{datasets[0]}"][1])
    paper = ["paper: OMAR", "paper: MACCA-OMAR"] if datasets[0] in PAPER else []
    print("| dataset | " + " | ".join(labels + paper) + " |\n|---" + "|---" * len(labels + paper) + "|")
    for dataset, scores in tables.items():
        cells = [spread(scores.get(label, [])) for label in labels]
        print(f"| {dataset} | " + " | ".join(cells + list(PAPER.get(dataset, ()))) + " |")
    if len(tables) < 3:
        return
    cells = []
    for label in labels:
        runs = [scores[label] for scores in tables.values() if len(scores.get(label, [])) > 1]
        if len(runs) < len(datasets):
            cells.append("")
            continue
        low, high = bootstrap_interval(runs)
        cells.append(f"{interquartile_mean(np.concatenate(runs)):.1f} ({low:.1f} to {high:.1f})")
    print("| **interquartile mean** | " + " | ".join(cells + [""] * len(paper)) + " |")


def paired(dataset: str, one: str, other: str) -> list[float]:
    """Differences between two methods, seed by seed."""
    scores = read(dataset, "score")
    return [a - b for a, b in zip(scores.get(one, []), scores.get(other, []), strict=False)]


def show_differences(datasets: list[str]) -> None:
    """MACCA against its controls: mean over datasets and half of Student's 95 % interval."""
    for other in ("BC", "OMAR, team", "OMAR, uniform"):
        gaps = [statistics.mean(seeds) for dataset in datasets if (seeds := paired(dataset, "MACCA-OMAR", other))]
        if len(gaps) > 1:
            better = sum(gap > 0 for gap in gaps)
            print(f"- MACCA-OMAR minus {other}: {statistics.mean(gaps):+.1f} ± {t_interval(gaps):.1f} ", end="")
            print(f"(mean over {len(gaps)} datasets; above on {better})")


def show_local_differences(datasets: list[str]) -> None:
    """What true and what learned credit add to the even split, paired by seed, and how right the learned one is."""
    print("| minus OMAR, uniform | " + " | ".join(datasets) + " |\n|---" + "|---" * len(datasets) + "|")
    for label in ("OMAR, truth", "MACCA-OMAR", "MACCA-OMAR, causal model first"):
        gaps = [paired(dataset, label, "OMAR, uniform") for dataset in datasets]
        cells = [f"{statistics.mean(g):+.1f} ± {t_interval(g):.1f}" if len(g) > 1 else "" for g in gaps]
        print(f"| {label} | " + " | ".join(cells) + " |")
    for label in ("MACCA-OMAR", "MACCA-OMAR, causal model first"):
        skills = [read(dataset, "credit_skill").get(label, []) for dataset in datasets]
        cells = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" if len(x) > 1 else "" for x in skills]
        print(f"| skill of the credit of {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    datasets = LOCAL if args.local else list(PAPER)
    if not args.show:
        for dataset in datasets:
            command = [sys.executable, str(ROOT / "paper" / "runs.py"), f"table1-{dataset}", "--jobs", str(args.jobs)]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(2)
    print("Score of the last policy, own references\n")
    show(datasets, "score")
    print()
    (show_local_differences if args.local else show_differences)(datasets)
    if not args.local:
        print("\nBest evaluation during training, own references\n")
        show(datasets, "best_score")
        print("\nScore of the last policy, the paper's references\n")
        show(datasets, "score_paper")
