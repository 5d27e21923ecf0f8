"""paper/: running tables of runs, the statistics in them, recording and drawing edges, measuring speed."""

import csv
import importlib
import json
import os
import random
import re
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
import ablation
import ablations
import all as everything
import pictures
import rolled
import rows
import runs
import table2
import table13
import tables
from runs import KEPT

from data import mpe

# ---- running a table ----

FAKE = """
import json, os, pathlib, sys, time
seed = sys.argv[-1]
if os.environ.get("FAKE") == "sleep":
    pathlib.Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(600)
if os.environ.get("FAKE") == "fail" and seed == "22":
    print("  1%| | 1/90\\rmacca_icq.py: something is wrong\\n  1%| | 1/90", file=sys.stderr)
    sys.exit(2)
run = pathlib.Path("runs/one")
run.mkdir(parents=True)
(run / "config.json").write_text(json.dumps({"args": {}, "dataset_sha256": "0123456789abcdef" * 4}))
(run / "metrics.csv").write_text(f"iteration,return,score\\n5,1.0,0\\n9,1.5,{seed}\\n")
"""
CLONING = "python macca_icq.py --credit uniform --beta 1e6 --dataset expert --seed "
SEEDS = ["21", "22", "23", "24", "25"]


@pytest.fixture
def project(tmp_path):
    """A project in which the scripts of credit-cn-expert train nothing; those of most rows are not even there."""
    (tmp_path / "paper").mkdir()
    for name in ("runs.py", "rows.py", "tables.py", "ray_engine.py"):
        shutil.copy(toy.ROOT / "paper" / name, tmp_path / "paper")
    (tmp_path / "macca_icq.py").write_text(FAKE)
    datasets = tmp_path / "data/datasets/mpe/simple_spread"
    datasets.mkdir(parents=True)
    metadata = {"paper_random_return": 1.0, "paper_expert_return": 2.0}
    np.savez(datasets / "expert.npz", metadata=json.dumps(metadata))
    return tmp_path


def start(project, *flags, **environment):
    code = [sys.executable, "paper/runs.py", "credit-cn-expert", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(code, cwd=project, env={**os.environ, **environment}, **pipes)


def run(project, *flags, **environment):
    process = start(project, *flags, **environment)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def recorded(project):
    with open(project / "paper/results/credit-cn-expert.csv") as file:
        return list(csv.DictReader(file))


def write(project, text):
    (project / "paper" / "results").mkdir(exist_ok=True)
    (project / "paper/results/credit-cn-expert.csv").write_text(text)


def test_one_row_of_a_table(project):
    """--only runs that row's seeds and no other row; a row that the table does not have is refused."""
    status, stdout, stderr = run(project, "--only", "behavior cloning")
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "behavior cloning" in stderr and "; ".join(tables.TABLES["credit-cn-expert"][1]) in stderr
    assert not (project / "paper" / "results").exists()
    for _ in range(2):  # the second time there is nothing left to do
        status, stdout, stderr = run(project, "--jobs", 1, "--only", "behaviour cloning")
        assert status == 0, stderr
        there = recorded(project)
        assert [(row["label"], row["seed"], row["score"]) for row in there] == [
            ("behaviour cloning", seed, seed) for seed in SEEDS
        ]
        assert "| behaviour cloning | 5 | 9 | 23.0 ± 1.6 |" in stdout and "another command" not in stdout
    row = there[0]
    assert row["command"] == f"{CLONING}21" and float(row["score_paper"]) == 50
    assert (row["best_return"], row["curve"], row["won"]) == ("1.0", "5:1.0 9:1.5", "")
    assert row["dataset_sha256"] == "0123456789abcdef" and f"torch {torch.__version__}" in row["versions"]


def test_the_first_seeds_of_a_table(project):
    for first, seeds in ((2, SEEDS[:2]), (4, SEEDS[:4])):
        assert run(project, "--only", "behaviour cloning", "--seeds", first)[0] == 0
        assert [row["seed"] for row in recorded(project)] == seeds
    for flag in ("--seeds", "--jobs"):
        status, stdout, stderr = run(project, "--only", "behaviour cloning", flag, 0)
        assert (status, stdout) == (2, "") and "must be at least 1" in stderr


def test_columns_that_are_printed_are_recorded(project):
    assert run(project, "--only", "behaviour cloning")[0] == 0
    printed = {
        *table13.COLUMNS,
        *table2.CREDIT,
        *ablations.COLUMNS,
        *"score best_score score_paper won return paid_skill curve".split(),
    }
    assert printed <= {*recorded(project)[0]}


def test_a_torn_row_is_run_again(project):
    """A last line without its newline was cut off. An older file may lack columns; its rows stay as they are."""
    head, old = "label,seed,command,score", "behaviour cloning,21," + CLONING + "21,7"
    write(project, f"{head}\n{old}\nbehaviour cloning,22,{CLONING}22,1234.5")
    status, _, stderr = run(project, "--only", "behaviour cloning")
    assert status == 0, stderr
    there = recorded(project)
    assert [(row["seed"], row["score"], row["return"]) for row in there] == [
        ("21", "7", ""),
        *((seed, seed, "1.5") for seed in SEEDS[1:]),
    ]
    assert (project / "paper/results/credit-cn-expert.csv").read_text().endswith("\n")
    assert not list((project / "paper" / "results").glob(".*"))


def test_the_newest_row_of_a_seed_counts(project):
    """A row of an older command is another run: the table is run anew, and shows each seed once."""
    columns = "label,seed,command,iterations,score,best_score,cause_skill"
    lines = [f"behaviour cloning,{seed},python paper/bc.py --seed {seed},9,{seed}0,0," for seed in SEEDS]
    write(project, "\n".join([columns, *lines, ""]))
    status, stdout, stderr = run(project, "--show")
    assert status == 0 and "| behaviour cloning | 5 | 9 | 230.0 ± 15.8 |" in stdout, stderr
    assert "another command than paper/tables.py has now: behaviour cloning" in stdout
    status, stdout, stderr = run(project, "--only", "behaviour cloning")
    assert status == 0 and len(recorded(project)) == 10, stderr
    assert "| behaviour cloning | 5 | 9 | 23.0 ± 1.6 |" in stdout and "another command" not in stdout


def test_a_run_that_fails(project):
    """The other runs go on, and their rows are kept."""
    status, stdout, stderr = run(project, "--only", "behaviour cloning", FAKE="fail")
    assert (status, stdout) == (2, "")
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("runs.py: 1 runs failed") and "(macca_icq.py: something is wrong)" in last
    assert [row["seed"] for row in recorded(project)] == [seed for seed in SEEDS if seed != "22"]


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
    (project / "data/datasets/mpe/simple_spread/expert.npz").unlink()
    for flags, said in ((["--show"], "has no rows yet"), ([], "expert.npz is missing")):
        status, stdout, stderr = run(project, *flags)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1) and said in stderr, stderr


