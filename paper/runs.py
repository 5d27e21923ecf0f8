"""Run a table: many trainings side by side, one CSV row each, and what they say together.

    python paper/runs.py cn-medium            # run what is missing of paper/results/cn-medium.csv, then print the table
    python paper/runs.py cn-medium --show     # print the table only

A run is a script with its arguments and a seed. Rows that exist are skipped, so a table can be stopped and continued.
Runs are single-threaded: several of them side by side use the cores better than one run with several threads.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "paper" / "results"

# name -> (seeds, {row label: command without the seed}). The first row of a table is what the others are compared with.
TABLES: dict[str, tuple[list[int], dict[str, str]]] = {}

# MACCA-ICQ; the other two scripts are in the scale tables below.
TABLES["cn-expert-icq"] = ([1, 2, 3, 4, 5], {"MACCA-ICQ": "macca_icq.py --dataset expert"})

# The backbones alone, with the true individual rewards, where the data leave room above behaviour cloning.
for quality in ("medium", "medium-replay"):
    TABLES[f"cn-{quality}"] = (
        [1, 2, 3],
        {
            "behaviour cloning": f"paper/bc.py --dataset {quality}",
            "CQL": f"macca_cql.py --credit truth --alpha 0.2 --dataset {quality}",
            "OMAR": f"macca_omar.py --credit truth --alpha 0.2 --dataset {quality}",
            "ICQ": f"macca_icq.py --credit truth --dataset {quality}",
        },
    )

# The settings that were tried for it, before the critics had layer normalisation and after. One seed each.
TUNING = {
    "bc": "paper/bc.py",
    "icq expectile 0.7 beta 1": "macca_icq.py --credit truth --expectile 0.7 --beta 1 --no-layer-norm",
    "icq expectile 0.7 beta 0.3": "macca_icq.py --credit truth --expectile 0.7 --beta 0.3 --no-layer-norm",
    "icq expectile 0.9 beta 0.3": "macca_icq.py --credit truth --expectile 0.9 --beta 0.3 --no-layer-norm",
    "icq expectile 0.9 beta 0.1": "macca_icq.py --credit truth --expectile 0.9 --beta 0.1 --no-layer-norm",
    "cql alpha 0.2": "macca_cql.py --credit truth --alpha 0.2 --no-layer-norm",
    "cql alpha 1": "macca_cql.py --credit truth --alpha 1 --no-layer-norm",
    "cql alpha 5": "macca_cql.py --credit truth --alpha 5 --no-layer-norm",
    "omar alpha 1 tau 0.9": "macca_omar.py --credit truth --alpha 1 --tau 0.9 --no-layer-norm",
    "omar alpha 5 tau 0.5": "macca_omar.py --credit truth --alpha 5 --tau 0.5 --no-layer-norm",
    "cql alpha 1, layer norm": "macca_cql.py --credit truth --alpha 1",
    "omar alpha 1 tau 0.9, layer norm": "macca_omar.py --credit truth --alpha 1 --tau 0.9",
}
for quality in ("medium-replay", "medium"):
    commands = {label: f"{run} --dataset {quality}" for label, run in TUNING.items()}
    TABLES[f"cn-tuning-{quality}"] = ([1], commands)

# How long the runs of paper/scale_or_credit.py must be: the backbone's learning curves with true rewards. One seed.
pilot = "macca_cql.py --credit truth --total-iterations 6000 --eval-interval 500 --eval-episodes 40"
TABLES["cn-pilot-length"] = (
    [1],
    {
        "medium, alpha 0.2": f"{pilot} --dataset medium --alpha 0.2",
        "medium-replay, alpha 0.2": f"{pilot} --dataset medium-replay --alpha 0.2",
        "random, alpha 0.2": f"{pilot} --dataset random --alpha 0.2",
        "random, alpha 1": f"{pilot} --dataset random --alpha 1",
        "expert, alpha 1": f"{pilot} --dataset expert --alpha 1",
        "expert, alpha 0.2": f"{pilot} --dataset expert --alpha 0.2",
    },
)

# How much of the gain is credit, how much is scale? (paper/scale_or_credit.py) With standardised rewards, `team` and
# `uniform` are the same run; "raw" ones are not standardised.
for script, quality, alpha in [
    ("macca_cql", "expert", 1),
    ("macca_cql", "medium", 0.2),
    ("macca_cql", "medium-replay", 0.2),
    ("macca_cql", "random", 0.2),
    ("macca_omar", "expert", 1),
]:
    train = f"{script}.py --dataset {quality} --alpha {alpha} --credit"
    TABLES[f"scale-{script[6:]}-{quality}"] = (
        [1, 2, 3] if quality == "random" else [1, 2, 3, 4, 5],
        {
            "behaviour cloning": f"paper/bc.py --dataset {quality}",
            "team": f"{train} team",
            "macca": f"{train} macca",
            "truth": f"{train} truth",
            "team, raw": f"{train} team --no-standardize-rewards",
            "uniform, raw": f"{train} uniform --no-standardize-rewards",
            "macca, raw": f"{train} macca --no-standardize-rewards",
        },
    )

# What Proposition 4.1 does not give: the same data and the same sum, under other conventions, and with the truth told.
# The causal model alone: 3,000 steps of it, and one of the policy.
alone = "macca_icq.py --causal-schedule first --causal-pretrain-iterations 3000 --total-iterations 1 --final-episodes 1"
TABLES["cn-conventions"] = (
    [1, 2, 3],
    {
        "own things to the owner, the rest evenly": f"{alone} --dataset medium",
        "no convention (anchor 1)": f"{alone} --dataset medium --anchor 1",
        "no graph": f"{alone} --dataset medium --graph full",
        "fitted to the true rewards": f"{alone} --dataset medium --causal-target truth",
        "fitted to the true rewards, no graph": f"{alone} --dataset medium --causal-target truth --graph full",
    },
)

# How long the runs of the paper's Table 1 must be, and alpha: learning curves on Predator-Prey and WORLD. One seed.
pilot = "macca_omar.py --credit uniform --total-iterations 4000 --eval-interval 500 --eval-episodes 40"
TABLES["pilot-simple_tag"] = (
    [1],
    {
        "expert, alpha 1": f"{pilot} --env mpe/simple_tag --dataset expert --alpha 1",
        "medium, alpha 1": f"{pilot} --env mpe/simple_tag --dataset medium --alpha 1",
        "medium, alpha 0.2": f"{pilot} --env mpe/simple_tag --dataset medium --alpha 0.2",
    },
)
TABLES["pilot-simple_world"] = ([1], {"expert, alpha 1": f"{pilot} --env mpe/simple_world --dataset expert --alpha 1"})

# The paper's Table 1 (paper/table1.py), and the tasks in which a predator is rewarded for what it does itself
# (paper/local.py). OMAR with `team` gets the rewards as they are, as the paper's does; the others are standardised.
LENGTH = 1_500
for task in ("simple_spread", "simple_tag", "simple_world", "simple_tag_local", "simple_world_local"):
    for quality in ("expert",) if task.endswith("local") else ("expert", "medium", "medium-replay", "random"):
        where = f"--env mpe/{task} --dataset {quality} --total-iterations {LENGTH} --eval-interval 500"
        train = f"macca_omar.py {where} --credit"
        local = {
            "OMAR, truth": f"{train} truth",
            "MACCA-OMAR, causal model first": f"{train} macca --own-share 0 --causal-schedule first",
        }
        TABLES[f"table1-{task}-{quality}"] = (
            [1, 2, 3],
            {
                "BC": f"paper/bc.py {where}",
                "OMAR, team": f"{train} team --no-standardize-rewards",
                "OMAR, uniform": f"{train} uniform",
                "MACCA-OMAR": f"{train} macca" + (" --own-share 0" if task.endswith("local") else ""),
                **(local if task.endswith("local") else {}),
            },
        )

# Is it credit? MACCA-OMAR's shares, each given to another agent, where MACCA gained most in Table 1.
where = f"--env mpe/simple_world --dataset medium-replay --total-iterations {LENGTH} --eval-interval 500"
TABLES["rolled"] = ([1, 2, 3], {"the next agent's share": f"paper/rolled.py {where}"})

# StarCraft-like battles on SMAX (paper/table2.py): first how long the runs must be, one seed.
TABLES["pilot-smax"] = (
    [1],
    {
        f"{label}, {map_name} {quality}": f"{script} --env smax/{map_name} --dataset {quality}"
        " --total-iterations 2000 --eval-interval 250 --eval-episodes 64"
        for map_name, quality in (("2s3z", "medium"), ("2s3z", "expert"))
        for label, script in (("BC", "paper/bc.py"), ("OMAR", "macca_omar.py --credit uniform"))
    },
)
# Then alpha and beta, where the defaults stayed below cloning, on a seed that the tables do not use.
where = "--env smax/5m_vs_6m --dataset expert --total-iterations 1000 --eval-interval 1000"
TABLES["pilot-smax-settings"] = (
    [4],
    {
        "ICQ, beta 0.3": f"macca_icq.py {where} --credit uniform",
        "ICQ, beta 1": f"macca_icq.py {where} --credit uniform --beta 1",
        "ICQ, beta 3": f"macca_icq.py {where} --credit uniform --beta 3",
        "OMAR, alpha 1": f"macca_omar.py {where} --credit uniform",
        "OMAR, alpha 5": f"macca_omar.py {where} --credit uniform --alpha 5",
    },
)
for map_name in ("2s3z", "5m_vs_6m", "6h_vs_8z"):
    for quality in ("expert", "medium"):
        where = f"--env smax/{map_name} --dataset {quality} --total-iterations 1000 --eval-interval 500"
        alpha = " --alpha 5" if quality == "expert" else ""  # the paper's for expert data
        TABLES[f"smax-{map_name}-{quality}"] = (
            [1, 2, 3],
            {
                "BC": f"paper/bc.py {where}",
                "MACCA-CQL": f"macca_cql.py {where}{alpha}",
                "MACCA-OMAR": f"macca_omar.py {where}{alpha}",
                "MACCA-ICQ": f"macca_icq.py {where}",
                "ICQ, team": f"macca_icq.py {where} --credit team --no-standardize-rewards",
                "ICQ, uniform": f"macca_icq.py {where} --credit uniform",
            },
        )


@dataclass
class Args:
    table: Annotated[str, tyro.conf.Positional]
    """one of the tables named in this file"""
    jobs: int = os.cpu_count() or 1
    """runs side by side"""
    only: str = ""
    """run this row alone"""
    show: bool = False
    """print what is there and run nothing"""


def run(command: str) -> dict[str, str]:
    """Run one script in a folder of its own and return its row: scores of the last and the best policy, provenance."""
    with tempfile.TemporaryDirectory() as folder:
        script, *arguments = command.split()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stderr[-500:]}")
        run_folder = next((Path(folder) / "runs").iterdir())
        config = json.loads((run_folder / "config.json").read_text())
        with open(run_folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
    last = rows[-1]
    best = max(rows[:-1] or rows, key=lambda row: float(row["return"]))
    kept = ["return", "score", "score_paper", "won", "team_nmse"]
    kept += ["credit_mse", "credit_mae", "credit_rank", "credit_skill", "even_mse", "even_mae"]
    kept += ["state_density", "action_density"]
    return {
        "command": f"python {command}",
        "iterations": last["iteration"],
        **{name: last.get(name, "") for name in kept},
        "best_score": best.get("score", ""),
        "best_return": best["return"],
        "curve": " ".join(f"{row['iteration']}:{float(row['return']):.1f}" for row in rows),
        "wall_seconds": f"{time.monotonic() - started:.0f}",
        "versions": " ".join(f"{name} {version}" for name, version in config["versions"].items()),
        "commit": config["commit"],
        "dataset_sha256": config.get("dataset_sha256", "")[:16],
    }


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a result file, or none."""
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def t_interval(values: list[float]) -> float:
    """Half the width of Student's 95 % interval of the mean of 2 to 12 values."""
    t = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201]
    return t[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def show(name: str) -> None:
    """Print a table as Markdown: mean and standard deviation over seeds, and the paired difference to the first row."""
    rows = read(RESULTS / f"{name}.csv")
    labels = [label for label in TABLES[name][1] if any(row["label"] == label for row in rows)]
    if not labels:
        print(f"runs.py: {name} has no rows yet; run it without --show", file=sys.stderr)
        raise SystemExit(2)
    column = "score" if any(row["score"] for row in rows) else "return"
    by_label = {label: {r["seed"]: r for r in rows if r["label"] == label} for label in labels}
    print(
        f"| | seeds | iterations | last policy | best evaluation | minus {labels[0]} (95 % interval) | credit skill |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, runs in by_label.items():
        last = [float(row[column]) for row in runs.values()]
        best = [float(row[f"best_{column}"]) for row in runs.values()]
        pairs = [
            float(runs[s][column]) - float(by_label[labels[0]][s][column]) for s in runs if s in by_label[labels[0]]
        ]
        skill = [float(row["credit_skill"]) for row in runs.values() if row["credit_skill"]]
        spread = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}" for v in (last, best)]
        difference = f"{statistics.mean(pairs):+.1f} ± {t_interval(pairs):.1f}" if len(pairs) > 1 else ""
        iterations = "/".join(sorted({row["iterations"] for row in runs.values()}))
        mean_skill = f"{statistics.mean(skill):.2f}" if skill else ""
        print(f"| {label} | {len(runs)} | {iterations} | {spread[0]} | {spread[1]} | {difference} | {mean_skill} |")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.table not in TABLES:
        print(f"runs.py: there is no table {args.table}; choose one of {', '.join(TABLES)}", file=sys.stderr)
        raise SystemExit(2)
    if not args.show:
        path = RESULTS / f"{args.table}.csv"
        path.parent.mkdir(exist_ok=True)
        seeds, commands = TABLES[args.table]
        if args.only not in ("", *commands):
            print(f"runs.py: {args.table} has no row {args.only}; choose one of {', '.join(commands)}", file=sys.stderr)
            raise SystemExit(2)
        for command in commands.values():  # better now than after hours
            words = command.split()
            env = words[words.index("--env") + 1] if "--env" in words else "mpe/simple_spread"
            given = words[words.index("--dataset") + 1] if "--dataset" in words else "expert"
            if not (dataset := ROOT / "data" / "datasets" / env / f"{given}.npz").is_file():
                print(f"runs.py: {dataset} is missing; README.md says which command makes it", file=sys.stderr)
                raise SystemExit(2)
        there = {row["command"] for row in read(path)}
        todo = [
            (label, seed, f"{command} --seed {seed}")
            for seed in seeds
            for label, command in commands.items()
            if args.only in ("", label) and f"python {command} --seed {seed}" not in there
        ]
        lock = threading.Lock()
        with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run", smoothing=0) as progress:
            futures = {pool.submit(run, command): (label, seed) for label, seed, command in todo}
            try:
                for future in as_completed(futures):
                    label, seed = futures[future]
                    row = {"label": label, "seed": str(seed), **future.result()}
                    with lock, open(path, "a", newline="") as file:
                        table = csv.DictWriter(file, row.keys(), lineterminator="\n")
                        if file.tell() == 0:
                            table.writeheader()
                        table.writerow(row)
                    progress.update()
            except (KeyboardInterrupt, RuntimeError) as error:
                pool.shutdown(cancel_futures=True, wait=False)
                print(f"runs.py: stopped ({error}); the rows so far are in {path}", file=sys.stderr)
                raise SystemExit(2) from None
    show(args.table)
