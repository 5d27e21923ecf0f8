"""Our files in other people's layouts: as their libraries expect them, and back without a difference."""

import contextlib
import io
import json
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import test_convert
import toy
from test_convert import healthy, leaf, load, run, save

from data import export


def exported(source, to, folder):
    """(status, stdout, stderr)"""
    status, stdout, stderr = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py"])
        try:
            export.main(export.Args(source, to, folder))
        except SystemExit as stop:
            status = stop.code
    return status, stdout.getvalue(), stderr.getvalue()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["continuous", "discrete", "next", "team"])
@pytest.mark.parametrize("to", ["minari", "vault"])
def test_there_and_back(to, kind, wide, tmp_path):
    """Identical arrays. Only what followed a terminal, which nobody uses, has no place in a vault."""
    arrays, metadata = healthy(kind)
    arrays["shapley_rewards"] = (arrays["rewards"][:, None] * [0.25, 0.75]).astype(np.float32)
    if kind == "team":
        for name in ("individual_rewards", "states"):
            del arrays[name]
    types = {name: np.float64 if wide and array.dtype == np.float32 else array.dtype for name, array in arrays.items()}
    save(
        tmp_path / "ours.npz", {name: array.astype(types[name]) for name, array in arrays.items()}, json.dumps(metadata)
    )
    status, stdout, stderr = exported(tmp_path / "ours.npz", to, tmp_path / "theirs")
    assert status == 0 and "theirs" in stdout, stderr
    flags = ["--env", "x", "--quality", "y", "--output", tmp_path / "back.npz"]
    status, stdout, stderr = run(tmp_path / "theirs", *flags)
    assert status == 0 and "not read" not in stdout, stderr
    back, _ = load(tmp_path / "back.npz")
    ends = arrays["terminals"] | arrays["timeouts"]
    for name in [name for name in arrays if name.startswith("next_")]:
        arrays[name.replace("next_", "final_")] = arrays.pop(name)[ends]
    assert back.keys() == arrays.keys()
    known = arrays["timeouts"][ends] if to == "vault" else slice(None)
    for name, array in arrays.items():
        chosen = known if name.startswith("final_") else slice(None)
        np.testing.assert_array_equal(back[name][chosen], array[chosen], err_msg=name)
        assert back[name].dtype == array.dtype


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_minari(kind, tmp_path):
    """Every episode and space as Minari has them (0.5.4 read these files and found every step in its spaces)."""
    arrays, metadata = healthy(kind)
    source = save(tmp_path / "ours.npz", arrays, json.dumps(metadata))
    assert exported(source, "minari", tmp_path / "toy-v0")[0] == 0
    about = json.loads((tmp_path / "toy-v0" / "data" / "metadata.json").read_text())
    assert (about["total_episodes"], about["total_steps"], about["data_format"]) == (8, 37, "hdf5")
    assert re.fullmatch(r"([-_\w][-_\w/]*[-_\w]+/)?[-_\w]+?-v\d+", about["dataset_id"])
    assert json.loads(about["description"]) == metadata
    space = json.loads(about["observation_space"])
    assert space["shape"] == [2, 2] and space["low"] == [[-np.inf] * 2] * 2 and space["dtype"] == "float32"
    space = json.loads(about["action_space"])
    assert space["nvec"] == [5, 5] if kind == "discrete" else space["high"] == [[1.0] * 2] * 2
    with h5py.File(tmp_path / "toy-v0" / "data" / "main_data.hdf5") as file:
        assert [*file] == [f"episode_{number}" for number in range(8)]
        first = file["episode_0"]
        assert first.attrs["total_steps"] == 5 and first["observations"].shape == (6, 2, 2)
        np.testing.assert_array_equal(first["observations"][5], arrays["final_observations"][0])
        np.testing.assert_array_equal(first["truncations"], arrays["timeouts"][:5])
        if kind == "discrete":
            np.testing.assert_array_equal(first["infos/action_mask"][5], arrays["final_action_masks"][0])