def test_another_engine_is_refused_where_it_is_not_installed(project):
    """And where nothing is left to run, it is not missed."""
    (project / "ray.py").write_text("raise ImportError")
    for flags, said in (
        (["--engine", "ray"], "needs Ray, which is not installed"),
        (["--gpus", "1"], "for --engine ray"),
    ):
        status, stdout, stderr = run(project, "--only", "behaviour cloning", *flags, PYTHONPATH=str(project))
        assert (status, stdout, stderr.count("\n")) == (2, "", 1) and said in stderr, stderr
    assert run(project, "--only", "behaviour cloning", PYTHONPATH=str(project))[0] == 0
    flags = ["--only", "behaviour cloning", "--engine", "ray"]
    assert run(project, *flags, PYTHONPATH=str(project))[0] == 0


# ---- the tables ----


def parsed(command):
    script, *words = shlex.split(command)
    before = {"paper/rolled.py": 1, "paper/ablation.py": 2}.get(script, 0)
    assert before < 2 or words[0] in ablation.CHANGES
    script, words = (words[before - 1], words[before:]) if before else (script, words)
    module = importlib.import_module(script.removeprefix("paper/").removesuffix(".py"))
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
            assert (args.share, args.anchor, args.h, args.gamma, args.hidden_dim) == ("slots", 1, 0.1, 0.95, 64)
            assert not args.standardize_rewards and args.dataset == quality
            assert args.total_iterations == 20_000  # the least that the paper trains
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
    one = {"1": {"x": "5", "dataset_sha256": "a"}, "2": {"x": "7", "dataset_sha256": "a"}}
    other = {"1": {"x": "1", "dataset_sha256": "a"}, "2": {"x": "1", "dataset_sha256": "b"}}
    assert rows.paired(one, other, "x") == [4]  # of seed 2 the data are others


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (12, 2.201), (13, 2.179), (21, 2.086), (61, 2.000)])
def test_t_interval(n, t):
    """Against the quantiles of Student's distribution in any table."""
    values = list(np.random.default_rng(n).normal(size=n))
    assert rows.t_interval(values) == pytest.approx(t * statistics.stdev(values) / n**0.5, rel=1e-3)


