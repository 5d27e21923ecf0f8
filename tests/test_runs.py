"""A run from the command to the files it leaves: resuming, evaluating, copying a script out, common parts."""

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

import pytest
import torch
import toy

from causal_model import CausalModel

CAUSAL = 15  # iterations of the causal model, which are counted up to 0
SHORT = ["--env", "toy:matching", "--no-cuda", "--batch-size", 16, "--hidden-dim", 8]
SHORT += ["--causal-iterations", CAUSAL]
SHORT += ["--eval-interval", 20, "--eval-episodes", 2, "--final-episodes", 3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "random.npz"
    return toy.write(path, metadata={"random_return": -10.0, "expert_return": 0.0}, final=True)


def start(script, folder, *flags, monkeypatch):
    folder.mkdir(exist_ok=True)
    status, stdout, stderr = toy.run(script, folder, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return stdout


def interrupted(script, folder, iterations, action, *flags, monkeypatch):
    """Do something after that many iterations of this process; a power cut is an exception that nobody catches."""
    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        toy.after(iterations, action, patch)
        if action is power_cut:
            with pytest.raises(PowerCut):
                toy.run(script, folder, *flags, monkeypatch=patch)
            return None
        return toy.run(script, folder, *flags, monkeypatch=patch)


def rows(run):
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same(one, other, path="checkpoint"):
    """Two checkpoints hold the same, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            if path != "checkpoint/args" or name != "resume":  # how the last process was called
                assert_same(one[name], other[name], f"{path}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def assert_same_runs(one, other):
    assert_same(load(one), load(other))
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


class PowerCut(Exception):
    pass


def power_cut():
    raise PowerCut


# ---- resuming ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
@pytest.mark.parametrize("graph, share", [("dynamic", "shapley"), ("fixed", "slots")])
def test_resumed_run_ends_with_the_same_weights(script, graph, share, dataset, tmp_path, monkeypatch):
    """Stopped by a signal or cut off without a warning: resumed, it must end bit-identical.

    While the causal model is trained, when it is trained but nothing is credited yet, and between two evaluations.
    """
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 50, "--graph", graph, "--share", share]
    credits, genuine = [], CausalModel.assign
    monkeypatch.setattr(CausalModel, "assign", lambda *inputs: credits.append(genuine(*inputs)) or credits[-1])
    start(script, tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    whole, expected = toy.run_folder(tmp_path / "whole"), credits[:]
    assert [int(row["iteration"]) for row in rows(whole)] == [20, 40, 50]

    def resume(folder, run):
        credits.clear()
        start(script, folder, "--no-cuda", "--resume", f"runs/{run.name}", monkeypatch=monkeypatch)
        assert_same_runs(whole, run)
        assert_same(credits, expected)  # they are not stored

    for number, reached in ((signal.SIGINT, -8), (signal.SIGTERM, 0), (signal.SIGHUP, 33)):
        folder = tmp_path / number.name
        status, stdout, stderr = interrupted(
            script, folder, CAUSAL + reached, lambda number=number: signal.raise_signal(number), *flags,
            monkeypatch=monkeypatch,
        )  # fmt: skip
        assert status == 128 + number, stderr
        stopped = toy.run_folder(folder)
        assert load(stopped)["iteration"] == reached
        assert [row["iteration"] for row in load(stopped)["rows"]] == [20] * (reached > 20)
        assert f"stopped at iteration {reached}; to go on: python {script}.py --resume runs/{stopped.name}" in stdout
        resume(folder, stopped)

    for iterations, reached in ((5, -CAUSAL), (CAUSAL + 5, 0), (CAUSAL + 35, 20)):
        folder = tmp_path / f"cut{iterations}"
        interrupted(script, folder, iterations, power_cut, *flags, monkeypatch=monkeypatch)
        cut = toy.run_folder(folder)
        assert load(cut)["iteration"] == reached
        resume(folder, cut)


@pytest.mark.parametrize("number", range(1, 8))
def test_a_signal_while_a_file_is_written(number, dataset, tmp_path, monkeypatch):
    """At any of them the run ends as asked and can go on: also when it was about to credit what it has learned."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 30]
    start("macca_cql", tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    (tmp_path / "run").mkdir()
    genuine, count = type(tmp_path).replace, []

    def replace(path, target):
        count.append(path)
        if len(count) == number:
            signal.raise_signal(signal.SIGTERM)
        return genuine(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", replace)
        genuine_signal = signal.signal(signal.SIGTERM, lambda *_: None)  # before the run has its own handler
        try:
            status, stdout, stderr = toy.run("macca_cql", tmp_path / "run", *flags, monkeypatch=patch)
        finally:
            signal.signal(signal.SIGTERM, genuine_signal)
    assert status in (0, 143) and "Traceback" not in stderr, stderr
    run = toy.run_folder(tmp_path / "run")
    assert (status == 0) == (number in (1, 6, 7))  # no handler yet, or the last iteration is done
    if status:
        assert "stopped at iteration" in stdout
        start("macca_cql", tmp_path / "run", "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
    assert_same_runs(run, toy.run_folder(tmp_path / "whole"))


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_a_finished_run_can_be_made_longer(script, dataset, tmp_path, monkeypatch):
    """--resume with more --total-iterations ends as a run that was that long from the start.

    Also if it is killed on the way, before or after its next checkpoint, and resumed without saying it again.
    """
    flags = [*SHORT, "--dataset", dataset]
    start(script, tmp_path / "long", *flags, "--total-iterations", 50, monkeypatch=monkeypatch)
    start(script, tmp_path / "run", *flags, "--total-iterations", 30, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path / "run")
    assert [row["iteration"] for row in rows(run)] == ["20", "30"]
    for folder, iterations in (("once", None), ("early", 5), ("late", 15)):
        longer = tmp_path / folder / "runs" / "one"
        shutil.copytree(run, longer)
        more = ["--no-cuda", "--resume", longer, "--total-iterations", 50]
        if iterations:
            interrupted(script, tmp_path / folder, iterations, power_cut, *more, monkeypatch=monkeypatch)
            more = more[:-2]
        start(script, tmp_path / folder, *more, monkeypatch=monkeypatch)
        assert_same_runs(longer, toy.run_folder(tmp_path / "long"))


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_a_finished_run_is_evaluated(script, dataset, tmp_path, monkeypatch):
    """--resume of a finished run prints its last row again, and changes nothing."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 25]
    stdout = start(script, tmp_path, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    files = {name: (run / name).read_bytes() for name in ("metrics.csv", "config.json")}
    checkpoint = load(run)
    (tmp_path / "elsewhere").mkdir()
    again = start(script, tmp_path / "elsewhere", "--resume", run, "--no-cuda", monkeypatch=monkeypatch)
    (line,) = (line for line in stdout.splitlines() if line.startswith("iteration 25: return "))
    assert line in again.splitlines() and "iteration 20" not in again
    assert files == {name: (run / name).read_bytes() for name in files}
    assert_same(load(run), checkpoint)
    assert not list((tmp_path / "elsewhere").iterdir())  # an evaluation leaves no run of its own


def test_the_same_seed_gives_the_same_run(dataset, tmp_path, monkeypatch):
    """Everything random hangs on --seed."""
    runs = []
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        flags = [*SHORT, "--dataset", dataset, "--total-iterations", 20, "--seed", seed]
        start("macca_omar", tmp_path / name, *flags, monkeypatch=monkeypatch)
        runs.append(toy.run_folder(tmp_path / name))
    assert_same_runs(runs[0], runs[1])
    assert rows(runs[0]) != rows(runs[2])


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
@pytest.mark.parametrize("content", [None, b"", b"torn", b'{"args": {"credit": "maccca", "env": "nothing:here"}}'])
def test_only_the_checkpoint_is_read(name, content, dataset, tmp_path, monkeypatch):
    """What else is in a run folder cannot stop it or change what it computes; metrics.csv is made whole again."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 30]
    start("macca_cql", tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    interrupted("macca_cql", tmp_path / "cut", CAUSAL + 25, power_cut, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path / "cut")
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    start("macca_cql", tmp_path / "cut", "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
    assert_same_runs(run, toy.run_folder(tmp_path / "whole"))
    if name == "config.json":  # written once, at the start
        assert (run / name).exists() == (content is not None) and (
            content is None or (run / name).read_bytes() == content
        )


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
def test_files_are_replaced_whole(moment, dataset, tmp_path, monkeypatch):
    """Whenever a file is written, a crash leaves the old one, or none, and not a part of the new one."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 30]
    start("macca_icq", tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    whole, written = toy.run_folder(tmp_path / "whole"), []
    for number in range(1, 9):
        with monkeypatch.context() as patch:
            genuine, count = getattr(type(tmp_path), moment), []

            def torn(path, content, genuine=genuine, count=count, number=number):
                count.append(path)
                if len(count) < number:
                    return genuine(path, content)
                if moment == "write_bytes":
                    genuine(path, content[: len(content) // 2])
                written.append(path.stem)
                raise PowerCut

            patch.setattr(type(tmp_path), moment, torn)
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                start("macca_icq", folder, *flags, monkeypatch=patch)
            except PowerCut:
                pass
        if len(count) < number:
            break
        run = toy.run_folder(folder)
        if (run / "config.json").exists():
            assert json.loads((run / "config.json").read_text())["args"]["batch_size"] == 16
        if (run / "metrics.csv").exists():
            assert rows(run) == rows(whole)[: len(rows(run))]
        if (run / "checkpoint.pt").exists():
            start("macca_icq", folder, "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
            assert_same_runs(run, whole)
            assert not list(run.glob("*.tmp"))
    assert written == ["config", *["checkpoint"] * 3, "metrics", "checkpoint", "metrics"], written


# ---- signals, in a process of its own ----


def process(folder, *command, **options):
    """A real `python ...` in `folder`, with the toy task importable."""
    code = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(toy.ROOT / "tests")}
    return subprocess.Popen(code, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe, **options)


def wait_for(found, training):
    deadline = time.monotonic() + 120
    while not found() and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found(), training.communicate()


def test_interrupted_process(dataset, tmp_path):
    """Ctrl-C: a checkpoint, one line that says how to go on, no traceback; and that line works."""
    script = toy.ROOT / "macca_icq.py"
    training = process(tmp_path, script, *SHORT, "--dataset", dataset, "--total-iterations", 1_000_000)
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.csv")), training)
    training.send_signal(signal.SIGINT)
    stdout, stderr = training.communicate(timeout=60)
    assert training.returncode == 130 and "Traceback" not in stderr, stderr
    stopped = re.search(r"stopped at iteration (\d+); to go on: python (\S+) --resume (\S+)", stdout)
    assert stopped is not None, stdout
    iteration, _, run = stopped.groups()
    assert load(tmp_path / run)["iteration"] == int(iteration)
    more = process(tmp_path, script, "--resume", run, "--no-cuda", "--total-iterations", int(iteration) + 5)
    stdout, stderr = more.communicate(timeout=120)
    assert more.returncode == 0, stderr
    assert int(rows(tmp_path / run)[-1]["iteration"]) == int(iteration) + 5 and run in stdout


def test_nohup(dataset, tmp_path):
    """A run that was told to ignore the end of its terminal goes on."""
    training = process(
        tmp_path, toy.ROOT / "macca_cql.py", *SHORT, "--dataset", dataset, "--total-iterations", 1_000_000,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.csv")), training)
    training.send_signal(signal.SIGHUP)
    reached = len(rows(toy.run_folder(tmp_path)))
    wait_for(lambda: len(rows(toy.run_folder(tmp_path))) > reached + 1, training)
    training.send_signal(signal.SIGTERM)
    stdout, stderr = training.communicate(timeout=60)
    assert training.returncode == 143 and "stopped at iteration" in stdout, stderr


def test_interrupted_in_the_first_seconds(dataset, tmp_path):
    """While torch is imported, Ctrl-C just ends the process."""
    training = process(tmp_path, "-X", "importtime", toy.ROOT / "macca_omar.py", *SHORT, "--dataset", dataset)
    lines = iter(training.stderr.readline, "")
    assert any("numpy" in line for line in lines)  # the script's first slow import
    training.send_signal(signal.SIGINT)
    _, stderr = training.communicate(timeout=60)
    assert training.returncode == -signal.SIGINT and "Traceback" not in stderr, stderr[-2000:]
    assert not list(tmp_path.iterdir())


def test_closed_pipe(dataset, tmp_path, monkeypatch):
    """As with `| head -1`: what was computed until the pipe was closed is in the checkpoint, and the run goes on."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 50]
    start("macca_cql", tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    (tmp_path / "closed").mkdir()
    training = process(tmp_path / "closed", "-u", toy.ROOT / "macca_cql.py", *flags)
    assert training.stdout.readline()
    training.stdout.close()
    training.wait(timeout=60)
    run = toy.run_folder(tmp_path / "closed")
    assert load(run)["iteration"] >= 0  # the causal model is trained
    start("macca_cql", tmp_path / "closed", "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
    assert_same_runs(run, toy.run_folder(tmp_path / "whole"))


# ---- what a run leaves ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_run_folder(script, dataset, tmp_path, monkeypatch):
    """The files of a run, and the saved policy scoring in an evaluation what the run reported."""
    flags = [*SHORT, "--dataset", dataset, "--total-iterations", 25]
    stdout = start(script, tmp_path, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    assert str(run.name) in stdout.splitlines()[0] and str(run.name) in stdout.splitlines()[-1]
    assert run.name.startswith(f"toy-matching__{script}__macca__1__")
    names = {path.name for path in run.iterdir() if "events.out.tfevents." not in path.name}
    assert names == {"config.json", "metrics.csv", "checkpoint.pt"} and len([*run.iterdir()]) == 4

    checkpoint, config = load(run), json.loads((run / "config.json").read_text())
    assert config.keys() == {"args", "dataset_sha256", "command"}
    assert config["args"]["batch_size"] == 16 and config["args"]["dataset"] == str(dataset)
    assert config["command"] == [str(toy.ROOT / f"{script}.py"), *map(str, flags)]
    assert (checkpoint["args"], checkpoint["dataset_sha256"]) == (config["args"], config["dataset_sha256"])
    assert checkpoint["script"] == f"{script}.py" and checkpoint["iteration"] == 25

    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert header.startswith("iteration,episodes,return,return_std,score,state_density,action_density,team_nmse,")
    final, module = rows(run)[-1], importlib.import_module(script)
    assert (final["iteration"], final["episodes"]) == ("25", "3")
    args = module.Args(**checkpoint["args"])
    data, metadata = module.load_dataset(dataset, args, toy.Matching())
    nets, *_ = module.build(args, module.hold_out(data)[0], metadata)
    nets.load_state_dict(checkpoint["nets"])
    for name, value in module.evaluate(toy.Matching(), nets, metadata, 3, 1000).items():
        assert float(final[name]) == value, name


class Victories(toy.Matching):
    """A battle that is won from the second evaluation on, and says so only then."""

    episodes = 0

    def reset(self, seed=None, options=None):
        Victories.episodes += 1
        return super().reset(seed)

    def step(self, actions):
        *rest, infos = super().step(actions)
        if Victories.episodes > 3:  # one at the start, two in each evaluation
            infos["a"]["won"] = True
        return *rest, infos


def test_columns_of_all_rows(tmp_path, monkeypatch):
    """A statistic that first appears later has an empty place in the rows before, also after a resume."""
    path = toy.write(tmp_path / "data.npz", metadata={"env": "test_runs:Victories"})
    flags = [*SHORT[2:], "--env", "test_runs:Victories", "--dataset", path, "--total-iterations", 60]
    monkeypatch.setattr(Victories, "episodes", 0)
    interrupted("macca_cql", tmp_path, CAUSAL + 50, power_cut, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    assert [row["won"] for row in rows(run)] == ["", "1.0"]
    start("macca_cql", tmp_path, "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
    assert [row["won"] for row in rows(run)] == ["", "1.0", "1.0"]


class Crashing(toy.Matching):
    """It fails in an episode of the second evaluation, as a game that crashes."""

    episodes, broken = 0, True

    def reset(self, seed=None, options=None):
        Crashing.episodes += 1
        if Crashing.broken and Crashing.episodes == 5:
            raise ConnectionError("the game is gone")
        return super().reset(seed)


def test_an_environment_that_crashes_in_an_evaluation(tmp_path, monkeypatch):
    """One sentence that says how to go on, and nothing that was computed is lost."""
    path = toy.write(tmp_path / "data.npz", metadata={"env": "test_runs:Crashing"})
    flags = [*SHORT[2:], "--env", "test_runs:Crashing", "--dataset", path, "--total-iterations", 60]
    monkeypatch.setattr(Crashing, "broken", False)
    start("macca_omar", tmp_path / "whole", *flags, monkeypatch=monkeypatch)
    monkeypatch.setattr(Crashing, "broken", True)
    monkeypatch.setattr(Crashing, "episodes", 0)
    (tmp_path / "run").mkdir()
    status, _, stderr = toy.run("macca_omar", tmp_path / "run", *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path / "run")
    assert status == 2 and "Traceback" not in stderr
    sentence = stderr[stderr.index("macca_omar.py: ") :].splitlines()[0]
    assert "--env test_runs:Crashing failed" in sentence and "the game is gone" in sentence
    assert f"--resume runs/{run.name}" in sentence and load(run)["iteration"] == 40
    start("macca_omar", tmp_path / "run", "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
    assert_same_runs(run, toy.run_folder(tmp_path / "whole"))


class Staying(toy.Matching):
    """Its agents are truncated, but never removed."""

    def step(self, actions):
        result = super().step(actions)
        self.agents = self.possible_agents[:]
        return result


def test_agents_that_are_never_removed(tmp_path, monkeypatch):
    """An evaluation ends."""
    path = toy.write(tmp_path / "data.npz", metadata={"env": "test_runs:Staying"})
    flags = [*SHORT[2:], "--env", "test_runs:Staying", "--dataset", path, "--total-iterations", 2]
    start("macca_icq", tmp_path, *flags, monkeypatch=monkeypatch)
    assert [row["iteration"] for row in rows(toy.run_folder(tmp_path))] == ["2"]


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
    body = source[source.index("def require(") :]
    for field in dataclasses.fields(module.Args):
        assert re.search(rf"\bargs\.{field.name}\b", body), field.name


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_script_copied_into_an_empty_folder(script, tmp_path):
    """A script, causal_model.py, a dataset and an importable environment are all that it takes to train."""
    for path in (toy.ROOT / f"{script}.py", toy.ROOT / "causal_model.py", toy.ROOT / "tests" / "toy.py"):
        shutil.copy(path, tmp_path)
    toy.write(tmp_path / "mine.npz", discrete=True, final=True)
    flags = [*SHORT[2:], "--env", "toy:matching_discrete", "--dataset", "mine.npz", "--total-iterations", 3]
    code = [sys.executable, f"{script}.py", *map(str, flags)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(code, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert load(toy.run_folder(tmp_path))["iteration"] == 3


def common(script):
    """The lines of a script outside of its header, its own arguments and their ranges, and its algorithm."""
    lines = (toy.ROOT / f"{script}.py").read_text().splitlines()

    def position(start, beginning=0):
        (first, *_) = (n for n in range(beginning, len(lines)) if lines[n].startswith(start))
        return first

    own = position("    # Algorithm specific")
    ranges = position("RANGES = ", own)
    kept = [
        lines[position("import signal") : own],
        lines[ranges : ranges + 1],
        lines[position("def require(", ranges) : position("# === ALGORITHM LOGIC")],
        lines[position("# === End of the algorithm") :],
    ]
    return [line for part in kept for line in part]


def test_common_parts_are_the_same_to_the_letter():
    """A repair made in one script only, or a reader's diff full of noise."""
    cql, omar, icq = (common(script) for script in toy.SCRIPTS)
    assert len(omar) > 400
    assert cql == omar
    # ICQ alone needs the dataset's next action, a few lines of load_dataset.
    difference = [line for line in difflib.ndiff(omar, icq) if line[0] in "+-"]
    assert len(difference) <= 4
    words = ("next action", "next_action", "taught")
    assert all(line[0] == "+" and any(word in line for word in words) for line in difference), difference


@pytest.mark.parametrize("one, other, most", [("macca_cql", "macca_omar", 60), ("macca_omar", "macca_icq", 130)])
def test_the_difference_of_two_scripts_is_short(one, other, most):
    """Read one script, then the diff."""
    files = [(toy.ROOT / f"{script}.py").read_text().splitlines() for script in (one, other)]
    changed = [line for line in difflib.ndiff(*files) if line[0] in "+-"]
    assert 0 < len(changed) <= most
    assert max(map(len, files)) <= 600


@pytest.mark.parametrize("script", [*toy.SCRIPTS, "causal_model"])
def test_scripts_stand_alone(script):
    """causal_model is the only import from this repository, and causal_model imports nothing of it."""
    source = (toy.ROOT / f"{script}.py").read_text()
    imported = set(re.findall(r"^\s*(?:from|import) ([A-Za-z_]\w*)", source, re.MULTILINE))
    ours = {path.stem for path in toy.ROOT.glob("*.py")} | {"data", "tests", "paper", "toy"}
    assert imported & ours == (set() if script == "causal_model" else {"causal_model"})