@pytest.mark.parametrize("to", ["minari", "vault"])
def test_particle_tasks_there_and_back(to, tmp_path):
    """The shipped dataset, also the owners of its states, which these formats have no place for."""
    arrays, metadata = load(test_convert.SHIPPED)
    short = {name: x[:4] if name.startswith("final_") else x[:100] for name, x in arrays.items()}
    kept = {"env": metadata["env"], "schema_version": "1", "state_owner": metadata["state_owner"]}
    assert exported(save(tmp_path / "ours.npz", short, json.dumps(kept)), to, tmp_path / "theirs")[0] == 0
    flags = ["--env", metadata["env"], "--quality", "y", "--output", tmp_path / "back.npz"]
    status, _, stderr = run(tmp_path / "theirs", *flags)
    assert status == 0, stderr
    back, about = load(tmp_path / "back.npz")
    assert about["state_owner"] == metadata["state_owner"] and back.keys() == short.keys()
    for name in short.keys() - {"rewards"}:  # the team's is the sum of the agents' again, with other last digits
        np.testing.assert_array_equal(back[name], short[name], err_msg=name)


def test_vault(tmp_path):
    """A step for what followed a time limit; the structure that flashbax (0.1.3 read these files) looks for."""
    arrays, metadata = healthy("discrete")
    source = save(tmp_path / "ours.npz", arrays, json.dumps(metadata))
    assert exported(source, "vault", tmp_path / "toy.vlt")[0] == 0
    folder = tmp_path / "toy.vlt" / "medium"
    about = json.loads((folder / "metadata.json").read_text())
    steps = int(np.max(leaf(folder, "vault_index")))
    assert about["version"] == 1.2 and steps == 37 + 6
    assert about["structure_shape"]["infos"] == {"legals": "(1, 43, 2, 5)", "state": "(1, 43, 4)"}
    assert about["structure_dtype"]["actions"] == "int64" and about["structure_shape"]["rewards"] == "(1, 43, 2)"
    found = {name: np.asarray(leaf(folder, f"{name}.")[0, :steps]) for name in ("actions", "rewards", "truncations")}
    legals = np.asarray(leaf(folder, "infos.legals.")[0, :steps])
    assert np.take_along_axis(legals, found["actions"][..., None], axis=2).all()
    added = found["truncations"].all(axis=1)
    assert added.sum() == 6 and added[5] and not found["rewards"][added].any()


def test_refused(tmp_path, monkeypatch):
    """One sentence, and nothing is left."""
    arrays, metadata = healthy("continuous")
    source = save(tmp_path / "ours.npz", arrays, json.dumps(metadata))
    bad = save(tmp_path / "bad.npz", {**arrays, "actions": arrays["actions"] * 9}, json.dumps(metadata))
    before = sorted(tmp_path.iterdir())
    for path, folder, words in (
        (tmp_path / "no.npz", tmp_path / "out", "no.npz is not a file"),
        (bad, tmp_path / "out", "bad.npz cannot be exported: actions are outside [-1, 1]"),
        (source, tmp_path, "exists; choose another --output"),
        (source, source / "out", "cannot be written"),
    ):
        status, stdout, stderr = exported(path, "minari", folder)
        assert status == 2 and not stdout and stderr.startswith("export.py: ") and stderr.count("\n") == 1
        assert words in stderr and sorted(tmp_path.iterdir()) == before
    for package, to in (("h5py", "minari"), ("tensorstore", "vault")):
        monkeypatch.setitem(sys.modules, package, None)
        status, _, stderr = exported(source, to, tmp_path / "out")
        assert status == 2 and f"pip install {package}" in stderr and sorted(tmp_path.iterdir()) == before


def test_the_command_itself(tmp_path):
    command = [sys.executable, toy.ROOT / "data" / "export.py", test_convert.SHIPPED, "--to", "nothing"]
    result = subprocess.run([*command, "--output", "x"], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert result.returncode == 2 and "minari" in result.stderr and not [*tmp_path.iterdir()]