def test_hierarchical_interval():
    """Against the same in slow loops, on datasets of unequal size, and twice the same."""
    draw, drawn = random.Random(0), []
    datasets = [[1.0, 2.0, 9.0], [20.0, 26.0], [-3.0], [5.0, 5.0, 6.0, 30.0, 7.0]]
    for _ in range(20_000):
        means = []
        for _ in datasets:
            seeds = draw.choice(datasets)
            means.append(statistics.mean(draw.choice(seeds) for _ in seeds))
        drawn.append(statistics.mean(means))
    interval = rows.hierarchical_interval(datasets, draws=20_000)
    assert interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.25)
    assert interval == rows.hierarchical_interval(datasets, draws=20_000)
    assert rows.hierarchical_interval([[2.0, 2.0], [2.0]]) == (2, 2)


@pytest.mark.parametrize("between, within, low, high", [(3, 0, 0.88, 0.97), (3, 3, 0.91, 0.985), (0, 3, 0.955, 1)])
def test_coverage_of_the_hierarchical_interval(between, within, low, high):
    """Twenty datasets of three seeds. Where all datasets are alike it is too wide, as it counts the seeds twice.

    1,500 repetitions have 0.925, 0.947 and 0.979; the limits are about three standard errors of 300 away.
    """
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        gaps = rng.normal(5, between, (20, 1)) + rng.normal(0, within, (20, 3))
        lower, upper = rows.hierarchical_interval(gaps.tolist(), draws=300)
        covered += lower <= 5 <= upper
    assert low <= covered / 300 <= high, covered / 300


def made_up_rows(table):
    """Rows of two seeds, as paper/runs.py writes them."""
    noise, (seeds, commands) = np.random.default_rng(0), tables.TABLES[table]
    for label, command in commands.items():
        for seed in seeds[:2]:
            told = {name: str(noise.normal()) for name in [*KEPT, "best_score", "best_return"]}
            yield {"label": label, "seed": str(seed), "command": command, "curve": "1:2.5 2:3.5", **told}


