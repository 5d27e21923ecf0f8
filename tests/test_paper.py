"""paper/: running tables of runs, the statistics in them, recording and drawing edges, measuring speed."""

import csv
import importlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import toy
import tyro
from PIL import Image

from causal_model import CausalModel

sys.path.insert(0, str(toy.ROOT / "paper"))
import pictures
import rolled
import rows
import table1
import tables

# ---- running a table ----

FAKE = """
import json, os, pathlib, sys, time
seed = sys.argv[-1]
if os.environ.get("FAKE") == "sleep":
    pathlib.Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(600)
if os.environ.get("FAKE") == "fail" and seed == "2":
    print("  1%| | 1/90\\rmacca_icq.py: something is wrong\\n  1%| | 1/90", file=sys.stderr)
    sys.exit(2)
run = pathlib.Path("runs/one")
run.mkdir(parents=True)
(run / "config.json").write_text(json.dumps({"args": {}, "dataset_sha256": "0123456789abcdef" * 4}))
(run / "metrics.csv").write_text(f"iteration,return,score\\n5,1.0,0\\n9,1.5,{seed}\\n")
"""
CLONING = "python macca_icq.py --credit uniform --beta 1e6 --dataset medium --seed "


@pytest.fixture
def project(tmp_path):
    """A project in which the scripts of the table cn-medium train nothing; those of most rows are not even there."""
    (tmp_path / "paper").mkdir()
    for name in ("runs.py", "rows.py", "tables.py"):
        shutil.copy(toy.ROOT / "paper" / name, tmp_path / "paper")
    (tmp_path / "macca_icq.py").write_text(FAKE)
    datasets = tmp_path / "data/datasets/mpe/simple_spread"
    datasets.mkdir(parents=True)
    metadata = {"paper_random_return": 1.0, "paper_expert_return": 2.0}
    np.savez(datasets / "medium.npz", metadata=json.dumps(metadata))
    return tmp_path


