"""Run a table of paper/tables.py: many trainings side by side, one CSV row each, and what the seeds say together.

    python paper/runs.py credit-cn-expert            # run what its file in paper/results lacks, then print the table
    python paper/runs.py credit-cn-expert --show     # print the table only
    python paper/runs.py paper-settings --commands   # print the command of every row: here the paper's Tables 9 and 10
    python paper/runs.py credit-cn-expert --engine ray --address HOST:6379   # run on a Ray cluster

A run is a script with its arguments and a seed. It is skipped if the file has a row with the same command, so a table
can be stopped and continued. Where a label has several rows for a seed, the newest one is shown.
Every run has one thread: several of them side by side use the cores better than one run with several threads.
"""

import csv
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import rows
import tyro
from tables import TABLES
from tqdm import tqdm

KEPT = ["return", "score", "score_paper", "won", "team_nmse", "cause_skill", "paid_skill", "cause_mse"]
KEPT += ["cause_even_mse", "paid_mse", "paid_mae", "paid_even_mse", "paid_even_mae"]
KEPT += ["state_density", "action_density"]


@dataclass
class Args:
    table: Annotated[str, tyro.conf.Positional]
    """one of the tables in paper/tables.py"""
    jobs: int = os.cpu_count() or 1
    """runs side by side; with --address as many as the cluster has room for"""
    only: str = ""
    """run this row alone"""
    seeds: int = 1_000
    """run the first so many of the table's seeds"""
    show: bool = False
    """run nothing, print the results"""
    commands: bool = False
    """run nothing, print the command of every row"""
    engine: Literal["local", "ray"] = "local"
    """processes of this machine, or tasks of Ray"""
    address: str = ""
    """with --engine ray: the cluster to join (HOST:PORT or auto), else one is started on this machine"""
    gpus: float = 0.0
    """with --engine ray: the share of a GPU that each run reserves"""


@dataclass
class Printing:
    """The arguments of the scripts that print several tables as one."""

    jobs: int = 2
    """runs side by side, each on one thread"""
    show: bool = False
    """run nothing, print what is there"""


def dataset(command: str) -> Path:
    """The file that a command trains on."""
    words = command.split()
    env = words[words.index("--env") + 1] if "--env" in words else "mpe/simple_spread"
    return rows.dataset_path(env, words[words.index("--dataset") + 1] if "--dataset" in words else "expert")


def path(table: str) -> Path:
    """The file of a table's rows."""
    return rows.RESULTS / f"{table}.csv"


