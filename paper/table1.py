"""The paper's Table 1: twelve particle datasets, OMAR with and without credit, and behaviour cloning beside it.

    python paper/table1.py            # run what paper/results/table1-*.csv lack, then print
    python paper/table1.py --show     # print what these files hold
    python paper/table1.py --local    # the tasks in which a predator is rewarded for what it does itself

The headline is the last policy over 100 episodes. Over tasks: the interquartile mean of all runs, with the 95 %
interval of a bootstrap that draws seeds within each dataset (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).
"""

import statistics
from dataclasses import dataclass

import numpy as np
import tyro
from rows import by_label, mean_interval, mean_std, numbers, paired, print_table
from runs import Printing, run_missing
from tables import TABLES

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
class Args(Printing):
    local: bool = False
    """the tasks with individual rewards of a predator's own making, instead of the paper's"""


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


def show(tables: dict, labels: list[str], column: str) -> None:
    """One table of a score: datasets down, methods across, interquartile means at the bottom."""
    scores = {dataset: [numbers(runs.get(label, {}), column) for label in labels] for dataset, runs in tables.items()}
    paper = ["paper: OMAR", "paper: MACCA-OMAR"] * (not tables.keys().isdisjoint(PAPER))
    body = [[name, *map(mean_std, cells), *PAPER.get(name, ())] for name, cells in scores.items() if any(cells)]
    if tables.keys() == PAPER.keys():
        means = []
        for runs in zip(*scores.values(), strict=True):  # of one method, a list of scores per dataset
            complete = all(len(seeds) > 1 for seeds in runs)
            low, high = bootstrap_interval(list(runs)) if complete else (0, 0)
            means.append(f"{interquartile_mean(np.concatenate(runs)):.1f} ({low:.1f} to {high:.1f})" * complete)
        body.append(["**interquartile mean**", *means, *[""] * len(paper)])
    print_table(["dataset", *labels, *paper], body)


def show_differences(tables: dict) -> None:
    """MACCA against its controls: mean over datasets and half of Student's 95 % interval."""
    for other in ("BC", "OMAR, team", "OMAR, uniform"):
        pairs = [paired(runs.get("MACCA-OMAR", {}), runs.get(other, {}), "score") for runs in tables.values()]
        gaps = [statistics.mean(seeds) for seeds in pairs if seeds]
        if len(gaps) > 1:
            counts = f"mean over {len(gaps)} datasets; above on {sum(gap > 0 for gap in gaps)}"
            print(f"- MACCA-OMAR minus {other}: {mean_interval(gaps)} ({counts})")


def show_local_differences(tables: dict) -> None:
    """What true and what learned credit add to the even split, paired by seed, and how right the learned one is."""
    body = []
    for label in ("OMAR, truth", "MACCA-OMAR"):
        pairs = [paired(runs.get(label, {}), runs.get("OMAR, uniform", {}), "score") for runs in tables.values()]
        body.append([label, *map(mean_interval, pairs)])
    skills = [numbers(runs.get("MACCA-OMAR", {}), "paid_skill") for runs in tables.values()]
    body.append(["skill of the credit of MACCA-OMAR", *(mean_std(skill, 2) for skill in skills)])
    print_table(["minus OMAR, uniform", *tables], body)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    datasets = LOCAL if args.local else list(PAPER)
    for dataset in datasets if not args.show else ():
        run_missing(f"table1-{dataset}", args.jobs)
    tables = {dataset: by_label(f"table1-{dataset}") for dataset in datasets}
    labels = list(TABLES[f"table1-{datasets[0]}"][1])
    print("Score of the last policy, own references\n")
    show(tables, labels, "score")
    print()
    (show_local_differences if args.local else show_differences)(tables)
    if not args.local:
        print("\nBest evaluation during training, own references\n")
        show(tables, labels, "best_score")
        print("\nScore of the last policy, the paper's references\n")
        show(tables, labels, "score_paper")
