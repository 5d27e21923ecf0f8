"""paper/runs.py --engine ray: a cluster of two nodes on this machine, one of which is lost. Skipped without Ray."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import toy

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

# A script that trains nothing. It sleeps if the folder PIDS exists; seed 2 fails otherwise.
FAKE = """
import json, os, pathlib, sys, time
seed = sys.argv[-1]
if pathlib.Path(PIDS).exists() and seed != "1":
    pathlib.Path(PIDS, str(os.getpid())).write_text(__file__)
    time.sleep(600)
if seed == "2":
    with np.load(sys.argv[sys.argv.index("--dataset") + 1]) as file: pass
run = pathlib.Path("runs/one")
run.mkdir(parents=True)
(run / "config.json").write_text(json.dumps({"args": {}, "dataset_sha256": "0123456789abcdef" * 4}))
(run / "metrics.csv").write_text(f"iteration,return,score\\n5,1.0,0\\n9,1.5,{seed}\\n")
"""
SHORT = "macca_icq.py --env toy:matching --no-cuda --batch-size 16 --hidden-dim 8 --causal-iterations 15"
SHORT += " --eval-interval 20 --eval-episodes 2 --final-episodes 3 --total-iterations 600"


def add_node(cluster, **options):
    """Ray gives a node 30 seconds to start, which are too few on a busy machine."""
    for attempt in range(4):
        try:
            return cluster.add_node(num_cpus=1, **options)
        except Exception:
            if attempt == 3:
                raise


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One node with room for one run. Its temporary files, and those of nodes that are added, are in `folder`."""
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("RAY_TMPDIR", "/tmp")  # the names of its sockets must be short
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster()
        add_node(cluster, include_dashboard=False)
        cluster.folder = folder
        yield cluster
        cluster.shutdown()


@pytest.fixture
def node(cluster):
    """A second node, of one run too."""
    node = add_node(cluster)
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


@pytest.fixture
def project(tmp_path):
    """A checkout with a table of its own: nodes must not find anything here."""
    (tmp_path / "paper").mkdir()
    for name in ("runs.py", "rows.py", "ray_engine.py"):
        shutil.copy(toy.ROOT / "paper" / name, tmp_path / "paper")
    return tmp_path


def table(project, row, *seeds):
    (project / "paper" / "tables.py").write_text(f"TABLES = {{'small': ({[*seeds]}, {{'row': {row!r}}})}}\n")


def fake(project, *seeds):
    """A table of the fake script on a dataset outside of data/datasets."""
    np.savez(project / "mine.npz", metadata=json.dumps({"paper_random_return": 1.0, "paper_expert_return": 2.0}))
    (project / "fake.py").write_text(f"import numpy as np\nPIDS = {str(project / 'pids')!r}\n{FAKE}")
    table(project, f"fake.py --dataset {project / 'mine.npz'}", *seeds)


def start(project, *flags):
    code = [sys.executable, "paper/runs.py", "small", "--jobs", "2", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(code, cwd=project, env={**os.environ}, start_new_session=True, **pipes)


def run(project, *flags):
    process = start(project, *flags)
    stdout, stderr = process.communicate(timeout=600)
    return process.returncode, stdout, stderr


def recorded(project):
    """The rows of the table, by seed, without times."""
    path = project / "paper" / "results" / "small.csv"
    if not path.exists():
        return []
    with open(path) as file:
        found = [{**row, "wall_seconds": ""} for row in csv.DictReader(file)]
    return sorted(found, key=lambda row: row["seed"])


def wait_for(found, runs):
    deadline = time.monotonic() + 300
    while not found() and runs.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found(), runs.communicate()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_cluster_of_its_own_and_a_run_that_fails(project):
    """Rows, the sentence of the error and the exit status are those of local runs, also the names of files in them."""
    fake(project, 1, 2, 3)
    (project / "fake.py").write_text((project / "fake.py").read_text().replace("as file: pass", "as file: file['no']"))
    status, _, stderr = run(project)
    expected, sentence = recorded(project), stderr.strip().splitlines()[-1]
    assert status == 2 and "1 runs failed" in sentence and [row["seed"] for row in expected] == ["1", "3"], stderr
    shutil.rmtree(project / "paper" / "results")
    status, stdout, stderr = run(project, "--engine", "ray")
    assert (status, stdout, stderr.strip().splitlines()[-1]) == (2, "", sentence)
    assert recorded(project) == expected


def test_refusals(project, cluster):
    fake(project, 1)
    for flags, said in (
        (["--address", cluster.address], "are for --engine ray"),
        (["--engine", "ray", "--address", cluster.address, "--gpus", "0.2"], "the cluster has 1 CPUs and 0 GPUs"),
    ):
        status, stdout, stderr = run(project, *flags)
        assert (status, stdout) == (2, "") and said in stderr.splitlines()[-1], stderr
        assert "Traceback" not in stderr and not recorded(project)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_trainings_on_all_nodes(number, project, cluster, node):
    """Rows so far are kept; nothing runs on, and nothing that was sent stays on a node."""
    fake(project, 1, 2, 3, 4)
    pids = project / "pids"
    pids.mkdir()
    runs = start(project, "--engine", "ray", "--address", cluster.address)
    wait_for(lambda: len([*pids.iterdir()]) == 2 and recorded(project), runs)
    children = [int(path.name) for path in pids.iterdir()]
    folders = {path.read_text().rsplit("/", 1)[0] for path in pids.iterdir()}
    assert len(folders) == 2 and all(folder.startswith(str(cluster.folder)) for folder in folders)
    os.killpg(runs.pid, number)  # as a terminal does
    stdout, stderr = runs.communicate(timeout=300)
    assert (runs.returncode, stdout) == (128 + number, ""), stderr
    assert "runs.py: stopped; the rows so far are in" in stderr and "Traceback" not in stderr
    assert not any(map(alive, children)) and not any(map(os.path.exists, folders))
    assert [row["seed"] for row in recorded(project)] == ["1"]


def test_a_lost_node(project, cluster, node, monkeypatch):
    """Its run is done again elsewhere, and all rows are those of local runs."""
    for name in ("macca_icq.py", "causal_model.py", "tests/toy.py"):
        shutil.copy(toy.ROOT / name, project)
    datasets = project / "data" / "datasets" / "toy:matching"
    datasets.mkdir(parents=True)
    references = {"random_return": -10.0, "expert_return": 0.0, "paper_random_return": -8.0, "paper_expert_return": 0.0}
    toy.write(datasets / "expert.npz", metadata=references)
    table(project, SHORT, 1, 2)
    assert run(project)[0] == 0
    expected = recorded(project)
    assert len(expected) == 2 and all(row["score_paper"] and row["iterations"] == "600" for row in expected)
    shutil.rmtree(project / "paper" / "results")
    runs = start(project, "--engine", "ray", "--address", cluster.address)
    lost = f"macca-*-{node.node_id}/tmp*/runs/*/metrics.csv"
    wait_for(lambda: [*cluster.folder.glob(lost)], runs)  # it has evaluated
    cluster.remove_node(node, allow_graceful=False)
    assert len(recorded(project)) < 2
    stdout, stderr = runs.communicate(timeout=600)
    assert runs.returncode == 0 and stdout.startswith("| "), stderr
    assert recorded(project) == expected
