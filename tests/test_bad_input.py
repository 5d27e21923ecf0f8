"""Every mistake of a user's ends in one sentence that names the file or flag, exit status 2, and nothing written."""

import errno
import importlib
import io
import json
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import tqdm
from gymnasium import spaces
from pettingzoo.utils.conversions import parallel_to_aec

SHORT = ["--env", "toy:matching", "--no-cuda", "--batch-size", 16, "--hidden-dim", 8, "--total-iterations", 4]
SHORT += ["--causal-iterations", 2, "--eval-interval", 2, "--eval-episodes", 1, "--final-episodes", 1]
T, E = 100, 20  # transitions and episodes of the toy dataset


def refused(folder, *flags, script="macca_omar", monkeypatch):
    """The one sentence that such a call ends in, without a warning beside it; nothing may be left under runs/."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status, stdout, stderr = toy.run(script, folder, *flags, monkeypatch=monkeypatch)
    assert status == 2, (status, stdout, stderr)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    assert lines[0].startswith(f"{script}.py: ")
    assert not [
        w for w in caught if issubclass(w.category, UserWarning | RuntimeWarning) and "/.venv" not in w.filename
    ]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return lines[0]


@pytest.fixture(autouse=True)
def bars():
    """What the end of a process would do."""
    yield
    tqdm.tqdm._instances.clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dataset and a finished run on it."""
    folder = tmp_path_factory.mktemp("finished")
    dataset = write(folder / "data.npz")
    with pytest.MonkeyPatch.context() as monkeypatch:
        status, _, stderr = toy.run("macca_omar", folder, *SHORT, "--dataset", dataset, monkeypatch=monkeypatch)
    assert status == 0, stderr
    return dataset, toy.run_folder(folder)


# ---- datasets ----


def arrays_of(discrete=False):
    """The arrays of a dataset with final observations and masks."""
    return toy.final_arrays(toy.record(toy.Matching(discrete), T))


def write(path, discrete=False, drop=(), metadata=None, **changes):
    """A dataset file; `changes` replace arrays, `drop` leaves some out, `metadata` adds to it."""
    about = {"env": f"toy:matching{'_discrete' if discrete else ''}", "schema_version": "1", **(metadata or {})}
    arrays = {"metadata": np.array(json.dumps(about)), **arrays_of(discrete), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if name not in drop})
    return path


def changed(name, row, value):
    """One entry of an array replaced."""
    array = arrays_of(name.startswith("discrete "))[name.removeprefix("discrete ")]
    array = array.astype(type(value)) if array.dtype == bool else array
    array[row] = value
    return array


def scaled(factor):
    """Rewards of another size."""
    return {name: arrays_of()[name] * np.float32(factor) for name in ("rewards", "individual_rewards")}


def first_rows(rows):
    """So many transitions of everything, the last of which ends by a time limit."""
    arrays = {name: array[:rows] for name, array in arrays_of().items() if not name.startswith("final_")}
    return arrays | {"timeouts": np.arange(rows) == rows - 1, "final_observations": np.zeros((1, 2, 2), np.float32)}


