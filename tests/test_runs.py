"""A run from the command to the files it leaves: resuming, evaluating, presets, copying a script out, common parts."""

import csv
import dataclasses
import difflib
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import toy

from causal_model import CausalModel

SHORT = ["--env", "toy:matching", "--no-cuda", "--batch-size", 16, "--hidden-dim", 8]
SHORT += ["--eval-interval", 20, "--eval-episodes", 2, "--final-episodes", 3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("dataset") / "random.npz", metadata={"expert_return": 0.0})


def start(script, folder, *flags, monkeypatch):
    status, stdout, stderr = toy.run(script, folder, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return stdout


def rows(run):
    """metrics.csv without the column that no two runs share."""
    with open(run / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same(one, other, path="checkpoint"):
    """Two checkpoints hold the same numbers, bit for bit, in everything but the clock."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            if name not in ("seconds", "git"):
                assert_same(one[name], other[name], f"{path}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other or (one != one and other != other), path  # nan where a number is not defined


def assert_same_runs(one, other):
    for name in ("policy.pt", "checkpoint.pt"):
        first, second = (torch.load(run / name, weights_only=True) for run in (one, other))
        assert_same(first, second, name)
    assert rows(one) == rows(other)


class PowerCut(Exception):
    pass


def power_cut():
    raise PowerCut


# ---- resuming ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
@pytest.mark.parametrize("graph, schedule", [("dynamic", "alternate"), ("fixed", "first")])
def test_resumed_run_ends_with_the_same_weights(script, graph, schedule, dataset, tmp_path, monkeypatch):
    """Stopped by Ctrl-C between two evaluations, or cut off without a warning: resumed, it must end bit-identical."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 50, "--graph", graph, "--causal-schedule", schedule]
    flags += ["--causal-pretrain-iterations", 15]
    length = 50 + 15 * (schedule == "first")
    for name in ("whole", "stopped", "cut"):
        (tmp_path / name).mkdir()
    start(script, tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    whole = toy.run_folder(tmp_path / "whole")
    assert [int(row["iteration"]) for row in rows(whole)] == [*range(20, length, 20), length]

    with monkeypatch.context() as patch:
        toy.after(33, lambda: signal.raise_signal(signal.SIGINT), patch)
        status, stdout, stderr = toy.run(script, tmp_path / "stopped", *flags, monkeypatch=patch)
    assert status == 128 + signal.SIGINT, stderr
    stopped = toy.run_folder(tmp_path / "stopped")
    checkpoint = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 33 and list(checkpoint["edges"]) == [0, 20]
    assert "stopped at iteration 33" in stdout and f"python {script}.py --resume runs/{stopped.name}" in stdout
    start(script, tmp_path / "stopped", "--no-cuda", "--resume", f"runs/{stopped.name}", monkeypatch=monkeypatch)
    assert_same_runs(whole, stopped)

    with monkeypatch.context() as patch:
        toy.after(35, power_cut, patch)
        with pytest.raises(PowerCut):
            toy.run(script, tmp_path / "cut", *flags, monkeypatch=patch)
    cut = toy.run_folder(tmp_path / "cut")
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["iteration"] == 20
    start(script, tmp_path / "cut", "--no-cuda", "--resume", f"runs/{cut.name}", monkeypatch=monkeypatch)
    assert_same_runs(whole, cut)


def test_a_finished_run_can_be_made_longer(dataset, tmp_path, monkeypatch):
    """--resume with more --total-iterations ends with the weights of a run that was that long from the start."""
    (tmp_path / "long").mkdir()
    flags = [*SHORT, "--dataset", dataset]
    start("macca_cql", tmp_path / "long", *flags, "--total-iterations", 50, monkeypatch=monkeypatch)
    start("macca_cql", tmp_path, *flags, "--total-iterations", 30, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    start("macca_cql", tmp_path, "--resume", run, "--total-iterations", 50, "--no-cuda", monkeypatch=monkeypatch)
    one, other = (
        torch.load(folder / "policy.pt", weights_only=True) for folder in (run, toy.run_folder(tmp_path / "long"))
    )
    assert_same(one, other)
    iterations = [int(row["iteration"]) for row in rows(run)]
    assert iterations == sorted(set(iterations)) and iterations[-1] == 50


def test_the_same_seed_gives_the_same_run(dataset, tmp_path, monkeypatch):
    """Everything random hangs on --seed."""
    runs = []
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        flags = [*SHORT, "--dataset", dataset, "--total-iterations", 20, "--seed", seed]
        start("macca_omar", tmp_path / name, *flags, monkeypatch=monkeypatch)
        runs.append(toy.run_folder(tmp_path / name))
    assert_same_runs(runs[0], runs[1])
    assert rows(runs[0]) != rows(runs[2])


def process(folder, *command):
    """A real `python ...` in `folder`, with the toy task importable."""
    code = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(toy.ROOT / "tests")}
    return subprocess.Popen(code, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe)


def test_interrupted_process(dataset, tmp_path):
    """Ctrl-C in a real process: a checkpoint, one line that says how to go on, no traceback; and that line works."""
    script = toy.ROOT / "macca_icq.py"
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 1_000_000]
    training = process(tmp_path, script, *flags)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/policy.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    training.send_signal(signal.SIGINT)
    stdout, stderr = training.communicate(timeout=60)
    assert training.returncode == 130 and "Traceback" not in stderr, stderr
    stopped = re.search(r"stopped at iteration (\d+); to go on: python (\S+) --resume (\S+)", stdout)
    assert stopped is not None, stdout
    iteration, _, run = stopped.groups()
    assert torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["iteration"] == int(iteration)
    more = process(tmp_path, script, "--resume", run, "--no-cuda", "--total-iterations", int(iteration) + 5)
    stdout, stderr = more.communicate(timeout=120)
    assert more.returncode == 0, stderr
    assert int(rows(tmp_path / run)[-1]["iteration"]) == int(iteration) + 5 and run in stdout


# ---- what a run leaves ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_run_folder_and_evaluation_of_its_policy(script, dataset, tmp_path, monkeypatch):
    """The files of a run, and policy.pt or checkpoint.pt scoring in an evaluation what the run reported."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 25]
    stdout = start(script, tmp_path, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    assert str(run.name) in stdout.splitlines()[-1]
    assert run.name.startswith(f"toy-matching__{script}__macca__1__")
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.csv", "checkpoint.pt", "policy.pt"}
    assert list(run.glob("events.out.tfevents.*")) and not list(run.glob("*.tmp"))
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["batch_size"] == 16 and len(config["dataset_sha256"]) == 64
    assert {"torch", "numpy", "python"} <= config["versions"].keys()

    final = rows(run)[-1]
    assert int(final["iteration"]) == 25 and int(final["episodes"]) == 3
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    module, edges = importlib.import_module(script), checkpoint["edges"]
    assert list(edges) == [0, 20, 25]  # where it was evaluated, and before anything was learned
    model = CausalModel(2, 4, 2)
    model.load_state_dict(checkpoint["causal_model"])
    args = module.Args(env="toy:matching", cuda=False)
    _, held_out = module.hold_out(module.load_dataset(dataset, args, toy.Matching())[0])
    probabilities = model.probabilities(held_out["observations"].flatten(1), held_out["actions"])
    torch.testing.assert_close(edges[25], torch.cat([part.mean(0) for part in probabilities], dim=1))
    assert all(not torch.equal(edges[0], edges[iteration]) for iteration in (20, 25))
    expected = torch.zeros(2, 8)  # log-odds at the start: each agent's own half of the state and own action, 4
    for agent in range(2):
        expected[agent, 2 * agent : 2 * agent + 2] = expected[agent, 4 + 2 * agent : 6 + 2 * agent] = 4
    torch.testing.assert_close(edges[0], expected.sigmoid())

    for name in ("policy.pt", "checkpoint.pt"):
        evaluation = [*flags[:-1], 0, "--checkpoint", run / name]
        stdout = start(script, tmp_path, *evaluation, monkeypatch=monkeypatch)
        printed = dict(line.split() for line in stdout.splitlines() if len(line.split()) == 2)
        assert float(printed["return"]) == pytest.approx(float(final["return"]), rel=1e-3)
        # Actors alone bring no causal model: numbers of one that never learned would deceive.
        assert ("credit_skill" in printed) == (name == "checkpoint.pt")
    assert toy.run_folder(tmp_path) == run  # an evaluation leaves no run of its own


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_whose_own_the_state_is(script, tmp_path, monkeypatch):
    """What all agents see is nobody's own, and so is all of a state that the dataset brings, unless it says whose."""
    arrays = toy.record(toy.Matching(), 100)
    shared = arrays["observations"].copy()
    shared[:, 1, 0] = shared[:, 0, 0]
    states = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    for name, changes, nobodys in [
        ("seen", {"observations": shared}, [0, 2]),
        ("brought", {"states": states}, [0, 1, 2]),
        ("owned", {"states": states, "metadata": {"state_owner": [1, -1, 0]}}, [1]),
    ]:
        (tmp_path / name).mkdir()
        path = toy.write(tmp_path / name / "data.npz", **changes)
        start(script, tmp_path / name, *SHORT, "--dataset", path, "--total-iterations", 1, monkeypatch=monkeypatch)
        run = toy.run_folder(tmp_path / name)
        edges = torch.load(run / "checkpoint.pt", weights_only=True)["edges"][0][:, :-4]  # [2, S], before training
        cheap = torch.zeros(edges.shape[1])
        cheap[nobodys] = 6.0  # for the common slot
        own = {"seen": [[0.0, 4, 0, 0], [0, 0, 0, 4]], "brought": [[0.0] * 3] * 2, "owned": [[0.0, 0, 4], [4, 0, 0]]}
        torch.testing.assert_close(edges, torch.maximum(torch.tensor(own[name]), cheap).sigmoid())


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_what_ends_a_life(script, tmp_path, monkeypatch):
    """A shift of the rewards would pay or fine long lives: a terminal forbids it, and a death before the time limit."""
    arrays = toy.record(toy.Matching(True), 100)
    dying, terminals = arrays["next_action_masks"].copy(), arrays["timeouts"] & (np.arange(100) == 4)
    dying[2, 1] = [True, False, False, False, False]
    for name, changes, shift in [
        ("time", {}, True),
        ("death", {"next_action_masks": dying}, False),
        ("terminal", {"terminals": terminals, "timeouts": arrays["timeouts"] & ~terminals}, False),
    ]:
        (tmp_path / name).mkdir()
        path = toy.write(tmp_path / name / "data.npz", True, **changes)
        flags = ["--env", "toy:matching_discrete", "--dataset", path, "--total-iterations", 1]
        start(script, tmp_path / name, *SHORT, *flags, monkeypatch=monkeypatch)
        stored = torch.load(toy.run_folder(tmp_path / name) / "checkpoint.pt", weights_only=True)
        assert stored["networks"]["shift"] == shift, name


def test_training_goes_on_from_a_checkpoint(dataset, tmp_path, monkeypatch):
    """--checkpoint must load networks, causal model and optimizers, but the learning rates are those given now."""
    flags = [*SHORT, "--dataset", dataset]
    for name in ("first", "more"):
        (tmp_path / name).mkdir()
    start("macca_omar", tmp_path / "first", *flags, "--total-iterations", 25, monkeypatch=monkeypatch)
    path = toy.run_folder(tmp_path / "first") / "checkpoint.pt"
    flags += ["--checkpoint", path, "--total-iterations", 1, "--learning-rate", 1e-8, "--causal-learning-rate", 1e-8]
    start("macca_omar", tmp_path / "more", *flags, "--target-rate", 0, monkeypatch=monkeypatch)
    old = torch.load(path, weights_only=True)
    new = torch.load(toy.run_folder(tmp_path / "more") / "checkpoint.pt", weights_only=True)
    for name, tensor in old["networks"].items():
        torch.testing.assert_close(new["networks"][name], tensor, atol=1e-6, rtol=0)
    for name, tensor in old["causal_model"].items():
        if name.startswith("reward"):
            torch.testing.assert_close(new["causal_model"][name], tensor, atol=1e-6, rtol=1e-6)
    for name in ("critic", "actor", "causal"):
        assert {state["step"].item() for state in new["optimizers"][name]["state"].values()} == {26.0}


# ---- presets ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_preset_takes_the_row_of_the_quality(script, tmp_path, monkeypatch):
    """--preset paper: Tables 9 and 10 for the dataset's quality; flags given beside it, on either side, win."""
    module = importlib.import_module(script)
    for quality in ("expert", "medium", "medium-replay", "random", "unheard-of"):
        folder = tmp_path / quality
        folder.mkdir()
        path = toy.write(folder / "data.npz", metadata={"quality": quality})
        flags = ["--env", "toy:matching", "--no-cuda", "--batch-size", 16, "--preset", "paper", "--h", 0.25]
        flags += ["--dataset", path, "--total-iterations", 1, "--final-episodes", 1]
        stdout = start(script, folder, *flags, monkeypatch=monkeypatch)
        found = json.loads((toy.run_folder(folder) / "config.json").read_text())["args"]
        known = quality if quality in module.PAPER_QUALITY else "expert"
        expected = {**module.PAPER, **module.PAPER_QUALITY[known], "batch_size": 16, "h": 0.25, "preset": "paper"}
        assert {name: found[name] for name in expected} == expected
        assert ("row for expert data" in stdout) == (quality == "unheard-of")  # it says which row it took
    assert module.PAPER_QUALITY["expert"]["lambda1"] == 7e-3 and module.PAPER["learning_rate"] == 3e-4
    assert module.PAPER_QUALITY["random"]["lambda1"] == 1e-7 and module.PAPER_QUALITY["random"]["lambda2"] == 1e-3


# ---- tables of runs ----

FAKE = """
import json, pathlib, sys
run = pathlib.Path("runs/one")
run.mkdir(parents=True)
(run / "config.json").write_text(json.dumps({"versions": {}, "commit": "", "args": sys.argv[1:]}))
(run / "metrics.csv").write_text(f"iteration,return,score\\n9,1.5,{sys.argv[-1]}\\n")
"""


def test_one_row_of_a_table(tmp_path):
    """--only runs that row's seeds and no other row; a row that the table does not have is refused."""
    table, datasets = tmp_path / "paper" / "results" / "cn-medium.csv", tmp_path / "data/datasets/mpe/simple_spread"
    table.parent.mkdir(parents=True)
    datasets.mkdir(parents=True)
    (datasets / "medium.npz").touch()
    shutil.copy(toy.ROOT / "paper" / "runs.py", tmp_path / "paper")
    (tmp_path / "paper" / "bc.py").write_text(FAKE)  # the scripts of the other rows are not even there

    def run(*flags):
        runs = process(tmp_path, "paper/runs.py", "cn-medium", "--jobs", 1, *flags)
        return *runs.communicate(timeout=120), runs.returncode

    stdout, stderr, status = run("--only", "behavior cloning")
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "behavior cloning" in stderr and "behaviour cloning, CQL, OMAR, ICQ" in stderr and not table.exists()
    for _ in range(2):  # the second time there is nothing left to do
        stdout, stderr, status = run("--only", "behaviour cloning")
        assert status == 0, stderr
        with open(table) as file:
            there = [(row["label"], row["seed"], row["score"]) for row in csv.DictReader(file)]
        assert there == [("behaviour cloning", seed, seed) for seed in "123"]
        assert "| behaviour cloning | 3 | 9 | 2.0 ± 1.0 |" in stdout


# ---- the scripts as files ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_help(script, tmp_path):
    """--help names every flag."""
    command = process(tmp_path, toy.ROOT / f"{script}.py", "--help")
    stdout, stderr = command.communicate(timeout=120)
    assert command.returncode == 0, stderr
    module = importlib.import_module(script)
    for field in dataclasses.fields(module.Args):
        assert f"--{field.name.replace('_', '-')}" in stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_every_argument_is_used(script):
    """A flag that is parsed and then ignored deceives whoever sets it."""
    module, source = importlib.import_module(script), (toy.ROOT / f"{script}.py").read_text()
    body = source[source.index("def fail(") :]
    for field in dataclasses.fields(module.Args):
        assert re.search(rf"\bargs\.{field.name}\b", body), field.name


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_script_copied_into_an_empty_folder(script, tmp_path):
    """A script, causal_model.py, a dataset and an importable environment are all that it takes to train."""
    for path in (toy.ROOT / f"{script}.py", toy.ROOT / "causal_model.py", toy.ROOT / "tests" / "toy.py"):
        shutil.copy(path, tmp_path)
    toy.write(tmp_path / "mine.npz", discrete=True)
    flags = [*SHORT[2:], "--env", "toy:matching_discrete", "--dataset", "mine.npz", "--total-iterations", 3]
    code = [sys.executable, f"{script}.py", *map(str, flags)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(code, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (toy.run_folder(tmp_path) / "policy.pt").is_file()


def common(script):
    """The lines of a script outside of its header, its own arguments, the paper's numbers and its algorithm."""
    lines = (toy.ROOT / f"{script}.py").read_text().splitlines()

    def position(start, beginning=0):
        (first, *_) = (n for n in range(beginning, len(lines)) if lines[n].startswith(start))
        return first

    own = position("    # Algorithm specific")
    numbers = position("PAPER_QUALITY", own)
    algorithm = position("# === ALGORITHM LOGIC")
    kept = [
        lines[position("import csv") : own],
        lines[position("# Tables 9 and 10", own) : numbers],
        lines[position("}", numbers) : algorithm],
        lines[position("# === End of the algorithm") :],
    ]
    return [line for part in kept for line in part]


def test_common_parts_are_the_same_to_the_letter():
    """A repair made in one script only, or a reader's diff full of noise."""
    cql, omar, icq = (common(script) for script in toy.SCRIPTS)
    assert len(omar) > 300
    assert cql == omar
    # ICQ alone needs the dataset's next action, a few lines of load_dataset.
    difference = [line for line in difflib.ndiff(omar, icq) if line[0] in "+-"]
    assert len(difference) <= 5
    assert all(line[0] == "+" and ("next_action" in line or "next row" in line) for line in difference), difference


@pytest.mark.parametrize("one, other", [("macca_cql", "macca_omar"), ("macca_omar", "macca_icq")])
def test_the_difference_of_two_scripts_is_short(one, other):
    """Read one script, then the diff: 150 changed lines are the most."""
    files = [(toy.ROOT / f"{script}.py").read_text().splitlines() for script in (one, other)]
    changed = [line for line in difflib.ndiff(*files) if line[0] in "+-"]
    assert 0 < len(changed) <= 150


@pytest.mark.parametrize("script", [*toy.SCRIPTS, "causal_model"])
def test_scripts_stand_alone(script):
    """causal_model is the only import from this repository, and causal_model imports nothing of it."""
    source = (toy.ROOT / f"{script}.py").read_text()
    imported = set(re.findall(r"^\s*(?:from|import) ([A-Za-z_]\w*)", source, re.MULTILINE))
    ours = {path.stem for path in toy.ROOT.glob("*.py")} | {"data", "tests", "paper", "toy"}
    assert imported & ours == (set() if script == "causal_model" else {"causal_model"})
