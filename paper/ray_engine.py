"""Runs of paper/runs.py as tasks of Ray, on the machines of a cluster (--engine ray). Imported only then.

A node needs the Python packages alone: the scripts and the datasets are sent to it, once, and go when the table ends.
"""

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rows

try:
    import ray  # pyright: ignore[reportMissingImports]
except ImportError:
    rows.fail("--engine ray needs Ray, which is not installed; requirements.txt says which version")

SOURCE = ["*.py", "data/*.py", "paper/*.py", "data/policies/**/prey.npz"]  # what a run reads, besides its dataset
RETRIES = 5  # how often a run whose node was lost is done again
WAIT = 30  # seconds for the nodes to end their runs: 20 are given to a training (runs.Training.close)


def node_folder() -> Path:
    """Where a node keeps what it was sent in this job. Two nodes of one machine have two folders."""
    context = ray.get_runtime_context()
    return Path(tempfile.gettempdir()).resolve() / f"macca-{context.get_job_id()}-{context.get_node_id()}"


def place(folder: Path, files: dict[str, tuple[str, Any]]) -> None:
    """Write files (name -> SHA-256 and reference of the content) that are not there yet, one task at a time."""
    import fcntl  # here, as the driver does not need it

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, (digest, reference) in files.items():
            path = folder / name
            if path.exists():
                continue  # and whole, as it got its name last
            content = ray.get(reference)
            if hashlib.sha256(content).hexdigest() != digest:
                raise OSError(f"{name} did not arrive as it was sent")
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.part")
            beside.write_bytes(content)
            os.replace(beside, path)


def train(
    files: dict[str, tuple[str, Any]], dataset: tuple[str, str], root: str, label: str, seed: int, command: str
) -> rows.Row | str:
    """The task, on a node: the row of a run, or a sentence that says why it failed, as runs.Training has them.

    `dataset` is its path for the driver, whose checkout is `root`, and its name among the files.
    """
    folder = node_folder()
    place(folder, files)
    sys.path.insert(0, str(folder / "paper"))
    import runs  # the one that was sent

    there = str(folder / dataset[1])
    words = [there if word == dataset[0] else word for word in command.split()]
    training = runs.Training(label, seed, " ".join(words), folder)
    try:
        while not training.done():
            time.sleep(0.2)
        result = training.result()
    finally:  # also when the task is cancelled
        training.terminate()
        training.close()
    return result.replace(there, dataset[0]).replace(str(folder), root) if isinstance(result, str) else result


def sweep() -> None:
    import shutil

    shutil.rmtree(node_folder(), ignore_errors=True)


class Run:
    """A run on the cluster, with the methods of runs.Training."""

    def __init__(self, command: str, commit: str, task: Any):
        self.command, self.commit, self.task = command, commit, task

    def done(self) -> bool:
        return bool(ray.wait([self.task], timeout=0)[0])

    def result(self) -> rows.Row | str:
        try:
            result = ray.get(self.task)
        except ray.exceptions.RayError as error:  # of the node, not of the script
            return f"{self.command} could not be run ({str(error).strip().splitlines()[-1]})"
        if isinstance(result, str):
            return result
        return {**result, "command": f"python {self.command}", "commit": self.commit}  # as the driver knows them

    def terminate(self) -> None:
        ray.cancel(self.task)

    def close(self) -> None:
        """Wait for the end, which is forced after a while."""
        if not ray.wait([self.task], timeout=WAIT)[0]:
            ray.cancel(self.task, force=True)


class Cluster:
    """A cluster that was joined or, without an address, one of this machine with room for `jobs` runs.

    `datasets` are those of all commands, `gpus` the share of a GPU that each run reserves.
    """

    def __init__(self, datasets: dict[str, Path], commit: str, address: str, jobs: int, gpus: float):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report each start to its makers
        handler = signal.getsignal(signal.SIGTERM)
        self.stdout = contextlib.redirect_stdout(sys.stderr)  # Ray prints there that a node was lost
        self.stdout.__enter__()
        try:
            options = {} if address else {"num_cpus": max(jobs, 1), "include_dashboard": False}
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:  # of many kinds
            where = f"the cluster at --address {address} cannot be joined" if address else "Ray does not start"
            rows.fail(f"{where}: {str(error).strip().splitlines()[0]}")
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        room = ray.cluster_resources()
        if not (0 <= gpus <= 1 and gpus <= room.get("GPU", 0) and room.get("CPU", 0) >= 1):
            ray.shutdown()
            found = f"{room.get('CPU', 0):g} CPUs and {room.get('GPU', 0):g} GPUs"
            rows.fail(f"a run takes a CPU and, as --gpus is {gpus:g}, that share of one GPU; the cluster has {found}")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes do not have this file
        self.paths, self.commit = datasets, commit
        source = sorted(path for pattern in SOURCE for path in rows.ROOT.glob(pattern))
        self.source = {str(path.relative_to(rows.ROOT)): self.send(path) for path in source}
        self.sent: dict[Path, tuple] = {}  # path -> name on the nodes, and what `send` says
        self.train = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(train)

    def send(self, path: Path) -> tuple[str, Any]:
        """SHA-256 of a file, and a reference by which every node can get it from the object store."""
        content = path.read_bytes()
        return hashlib.sha256(content).hexdigest(), ray.put(content)

    def start(self, label: str, seed: int, command: str) -> Run:
        path = self.paths[command]
        if path not in self.sent:
            inside = path.is_relative_to(rows.ROOT / "data" / "datasets")
            sent = self.send(path)
            self.sent[path] = str(path.relative_to(rows.ROOT)) if inside else f"data/datasets/{sent[0]}.npz", sent
        name, sent = self.sent[path]
        files = {**self.source, name: sent}
        task = self.train.remote(files, (str(path), name), str(rows.ROOT), label, seed, command)
        return Run(command, self.commit, task)

    def close(self) -> None:
        """Remove what the nodes were sent, and leave the cluster."""
        with contextlib.suppress(ray.exceptions.RayError):
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            nodes = [here(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
            remove = ray.remote(num_cpus=0, max_retries=0)(sweep)
            tasks = [remove.options(scheduling_strategy=node).remote() for node in nodes]
            ray.wait(tasks, num_returns=len(tasks), timeout=WAIT)
        ray.shutdown()
        self.stdout.__exit__(None, None, None)