STATES, OWNED = np.zeros((T, 3), np.float32), {"state_owner": [0, 1, -1]}
CONTINUOUS = {
    # what is wrong: (arguments of `write`, words of the sentence)
    "no observations": ({"drop": ["observations"]}, ["lacks observations"]),
    "no actions": ({"drop": ["actions"]}, ["lacks actions"]),
    "no rewards": ({"drop": ["rewards"]}, ["rewards"]),
    "no terminals": ({"drop": ["terminals"]}, ["lacks terminals"]),
    "no timeouts": ({"drop": ["timeouts"]}, ["lacks timeouts"]),
    "no final observations": ({"drop": ["final_observations"]}, ["lacks final_observations"]),
    "no metadata": ({"drop": ["metadata"]}, ["metadata"]),
    "too few final observations": (
        {"final_observations": np.zeros((3, 2, 2), np.float32)},
        ["final_observations", "[3, 2, 2]", "[20, 2, 2]"],
    ),
    "nan in final observations": ({"final_observations": np.full((E, 2, 2), np.nan)}, ["final_observations", "NaN"]),
    "final observations of another kind": ({"final_observations": np.full((E, 2, 2), "x")}, ["final_observations"]),
    "three agents": ({"observations": np.zeros((T, 3, 2), np.float32)}, ["observations", "[100, 3, 2]", "[100, 2, 2]"]),
    "observations of one dimension": ({"observations": np.zeros(T, np.float32)}, ["observations", "[100]"]),
    "flat actions": ({"actions": np.zeros((T, 4), np.float32)}, ["actions", "[100, 4]", "[100, 2, 2]"]),
    "indices where vectors belong": ({"actions": np.zeros((T, 2), np.int64)}, ["actions", "int64"]),
    "short rewards": ({"rewards": np.zeros(T - 1, np.float32)}, ["[99"]),
    "a number for rewards": ({"rewards": np.float32(1)}, ["rewards", "[]"]),
    "whole rewards": ({"rewards": np.zeros(T, np.int64)}, ["rewards", "int64"]),
    "equal rewards": (
        {"rewards": np.ones(T, np.float32), "individual_rewards": np.full((T, 2), 0.5, np.float32)},
        ["all rewards are equal"],
    ),
    "terminals as numbers": ({"terminals": np.zeros(T, np.float32)}, ["terminals", "float32"]),
    "both ends": ({"terminals": arrays_of()["timeouts"]}, ["both terminal and timeout"]),
    "no end": (
        {"timeouts": np.arange(T) == 4, "final_observations": STATES[:1, :2, None] @ [[0.0, 0]]},
        ["the last row"],
    ),
    "next observations of other rows": (
        {"next_observations": arrays_of()["observations"]},
        ["next_observations", "not the next row's"],
    ),
    "individual rewards of one agent": ({"individual_rewards": np.zeros(T, np.float32)}, ["individual_rewards"]),
    "flat states": ({"states": np.zeros(T, np.float32), "metadata": OWNED}, ["states", "[100]"]),
    "states with too many dimensions": (
        {"states": np.zeros((T, 2, 2), np.float32), "metadata": OWNED},
        ["states", "[100, 2, 2]"],
    ),
    "owners of no states": ({"metadata": OWNED}, ["lacks states"]),
    "causes of one agent": ({"shapley_rewards": np.zeros(T, np.float32)}, ["shapley_rewards", "[100]"]),
    "causes that are no split": ({"shapley_rewards": np.ones((T, 2), np.float32)}, ["or of shapley_rewards"]),
    "nan in causes": ({"shapley_rewards": np.full((T, 2), np.nan, np.float32)}, ["shapley_rewards", "NaN"]),
    "text": ({"observations": np.full((T, 2, 2), "x")}, ["observations"]),
    "no transitions": ({name: array[:0] for name, array in arrays_of().items()}, ["cannot be used"]),
    "one transition": (first_rows(1), ["all rewards are equal"]),
    "nan": ({"observations": changed("observations", 7, np.nan)}, ["observations", "NaN"]),
    "infinity": ({"rewards": changed("rewards", 7, np.inf)}, ["rewards", "infinity"]),
    "nan in individual rewards": (
        {"individual_rewards": changed("individual_rewards", 7, np.nan)},
        ["individual_rewards", "NaN"],
    ),
    "too large for float32": ({"rewards": np.full(T, 1e300)}, ["rewards", "infinity"]),
    "half floats that are infinite": ({"rewards": np.full(T, np.inf, np.float16)}, ["rewards", "infinity"]),
    "rewards too large to be squared": (scaled(1e20), ["rewards", "1e9"]),
    "an observation too large": ({"observations": changed("observations", 7, 1e10)}, ["observations", "1e9"]),
    "rewards that are the mean": (
        {"rewards": arrays_of()["individual_rewards"].mean(1)},
        ["rewards are not the sum of individual_rewards"],
    ),
    "owners of too few dimensions": (
        {"states": STATES, "metadata": {"state_owner": [0, 1]}},
        ["state_owner must name 3"],
    ),
    "owners of too many": (
        {"states": STATES, "metadata": {"state_owner": [0, 1, -1, -1]}},
        ["state_owner must name 3"],
    ),
    "an owner beyond the agents": ({"states": STATES, "metadata": {"state_owner": [0, 2, -1]}}, ["state_owner"]),
    "an owner below nobody": ({"states": STATES, "metadata": {"state_owner": [0, -2, 1]}}, ["state_owner"]),
    "an owner's name": ({"states": STATES, "metadata": {"state_owner": [0, "agent_1", -1]}}, ["state_owner"]),
    "an owner of 400 digits": ({"states": STATES, "metadata": {"state_owner": [0, 10**400, -1]}}, ["state_owner"]),
    "owners by name": ({"states": STATES, "metadata": {"state_owner": {"0": 0, "1": 1, "2": -1}}}, ["state_owner"]),
    "a number for owners": ({"states": STATES[:, :1], "metadata": {"state_owner": 0}}, []),
    "a word for a reference": ({"metadata": {"random_return": "abc"}}, []),
    "an infinite reference": ({"metadata": {"expert_return": float("inf")}}, ["expert_return"]),
    "a reference of 400 digits": ({"metadata": {"random_return": 10**400}}, []),
    "actions out of range": ({"actions": changed("actions", 7, 1.02)}, ["actions", "-1 to 1"]),
    "another environment": ({"metadata": {"env": "mpe/simple_spread"}}, ["mpe/simple_spread", "toy:matching"]),
    "pickled": ({"individual_rewards": np.full((T, 2), None, object)}, ["allow_pickle"]),
}