def commit() -> str:
    """The commit of this checkout, nothing where there is no git."""
    try:
        git = ["git", "-C", str(rows.ROOT), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Training:
    """A run of a script, in a folder of its own below `parent` that goes when the run has ended."""

    def __init__(self, label: str, seed: int, command: str, parent: Path | None = None):
        self.label, self.seed, self.command, self.started = label, seed, command, time.monotonic()
        self.commit = commit()
        self.folder = tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)
        self.errors = Path(self.folder.name, "errors.txt")  # a pipe would fill up, as nobody reads it before the end
        script, *arguments = command.split()
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(rows.ROOT / script), *arguments],
                cwd=self.folder.name,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def done(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> rows.Row | str:
        """The row of a run that has ended or, if it failed, a sentence that says why."""
        if not self.process.returncode:
            return self.row()
        said = [line for line in self.errors.read_text().splitlines() if line.strip()]
        said = [line for line in said if "%|" not in line]  # no progress bars
        reason = said[-1] if said else "it said nothing"
        return f"{self.command} ended with status {self.process.returncode} ({reason})"

    def terminate(self) -> None:
        self.process.terminate()

    def close(self) -> None:
        """Wait for the end, which is forced after 20 s, and remove the folder."""
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    def row(self) -> rows.Row:
        """What a finished run found: scores of the last and the best policy, and what the run depends on."""
        (run,) = Path(self.folder.name, "runs").iterdir()
        config = json.loads((run / "config.json").read_text())
        with open(run / "metrics.csv") as file:
            evaluations = list(csv.DictReader(file))
        last, best = evaluations[-1], max(evaluations[:-1] or evaluations, key=lambda row: float(row["return"]))
        with np.load(dataset(self.command), allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"])) if "metadata" in file else {}
        low, high = (metadata.get(f"paper_{policy}_return", math.nan) for policy in ("random", "expert"))
        if low < high:  # the paper has scores for this task
            last["score_paper"] = str(100 * (float(last["return"]) - low) / (high - low))
        versions = {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")}
        return {
            "label": self.label,
            "seed": str(self.seed),
            "command": f"python {self.command}",
            "iterations": last["iteration"],
            **{name: last.get(name, "") for name in KEPT},
            "best_score": best.get("score", ""),
            "best_return": best["return"],
            "curve": " ".join(f"{row['iteration']}:{float(row['return']):.1f}" for row in evaluations),
            "wall_seconds": f"{time.monotonic() - self.started:.0f}",
            "versions": " ".join(f"{name} {number}" for name, number in versions.items()),
            "device": "cuda" if config["args"].get("cuda") else "cpu",
            "commit": self.commit,
            "dataset_sha256": config["dataset_sha256"][:16],
        }


def run_missing(
    names: Sequence[str],
    jobs: int,
    only: str = "",
    engine: str = "local",
    address: str = "",
    gpus: float = 0.0,
    first: int = 1_000,
) -> None:
    """Run what the tables' files lack, of each table's `first` seeds. SIGTERM and Ctrl-C end the trainings too."""
    if min(jobs, first) < 1:
        rows.fail("--jobs and --seeds must be at least 1")
    todo = []
    for table in names:
        seeds, commands = TABLES[table]
        if only not in ("", *commands):
            rows.fail(f"{table} has no row {only}; choose one of: {'; '.join(commands)}")
        there = {row["command"] for row in rows.read(path(table))}
        runs = [(table, label, f"{commands[label]} --seed {n}", n) for n in seeds[:first] for label in commands]
        todo += [run for run in runs if only in ("", run[1]) and f"python {run[2]}" not in there]
    for _, _, command, _ in todo:  # better now than after hours
        if not dataset(command).is_file():
            rows.fail(f"{dataset(command)} is missing; python paper/all.py records what the tables need")

    cluster, running, failures, signals = None, [], [], []
    handlers = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    start = Training
    if engine == "ray" and todo:
        from ray_engine import Cluster  # here, as nothing else needs Ray

        cluster = Cluster({command: dataset(command) for _, _, command, _ in todo}, commit(), address, jobs, gpus)
        start, jobs = cluster.start, len(todo)  # Ray runs what it has room for, the others wait
    progress = tqdm(total=len(todo), unit="run", smoothing=0)
    try:
        while (todo or running) and not signals:
            while todo and len(running) < jobs:
                table, label, command, seed = todo.pop(0)
                running.append((table, start(label, seed, command)))
                progress.set_description(table)
            time.sleep(0.2)
            for table, training in [(table, training) for table, training in running if training.done()]:
                running.remove((table, training))
                result = training.result()
                if isinstance(result, str):
                    failures.append(result)
                else:
                    rows.add(path(table), result)
                training.close()
                progress.update()
    finally:
        progress.close()
        for _, training in running:
            training.terminate()
        for _, training in running:
            training.close()
        if cluster:
            cluster.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    where = path(names[0]) if len(names) == 1 else rows.RESULTS
    if signals:
        print(f"{Path(sys.argv[0]).name}: stopped; the rows so far are in {where}", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    if failures:
        rows.fail(f"{len(failures)} runs failed, the others are in {where}; the first: {failures[0]}")


def show(table: str) -> None:
    """Print a table: mean and standard deviation over seeds, and the paired difference to the first row."""
    commands, runs = TABLES[table][1], rows.by_label(table)
    labels = [label for label in commands if label in runs]
    if not labels:
        rows.fail(f"{table} has no rows yet; run it without --show")
    first = runs[labels[0]]
    column = "score" if any(rows.numbers(runs[label], "score") for label in labels) else "return"
    head = ["", "seeds", "iterations", "last policy", "best evaluation"]
    body, older = [], []
    for label in labels:
        seeds, skill = runs[label], rows.numbers(runs[label], "cause_skill")
        body.append(
            [
                label,
                str(len(seeds)),
                "/".join(sorted({row["iterations"] for row in seeds.values()})),
                rows.mean_std(rows.numbers(seeds, column)),
                rows.mean_std(rows.numbers(seeds, f"best_{column}")),
                rows.mean_interval(rows.paired(seeds, first, column)),
                f"{statistics.mean(skill):.2f}" if skill else "",
            ]
        )
        if any(row["command"] != f"python {commands[label]} --seed {seed}" for seed, row in seeds.items()):
            older.append(label)
    rows.print_table([*head, f"minus {labels[0]} (95 % interval)", "cause skill"], body)
    if older:
        print(f"\nThese rows were recorded with another command than paper/tables.py has now: {'; '.join(older)}.")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.table not in TABLES:
        rows.fail(f"there is no table {args.table}; choose one of {', '.join(TABLES)}")
    if args.commands:
        for label, command in TABLES[args.table][1].items():
            print(f"# {label}\npython {command}")
        raise SystemExit
    if args.engine == "local" and (args.address or args.gpus):
        rows.fail("--address and --gpus are for --engine ray")
    if not args.show:
        run_missing([args.table], args.jobs, args.only, args.engine, args.address, args.gpus, args.seeds)
    show(args.table)