@pytest.mark.parametrize(
    "script, flags",
    [
        ("table1", ["--show"]),
        ("ablations", ["--show"]),
        ("table2", ["--show"]),
        ("table13", []),
        ("credit", ["--show"]),
    ],
)
def test_recorded_tables_can_be_printed(script, flags, tmp_path, monkeypatch):
    """Every row of a printed table has as many cells as its head, and some hold numbers.

    The rows are those of paper/results, and made-up ones for the tables that have not been run.
    """
    shutil.copytree(toy.ROOT / "paper" / "results", tmp_path / "results")
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    for table in tables.TABLES:
        path = tmp_path / "results" / f"{table}.csv"
        for row in made_up_rows(table) if not path.exists() else ():
            rows.add(path, row)
    status, stdout, stderr = toy.run(f"paper/{script}", tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    blocks = [block.splitlines() for block in stdout.split("\n\n") if block.startswith("|")]
    assert blocks and all(len({line.count("|") for line in block}) == 1 for block in blocks)
    assert any("±" in line for block in blocks for line in block)
    if script == "credit":
        assert re.search(
            r"^- MACCA: [+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+; 1\d tables, \d+ pairs of seeds\)$", stdout, re.M
        )


# ---- edges and pictures ----

SHORT = ["--no-cuda", "--total-iterations", 4, "--eval-interval", 2, "--eval-episodes", 1, "--final-episodes", 1]
SHORT += ["--batch-size", 16, "--hidden-dim", 8, "--causal-iterations", 3, "--references", 1]


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
    """Before training, where log-odds are 4 for an agent's own dimensions, every 500th iteration, and at the end."""
    dataset = toy.write(tmp_path / "data.npz")
    flags = ["--env", "toy:matching", "--dataset", dataset, "--causal-iterations", 501]
    run = with_edges(tmp_path, *flags, script="macca_cql", monkeypatch=monkeypatch)
    with np.load(run / "edges.npz", allow_pickle=False) as file:
        iterations, edges = file["iterations"], file["edges"]
    assert list(iterations) == [0, 500, 501] and edges.shape == (3, 2, 8)
    expected = torch.zeros(2, 8)  # of [N, S + N A]: each agent's half of the state, and its own action
    for agent in range(2):
        expected[agent, 2 * agent : 2 * agent + 2] = expected[agent, 4 + 2 * agent : 6 + 2 * agent] = 4
    torch.testing.assert_close(torch.from_numpy(edges[0]), expected.sigmoid())

    module = importlib.import_module("macca_cql")
    args = module.Args(env="toy:matching", cuda=False)
    _, held_out = module.hold_out(module.load_dataset(dataset, args, toy.Matching())[0])
    model = CausalModel(2, 4, 2, [0, 0, 1, 1], references=1)
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
    assert stdout.split() == [str(run / name) for name in ("edges.png", "graph.png", "credit.png", "episode.gif")]
    for name in ("edges.png", "graph.png", "credit.png"):
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
    toy.write(tmp_path / "data.npz", discrete, states=states.copy(), metadata={"state_owner": [1, 1, 0, 0]})
    flags = ["--env", f"toy:matching{'_discrete' * discrete}", "--dataset", "data.npz"]
    run, out = trained(tmp_path, *flags, script=script, monkeypatch=monkeypatch), tmp_path / "new" / "folder"
    status, stdout, stderr = toy.run("paper/pictures", tmp_path, run, "--out", out, monkeypatch=monkeypatch)
    assert status == 0, stderr
    assert "no episode.gif" in stdout and "no edges.png" in stdout
    assert sorted(path.name for path in out.iterdir()) == ["credit.png", "graph.png"]


@pytest.mark.parametrize("edges", [np.zeros((2, 5)), np.full((3, 40), 0.9)])
def test_graphs_without_an_edge_and_with_very_many(edges, tmp_path, monkeypatch):
    """A line for each edge that counts, up to 60, and for each agent."""
    figures = []
    monkeypatch.setattr(pictures.plt, "close", figures.append)
    names = [("nobody's", "", f"s{d}") for d in range(edges.shape[1])]
    pictures.draw_graph(tmp_path / "graph.png", edges, names, 0.1)
    assert len(figures[0].axes[0].lines) == min(60, (edges >= 0.1).sum()) + len(edges)
    with Image.open(tmp_path / "graph.png") as image:
        image.load()


def test_names_of_dimensions():
    """Cooperative Navigation's are known by name, the others by whose they are."""
    _, owner = mpe.factored_states("simple_spread", np.zeros((1, 3, 18), np.float32))
    state, action = pictures.dimension_names("mpe/simple_spread", owner, 3, 2)
    assert len(state) == 18 and len(action) == 6 and action[2:4] == [("agent 2", "", "x"), ("agent 2", "", "y")]
    assert state[3:5] == [("agent 1", "position", "y"), ("agent 2", "velocity", "x")]
    assert state[12] == ("nobody's", "landmark 1", "x") and state[-1] == ("nobody's", "landmark 3", "y")
    state, action = pictures.dimension_names("smax/2s3z", [0, 1, -1], 2, 1)
    assert state == [("agent 1", "", "s0"), ("agent 2", "", "s1"), ("nobody's", "", "s2")]
    assert action == [("agent 1", "", "a0"), ("agent 2", "", "a0")]


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


@pytest.mark.parametrize("share", ["shapley", "slots"])
def test_rolled_credit(share):
    """Every agent is told the share of the agent before it; the sum stays the team reward."""
    model = CausalModel(3, 6, 2, [0, 0, 1, 1, 2, 2], share)
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
    for line in ("causal model: update ", "policy: update ", " µs per transition", "175 transitions, peak memory"):
        assert line in stdout


@pytest.mark.parametrize("name", ablation.CHANGES)
@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_an_ablation_trains(script, name, tmp_path, monkeypatch):
    """Every script still has the lines that are replaced, and runs with what takes their place."""
    for method in ("_slots", "assign"):  # put back after the test
        monkeypatch.setattr(CausalModel, method, getattr(CausalModel, method))
    flags = ["--env", "toy:matching", "--dataset", toy.write(tmp_path / "data.npz"), *SHORT]
    status, stdout, stderr = toy.run("paper/ablation", tmp_path, name, f"{script}.py", *flags, monkeypatch=monkeypatch)
    assert status == 0 and "that was the last policy" in stdout, stderr
    status, _, stderr = toy.run("paper/ablation", tmp_path, name, "other.py", *flags, monkeypatch=monkeypatch)
    assert status == 2 and "must be one of" in stderr


def random_model(share="slots"):
    """A causal model with edges of all probabilities."""
    torch.manual_seed(0)
    model = CausalModel(3, 6, 2, [0, 0, 1, 1, 2, 2], share, references=2)
    with torch.no_grad():
        model.edge_logits.normal_(-2, 2)
        model.edge_network[2].weight.normal_(0, 0.3)
    return model


def test_slots_of_the_ablations():
    """Without clipping, slots see parents times probabilities; averaged, all rows have the mean's mask."""
    model, parents = random_model(), torch.randn(20, 12)
    probabilities = torch.sigmoid(model._logits(parents)[0])
    model.mean_probabilities = probabilities.mean(0, keepdim=True)
    masks = (model.mean_probabilities >= model.h).float().expand(20, -1, -1)
    assert 0 < masks.mean() < 1 and not torch.equal(masks, (probabilities >= model.h).float())
    for slots, factors in ((ablation.soft, probabilities), (ablation.averaged, masks)):
        for row in range(20):
            for i in range(3):
                hidden = model.first_layer(parents[row] * factors[row, i]) + model.identity[i]
                torch.testing.assert_close(slots(model, parents)[row, i], model.reward_network(hidden[None])[0, 0])


def test_predicted_rewards_are_in_a_rewards_units():
    """They sum to the predicted team reward, whatever was recorded."""
    model, state, action = random_model(), torch.randn(8, 6), torch.rand(8, 3, 2)
    model.fit_statistics(state, action, 5 + 3 * torch.randn(8))
    predicted = ablation.predicted(model, state, action, torch.randn(8))
    torch.testing.assert_close(predicted.sum(1), model.predict(state, action))
    assert predicted.std(1).min() > 0


def test_a_model_of_what_is_paid_predicts_it(tmp_path, monkeypatch):
    """Both rewards come from the first agent's action: their sum does not say who is paid what, the rewards do."""
    monkeypatch.setattr(CausalModel, "assign", CausalModel.assign)
    first = toy.record(toy.Matching(), 2000)["actions"][:, 0, 0]
    paid = np.stack([0.2 * first, first], axis=1).astype(np.float32)
    dataset = toy.write(tmp_path / "data.npz", transitions=2000, individual_rewards=paid, rewards=paid.sum(1))
    flags = ["--env", "toy:matching", "--dataset", dataset, *SHORT, "--causal-iterations", 600, "--batch-size", 128]
    skills = []
    for folder, words in (("truth", ["truth"]), ("plain", [])):
        (tmp_path / folder).mkdir()
        script = ("paper/ablation", *words, "macca_cql.py") if words else ("macca_cql",)
        status, _, stderr = toy.run(script[0], tmp_path / folder, *script[1:], *flags, monkeypatch=monkeypatch)
        assert status == 0, stderr
        monkeypatch.undo() if words else None
        with open(toy.run_folder(tmp_path / folder) / "metrics.csv") as file:
            skills.append(float([*csv.DictReader(file)][-1]["paid_skill"]))
    assert skills[0] > 0.9 and skills[1] < 0, skills


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_a_causal_model_beside_the_policies(script, tmp_path, monkeypatch):
    """It learns before every update of the policies, which are told what it says at that moment."""
    monkeypatch.setattr(CausalModel, "assign", CausalModel.assign)
    genuine, losses, told = CausalModel.assign, [], []
    plain_loss = CausalModel.loss
    monkeypatch.setattr(CausalModel, "loss", lambda *x: losses.append(1) or plain_loss(*x))
    monkeypatch.setattr(CausalModel, "assign", lambda *x: told.append((len(losses), len(x[1]))) or genuine(*x))
    flags = ["--env", "toy:matching", "--dataset", toy.write(tmp_path / "data.npz"), *SHORT, "--causal-iterations", 1]
    words = ("beside", f"{script}.py", *flags)
    status, _, stderr = toy.run("paper/ablation", tmp_path, *words, monkeypatch=monkeypatch)
    assert status == 0, stderr
    assert [number for number, rows in told if rows == 16] == [2, 3, 4, 5] and len(losses) == 5  # 1 before, 4 beside
    broken = lambda *x: genuine(*x) * (torch.nan if len(x[1]) == 16 else 1)  # noqa: E731
    monkeypatch.setattr(CausalModel, "assign", broken)  # what the minibatch is told reaches the critics
    status, _, stderr = toy.run("paper/ablation", tmp_path, *words, monkeypatch=monkeypatch)
    assert status == 2 and "critic_loss is nan" in stderr, stderr


def test_pages_are_filled_from_commands():
    """What stands between the marks is replaced by what the command prints, the rest stays, and twice is once."""
    text = "a 1\n<!-- python paper/table13.py -->\nold\n<!-- end -->\nb\n"
    page = everything.filled(text)
    assert page.startswith("a 1\n<!-- python paper/table13.py -->\n\n| data | seeds |")
    assert page.endswith("|\n\n<!-- end -->\nb\n") and "old" not in page and everything.filled(page) == page
    with pytest.raises(SystemExit):
        everything.filled("<!-- python paper/nothing.py -->\n<!-- end -->")


def test_the_readmes_table_is_what_its_command_prints():
    text = (toy.ROOT / "README.md").read_text()
    assert "<!-- python paper/table1.py --gains -->" in text and everything.filled(text) == text


@pytest.mark.parametrize("script", ["table1", "ablations", "table2"])
def test_no_cell_of_a_whole_table_is_empty(script, tmp_path, monkeypatch):
    """With results for every row of every table: a label that no table has would leave an empty cell."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    for table in tables.TABLES:
        for row in made_up_rows(table):
            rows.add(tmp_path / f"{table}.csv", row)
    status, stdout, stderr = toy.run(f"paper/{script}", tmp_path, "--show", monkeypatch=monkeypatch)
    assert status == 0, stderr
    may_be_empty = {"the paper's", "the paper's, expert", "the paper's, on SMAC", "minus MACCA, paired", ""}
    may_be_empty |= {"state density", "action density", "team NMSE", "cause skill"} if script == "ablations" else set()
    for block in (block.splitlines() for block in stdout.split("\n\n") if block.startswith("|")):
        head, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block)
        for cells in body:
            empty = [name for name, cell in zip(head, cells, strict=True) if not cell]
            assert {*empty} <= may_be_empty, (cells, empty)
    assert script != "table1" or stdout.count("; 12 datasets)") == 9


def test_every_dataset_of_a_table_has_a_command():
    """Whose arguments exist, and which writes that file."""
    collector = importlib.import_module("data.collect_mpe")
    paths = {path for _, commands in tables.TABLES.values() for path in map(runs.dataset, commands.values())}
    assert len(paths) > 20
    for path in paths:
        script, *words = everything.recording(str(path.relative_to(toy.ROOT))).split()
        if script == "data/collect_mpe.py":
            args = tyro.cli(collector.Args, args=words)
            assert toy.ROOT / (args.output or f"data/datasets/{args.env}/{args.quality}.npz") == path
        else:  # cannot be imported without SMAX
            env, quality = path.relative_to(toy.ROOT / "data/datasets").with_suffix("").as_posix().rsplit("/", 1)
            assert (script, words) == ("data/collect_smax.py", ["--env", env, "--quality", quality])


def test_speed_beside_omars_code(tmp_path):
    """In a process of its own, as it puts stand-ins in the place of what their code imports."""
    command = [sys.executable, str(toy.ROOT / "paper/speed.py"), "--omar", str(tmp_path), "--transitions", "200"]
    command += ["--rounds", "1", "--batch-size", "16", "--threads", "1", "--no-cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is no clone of https://github.com/ling-pan/OMAR" in done.stderr
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms/maddpg.py").write_text("""
class MATD3:
    def __init__(self, sizes, names, **settings):
        assert sizes == [{"num_in_pol": 18, "num_out_pol": 2, "num_in_critic": 20}] * 3
        self.turn = 0
    def update(self, sample, agent):
        shapes = [tuple(x[agent].shape) for x in sample]
        assert shapes == [(16, 18), (16, 2), (16,), (16, 18), (16,)] and agent == self.turn
        self.turn += 1
    def update_all_targets(self):
        assert self.turn == 3
        self.turn = 0
""")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "batch 16: OMAR's 0.0 ms, ours " in done.stdout, done.stderr


def test_the_better_setting_has_the_higher_mean_on_shared_seeds():
    even = {"21": {"score": "50"}, "22": {"score": "60"}}
    runs = {"R / N": even, "other": {"21": {"score": "57"}, "22": {"score": "55"}}, "half": {"22": {"score": "59"}}}
    assert rows.better(runs, "R / N", "other", "not run") == runs["other"]  # 56 above 55
    assert rows.better(runs, "R / N", "other", "half") == even  # of seed 22: 60 above 55 and 59
    assert rows.better({"half": {"22": {"score": ""}}}, "half") == {}
    assert rows.better(runs, "R / N") == even and rows.better(runs, "not run") == {}