@pytest.mark.parametrize("mistake", CONTINUOUS)
def test_dataset(mistake, tmp_path, monkeypatch):
    """A dataset that does not fit is refused before anything is trained on it."""
    arguments, words = CONTINUOUS[mistake]
    path = write(tmp_path / "bad.npz", **arguments)
    sentence = refused(tmp_path, *SHORT, "--dataset", path, monkeypatch=monkeypatch)
    assert str(path) in sentence and all(word in sentence for word in words), sentence


DISCRETE = {
    "index too large": ({"actions": changed("discrete actions", 7, 5)}, ["actions", "0 to 4"]),
    "negative index": ({"actions": changed("discrete actions", 7, -1)}, ["actions", "0 to 4"]),
    "vectors": ({"actions": np.zeros((T, 2, 5), np.float32)}, ["actions", "float32"]),
    "indices with one more axis": ({"actions": np.zeros((T, 2, 1), np.int64)}, ["actions", "[100, 2, 1]", "[100, 2]"]),
    "masks of too few actions": ({"action_masks": np.ones((T, 2, 4), bool)}, ["action_masks", "[100, 2, 4]"]),
    "masks as numbers": ({"final_action_masks": np.ones((E, 2, 5), np.int8)}, ["final_action_masks", "int8"]),
    "an action that was not allowed": ({"action_masks": np.zeros((T, 2, 5), bool)}, ["action_masks"]),
    "no masks after a timeout": ({"drop": ["final_action_masks"]}, ["final_action_masks"]),
}


@pytest.mark.parametrize("script", ["macca_omar", "macca_icq"])
@pytest.mark.parametrize("mistake", DISCRETE)
def test_discrete_dataset(mistake, script, tmp_path, monkeypatch):
    """Indices and masks. A time limit bootstraps: the next row's mask, of another episode, would be a wrong one."""
    arguments, words = DISCRETE[mistake]
    path = write(tmp_path / "bad.npz", discrete=True, **arguments)
    flags = ["--env", "toy:matching_discrete", *SHORT[2:], "--dataset", path]
    sentence = refused(tmp_path, *flags, script=script, monkeypatch=monkeypatch)
    assert str(path) in sentence and all(word in sentence for word in words), sentence


def test_nothing_to_learn_the_values_of(tmp_path, monkeypatch):
    """ICQ needs a next action: where a time limit ends every episode after one step, there is none."""
    ends = {"timeouts": np.ones(T, bool), "final_observations": arrays_of()["observations"]}
    path = write(tmp_path / "bad.npz", **ends)
    sentence = refused(tmp_path, *SHORT, "--dataset", path, script="macca_icq", monkeypatch=monkeypatch)
    assert str(path) in sentence and "next action" in sentence
    assert toy.run("macca_cql", tmp_path, *SHORT, "--dataset", path, monkeypatch=monkeypatch)[0] == 0