def start(project, *flags, **environment):
    code = [sys.executable, "paper/runs.py", "cn-medium", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(code, cwd=project, env={**os.environ, **environment}, **pipes)


def run(project, *flags, **environment):
    process = start(project, *flags, **environment)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def recorded(project):
    with open(project / "paper/results/cn-medium.csv") as file:
        return list(csv.DictReader(file))


def write(project, text):
    (project / "paper" / "results").mkdir(exist_ok=True)
    (project / "paper/results/cn-medium.csv").write_text(text)


def test_one_row_of_a_table(project):
    """--only runs that row's seeds and no other row; a row that the table does not have is refused."""
    status, stdout, stderr = run(project, "--only", "behavior cloning")
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "behavior cloning" in stderr and "behaviour cloning; CQL; OMAR; ICQ" in stderr
    assert not (project / "paper" / "results").exists()
    for _ in range(2):  # the second time there is nothing left to do
        status, stdout, stderr = run(project, "--jobs", 1, "--only", "behaviour cloning")
        assert status == 0, stderr
        there = recorded(project)
        assert [(row["label"], row["seed"], row["score"]) for row in there] == [
            ("behaviour cloning", seed, seed) for seed in "123"
        ]
        assert "| behaviour cloning | 3 | 9 | 2.0 ± 1.0 |" in stdout and "another command" not in stdout
    row = there[0]
    assert row["command"] == f"{CLONING}1" and float(row["score_paper"]) == 50
    assert (row["best_return"], row["curve"], row["won"]) == ("1.0", "5:1.0 9:1.5", "")
    assert row["dataset_sha256"] == "0123456789abcdef" and f"torch {torch.__version__}" in row["versions"]


def test_columns_are_those_of_the_rows_so_far(project):
    """Old and new rows live in one file: a fresh one has the columns of the files in paper/results."""
    assert run(project, "--only", "behaviour cloning")[0] == 0
    with open(toy.ROOT / "paper/results/rolled.csv") as file:
        assert list(recorded(project)[0]) == next(csv.reader(file))


def test_a_torn_row_is_run_again(project):
    """A last line without its newline was cut off. An older file may lack columns; its rows stay as they are."""
    head, old = "label,seed,command,score", "behaviour cloning,1," + CLONING + "1,7"
    write(project, f"{head}\n{old}\nbehaviour cloning,2,{CLONING}2,1234.5")
    status, _, stderr = run(project, "--only", "behaviour cloning")
    assert status == 0, stderr
    there = recorded(project)
    assert [(row["seed"], row["score"], row["return"]) for row in there] == [
        ("1", "7", ""),
        ("2", "2", "1.5"),
        ("3", "3", "1.5"),
    ]
    assert (project / "paper/results/cn-medium.csv").read_text().endswith("\n")
    assert not list((project / "paper" / "results").glob(".*"))


def test_the_newest_row_of_a_seed_counts(project):
    """A row of an older command is another run: the table is run anew, and shows each seed once."""
    columns = "label,seed,command,iterations,score,best_score,credit_skill"
    lines = [f"behaviour cloning,{seed},python paper/bc.py --seed {seed},9,{seed}0,0," for seed in "123"]
    write(project, "\n".join([columns, *lines, ""]))
    status, stdout, stderr = run(project, "--show")
    assert status == 0 and "| behaviour cloning | 3 | 9 | 20.0 ± 10.0 |" in stdout, stderr
    assert "another command than paper/tables.py has now: behaviour cloning" in stdout
    status, stdout, stderr = run(project, "--only", "behaviour cloning")
    assert status == 0 and len(recorded(project)) == 6, stderr
    assert "| behaviour cloning | 3 | 9 | 2.0 ± 1.0 |" in stdout and "another command" not in stdout


def test_a_run_that_fails(project):
    """The other runs go on, and their rows are kept."""
    status, stdout, stderr = run(project, "--only", "behaviour cloning", FAKE="fail")
    assert (status, stdout) == (2, "")
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("runs.py: 1 runs failed") and "(macca_icq.py: something is wrong)" in last
    assert [row["seed"] for row in recorded(project)] == ["1", "3"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_trainings_too(number, project):
    (project / "pids").mkdir()
    (project / "tmp").mkdir()
    environment = {"FAKE": "sleep", "PIDS": str(project / "pids"), "TMPDIR": str(project / "tmp")}
    runs = start(project, "--jobs", 2, "--only", "behaviour cloning", **environment)
    deadline = time.monotonic() + 60
    while len(list((project / "pids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in (project / "pids").iterdir()]
    assert len(children) == 2
    runs.send_signal(number)
    stdout, stderr = runs.communicate(timeout=60)
    assert (runs.returncode, stdout) == (128 + number, ""), stderr
    assert "runs.py: stopped; the rows so far are in" in stderr and "Traceback" not in stderr
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert not list((project / "tmp").iterdir())
    assert not (project / "paper" / "results").exists()


def test_refusals(project):
    (project / "data/datasets/mpe/simple_spread/medium.npz").unlink()
    for flags, said in ((["--show"], "has no rows yet"), ([], "medium.npz is missing")):
        status, stdout, stderr = run(project, *flags)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1) and said in stderr, stderr


# ---- the tables ----


def parsed(command):
    script, *words = shlex.split(command)
    script, words = (words[0], words[1:]) if script == "paper/rolled.py" else (script, words)
    module = importlib.import_module(script.removesuffix(".py"))
    args = tyro.cli(module.Args, args=words)
    for name, (low, high) in module.RANGES.items():
        assert low <= getattr(args, name) <= high, name
    return args


@pytest.mark.parametrize("table", tables.TABLES)
def test_commands_are_those_of_the_scripts(table):
    """A flag that a script no longer has would be found out only after the runs before it."""
    seeds, commands = tables.TABLES[table]
    assert seeds and commands
    for command in commands.values():
        parsed(f"{command} --seed {seeds[0]}")
    assert len(set(commands.values())) == len(commands)


def test_the_papers_settings():
    """Tables 9 and 10 of the paper, printed as commands."""
    code = [sys.executable, str(toy.ROOT / "paper/runs.py"), "paper-settings", "--commands"]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    commands = dict(zip(lines[::2], lines[1::2], strict=True))
    assert len(commands) == 12
    lambdas = {"expert": (7e-3, 7e-3), "medium": (5e-3, 5e-3), "medium-replay": (5e-3, 7e-3), "random": (1e-7, 1e-3)}
    own = {"expert": (0.9, 5), "medium": (0.7, 0.5), "medium-replay": (0.7, 1), "random": (0.99, 1)}
    for quality in lambdas:
        for name in ("CQL", "OMAR", "ICQ"):
            args = parsed(commands[f"# MACCA-{name}, {quality}"].removeprefix("python "))
            assert (args.batch_size, args.learning_rate, args.causal_learning_rate) == (1024, 3e-4, 5e-2)
            assert (args.anchor, args.h, args.gamma, args.hidden_dim) == (1, 0.1, 0.95, 64)
            assert not args.standardize_rewards and not args.layer_norm and args.dataset == quality
            assert (args.lambda1, args.lambda2) == lambdas[quality]
            assert name != "OMAR" or (args.tau, args.alpha) == own[quality]
            assert name != "CQL" or args.alpha == own[quality][1]


# ---- statistics ----


def test_cells():
    assert rows.mean_std([]) == "" and rows.mean_std([1.25], 2) == "1.25" and rows.mean_std([1.0, 3.0]) == "2.0 ± 1.4"
    assert rows.mean_interval([1.0]) == "" and rows.mean_interval([1.0, 3.0]) == "+2.0 ± 12.7"
    runs = {"1": {"x": "1"}, "2": {"x": ""}, "3": {"x": "5"}}
    assert rows.numbers(runs, "x") == [1, 5] and rows.numbers(runs, "y") == []
    assert rows.paired(runs, {"2": {"x": "1"}, "3": {"x": "2"}, "4": {"x": "3"}}, "x") == [3]


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (12, 2.201), (13, 2.179), (21, 2.086), (61, 2.000)])
def test_t_interval(n, t):
    """Against the quantiles of Student's distribution in any table."""
    values = list(np.random.default_rng(n).normal(size=n))
    assert rows.t_interval(values) == pytest.approx(t * statistics.stdev(values) / n**0.5, rel=1e-3)


@pytest.mark.parametrize("n", [3, 4, 7, 36])
def test_interquartile_mean(n):
    """Each value four times over: then a quarter of the copies is n of them, and can be cut off whole."""
    scores = np.random.default_rng(n).normal(size=n) ** 3
    copies = sorted(value for value in scores for _ in range(4))
    assert table1.interquartile_mean(scores) == pytest.approx(np.mean(copies[n : 3 * n]))
    outlier = np.where(scores == scores.max(), 1e6, scores)
    assert n < 4 or table1.interquartile_mean(outlier) == pytest.approx(table1.interquartile_mean(scores))


def test_bootstrap_interval():
    """Draws stay within a dataset: the differences between datasets do not widen the interval, those of seeds do."""
    rng = np.random.default_rng(0)
    level = 100 * np.arange(12)
    alike = [[value] * 3 for value in level]
    low, high = table1.bootstrap_interval(alike)
    assert low == high == pytest.approx(np.mean(level[3:9]))
    spread = [list(value + rng.normal(0, 3, 3)) for value in level]
    low, high = table1.bootstrap_interval(spread)
    middle = np.concatenate(spread)
    assert low < table1.interquartile_mean(middle) < high
    # The middle half are 18 runs; seeds of 3 draws have a deviation of 3 sqrt(2 / 3) around their mean.
    assert 0.5 < (high - low) / (2 * 1.96 * 3 * (2 / 3) ** 0.5 / 18**0.5) < 1.5


@pytest.mark.parametrize("script", ["table1", "table2", "table13", "scale_or_credit"])
def test_recorded_tables_can_be_printed(script, tmp_path, monkeypatch):
    """Every row of a printed table has as many cells as its head, and some hold numbers."""
    shutil.copytree(toy.ROOT / "paper" / "results", tmp_path / "results")
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    flags = [] if script == "table13" else ["--show"]
    status, stdout, stderr = toy.run(f"paper/{script}", tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    blocks = [block.splitlines() for block in stdout.split("\n\n") if block.startswith("|")]
    assert blocks and all(len({line.count("|") for line in block}) == 1 for block in blocks)
    assert any("±" in line for block in blocks for line in block)


# ---- edges and pictures ----

SHORT = ["--no-cuda", "--total-iterations", 4, "--eval-interval", 2, "--eval-episodes", 1, "--final-episodes", 1]
SHORT += ["--batch-size", 16, "--hidden-dim", 8]


def trained(folder, *flags, script="macca_omar", monkeypatch):
    status, _, stderr = toy.run(script, folder, *SHORT, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return toy.run_folder(folder)


def with_edges(folder, *flags, script="macca_omar", monkeypatch):
    for name in ("loss", "report"):  # put back after the test
        monkeypatch.setattr(CausalModel, name, getattr(CausalModel, name))
    status, _, stderr = toy.run("paper/edges", folder, f"{script}.py", *SHORT, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return toy.run_folder(folder)


def test_edges_of_a_run(tmp_path, monkeypatch):
    """Before training, where log-odds are 4 for an agent's own dimensions, and at every evaluation."""
    dataset = toy.write(tmp_path / "data.npz")
    flags = ["--env", "toy:matching", "--dataset", dataset, "--total-iterations", 5]
    run = with_edges(tmp_path, *flags, script="macca_cql", monkeypatch=monkeypatch)
    with np.load(run / "edges.npz", allow_pickle=False) as file:
        iterations, edges = file["iterations"], file["edges"]
    assert list(iterations) == [0, 2, 4, 5] and edges.shape == (4, 2, 8)
    expected = torch.zeros(2, 8)  # of [N, S + N A]: each agent's half of the state, and its own action
    for agent in range(2):
        expected[agent, 2 * agent : 2 * agent + 2] = expected[agent, 4 + 2 * agent : 6 + 2 * agent] = 4
    torch.testing.assert_close(torch.from_numpy(edges[0]), expected.sigmoid())

    module = importlib.import_module("macca_cql")
    args = module.Args(env="toy:matching", cuda=False)
    _, held_out = module.hold_out(module.load_dataset(dataset, args, toy.Matching())[0])
    model = CausalModel(2, 4, 2)
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["causal_model"])
    probabilities = model.probabilities(held_out["observations"].flatten(1), held_out["actions"])
    last = torch.cat([part.mean(0) for part in probabilities], dim=1)
    torch.testing.assert_close(torch.from_numpy(edges[-1]), last)
    assert not np.allclose(edges[0], edges[1])


def test_edges_need_a_script_and_a_new_run(tmp_path, monkeypatch):
    for flags, said in ((["macca.py"], "expected one of"), (["macca_cql.py", "--resume", "runs/RUN"], "a new run")):
        status, stdout, stderr = toy.run("paper/edges", tmp_path, *flags, monkeypatch=monkeypatch)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1) and said in stderr, stderr


def test_pictures_of_cooperative_navigation(tmp_path, monkeypatch):
    run = with_edges(tmp_path, monkeypatch=monkeypatch)
    status, stdout, stderr = toy.run("paper/pictures", tmp_path, run, monkeypatch=monkeypatch)
    assert status == 0, stderr
    assert stdout.split() == [str(run / name) for name in ("edges.png", "credit.png", "episode.gif")]
    for name in ("edges.png", "credit.png"):
        with Image.open(run / name) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(10**6)) > 100, name  # something was drawn
    with Image.open(run / "episode.gif") as animation:
        assert animation.n_frames == 25
    assert (run / "episode.gif").stat().st_size < 600_000


@pytest.mark.parametrize("script, discrete", [("macca_cql", False), ("macca_icq", True)])
def test_an_environment_that_is_not_rendered(script, discrete, tmp_path, monkeypatch):
    """With a state of the dataset's own, which is then asked of the environment; and without recorded edges."""
    states = toy.record(toy.Matching(discrete), 100)["observations"].reshape(100, 4)[:, ::-1]
    toy.write(tmp_path / "data.npz", discrete, states=states.copy())
    flags = ["--env", f"toy:matching{'_discrete' * discrete}", "--dataset", "data.npz"]
    run, out = trained(tmp_path, *flags, script=script, monkeypatch=monkeypatch), tmp_path / "new" / "folder"
    status, stdout, stderr = toy.run("paper/pictures", tmp_path, run, "--out", out, monkeypatch=monkeypatch)
    assert status == 0, stderr
    assert "no episode.gif" in stdout and "no edges.png" in stdout
    assert [path.name for path in out.iterdir()] == ["credit.png"]


class Leaving(toy.Matching):
    """The second agent leaves after two of five steps."""

    def step(self, actions):
        results = super().step({"a": np.zeros(2), "b": np.zeros(2), **actions})
        self.agents = self.agents[:1] if self.steps >= 2 else self.agents
        return results


def test_what_is_recorded_of_an_episode():
    """Who has left is not alive any more and does nothing; a dead agent has one action left."""
    recorder = pictures.Recorder(Leaving(), types.SimpleNamespace(action_dim=2, discrete=False), joint=False)
    recorder.reset(seed=0)
    earned = []
    while recorder.agents:
        earned.append(recorder.step({agent: np.full(2, 0.5) for agent in recorder.agents})[1])
    batch = recorder.batch()
    assert batch["alive"].tolist() == [[True, True]] * 2 + [[True, False]] * 3
    assert batch["actions"].tolist() == [[[0.5, 0.5]] * 2] * 2 + [[[0.5, 0.5], [0, 0]]] * 3
    assert batch["individual_rewards"].tolist() == pytest.approx(np.array([list(row.values()) for row in earned]))
    torch.testing.assert_close(batch["rewards"], batch["individual_rewards"].sum(1))
    torch.testing.assert_close(batch["states"], batch["observations"].flatten(1))

    recorder = pictures.Recorder(toy.Matching(True), types.SimpleNamespace(action_dim=5, discrete=True), joint=True)
    _, infos = recorder.reset(seed=0)
    infos["b"]["action_mask"] = np.eye(5)[0]
    masks = np.array([info["action_mask"] for info in infos.values()])
    recorder.env.masks[1] = True
    recorder.step({agent: int(mask.argmax()) for agent, mask in zip(toy.AGENTS, masks, strict=True)})
    batch = recorder.batch()
    assert batch["alive"].tolist() == [[True, False]] and "states" not in batch
    assert batch["action_masks"].tolist() == [masks.astype(bool).tolist()]
    assert batch["actions"].tolist() == [masks.argmax(1).tolist()]


def test_folders_that_cannot_be_drawn(tmp_path, monkeypatch):
    def sentence(*flags):
        status, stdout, stderr = toy.run("paper/pictures", tmp_path, *flags, monkeypatch=monkeypatch)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
        return stderr

    assert "is no run folder" in sentence("nowhere")
    toy.write(tmp_path / "data.npz")
    flags = ["--env", "toy:matching", "--dataset", "data.npz"]
    team = trained(tmp_path, *flags, "--credit", "team", monkeypatch=monkeypatch)
    assert "--credit team" in sentence(team)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.npz").write_bytes((tmp_path / "data.npz").read_bytes())
    run = trained(tmp_path / "other", *flags, monkeypatch=monkeypatch)
    assert "cannot be written" in sentence(run, "--out", tmp_path / "data.npz")
    (run / "checkpoint.pt").write_bytes(b"nothing")
    assert "is no run folder" in sentence(run)


# ---- the rest ----


def test_rolled_credit():
    """Every agent is told the share of the agent before it; the sum stays the team reward."""
    model = CausalModel(3, 6, 2)
    state, action, team = torch.randn(8, 6), torch.rand(8, 3, 2), torch.randn(8)
    genuine, told = model.assign(state, action, team), rolled.rolled(model, state, action, team)
    torch.testing.assert_close(told[:, [1, 2, 0]], genuine)
    torch.testing.assert_close(told.sum(1), team)
    assert not torch.allclose(told, genuine)


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_speed(script, tmp_path, monkeypatch):
    flags = ["--script", script, "--transitions", 200, "--rounds", 1, "--batch-size", 16, "--no-cuda", "--threads", 1]
    status, stdout, stderr = toy.run("paper/speed", tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    for line in ("--credit team: update ", "--credit macca: update ", "175 transitions, peak memory"):
        assert line in stdout
