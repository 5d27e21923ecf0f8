"""Every mistake of a user's ends in one sentence that names the file or flag, exit status 2, and nothing written."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import toy

SHORT = ["--env", "toy:matching", "--no-cuda", "--batch-size", 16, "--hidden-dim", 8, "--total-iterations", 4]
SHORT += ["--eval-interval", 2, "--eval-episodes", 1, "--final-episodes", 1]
T = 100  # transitions of the toy dataset


def refused(folder, *flags, script="macca_omar", monkeypatch):
    """The one sentence that such a call ends in; nothing may be left under runs/."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, stdout, stderr = toy.run(script, folder, *flags, monkeypatch=monkeypatch)
    assert status == 2, (status, stdout, stderr)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    assert lines[0].startswith(f"{script}.py: ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dataset and a finished run on it."""
    folder = tmp_path_factory.mktemp("finished")
    dataset = toy.write(folder / "data.npz")
    with pytest.MonkeyPatch.context() as monkeypatch:
        status, _, stderr = toy.run("macca_omar", folder, *SHORT, "--dataset", dataset, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return dataset, toy.run_folder(folder)


# ---- datasets ----


def changed(name, row, value):
    """One entry of an array replaced."""
    array = toy.record(toy.Matching(name.startswith("discrete ")), T)[name.removeprefix("discrete ")]
    array = array.astype(type(value)) if array.dtype == bool else array
    array[row] = value
    return array


CONTINUOUS = {
    # what is wrong: (arguments of toy.write, words of the sentence)
    "no observations": ({"drop": ["observations"]}, ["lacks observations"]),
    "no actions": ({"drop": ["actions"]}, ["lacks actions"]),
    "no rewards": ({"drop": ["rewards"]}, ["lacks rewards"]),
    "no terminals": ({"drop": ["terminals"]}, ["lacks terminals"]),
    "no timeouts": ({"drop": ["timeouts"]}, ["lacks timeouts"]),
    "no next observations": ({"drop": ["next_observations"]}, ["next_observations"]),
    "too few final observations": (
        {"drop": ["next_observations"], "final_observations": np.zeros((3, 2, 2), np.float32)},
        ["final_observations"],
    ),
    "nan in final observations": (
        {"drop": ["next_observations"], "final_observations": np.full((T // 5, 2, 2), np.nan, np.float32)},
        ["final_observations", "finite"],
    ),
    "final observations of another kind": (
        {"drop": ["next_observations"], "final_observations": np.full((T // 5, 2, 2), "x")},
        ["final_observations"],
    ),
    "three agents": ({"observations": np.zeros((T, 3, 2), np.float32)}, ["observations", "[100, 3, 2]", "[100, 2, 2]"]),
    "flat actions": ({"actions": np.zeros((T, 4), np.float32)}, ["actions", "[100, 4]", "[100, 2, 2]"]),
    "indices where vectors belong": ({"actions": np.zeros((T, 2), np.int64)}, ["actions", "int64"]),
    "short rewards": ({"rewards": np.zeros(T - 1, np.float32)}, ["[99"]),
    "a number for rewards": ({"rewards": np.float32(1)}, ["rewards", "[]"]),
    "whole rewards": ({"rewards": np.zeros(T, np.int64)}, ["rewards", "int64"]),
    "terminals as numbers": ({"terminals": np.zeros(T, np.float32)}, ["terminals", "float32"]),
    "individual rewards of one agent": ({"individual_rewards": np.zeros(T, np.float32)}, ["individual_rewards"]),
    "flat states": ({"states": np.zeros(T, np.float32)}, ["states", "[100]"]),
    "states with too many dimensions": ({"states": np.zeros((T, 2, 2), np.float32)}, ["states", "[100, 2, 2]"]),
    "text": ({"observations": np.full((T, 2, 2), "x")}, ["observations"]),
    "no transitions": (
        {
            name: np.zeros((0, *shape), bool if name in ("terminals", "timeouts") else np.float32)
            for name, shape in [
                *[(name, (2, 2)) for name in ("observations", "next_observations", "actions")],
                *[(name, ()) for name in ("rewards", "terminals", "timeouts")],
                ("individual_rewards", (2,)),
            ]
        },
        ["[0"],
    ),
    "nan": ({"observations": changed("observations", 7, np.nan)}, ["observations", "NaN or infinity"]),
    "infinity": ({"rewards": changed("rewards", 7, np.inf)}, ["rewards", "NaN or infinity"]),
    "nan in individual rewards": (
        {"individual_rewards": changed("individual_rewards", 7, np.nan)},
        ["individual_rewards", "NaN or infinity"],
    ),
    "too large for float32": (
        {"rewards": np.full(T, 1e300)},
        ["rewards", "NaN or infinity"],
    ),
    "rewards that are the mean": (
        {"rewards": toy.record(toy.Matching(), T)["individual_rewards"].mean(1)},
        ["rewards are not the sum of individual_rewards"],
    ),
    "owners of too few dimensions": (
        {"states": np.zeros((T, 3), np.float32), "metadata": {"state_owner": [0, 1]}},
        ["state_owner", "3 agents from 0 to 1"],
    ),
    "owners of too many dimensions": (
        {"states": np.zeros((T, 3), np.float32), "metadata": {"state_owner": [0, 1, -1, -1]}},
        ["state_owner", "3 agents from 0 to 1"],
    ),
    "an owner beyond the agents": (
        {"states": np.zeros((T, 3), np.float32), "metadata": {"state_owner": [0, 2, -1]}},
        ["state_owner", "0 to 1"],
    ),
    "an owner below nobody": (
        {"states": np.zeros((T, 3), np.float32), "metadata": {"state_owner": [0, -2, 1]}},
        ["state_owner", "0 to 1"],
    ),
    "an owner's name": (
        {"states": np.zeros((T, 3), np.float32), "metadata": {"state_owner": [0, "agent_1", -1]}},
        ["state_owner", "0 to 1"],
    ),
    "owners that are no list": (
        {"states": np.zeros((T, 3), np.float32), "metadata": {"state_owner": {"0": 0, "1": 1, "2": -1}}},
        ["state_owner"],
    ),
    "a number for owners": ({"states": np.zeros((T, 1), np.float32), "metadata": {"state_owner": 0}}, ["state_owner"]),
    "owners without states": ({"metadata": {"state_owner": [0, 0, 1, 1]}}, ["state_owner"]),
    "a word for a reference": ({"metadata": {"random_return": "abc"}}, ["random_return", "abc"]),
    "actions out of range": ({"actions": changed("actions", 7, 1.5)}, ["actions", "1.5", "-1 to 1"]),
    "another environment": ({"metadata": {"env": "mpe/simple_spread"}}, ["mpe/simple_spread", "toy:matching"]),
    "pickled": ({"individual_rewards": np.full((T, 2), None, object)}, ["allow_pickle"]),
}


@pytest.mark.parametrize("mistake", CONTINUOUS)
def test_dataset(mistake, tmp_path, monkeypatch):
    """A dataset that does not fit is refused before anything is trained on it."""
    arguments, words = CONTINUOUS[mistake]
    path = toy.write(tmp_path / "bad.npz", **arguments)
    sentence = refused(tmp_path, *SHORT, "--dataset", path, monkeypatch=monkeypatch)
    assert str(path) in sentence and all(word in sentence for word in words), sentence


DISCRETE = {
    "index too large": ({"actions": changed("discrete actions", 7, 5)}, ["actions", "5", "0 to 4"]),
    "negative index": ({"actions": changed("discrete actions", 7, -1)}, ["actions", "-1", "0 to 4"]),
    "vectors": ({"actions": np.zeros((T, 2, 5), np.float32)}, ["actions", "float32"]),
    "masks of too few actions": ({"action_masks": np.ones((T, 2, 4), bool)}, ["action_masks", "[100, 2, 4]"]),
    "masks as numbers": ({"next_action_masks": np.ones((T, 2, 5), np.int8)}, ["next_action_masks", "int8"]),
    "an action that was not allowed": ({"action_masks": np.zeros((T, 2, 5), bool)}, ["action_masks"]),
    "no masks after a timeout": ({"drop": ["next_action_masks"]}, ["next_action_masks"]),
}


@pytest.mark.parametrize("script", ["macca_omar", "macca_icq"])
@pytest.mark.parametrize("mistake", DISCRETE)
def test_discrete_dataset(mistake, script, tmp_path, monkeypatch):
    """Indices and masks. A time limit bootstraps: the next row's mask, of another episode, would be a wrong one."""
    arguments, words = DISCRETE[mistake]
    path = toy.write(tmp_path / "bad.npz", discrete=True, **arguments)
    flags = ["--env", "toy:matching_discrete", *SHORT[2:], "--dataset", path]
    sentence = refused(tmp_path, *flags, script=script, monkeypatch=monkeypatch)
    assert str(path) in sentence and all(word in sentence for word in words), sentence


def test_files_that_are_no_dataset(tmp_path, monkeypatch):
    """Missing, a folder, empty, text, cut short, damaged inside, a bare array, wrong metadata."""
    whole = toy.write(tmp_path / "whole.npz").read_bytes()
    contents = {
        "empty.npz": b"",
        "text.npz": b"these are not the arrays that you are looking for",
        "truncated.npz": whole[: len(whole) // 2],
        "damaged.npz": whole[:3000] + bytes(400) + whole[3400:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(3))
    arrays = toy.record(toy.Matching(), T)
    np.savez(tmp_path / "metadata.npz", **arrays, metadata=np.array("{not JSON"))
    np.savez(tmp_path / "list.npz", **arrays, metadata=np.array(json.dumps(["toy:matching"])))
    (tmp_path / "folder.npz").mkdir()
    for name in [*contents, "array.npy", "metadata.npz", "list.npz", "folder.npz", "missing.npz"]:
        sentence = refused(tmp_path, *SHORT, "--dataset", tmp_path / name, monkeypatch=monkeypatch)
        assert str(tmp_path / name) in sentence
    sentence = refused(tmp_path, *SHORT, "--dataset", "medium", monkeypatch=monkeypatch)
    assert "medium.npz does not exist" in sentence and "collect.py" in sentence


def test_individual_rewards_only_where_they_are_needed(tmp_path, monkeypatch):
    """A benchmark without individual rewards can be trained on; what needs them says so."""
    path = toy.write(tmp_path / "team.npz", drop=["individual_rewards"])
    for flag in ("--credit", "--causal-target"):
        sentence = refused(tmp_path, *SHORT, "--dataset", path, flag, "truth", monkeypatch=monkeypatch)
        assert str(path) in sentence and "individual_rewards" in sentence
    assert toy.run("macca_omar", tmp_path, *SHORT, "--dataset", path, monkeypatch=monkeypatch)[0] == 0


def test_other_number_types_are_read(tmp_path, monkeypatch):
    """float64 arrays and small integers hold the same numbers: they are converted, and give the same weights."""
    results = []
    for discrete in (False, True):
        arrays = toy.record(toy.Matching(discrete), T)
        wide = {
            name: array.astype(">f8") if array.dtype == np.float32 else array.astype(np.uint8)
            for name, array in arrays.items()
            if array.dtype in (np.float32, np.int64)
        }
        env = f"toy:matching{'_discrete' if discrete else ''}"
        for name, changes in (("plain", {}), ("wide", wide)):
            folder = tmp_path / f"{name}{discrete}"
            folder.mkdir()
            path = toy.write(folder / "data.npz", discrete, **changes)
            flags = ["--env", env, *SHORT[2:], "--dataset", path]
            status, _, stderr = toy.run("macca_icq", folder, *flags, monkeypatch=monkeypatch)
            assert status == 0, stderr
            results.append(torch.load(toy.run_folder(folder) / "policy.pt", weights_only=True)["actor"])
    for one, other in (results[:2], results[2:]):
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---- arguments ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch-size", 0], ["--batch-size is 0"]),
        (["--batch-size", 1], ["--batch-size is 1"]),  # has no deviation to standardise by
        (["--batch-size", -5], ["--batch-size is -5"]),
        (["--causal-pretrain-iterations", 0], ["--causal-pretrain-iterations is 0"]),  # "first" would never freeze
        (["--gamma", 2], ["--gamma is 2", "1"]),
        (["--gamma", -0.1], ["--gamma is -0.1"]),
        (["--gamma", "nan"], ["--gamma is nan"]),
        (["--learning-rate", "inf"], ["--learning-rate is inf"]),
        (["--learning-rate", -1], ["--learning-rate is -1"]),
        (["--target-rate", 1.5], ["--target-rate is 1.5"]),
        (["--h", 1.1], ["--h is 1.1"]),
        (["--tau", 1.1], ["--tau is 1.1"]),
        (["--lambda1", -1], ["--lambda1 is -1"]),
        (["--anchor", -1], ["--anchor is -1"]),
        (["--anchor", 0], ["--anchor is 0"]),
        (["--seed", -1], ["--seed is -1"]),
        (["--hidden-dim", 0], ["--hidden-dim is 0"]),
        (["--eval-interval", 0], ["--eval-interval is 0"]),
        (["--final-episodes", 0], ["--final-episodes is 0"]),
        (["--omar-samples", 0], ["--omar-samples is 0"]),
        (["--omar-rounds", 0], ["--omar-rounds is 0"]),
        (["--cql-samples", 0], ["--cql-samples is 0"]),
        (["--total-iterations", -1], ["--total-iterations is -1"]),
        (["--total-iterations", 0], ["--total-iterations", "--checkpoint"]),
        (["--env", "simple_spread"], ["--env", "simple_spread", "mpe/simple_spread"]),
        (["--env", "nosuchfamily/task"], ["--env nosuchfamily/task"]),
        (["--env", "mpe/nosuchtask"], ["--env mpe/nosuchtask", "simple_spread"]),
        (["--env", "nosuchmodule:factory"], ["--env nosuchmodule:factory", "nosuchmodule"]),
        (["--env", "toy:nosuchfactory"], ["--env toy:nosuchfactory", "nosuchfactory"]),
        (["--env", "json:JSONDecoder"], ["--env json:JSONDecoder"]),
        (["--env", ":"], ["--env :"]),
        (["--env", "toy:Unequal"], ["--env toy:Unequal", "different"]),
        (["--env", "toy:Wide"], ["--env toy:Wide", "from -1 to 1"]),
        (["--env", "toy:Several"], ["--env toy:Several", "MultiDiscrete"]),
    ],
)
def test_arguments(flags, words, finished, tmp_path, monkeypatch):
    """Numbers that cannot be meant and environments that cannot be played."""
    sentence = refused(tmp_path, *SHORT, "--dataset", finished[0], *flags, monkeypatch=monkeypatch)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("flags, words", [(["--expectile", 1.5], "--expectile is 1.5"), (["--beta", 0], "--beta is 0")])
def test_arguments_of_icq(flags, words, finished, tmp_path, monkeypatch):
    """ICQ divides by its temperature, and an expectile lies between 0 and 1."""
    flags = [*SHORT, "--dataset", finished[0], *flags]
    assert words in refused(tmp_path, *flags, script="macca_icq", monkeypatch=monkeypatch)


def test_cuda_where_there_is_none(finished, tmp_path, monkeypatch):
    """--cuda without a device is an error, not a silent fall back to the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = [flag for flag in SHORT if flag != "--no-cuda"]
    sentence = refused(tmp_path, *flags, "--dataset", finished[0], "--cuda", monkeypatch=monkeypatch)
    assert "--cuda" in sentence


# ---- checkpoints ----


def test_checkpoints_that_do_not_belong(finished, tmp_path, monkeypatch):
    """Of another script, another dataset, other sizes, garbage, missing, or actors alone where training goes on."""
    dataset, run = finished
    good, flags = run / "checkpoint.pt", [*SHORT, "--dataset", dataset]

    def sentence(*more, script="macca_omar"):
        return refused(tmp_path, *flags, *more, script=script, monkeypatch=monkeypatch)

    for script in ("macca_cql", "macca_icq"):
        found = sentence("--checkpoint", good, script=script)
        assert str(good) in found and "macca_omar.py" in found and f"{script}.py" in found
    other = toy.write(tmp_path / "other.npz", transitions=2 * T)
    assert str(good) in sentence("--checkpoint", good, "--dataset", other)
    assert "hidden_dim" in sentence("--checkpoint", good, "--hidden-dim", 9)
    assert "layer_norm" in sentence("--checkpoint", good, "--no-layer-norm")
    assert "last_action" in sentence("--checkpoint", good, "--no-last-action")
    assert "policy.pt" in sentence("--checkpoint", run / "policy.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "half.pt").write_bytes(good.read_bytes()[:2000])
    torch.save([1, 2], tmp_path / "list.pt")
    stored = torch.load(good, weights_only=True)
    keys = {name: stored[name] for name in stored.keys() - {"networks", "actor"}}
    torch.save(keys, tmp_path / "hollow.pt")
    torch.save({**stored, "networks": {}}, tmp_path / "nothing.pt")
    for name in ("garbage.pt", "empty.pt", "half.pt", "list.pt", "hollow.pt", "nothing.pt", "missing.pt"):
        assert str(tmp_path / name) in sentence("--checkpoint", tmp_path / name)
        assert str(tmp_path / name) in sentence("--checkpoint", tmp_path / name, "--total-iterations", 0)


def test_runs_that_cannot_be_resumed(finished, tmp_path, monkeypatch):
    """Not a run, a run of another script, without its checkpoint, damaged, or with other arguments."""
    dataset, run = finished

    def sentence(*flags, script="macca_omar"):
        return refused(tmp_path, *flags, "--no-cuda", script=script, monkeypatch=monkeypatch)

    assert "--resume" in sentence("--resume", tmp_path / "nowhere")
    assert "--resume" in sentence("--resume", dataset.parent)
    for script in ("macca_cql", "macca_icq"):  # one lacks arguments that this run has, the other has some of its own
        assert "--resume" in sentence("--resume", run, script=script)
    for name, content in (("text", "not JSON"), ("empty", "{}"), ("list", "[]"), ("number", '{"args": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        assert "--resume" in sentence("--resume", tmp_path / name)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_bytes((run / "config.json").read_bytes())
    assert str(tmp_path / "young" / "checkpoint.pt") in sentence("--resume", tmp_path / "young")
    assert "gamma" in sentence("--resume", run, "--gamma", 0.5)
    assert "seed" in sentence("--resume", run, "--seed", 7)
    assert "lambda1" in sentence("--resume", run, "--lambda1", 1, "--total-iterations", 9)
    assert "--total-iterations" in sentence("--resume", run, "--total-iterations", 3)  # it has done 4


def test_a_cql_run_is_not_resumed_by_omar(tmp_path, monkeypatch):
    """The arguments of CQL are all known to OMAR, which has more: it must not go on with defaults for those."""
    dataset = toy.write(tmp_path / "data.npz")
    assert toy.run("macca_cql", tmp_path, *SHORT, "--dataset", dataset, monkeypatch=monkeypatch)[0] == 0
    run = toy.run_folder(tmp_path)
    assert "--resume" in refused(tmp_path, "--no-cuda", "--resume", run, monkeypatch=monkeypatch)


# ---- numbers that go wrong ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_a_loss_that_is_not_finite(script, tmp_path, monkeypatch):
    """The run stops, says which term it was, and the last good checkpoint stays as it was."""
    dataset = toy.write(tmp_path / "data.npz")
    flags = [*SHORT, "--dataset", dataset, "--learning-rate", 1e18]
    status, _, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    assert status == 2 and "Traceback" not in stderr
    assert "_loss is" in stderr and "iteration 2" in stderr and "--learning-rate" in stderr, stderr
    assert stderr.splitlines()[-1].startswith(f"{script}.py: ")  # on a line of its own, not behind the progress bar
    assert not list(run.glob("*.pt"))

    # A good run that goes wrong on the way, after its first checkpoint.
    (tmp_path / "later").mkdir()
    genuine, count = torch.nn.functional.relu, []

    def relu(x, *arguments, **keywords):
        return genuine(x * (torch.nan if count else 1.0), *arguments, **keywords)

    with monkeypatch.context() as patch:
        toy.after(3, lambda: count.append(1), patch)
        patch.setattr(torch.nn.functional, "relu", relu)
        status, _, stderr = toy.run(script, tmp_path / "later", *SHORT, "--dataset", dataset, monkeypatch=patch)
    run = toy.run_folder(tmp_path / "later")
    assert status == 2 and str(run.name) in stderr and "is nan at iteration 4" in stderr, stderr
    kept = torch.load(run / "checkpoint.pt", weights_only=True)
    assert kept["iteration"] == 2 and all(tensor.isfinite().all() for tensor in kept["networks"].values())


def test_interrupted_with_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """Ctrl-C between two checks must not replace a good checkpoint by one full of NaN."""
    dataset = toy.write(tmp_path / "data.npz")
    toy.after(5, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    flags = [*SHORT, "--dataset", dataset, "--learning-rate", 1e18, "--eval-interval", 50, "--total-iterations", 50]
    status, _, stderr = toy.run("macca_cql", tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 2 and ("_loss is nan" in stderr or "_loss is inf" in stderr), (status, stderr)
    assert not list(toy.run_folder(tmp_path).glob("*.pt"))


# ---- the same in a process of its own ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--env", "smac/nosuchmap"], "--env smac/nosuchmap"),
        (["--credit", "yes"], "credit"),
    ],
)
def test_the_command_itself(flags, words, tmp_path):
    """What a user sees in a terminal: exit status 2, no traceback, and no runs folder."""
    command = [sys.executable, toy.ROOT / "macca_cql.py", "--no-cuda", *flags]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr and words in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