def member(array):
    np.lib.format.write_array(buffer := io.BytesIO(), np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def pack(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_files_that_are_no_dataset(tmp_path, monkeypatch):
    """Missing, a folder, empty, text, cut short, damaged inside, a bare array, another format, wrong metadata."""
    whole = write(tmp_path / "whole.npz").read_bytes()
    with np.load(tmp_path / "whole.npz") as file:
        members = {f"{name}.npy": member(file[name]) for name in file}
    text = json.loads(str(np.load(tmp_path / "whole.npz")["metadata"]))
    rewards = members["rewards.npy"]
    contents = {
        "empty.npz": b"",
        "text.npz": b"these are not the arrays that you are looking for",
        "truncated.npz": whole[: len(whole) // 2],
        "damaged.npz": whole[:3000] + bytes(400) + whole[3400:],
        "array.npz": rewards,
        "hdf5.npz": b"\x89HDF\r\n\x1a\n" + whole,
        "compression.npz": whole.replace(b"PK\x01\x02\x2d\x03\x2d\0\0\0\0\0", b"PK\x01\x02\x2d\x03\x2d\0\0\0\x63\0"),
    }
    assert contents["compression.npz"] != whole
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    changes = {
        "rows.npz": {"rewards.npy": rewards.replace(b"(100,), }" + b" " * 10, b"(1000000000000,), }")},
        "header.npz": {"rewards.npy": rewards.replace(b"'descr'", b"'desXr'")},
        "code.npz": {"rewards.npy": rewards.replace(b"'<f4'", b"id(4)")},
        "kind.npz": {"rewards.npy": rewards.replace(b"'<f4'", b"'<f2'")},
        "no_array.npz": {"rewards.npy": b"no array"},
        "json.npz": {"metadata.npy": member("{not JSON")},
        "list.npz": {"metadata.npy": member(json.dumps([text]))},
        "nested.npz": {"metadata.npy": member('{"a":' * 3000 + "1" + "}" * 3000)},
        "digits.npz": {"metadata.npy": member(json.dumps(text)[:-1] + ', "a": 1' + "0" * 5000 + "}")},
    }
    for name, change in changes.items():
        assert change.keys() <= members.keys() and all(members[key] != value for key, value in change.items())
        pack(tmp_path / name, members | change)
    (tmp_path / "folder.npz").mkdir()
    for name in [*contents, *changes, "folder.npz", "missing.npz"]:
        sentence = refused(tmp_path, *SHORT, "--dataset", tmp_path / name, monkeypatch=monkeypatch)
        assert str(tmp_path / name) in sentence and "unsafely" not in sentence, sentence
    sentence = refused(tmp_path, *SHORT, "--dataset", "medium", monkeypatch=monkeypatch)
    assert "medium.npz does not exist" in sentence and "data/collect" in sentence


def test_what_nobody_reads_is_no_fault(tmp_path, monkeypatch):
    """A README in the zip, a Mac's shadow files, an array of objects that no script needs."""
    write(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as file:
        members = {f"{name}.npy": member(file[name]) for name in file}
    np.lib.format.write_array(objects := io.BytesIO(), np.array([{"step": 1}], object))
    extra = {"README": b"read me", "__MACOSX/._rewards.npy": b"\0\5\x16\7", "infos.npy": objects.getvalue()}
    pack(tmp_path / "extra.npz", members | extra)
    status, _, stderr = toy.run(
        "macca_omar", tmp_path, *SHORT, "--dataset", tmp_path / "extra.npz", monkeypatch=monkeypatch
    )
    assert status == 0, stderr


@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_few_rows(rows, script, tmp_path, monkeypatch):
    """So few that what is not held out may have no standard deviation: trained on all the same, with finite numbers."""
    for name in ("one", "many"):  # episodes
        folder = tmp_path / name
        folder.mkdir()
        arrays = first_rows(rows)
        if name == "many":
            ends = {"terminals": np.ones(rows, bool), "timeouts": np.zeros(rows, bool)}
            arrays |= ends | {"final_observations": np.zeros((rows, 2, 2), np.float32)}
        path = write(folder / "few.npz", **arrays)
        status, _, stderr = toy.run(script, folder, *SHORT, "--dataset", path, monkeypatch=monkeypatch)
        assert status == 0, stderr
        assert np.isfinite(np.genfromtxt(toy.run_folder(folder) / "metrics.csv", delimiter=",", skip_header=1)).all()


@pytest.mark.parametrize("script", toy.SCRIPTS)
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e8])
def test_rewards_of_any_size(factor, script, tmp_path, monkeypatch):
    """Far from 1 in either direction: every number in metrics.csv is finite."""
    path = write(tmp_path / "data.npz", **scaled(factor))
    status, _, stderr = toy.run(script, tmp_path, *SHORT, "--dataset", path, monkeypatch=monkeypatch)
    assert status == 0, stderr
    with open(toy.run_folder(tmp_path) / "metrics.csv") as file:
        numbers = [float(number) for line in [*file][1:] for number in line.strip().split(",") if number]
    assert len(numbers) > 10 and np.isfinite(numbers).all()


def test_individual_rewards_only_where_they_are_needed(tmp_path, monkeypatch):
    """A benchmark without individual rewards can be trained on; what needs them, or causes, says so."""
    path = write(tmp_path / "team.npz", drop=["individual_rewards"])
    for credit, lacking in (("truth", "individual_rewards"), ("oracle", "shapley_rewards")):
        sentence = refused(tmp_path, *SHORT, "--dataset", path, "--credit", credit, monkeypatch=monkeypatch)
        assert f"{path} lacks {lacking}" in sentence
    assert toy.run("macca_omar", tmp_path, *SHORT, "--dataset", path, monkeypatch=monkeypatch)[0] == 0


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_oracle(script, tmp_path, monkeypatch):
    """It trains on recorded causes, and on nothing else."""
    causes = np.float32([0.25, 0.75]) * arrays_of()["rewards"][:, None]
    path = write(tmp_path / "data.npz", drop=["individual_rewards"], shapley_rewards=causes)
    flags = [*SHORT, "--dataset", path, "--credit", "oracle"]
    status, _, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr


def test_other_number_types_are_read(tmp_path, monkeypatch):
    """float64 arrays and small integers hold the same numbers: they are converted, and give the same weights."""
    for discrete in (False, True):
        arrays, results = arrays_of(discrete), []
        wide = {
            name: array.astype(">f8") if array.dtype == np.float32 else array.astype(np.uint8)
            for name, array in arrays.items()
            if array.dtype in (np.float32, np.int64)
        }
        env = f"toy:matching{'_discrete' if discrete else ''}"
        for name, changes in (("plain", arrays), ("wide", arrays | wide)):
            folder = tmp_path / f"{name}{discrete}"
            folder.mkdir()
            path = write(folder / "data.npz", discrete, **changes)
            flags = ["--env", env, *SHORT[2:], "--dataset", path]
            status, _, stderr = toy.run("macca_icq", folder, *flags, monkeypatch=monkeypatch)
            assert status == 0, stderr
            results.append(torch.load(toy.run_folder(folder) / "checkpoint.pt", weights_only=True)["nets"])
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- environments ----


class Counting(toy.Matching):
    """Discrete actions that do not begin at 0."""

    def __init__(self):
        super().__init__(discrete=True)

    def action_space(self, agent):
        return spaces.Discrete(5, start=1)


class InADict(Counting):
    """The mask inside of the observation, as in PettingZoo's classic games."""

    def action_space(self, agent):
        return spaces.Discrete(5)

    def observation_space(self, agent):
        return spaces.Dict({"observation": spaces.Box(-1.0, 1.0, (2,)), "action_mask": spaces.MultiBinary(5)})


class Maskless(InADict):
    """The masks that the dataset has are not in the infos."""

    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (2,))

    def _observe(self):
        observations, infos = super()._observe()
        self.masks[:] = True
        return observations, {agent: {} for agent in infos}


class ForAll(toy.Matching):
    """A key that is no agent's, as RLlib has it."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, {**rewards, "__all__": sum(rewards.values())}, *rest


class Narrow(toy.Matching):
    """Observations narrower than their space: numpy would broadcast a single number."""

    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (3,))


class Image(toy.Matching):
    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (2, 2))


class Number(toy.Matching):
    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, ())


class Unseeded(toy.Matching):
    """Gym's reset of old: without a seed, and observations alone."""

    def reset(self):
        return super().reset()[0]


class Lonely(toy.Matching):
    """A step that returns rewards of nobody knows whom."""

    def step(self, actions):
        return super().step(actions)[0], 1.0, False, {}


class Deserted(toy.Matching):
    def __init__(self):
        super().__init__()
        self.possible_agents = []


class Broken(toy.Matching):
    def step(self, actions):
        raise ConnectionError("the game is gone")


def turns():
    """An AEC environment: one agent acts at a time."""
    return parallel_to_aec(toy.Matching())


ENVIRONMENTS = {
    "Counting": ["Discrete(5, start=1)"],
    "InADict": ["masks belong in"],
    "ForAll": ["__all__"],
    "Narrow": ["(2,)", "(3,)"],
    "Image": ["vectors"],
    "Number": ["vectors"],
    "Unseeded": ["seed"],
    "Lonely": [],
    "Deserted": [],
    "Broken": ["the game is gone"],
    "turns": ["parallel environment"],
}


@pytest.mark.filterwarnings("ignore:The base environment")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(name, finished, tmp_path, monkeypatch):
    """What cannot be played is refused before training, not at the first evaluation."""
    flags = [*SHORT[2:], "--dataset", finished[0], "--env", f"test_bad_input:{name}"]
    sentence = refused(tmp_path, *flags, monkeypatch=monkeypatch)
    assert f"--env test_bad_input:{name}" in sentence and all(word in sentence for word in ENVIRONMENTS[name]), sentence


def test_masks_in_the_dataset_only(tmp_path, monkeypatch):
    """The policy would play what is forbidden there."""
    about = {"env": "test_bad_input:Maskless"}
    path = write(tmp_path / "data.npz", True, metadata=about)
    flags = [*SHORT[2:], "--dataset", path, "--env", "test_bad_input:Maskless"]
    sentence = refused(tmp_path, *flags, monkeypatch=monkeypatch)
    assert str(path) in sentence and "action masks" in sentence
    allowed = {name: np.ones_like(array) for name, array in arrays_of(True).items() if "masks" in name}
    write(path, True, metadata=about, **allowed)
    assert toy.run("macca_omar", tmp_path, *flags, monkeypatch=monkeypatch)[0] == 0


# ---- arguments ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch-size", 0], ["--batch-size is 0"]),
        (["--batch-size", 1], ["--batch-size is 1"]),  # has no standard deviation
        (["--batch-size", -5], ["--batch-size is -5"]),
        (["--batch-size", 10**12], ["--batch-size is 1000000000000"]),
        (["--hidden-dim", 10**12], ["--hidden-dim is 1000000000000"]),
        (["--causal-iterations", 0], ["--causal-iterations is 0"]),
        (["--references", 0], ["--references is 0"]),
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
        (["--eval-episodes", 0], ["--eval-episodes is 0"]),
        (["--final-episodes", 0], ["--final-episodes is 0"]),
        (["--omar-samples", 0], ["--omar-samples is 0"]),
        (["--omar-rounds", 0], ["--omar-rounds is 0"]),
        (["--cql-samples", 0], ["--cql-samples is 0"]),
        (["--total-iterations", -1], ["--total-iterations is -1"]),
        (["--total-iterations", 0], ["--total-iterations is 0"]),
        (["--env", "simple_spread"], ["--env simple_spread"]),
        (["--env", "nosuchfamily/task"], ["--env nosuchfamily/task"]),
        (["--env", "mpe/nosuchtask"], ["--env mpe/nosuchtask", "simple_spread"]),
        (["--env", "nosuchmodule:factory"], ["--env nosuchmodule:factory", "nosuchmodule"]),
        (["--env", "toy:nosuchfactory"], ["--env toy:nosuchfactory", "nosuchfactory"]),
        (["--env", "json:JSONDecoder"], ["--env json:JSONDecoder"]),
        (["--env", ":"], ["--env :"]),
        (["--env", "toy:Unequal"], ["--env toy:Unequal", "different"]),
        (["--env", "toy:Wide"], ["--env toy:Wide", "Box(-1, 1"]),
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
    assert "CUDA" in sentence and "--no-cuda" in sentence


# ---- runs ----


def test_runs_that_cannot_be_resumed(finished, tmp_path, monkeypatch):
    """Not a run, a run of another script, without its checkpoint, with another dataset, or with other arguments."""
    dataset, run = finished

    def sentence(*flags, script="macca_omar"):
        return refused(tmp_path, "--resume", *flags, "--no-cuda", script=script, monkeypatch=monkeypatch)

    for folder in (tmp_path / "nowhere", dataset.parent, dataset):
        assert str(folder) in sentence(folder) and "start again" in sentence(folder)
    for script in ("macca_cql", "macca_icq"):  # one lacks arguments that this run has, the other has some of its own
        assert "macca_omar.py" in sentence(run, script=script) and str(run) in sentence(run, script=script)
    young = tmp_path / "young"  # it ended before its first checkpoint
    young.mkdir()
    (young / "config.json").write_bytes((run / "config.json").read_bytes())
    assert str(young) in sentence(young) and "start again" in sentence(young)
    assert "gamma" in sentence(run, "--gamma", 0.5)
    assert "seed" in sentence(run, "--seed", 7)
    assert "lambda1" in sentence(run, "--lambda1", 1, "--total-iterations", 9)
    assert "credit" in sentence(run, "--credit", "team") and "dataset" in sentence(run, "--dataset", "expert")
    assert "4 iterations" in sentence(run, "--total-iterations", 3)  # it has done 4
    content = dataset.read_bytes()
    try:
        write(dataset, **scaled(2))
        assert str(run) in sentence(run) and "another dataset" in sentence(run)
        dataset.unlink()
        assert str(dataset) in sentence(run) and "does not exist" in sentence(run)
    finally:
        dataset.write_bytes(content)


def test_checkpoints_that_are_not_whole(finished, tmp_path, monkeypatch):
    """Cut short, garbage, one flipped bit anywhere, or edited by hand: no number of it is trained on."""
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    good = (run / "checkpoint.pt").read_bytes()
    stored = torch.load(io.BytesIO(good), weights_only=True)
    contents = {
        "empty": b"",
        "garbage": b"garbage",
        "half": good[: len(good) // 2],
        "short": good[:-1],
        "long": good + b"x",
    }
    edits = {
        "list": [1, 2],
        "hollow": {name: value for name, value in stored.items() if name != "nets"},
        "credit": {**stored, "args": {**stored["args"], "credit": "maccca"}},
        "nan": {**stored, "nets": {name: x * torch.nan for name, x in stored["nets"].items()}},
        "shape": {**stored, "actor": {**stored["actor"], "state": {0: {"step": 1.0, "exp_avg": torch.zeros(3)}}}},
    }
    for name, edit in edits.items():
        torch.save(edit, buffer := io.BytesIO())
        contents[name] = buffer.getvalue()
    for content in contents.values():
        (run / "checkpoint.pt").write_bytes(content)
        sentence = refused(tmp_path, "--resume", run, "--no-cuda", monkeypatch=monkeypatch)
        assert str(run) in sentence and "no whole checkpoint" in sentence
    script, rng = importlib.import_module("macca_omar"), np.random.default_rng(0)
    (run / "checkpoint.pt").write_bytes(good)
    assert script.load_checkpoint(run).keys() == stored.keys()
    for _ in range(50):
        flipped = bytearray(good)
        flipped[rng.integers(len(good))] ^= 1 << rng.integers(8)
        (run / "checkpoint.pt").write_bytes(flipped)
        with pytest.raises(SystemExit):
            script.load_checkpoint(run)


def test_a_cql_run_is_not_resumed_by_omar(tmp_path, monkeypatch):
    """The arguments of CQL are all known to OMAR, which has more: it must not go on with defaults for those."""
    dataset = write(tmp_path / "data.npz")
    assert toy.run("macca_cql", tmp_path, *SHORT, "--dataset", dataset, monkeypatch=monkeypatch)[0] == 0
    run = toy.run_folder(tmp_path)
    sentence = refused(tmp_path, "--no-cuda", "--resume", run, monkeypatch=monkeypatch)
    assert "macca_cql.py" in sentence and str(run) in sentence


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written(number, finished, tmp_path, monkeypatch):
    """Full or read-only: told at the start and at resume, before anything is trained."""

    def write_bytes(path, content):
        raise OSError(number, "this disk does not take it")

    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    for flags in ([*SHORT, "--dataset", finished[0]], ["--no-cuda", "--resume", run, "--total-iterations", 9]):
        sentence = refused(tmp_path, *flags, monkeypatch=monkeypatch)
        assert "this disk does not take it" in sentence and "run" in sentence


# ---- numbers that go wrong ----


@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_a_loss_that_is_not_finite(script, tmp_path, monkeypatch):
    """The run stops, says which term it was, and the last good checkpoint stays as it was."""
    dataset = write(tmp_path / "data.npz")
    flags = [*SHORT, "--dataset", dataset, "--learning-rate", 1e9]
    (tmp_path / "first").mkdir()
    status, _, stderr = toy.run(script, tmp_path / "first", *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path / "first")
    assert status == 2 and "Traceback" not in stderr
    assert "_loss is" in stderr and "iteration 2" in stderr and "lower the learning rate" in stderr, stderr
    assert any(line.startswith(f"{script}.py: ") for line in stderr.splitlines())  # not behind the progress bar
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 0

    # A good run that goes wrong on the way, after its first checkpoint.
    (tmp_path / "later").mkdir()
    genuine, count = torch.nn.functional.relu, []

    def relu(x, *arguments, **keywords):
        return genuine(x * (torch.nan if count else 1.0), *arguments, **keywords)

    with monkeypatch.context() as patch:
        toy.after(2 + 3, lambda: count.append(1), patch)
        patch.setattr(torch.nn.functional, "relu", relu)
        status, _, stderr = toy.run(script, tmp_path / "later", *SHORT, "--dataset", dataset, monkeypatch=patch)
    run = toy.run_folder(tmp_path / "later")
    assert status == 2 and str(run.name) in stderr and "is nan at iteration 4" in stderr, stderr
    kept = torch.load(run / "checkpoint.pt", weights_only=True)
    assert kept["iteration"] == 2 and all(tensor.isfinite().all() for tensor in kept["nets"].values())


def test_a_loss_of_the_causal_model_that_is_not_finite(tmp_path, monkeypatch):
    """Nothing is credited by it."""
    flags = [*SHORT, "--dataset", write(tmp_path / "data.npz"), "--causal-learning-rate", 1e9]
    status, _, stderr = toy.run("macca_omar", tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 2 and "causal_loss is" in stderr and "iteration 0" in stderr and "Traceback" not in stderr
    assert torch.load(toy.run_folder(tmp_path) / "checkpoint.pt", weights_only=True)["iteration"] == -2


def test_interrupted_with_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """Ctrl-C between two checks must not replace a good checkpoint by one full of NaN."""
    dataset = write(tmp_path / "data.npz")
    toy.after(5, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    flags = [*SHORT, "--dataset", dataset, "--learning-rate", 1e9]
    flags += ["--eval-interval", 50, "--total-iterations", 50]
    status, _, stderr = toy.run("macca_cql", tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 2 and ("_loss is nan" in stderr or "_loss is inf" in stderr), (status, stderr)
    checkpoint = torch.load(toy.run_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 0 and all(tensor.isfinite().all() for tensor in checkpoint["nets"].values())


class Paying(toy.Matching):
    """It pays nan."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, dict.fromkeys(rewards, float("nan")), *rest


def test_a_return_that_is_not_finite(tmp_path, monkeypatch):
    """No nan is written to metrics.csv, and what was trained stays."""
    path = write(tmp_path / "data.npz", metadata={"env": "test_bad_input:Paying"})
    flags = [*SHORT[2:], "--env", "test_bad_input:Paying", "--dataset", path]
    status, _, stderr = toy.run("macca_icq", tmp_path, *flags, monkeypatch=monkeypatch)
    run = toy.run_folder(tmp_path)
    assert status == 2 and "return is nan at iteration 2" in stderr and "Traceback" not in stderr, stderr
    assert not (run / "metrics.csv").exists()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2


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
