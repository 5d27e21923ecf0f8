"""Every foreign format, written as its owners write it, converted, compared value by value, and trained on; the check.

The toy tasks of toy.py are the source of all data here: `play` records episodes of them, `ours` lays these out as our
file must have them, and the functions `write_...` as others do.
"""

import contextlib
import importlib
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorstore
import toy

sys.path.insert(0, str(toy.ROOT))
from data import check, convert, files, mpe

VAULT = Path(__file__).resolve().parent / "vault" / "toy.vlt"
SHIPPED = toy.ROOT / "data" / "datasets" / "mpe" / "simple_spread" / "expert.npz"


def run(*flags):
    """`python data/convert.py FLAGS` in this process: (status, stdout, stderr)."""
    status, stdout, stderr, words = 0, io.StringIO(), io.StringIO(), [str(flag) for flag in flags]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *words])
        try:
            convert.main(convert.parse(words))
        except SystemExit as stop:
            status = stop.code
    return status, stdout.getvalue(), stderr.getvalue()


def load(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("metadata")))


# ---- the same episodes in our layout and in those of others ----


def play(discrete, lengths, seed=0):
    """Episodes of random actions: dictionaries of arrays [L, ...]. Only those of 5 steps end by time limit."""
    rows, episodes = toy.record(toy.Matching(discrete), 5 * len(lengths), seed), []
    for number, length in enumerate(lengths):
        episode = {name: array[5 * number : 5 * number + length] for name, array in rows.items()}
        episode["terminals"] = np.arange(length) == (length - 1 if length < 5 else -1)
        episode["timeouts"] = np.arange(length) == (length - 1 if length == 5 else -1)
        episode["states"] = episode["observations"].reshape(length, -1)
        episodes.append(episode)
    return episodes


def join(episodes):
    return {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}


def ours(episodes, without=()):
    """What must stand in our file."""
    arrays = join(episodes)
    for name in [name for name in ("observations", "action_masks") if f"next_{name}" in arrays]:
        arrays[f"final_{name}"] = arrays.pop(f"next_{name}")[arrays["terminals"] | arrays["timeouts"]]
    return {name: array for name, array in arrays.items() if name not in without}


def last_step_lost(episodes):
    """What is left of episodes where a source does not tell what came after their last step."""
    left = []
    for episode in episodes:
        episode = {name: array.copy() for name, array in episode.items()}
        if episode["terminals"][-1]:  # nothing is bootstrapped from here: anything may stand there
            for name in ("observations", "action_masks") if "action_masks" in episode else ("observations",):
                episode[f"next_{name}"][-1] = episode[name][-1]
        else:
            episode = {name: array[:-1] for name, array in episode.items()}
            episode["timeouts"][-1:] = True
        left.append(episode)
    return [episode for episode in left if len(episode["rewards"])]


def write_omar(folder):
    """Two agents of ours and a third, which observes three numbers; two seeds, whose rows are no multiple of 5."""
    taken = []
    for seed, episodes in enumerate((play(False, [5] * 9, 1), play(False, [5] * 12, 2))):
        path = folder / "expert" / f"seed_{seed}_data"
        path.mkdir(parents=True)
        rows = join(episodes)
        kinds = {"obs": "observations", "next_obs": "next_observations", "acs": "actions", "rews": "individual_rewards"}
        for i in range(3):
            for kind, name in kinds.items():
                array = rows[name][: len(rows[name]) - 2, i % 2].astype(np.float64)
                if i == 2:
                    array = np.ones((len(array), 3)) if "obs" in kind else array
                np.save(path / f"{kind}_{i}.npy", array)
            np.save(path / f"dones_{i}.npy", np.zeros(len(array)))
        taken += episodes[:-1]
    return folder / "expert", ["--episode-length", 5], ours(taken, without=["states"])


def pymarl(episodes):
    """A padded batch [E, 6, ...]; behind the last step stands what it led to, and an action that nobody took."""
    batch = {
        "obs": np.zeros((len(episodes), 6, 2, 2), np.float32),
        "state": np.zeros((len(episodes), 6, 4), np.float32),
        "actions": np.zeros((len(episodes), 6, 2, 1), np.int64),
        "avail_actions": np.zeros((len(episodes), 6, 2, 5), np.int32),
        "reward": np.zeros((len(episodes), 6, 1), np.float32),
        "terminated": np.zeros((len(episodes), 6, 1), np.uint8),
        "filled": np.zeros((len(episodes), 6, 1), np.int64),
    }
    for e, episode in enumerate(episodes):
        steps = len(episode["rewards"])
        for key, name in {"obs": "observations", "avail_actions": "action_masks"}.items():
            batch[key][e, :steps] = episode[name]
            batch[key][e, steps] = episode[f"next_{name}"][-1]
        batch["state"][e, : steps + 1] = batch["obs"][e, : steps + 1].reshape(steps + 1, 4)
        batch["actions"][e, :steps, :, 0] = episode["actions"]
        batch["actions"][e, steps] = 3
        batch["reward"][e, :steps, 0] = episode["rewards"]
        batch["terminated"][e, steps - 1] = 1
        batch["filled"][e, : steps + 1] = 1
    return batch


def write_h5(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    return path


LENGTHS = [5, 3, 5, 1, 5, 4, 5, 2, 5, 5, 5, 5]


def write_pymarl_h5(folder):
    """Twelve parts of one episode each, so that part_10 must not come before part_2."""
    episodes = play(True, LENGTHS)
    for e, episode in enumerate(episodes):
        write_h5(folder / "medium" / f"part_{e}.h5", pymarl([episode]))
    return folder / "medium", [], ours(episodes, without=["individual_rewards"])


def write_pymarl_npy(folder):
    """A buffer with room for more episodes than were played; PyMARL itself does not call a time limit `terminated`."""
    episodes = play(True, LENGTHS)
    episodes[1]["terminals"][-1], episodes[1]["timeouts"][-1] = False, True  # an earlier one, of 3 steps
    (folder / "buffer").mkdir(parents=True)
    for name, array in pymarl(episodes).items():
        if name == "terminated":
            array[[length == 5 or e == 1 for e, length in enumerate(LENGTHS)]] = 0
        np.save(folder / "buffer" / f"{name}.npy", np.concatenate([array, np.zeros_like(array[:2])]))
    return folder / "buffer", [], ours(episodes, without=["individual_rewards"])


def sequences():
    """Two sequences [2, 22, ...] of four episodes each, of which the second is terminal, and the begin of a fifth."""
    rows = join(play(True, [5] * 10))
    found = {name: array.reshape(2, 25, *array.shape[1:])[:, :22] for name, array in rows.items()}
    step = np.arange(22)[:, None]
    flags = {"terminals": step == 9, "truncations": (step % 5 == 4) & (step != 9)}
    flags = {name: np.repeat(np.repeat(flag[None], 2, axis=0), 2, axis=2) for name, flag in flags.items()}
    flags["terminals"][1, :, 0] = False  # the first agent goes on there, so the episode does
    return {**found, **flags}


def write_vault(folder):
    """tests/vault/toy.vlt, written by flashbax 0.1.3 (jax 0.10.2) from `sequences()` saved as /tmp/sequences.npz:

    import flashbax, jax, jax.numpy as jnp, numpy as np
    from flashbax.vault import Vault

    file = np.load("/tmp/sequences.npz")
    names = {"observations": "observations", "actions": "actions", "individual_rewards": "rewards"}
    names |= {"terminals": "terminals", "truncations": "truncations"}
    steps = {theirs: jnp.asarray(file[ours]) for ours, theirs in names.items()}
    steps["infos"] = {"legals": jnp.asarray(file["action_masks"]), "state": jnp.asarray(file["states"])}
    buffer = flashbax.make_flat_buffer(64, 1, 1, add_sequences=True, add_batch_size=2)
    state = buffer.add(buffer.init(jax.tree.map(lambda x: x[0, 0], steps)), steps)
    Vault("toy.vlt", state.experience, rel_dir="tests/vault", vault_uid="Good").write(state)
    """
    episodes = play(True, [5] * 10)
    episodes[1]["terminals"][-1], episodes[1]["timeouts"][-1] = True, False
    long = join(episodes[6:8])
    long["timeouts"][4] = False
    return VAULT, [], ours(last_step_lost([*episodes[:4], episodes[5], long, episodes[8]]))


def leaf(path, name, **more):
    """An array of a vault; `more` creates it."""
    store = {"driver": "ocdbt", "base": f"file://{path}/", "path": name}
    spec = {"driver": "zarr", "kvstore": store, **({"create": True} if more else {"open": True})}
    if len(more.get("shape", [])) > 1:
        spec["metadata"] = {"chunks": [more["shape"][0], 64, *more["shape"][2:]]}
    return tensorstore.open(spec, **more).result()


def vault(path, arrays):
    """Arrays [B, T, ...] as flashbax lays them out: so many steps of very many, and how many there are."""
    steps = max(array.shape[1] for array in arrays.values() if array.ndim > 1)
    for name, array in arrays.items():
        shape = [array.shape[0], 10**13, *array.shape[2:]]
        leaf(path, f"{name}.", dtype=array.dtype, shape=shape)[:, : array.shape[1]].write(array).result()
    leaf(path, "vault_index", dtype=np.int32, shape=[1]).write(np.array([steps], np.int32)).result()


def write_vault_of_omar(folder):
    """In flashbax's layout: one sequence per seed; our observations are padded to the width of the prey's."""
    episodes = [play(False, [5] * 4, seed) for seed in (3, 4)]
    rows = [join(sequence) for sequence in episodes]
    arrays = {
        "observations": np.stack([row["observations"] for row in rows]),
        "actions": np.stack([row["actions"] for row in rows]),
        "rewards": np.stack([row["individual_rewards"] for row in rows]),
        "terminals": np.zeros((2, 20, 2), bool),
        "truncations": np.stack([row["timeouts"] for row in rows])[:, :, None].repeat(2, axis=2),
    }
    arrays = {name: np.concatenate([array, array[:, :, :1]], axis=2) for name, array in arrays.items()}
    arrays["observations"] = np.pad(arrays["observations"], [(0, 0)] * 3 + [(0, 1)], constant_values=-np.inf)
    arrays["observations"][:, :, 2] = 3
    vault(folder / "spread.vlt" / "Expert", arrays)
    return folder / "spread.vlt" / "Expert", [], ours(last_step_lost([*episodes[0], *episodes[1]]), without=["states"])


def write_d4rl_npz(folder):
    """Everything there is, rewards [T, N, 1], an array stored by columns, and a begun episode at the end."""
    episodes = play(True, LENGTHS)
    rows = join([*episodes, play(True, [5], 9)[0]])
    rows["rewards"] = rows.pop("individual_rewards")[..., None]
    rows = {name: array[:-1] for name, array in rows.items()}
    np.savez_compressed(folder / "d4rl.npz", **{**rows, "states": np.asfortranarray(rows["states"])})
    return folder / "d4rl.npz", [], ours(episodes)


def write_d4rl_hdf5(folder):
    """Without next observations, with flags as numbers, and a terminal that is a timeout, too."""
    episodes = play(False, LENGTHS)
    rows = join(episodes)
    rows["timeouts"] |= rows["terminals"]
    rows["rewards"] = rows.pop("individual_rewards")
    rows |= {name: rows[name].astype(np.float32) for name in ("terminals", "timeouts")}
    del rows["next_observations"]
    return write_h5(folder / "d4rl.hdf5", rows), [], ours(last_step_lost(episodes))


def write_ours(folder):
    """Our own names, in HDF5: final observations and individual rewards."""
    arrays = ours(play(False, LENGTHS))
    return write_h5(folder / "ours.h5", arrays), [], arrays


def write_omiga(folder):
    """A row more than there are steps in every episode; a state per agent, rewards [M, 1], d per agent."""
    episodes, rows = play(False, LENGTHS), []
    for episode in episodes:
        seen = np.concatenate([episode["observations"], episode["next_observations"][-1:]])
        steps = len(seen) - 1
        rows.append({"o": seen, "s": np.repeat(seen.reshape(steps + 1, 1, 4), 2, axis=1)})
        rows[-1]["a"] = np.concatenate([episode["actions"], np.full((1, 2, 2), 0.5, np.float32)])
        rows[-1]["r"] = np.append(episode["rewards"], 7)[:, None]
        rows[-1]["d"] = np.repeat(np.arange(steps + 1)[:, None] == steps, 2, axis=1)
    source = write_h5(folder / "omiga.hdf5", join(rows))
    return source, ["--episode-length", 5], ours(episodes, without=["individual_rewards"])


def minari(episodes, agents):
    """Groups of episodes; what the agents do is in groups of their names, or stacked."""
    arrays = {}
    for number, episode in enumerate(episodes):
        seen = {}
        for name in [name for name in ("observations", "action_masks") if name in episode]:
            seen[name] = np.concatenate([episode[name], episode[f"next_{name}"][-1:]])
        place, masks = f"episode_{number}", seen.get("action_masks", np.zeros((0, 2))).astype(np.int8)
        for i, agent in enumerate(agents):
            nested = "/observation" if len(masks) else ""
            arrays[f"{place}/observations/{agent}{nested}"] = seen["observations"][:, i]
            arrays[f"{place}/actions/{agent}"] = episode["actions"][:, i]
            if len(masks):
                arrays[f"{place}/observations/{agent}/action_mask"] = masks[:, i]
        if not agents:
            arrays[f"{place}/observations"], arrays[f"{place}/actions"] = seen["observations"], episode["actions"]
            arrays[f"{place}/infos/state"] = seen["observations"].reshape(-1, 4)
            if len(masks):
                arrays[f"{place}/infos/action_mask"] = masks
        arrays[f"{place}/rewards"] = episode["rewards" if agents else "individual_rewards"].astype(np.float64)
        arrays[f"{place}/terminations"], arrays[f"{place}/truncations"] = episode["terminals"], episode["timeouts"]
    return arrays


def write_minari(folder):
    """A dataset's folder; agents in groups, the second of which comes first in the alphabet; masks as PettingZoo's."""
    episodes = play(True, LENGTHS)
    write_h5(folder / "toy-v0" / "data" / "main_data.hdf5", minari(episodes, ["agent_2", "agent_10"]))
    return folder / "toy-v0", [], ours(episodes, without=["individual_rewards", "states"])


def write_minari_stacked(folder):
    """Agents on an axis, rewards for each of them, the state in infos; an episode does not say why it ends."""
    episodes = play(False, LENGTHS)
    arrays = minari(episodes, [])
    arrays["episode_0/truncations"] = np.zeros(5, bool)
    return write_h5(folder / "main_data.hdf5", arrays), [], ours(episodes)


FORMATS = {
    "OMAR": (write_omar, "macca_omar"),
    "PyMARL .h5": (write_pymarl_h5, "macca_cql"),
    "PyMARL .npy": (write_pymarl_npy, "macca_icq"),
    "flashbax vault": (write_vault, "macca_icq"),
    "vault of OMAR's": (write_vault_of_omar, "macca_cql"),
    "D4RL .npz": (write_d4rl_npz, "macca_omar"),
    "D4RL .hdf5": (write_d4rl_hdf5, "macca_icq"),
    "ours": (write_ours, "macca_cql"),
    "OMIGA": (write_omiga, "macca_omar"),
    "Minari": (write_minari, "macca_icq"),
    "Minari, stacked": (write_minari_stacked, "macca_omar"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(name, tmp_path, monkeypatch):
    """Every value is where it belongs; small pieces make the same file; one of the scripts trains on it."""
    write, script = FORMATS[name]
    source, flags, expected = write(tmp_path)
    env = "toy:matching_discrete" if "action_masks" in expected else "toy:matching"
    flags = [source, "--env", env, "--quality", "random", *flags]
    status, stdout, stderr = run(*flags, "--output", tmp_path / "data.npz")
    assert status == 0, stderr
    arrays, metadata = load(tmp_path / "data.npz")
    assert arrays.keys() == expected.keys()
    for key, array in expected.items():
        assert arrays[key].dtype == (np.float32 if array.dtype.kind == "f" else array.dtype), key
        np.testing.assert_array_equal(arrays[key], array.astype(arrays[key].dtype), err_msg=key)

    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    returns = [part.sum() / 2 for part in np.split(expected["rewards"].astype(float), ends[:-1] + 1)]
    assert metadata["env"] == env and metadata["quality"] == "random" and metadata["schema_version"] == "1"
    assert (metadata["transitions"], metadata["episodes"]) == (len(arrays["rewards"]), len(ends))
    for key in ("mean", "std", "min", "max"):
        assert metadata[f"episode_return_{key}"] == pytest.approx(getattr(np, key)(returns), rel=1e-5)
    assert str(tmp_path.parent) not in json.dumps(metadata) and metadata["source"].endswith(source.name)
    assert f"{len(arrays['rewards']):,} in {len(ends):,} episodes" in stdout and "SHA-256" in stdout
    assert f"{np.mean(returns):.2f} per agent and episode" in stdout

    with monkeypatch.context() as patch:
        patch.setattr(check, "PIECE", 100)
        assert run(*flags, "--output", tmp_path / "pieces.npz")[0] == 0
    assert (tmp_path / "pieces.npz").read_bytes() == (tmp_path / "data.npz").read_bytes()

    flags = ["--env", env, "--dataset", tmp_path / "data.npz", "--no-cuda", "--batch-size", 16, "--hidden-dim", 8]
    flags += ["--total-iterations", 200, "--eval-interval", 200, "--eval-episodes", 1, "--final-episodes", 1]
    status, _, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0 and (toy.run_folder(tmp_path) / "checkpoint.pt").exists(), stderr


def test_time_limit_and_terminal(tmp_path):
    """--episode-length tells them apart where the source does not: the vault's second episode, too, is 5 steps long."""
    flags = ["--env", "x", "--quality", "y", "--output", tmp_path / "data.npz"]
    status, stdout, _ = run(VAULT, *flags, "--episode-length", 5)
    assert status == 0 and "left out: 4 rows at the end" in stdout and "the last step of the 7 episodes" in stdout
    assert "agents ended before their team in 1 episodes" in stdout
    arrays, _ = load(tmp_path / "data.npz")
    assert not arrays["terminals"].any() and arrays["timeouts"].sum() == 7 and len(arrays["rewards"]) == 6 * 4 + 9

    source = write_h5(tmp_path / "episodes.h5", pymarl(play(True, [5, 3, 3, 4])))
    assert run(source, *flags, "--overwrite", "--episode-length", 3)[0] == 0
    arrays, _ = load(tmp_path / "data.npz")
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [7, 10]
    assert np.flatnonzero(arrays["terminals"]).tolist() == [4, 14]


def test_one_step_and_a_time_limit(tmp_path):
    """Nothing is left of such an episode where what came after it is not known."""
    rows = join(play(False, [1, 1, 5]))
    rows["timeouts"][1], rows["terminals"][1] = True, False
    del rows["next_observations"], rows["individual_rewards"]
    np.savez(tmp_path / "source.npz", **rows)
    assert run(tmp_path / "source.npz", "--env", "x", "--quality", "y", "--output", tmp_path / "data.npz")[0] == 0
    arrays, _ = load(tmp_path / "data.npz")
    np.testing.assert_array_equal(arrays["observations"], rows["observations"][[0, 2, 3, 4, 5]])
    np.testing.assert_array_equal(arrays["final_observations"], rows["observations"][[0, 6]])
    assert arrays["terminals"].tolist() == [True] + 4 * [False] and arrays["timeouts"].tolist() == 4 * [False] + [True]


def test_states_of_particle_tasks_are_factored(tmp_path):
    """OMAR's files get the joint state, each number with its owner; other states and other sizes stay as they are."""
    env, rng = mpe.BatchedEnv("simple_world_3v1", 8, prey="random"), np.random.default_rng(4)
    seen, paid, actions = [env.reset(seed=1)], [], rng.uniform(-1, 1, (25, 8, 3, 2))
    for action in actions:
        obs, rewards = env.step(action)
        seen.append(obs)
        paid.append(rewards)
    now, after = (np.stack(x, axis=1).reshape(200, 3, -1) for x in (seen[:-1], seen[1:]))
    rows = {"obs": now, "next_obs": after, "acs": np.stack(actions, axis=1).reshape(200, 3, 2)}
    rows |= {"rews": np.stack(paid, axis=1).reshape(200, 3), "dones": np.zeros((200, 3))}
    (tmp_path / "omar").mkdir()
    for name, array in rows.items():
        for i in range(3):
            np.save(tmp_path / "omar" / f"{name}_{i}.npy", array[:, i])
    path = tmp_path / "data.npz"
    flags = ["--quality", "y", "--overwrite", "--output", path]
    states, owner = mpe.factored_states("simple_world_3v1", now)
    assert states[:, -1].min() == 0 and states[:, -1].max() == 1  # the prey in a forest, and seen
    status, stdout, stderr = run(tmp_path / "omar", "--env", "mpe/simple_world_3v1", *flags)
    assert status == 0 and "added: states, from the observations" in stdout, stderr
    arrays, metadata = load(path)
    np.testing.assert_array_equal(arrays["states"], states)
    assert metadata["state_owner"] == owner
    assert run("--check", path)[0] == 0
    for env_name in ("mpe/simple_tag", "x"):  # it observes other numbers, or is no particle task
        assert run(tmp_path / "omar", "--env", env_name, *flags)[0] == 0
        arrays, metadata = load(path)
        assert "states" not in arrays and "state_owner" not in metadata

    names = {"observations": "obs", "next_observations": "next_obs", "actions": "acs", "rewards": "rews"}
    source = {ours: rows[theirs].astype(np.float32) for ours, theirs in names.items()}
    source["timeouts"] = np.arange(200) % 25 == 24
    for given, known in ((states, True), (states[:, :-1], False), (states + 1, False)):
        np.savez(tmp_path / "source.npz", **source, states=given)
        assert run(tmp_path / "source.npz", "--env", "mpe/simple_world_3v1", *flags)[0] == 0
        arrays, metadata = load(path)
        np.testing.assert_array_equal(arrays["states"], given)
        assert metadata.get("state_owner") == (owner if known else None)


def test_what_a_reward_per_agent_is(tmp_path):
    """Different ones are the agents' own, equal ones the team's unless asked for, or in a folder of OMAR's."""
    rows = join(play(False, [5] * 4))
    del rows["next_observations"]
    differ, same = rows.pop("individual_rewards"), np.repeat(rows["rewards"][:, None], 2, axis=1)
    flags = ["--env", "x", "--quality", "y", "--overwrite", "--output", tmp_path / "data.npz"]
    kept = ~rows["timeouts"]
    cases = [(differ, [], True), (same, [], False), (same, ["--rewards", "individual"], True), (same[:, :1], [], False)]
    cases += [(same, ["--rewards", "team"], False), (same, ["--env", "mpe/simple_tag"], True)]
    for given, asked, individual in cases:
        np.savez(tmp_path / "source.npz", **{**rows, "rewards": given})
        status, stdout, _ = run(tmp_path / "source.npz", *flags, *asked)
        arrays, _ = load(tmp_path / "data.npz")
        assert status == 0 and ("individual_rewards" in arrays) == individual
        assert ("rewards read as     individual" in stdout) == individual
        assert ("own rewards" in stdout) == individual
        expected = given.sum(1) if individual else given[:, 0]
        np.testing.assert_array_equal(arrays["rewards"], expected[kept])
        if individual:
            np.testing.assert_array_equal(arrays["individual_rewards"], given[kept])
            share = (given[kept][:, 0] != given[kept][:, 1]).mean()
            assert f"in {share:.1%} of the steps" in stdout

    folder, length, _ = write_omar(tmp_path)  # predators share every reward, and yet it is each one's own
    for path in folder.glob("*/rews_*.npy"):
        np.save(path, np.load(path.with_name("rews_0.npy")))
    assert run(folder, *flags, *length)[0] == 0
    arrays, _ = load(tmp_path / "data.npz")
    np.testing.assert_array_equal(arrays["rewards"], 2 * arrays["individual_rewards"][:, 0])
    assert run(folder, *flags, *length, "--rewards", "team")[0] == 0
    assert "individual_rewards" not in load(tmp_path / "data.npz")[0]


def write_older(folder):
    """A battle as the collector once wrote it: next_action_masks, and no last actions."""
    arrays = ours(episodes := play(True, LENGTHS), without=["final_action_masks"])
    arrays["next_action_masks"] = join(episodes)["next_action_masks"]
    metadata = {"schema_version": "1", "env": "smax/3m", "quality": "medium", "win_rate": 0.25, "seed": 3}
    metadata |= {"command": "python data/collect_smax.py", "random_return": -1, "expert_return": 9}
    metadata |= {"state_owner": [0, 0, 1, 1], "policy": {"env": "smax/3m"}, "episode_return_mean": 77}
    return save(folder / "older.npz", arrays, json.dumps(metadata)), [], ours(episodes)


@pytest.mark.parametrize("write", [write_older, write_pymarl_h5, write_d4rl_npz, write_vault, write_minari])
def test_last_actions(write, tmp_path, monkeypatch):
    """Battles get them by default, other tasks when asked; they are appended once."""
    source, flags, expected = write(tmp_path)
    path = tmp_path / "data.npz"
    flags = [source, *flags, "--quality", "medium", "--overwrite", "--output", path]
    status, _, stderr = run(*flags, "--env", "toy:matching_discrete")
    assert status == 0, stderr
    plain = load(path)[0]
    for key in ("observations", "final_observations", "action_masks", "final_action_masks"):
        np.testing.assert_array_equal(plain[key], expected[key])

    slow, last, episode = [], np.zeros((2, 5)), 0
    finals = np.concatenate([plain["final_observations"], np.zeros((len(plain["final_observations"]), 2, 5))], axis=2)
    for row, actions in enumerate(plain["actions"]):
        slow.append(np.concatenate([plain["observations"][row], last], axis=1))
        last = np.eye(5)[actions]
        if plain["terminals"][row] or plain["timeouts"][row]:
            finals[episode, :, 2:], last, episode = last, np.zeros((2, 5)), episode + 1
    used = plain["timeouts"][plain["terminals"] | plain["timeouts"]] | (write is not write_vault)
    for piece, asked in ((check.PIECE, ["--env", "smac/3m"]), (100, ["--env", "x", "--last-action"])):
        monkeypatch.setattr(check, "PIECE", piece)
        status, stdout, stderr = run(*flags, *asked)
        assert status == 0 and "the last action, 5 numbers" in stdout, stderr
        arrays, metadata = load(path)
        np.testing.assert_array_equal(arrays["observations"], np.array(slow, np.float32))
        np.testing.assert_array_equal(arrays["final_observations"][used], np.float32(finals)[used])
        assert "--last-action" in metadata["command"] or "smac" in metadata["command"]
        for key in plain.keys() - {"observations", "final_observations"}:
            np.testing.assert_array_equal(arrays[key], plain[key])
    again = ["--env", "smac/3m", "--quality", "medium", "--output", tmp_path / "again.npz"]
    status, stdout, _ = run(path, *again)
    assert status == 0 and "end with the last actions already" in stdout
    for key, array in load(tmp_path / "again.npz")[0].items():
        np.testing.assert_array_equal(array, arrays[key])
    assert "do not end with the last actions" in refused(tmp_path, *flags, "--env", "smax/3m", "--no-last-action")


def test_what_an_older_file_knows_is_kept(tmp_path):
    """All of its metadata but what is measured again and how the file was made."""
    source = write_older(tmp_path)[0]
    assert "observations do not end with the last actions" in findings(source)[0]
    flags = ["--env", "smax/3m", "--quality", "medium", "--output", tmp_path / "data.npz"]
    assert run(source, *flags)[0] == 0
    old, new = load(source)[1], load(tmp_path / "data.npz")[1]
    assert {key for key in old if new.get(key) != old[key]} == {"command", "episode_return_mean"}
    assert new["command"].startswith("python data/convert.py") and old["command"] in new["source_notes"][-1]


def test_masks_that_allow_everything(tmp_path):
    """They say nothing, so the converter leaves them out where it does not know those after the last rows."""
    arrays = ours(play(True, LENGTHS), without=["final_action_masks"])
    arrays["action_masks"][:] = True
    flags = ["--env", "x", "--quality", "y", "--output", tmp_path / "data.npz"]
    status, stdout, _ = run(only(tmp_path, **arrays), *flags)
    assert status == 0 and "left out: action_masks" in stdout and "action_masks" not in load(tmp_path / "data.npz")[0]


def test_seeds_and_agents(tmp_path):
    """What --seeds and --agents choose, and what is said about what is left out."""
    folder, length, expected = write_omar(tmp_path)
    flags = [*length, "--env", "x", "--quality", "y", "--overwrite", "--output", tmp_path / "data.npz"]
    status, stdout, _ = run(folder, *flags, "--seeds", 1, "--agents", 1)
    arrays, metadata = load(tmp_path / "data.npz")
    assert status == 0 and len(arrays["rewards"]) == 55
    np.testing.assert_array_equal(arrays["observations"], expected["observations"][40:, :1])
    np.testing.assert_array_equal(arrays["rewards"], expected["individual_rewards"][40:, 0])
    left_out = [
        "left out: the agents [1, 2], which observe [2, 3] numbers",
        "left out: 3 rows at the end, which are no whole",
    ]
    for words in left_out:
        assert words in stdout and any(words in note for note in metadata["source_notes"])
    assert "--seeds 1" in metadata["command"] and "--agents 1" in metadata["command"]
    assert run(folder / "seed_1_data", *flags, "--agents", 1)[0] == 0
    np.testing.assert_array_equal(load(tmp_path / "data.npz")[0]["actions"], arrays["actions"])


def test_memory(tmp_path, monkeypatch):
    """A source of 64 MB passes through with little of it in memory at a time."""
    path = tmp_path / "seed_0_data"
    path.mkdir()
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 99, (10_000, 200), dtype=np.int8).astype(np.float64)
    for i in range(2):
        np.save(path / f"obs_{i}.npy", seen)
        np.save(path / f"next_obs_{i}.npy", np.roll(seen, -1, axis=0) + (np.arange(10_000) % 25 == 24)[:, None])
        np.save(path / f"acs_{i}.npy", rng.uniform(-1, 1, (10_000, 2)))
        np.save(path / f"rews_{i}.npy", rng.normal(size=10_000))
        np.save(path / f"dones_{i}.npy", np.zeros(10_000))
    monkeypatch.setattr(check, "PIECE", 2**18)
    tracemalloc.start()
    status, _, stderr = run(path, "--env", "x", "--quality", "y", "--output", tmp_path / "data.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 0, stderr
    assert peak < 6e6


# ---- what is refused ----


def only(folder, **arrays):
    np.savez(folder / "source.npz", **arrays)
    return folder / "source.npz"


def changed(write, name, change):
    """A source with one array (of an .npz or of a folder of .npy) changed."""

    def make(folder):
        source, flags, _ = write(folder)
        if source.suffix == ".npz":
            with np.load(source) as file:
                arrays = {key: change(file[key]) if fnmatch(key, name) else file[key] for key in file.files}
            only(folder, **arrays)
            source = folder / "source.npz"
        else:
            for path in source.rglob(f"{name}.npy"):
                np.save(path, change(np.load(path)))
        return source, *flags

    return make


def put(row, value):
    def change(array):
        array[row] = value
        return array

    return change


def forbidden(folder):
    """In row 7 the second agent may not do what it did."""
    source, *_ = write_d4rl_npz(folder)
    with np.load(source) as file:
        arrays = {key: file[key] for key in file.files}
    arrays["action_masks"][7, 1, arrays["actions"][7, 1]] = False
    arrays["next_action_masks"][6] = arrays["action_masks"][7]
    return (only(folder, **arrays),)


def changed_bytes(name, content):
    def make(folder):
        source, *_ = write_pymarl_npy(folder)
        (source / name).write_bytes(content)
        return (source,)

    return make


def group(folder):
    source, *_ = write_d4rl_hdf5(folder)
    with h5py.File(source, "a") as file:
        del file["observations"]
        file.create_group("observations")
    return (source,)


def without(write, *names):
    def make(folder):
        source, flags, _ = write(folder)
        with np.load(source) as file:
            return only(folder, **{name: file[name] for name in file.files if name not in names}), *flags

    return make


def text(name, content):
    def make(folder):
        (folder / name).write_text(content)
        return (folder / name,)

    return make


def empty_folder(folder):
    (folder / "empty").mkdir()
    return (folder / "empty",)


def folder_of_pickles(folder):
    (folder / "3m").mkdir()
    (folder / "3m" / "episode_0.pkl").write_bytes(b"cos\nsystem\n")
    return (folder / "3m",)


def pickled_objects(folder):
    rows = {name: np.zeros(3) for name in ("actions", "rewards", "terminals")}
    return (only(folder, observations=np.full((3, 2, 2), None), **rows),)


def pickled_array(folder):
    source, _, _ = write_pymarl_npy(folder)
    np.save(source / "obs.npy", np.full((3, 2, 2), None))
    return (source,)


def several_vaults(folder):
    for uid in ("Good", "Poor"):
        (folder / "3m.vlt" / uid).mkdir(parents=True)
        (folder / "3m.vlt" / uid / "manifest.ocdbt").touch()
    return (folder / "3m.vlt",)


def cut_short(folder):
    source = write_d4rl_hdf5(folder)[0]
    source.write_bytes(source.read_bytes()[:3000])
    return (source,)


def damaged(folder):
    source = write_d4rl_npz(folder)[0]
    content = source.read_bytes()
    source.write_bytes(content[:400] + bytes(100) + content[500:])
    return (source,)


def parts_of_two_maps(folder):
    write_h5(folder / "parts" / "part_0.h5", pymarl(play(True, [5])))
    write_h5(folder / "parts" / "part_1.h5", {name: array[:, :4] for name, array in pymarl(play(True, [2])).items()})
    return (folder / "parts",)


def a_broken_part(folder):
    for part in range(2):
        source = write_h5(folder / "parts" / f"part_{part}.h5", pymarl(play(True, [5])))
    source.write_bytes(source.read_bytes()[:3000])
    return (folder / "parts",)


def no_agents_axis(folder):
    return (
        only(folder, observations=np.zeros((9, 2)), **{n: np.zeros(9) for n in ("actions", "rewards", "terminals")}),
    )


def longer_episodes(folder):
    """One episode of 50 steps per seed."""
    for seed in range(2):
        path = folder / "expert" / f"seed_{seed}_data"
        path.mkdir(parents=True)
        step = np.arange(50.0)
        arrays = {"obs_0": step[:, None], "next_obs_0": step[:, None] + 1, "acs_0": np.zeros((50, 2))}
        for name, array in {**arrays, "rews_0": step, "dones_0": np.zeros(50)}.items():
            np.save(path / f"{name}.npy", array)
    return (folder / "expert",)


def plus(write, *more):
    return lambda folder: (write(folder)[0], *more)


REFUSED = {
    # what it is: (makes the source and flags, words of the sentence)
    "missing": (lambda folder: (folder / "nowhere.h5",), ["nowhere.h5 does not exist"]),
    "text": (text("data.txt", "not data"), ["data.txt has none of the formats"]),
    "empty folder": (empty_folder, ["empty has none of the formats"]),
    "pickle": (text("data.pkl", ""), ["data.pkl: pickles are never loaded"]),
    "folder of pickles": (folder_of_pickles, ["3m: pickles are never loaded"]),
    "pickled objects": (pickled_objects, ["observations holds pickled objects"]),
    "pickled array": (pickled_array, ["buffer could not be converted", "Python objects"]),
    "no .npy": (changed_bytes("obs.npy", b"nonsense"), ["buffer could not be converted", "magic string"]),
    "text called .h5": (text("data.h5", "not data"), ["data.h5 is not an HDF5 file"]),
    "text called .npz": (text("source.npz", "not data"), ["source.npz could not be converted: it is not an .npz file"]),
    "a group": (group, ["observations is a group, expected an array"]),
    "cut short": (cut_short, ["d4rl.hdf5 is not an HDF5 file, or only the beginning of one"]),
    "damaged": (damaged, ["d4rl.npz could not be converted"]),
    "several vaults": (several_vaults, ["several datasets", "Good, Poor"]),
    "no rows": (changed(write_d4rl_npz, "*", lambda x: x[:0]), ["'observations': 0", "expected equally many rows"]),
    "nan everywhere": (
        changed(write_d4rl_npz, "*observations", put((slice(None), 0, 0), np.nan)),
        ["observations holds NaN, infinity or numbers from 1e9, in 50 rows"],
    ),
    "no rewards": (without(write_d4rl_npz, "rewards"), ["source.npz lacks rewards", "actions"]),
    "OMAR without a file": (plus(write_omar, "--seeds", 3), ["seed_3_data lacks obs_0, next_obs_0"]),
    "OMAR, episodes of another length": (plus(write_omar, "--episode-length", 4), ["row 4", "inside an episode"]),
    "OMAR, longer episodes": (longer_episodes, ["go on after 25 rows", "--episode-length"]),
    "OMAR, done inside": (changed(write_omar, "dones_1", put(2, 1)), ["row 2 is done", "--episode-length"]),
    "OMAR, not in order": (
        changed(write_omar, "next_obs_1", put(11, 9)),
        ["next_observations of row 11", "inside an episode"],
    ),
    "OMAR, prey first": (changed(write_omar, "*obs_0", lambda x: np.ones((len(x), 3))), ["[3, 2, 3]", "--agents"]),
    "OMAR, too many agents": (plus(write_omar, "--agents", 3), ["[2, 2, 3]", "--agents"]),
    "OMAR, unequal actions": (changed(write_omar, "acs_1", lambda x: x[:, :1]), ["the agents' acs differ in size"]),
    "OMAR, unequal lengths": (
        changed(write_omar, "rews_0", lambda x: x[:-1]),
        ["'rews_0'", "expected equally many rows"],
    ),
    "PyMARL, a hole": (changed(write_pymarl_npy, "filled", put((2, 1), 0)), ["episode 2", "filled"]),
    "PyMARL, terminated too late": (changed(write_pymarl_npy, "terminated", put((1, 3), 1)), ["episode 1"]),
    "PyMARL, parts of two maps": (parts_of_two_maps, ["do not fit together"]),
    "PyMARL, a broken part": (a_broken_part, ["part_1.h5 is not an HDF5 file, or only the beginning of one"]),
    "PyMARL, individual": (plus(write_pymarl_h5, "--rewards", "individual"), ["only the team's reward"]),
    "D4RL, one agent": (no_agents_axis, ["a row of observations is [2]", "expected [agents, numbers]"]),
    "D4RL, no end": (changed(write_d4rl_npz, "t*", np.zeros_like), ["no whole episode"]),
    "D4RL, not in order": (changed(write_d4rl_npz, "next_observations", put(11, 9)), ["observations of row 11"]),
    "D4RL, masks not in order": (
        changed(write_d4rl_npz, "next_action_masks", put(11, 0)),
        ["action_masks of row 11"],
    ),
    "D4RL, no final masks": (
        without(write_d4rl_npz, "next_action_masks"),
        ["add final_action_masks"],
    ),
    "D4RL, team": (plus(write_d4rl_npz, "--rewards", "team"), ["rewards differ; leave out --rewards team"]),
    "D4RL, three rewards": (changed(write_d4rl_npz, "rewards", lambda x: np.ones((len(x), 3))), ["3 rewards"]),
    "nan": (changed(write_d4rl_npz, "rewards", put(3, np.nan)), ["rewards holds NaN", "individual_rewards holds NaN"]),
    "not an index": (changed(write_d4rl_npz, "actions", lambda x: x + 0.5), ["float64 [2], expected integers if"]),
    "forbidden": (forbidden, ["action_masks forbid an action that was taken, in 1 rows"]),
    "too far": (
        changed(write_omar, "acs_1", put((3, 1), 1.5)),
        ["actions are outside [-1, 1] in 2 rows, up to 1.5; add --clip-actions"],
    ),
    "beyond float32": (changed(write_omar, "rews_1", put(3, 1e300)), ["individual_rewards holds NaN, infinity"]),
    "last actions of none": (
        plus(write_omar, "--episode-length", 5, "--last-action"),
        ["no discrete actions", "add --no-last-action"],
    ),
    "seeds of a vault": (lambda folder: (VAULT, "--seeds", 1), ["--seeds is for OMAR"]),
    "agents of PyMARL": (plus(write_pymarl_h5, "--agents", 1), ["--agents is for OMAR and OG-MARL and Minari"]),
    "no agents": (plus(write_omar, "--agents", 0), ["--agents is 0"]),
    "no length": (plus(write_omar, "--episode-length", 0), ["--episode-length is 0"]),
}


def refused(folder, *flags):
    """The one sentence that such a call ends in; nothing may be written."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, stdout, stderr = run(*flags)
    assert status == 2 and not stdout, (status, stdout, stderr)
    sentence = stderr.splitlines()[-1]  # a progress bar may stand before it
    assert sentence.startswith("convert.py: ") and stderr.count("convert.py: ") == 1, stderr
    assert "Traceback" not in stderr and not sentence.endswith(".")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return sentence


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, tmp_path):
    make, words = REFUSED[what]
    source, *flags = make(tmp_path)
    flags = [source, "--env", "x", "--quality", "y", "--output", tmp_path / "data.npz", *flags]
    sentence = refused(tmp_path, *flags)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("package, write", [("h5py", write_pymarl_h5), ("tensorstore", write_vault)])
def test_missing_package(package, write, tmp_path, monkeypatch):
    """It is asked for by name; the formats that do without it are converted."""
    source = write(tmp_path)[0]
    monkeypatch.setitem(sys.modules, package, None)
    flags = ["--env", "x", "--quality", "y", "--output", tmp_path / "data.npz"]
    assert f"pip install {package}" in refused(tmp_path, source, *flags)
    assert run(write_d4rl_npz(tmp_path)[0], *flags)[0] == 0


def test_output(tmp_path, monkeypatch):
    """Where the file goes by default, and that nothing is replaced unasked."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    source, flags, _ = write_omar(tmp_path)
    flags = [source, *flags, "--env", "mpe/simple_tag", "--quality", "expert"]
    assert run(*flags)[0] == 0
    path = tmp_path / "data" / "datasets" / "mpe" / "simple_tag" / "expert.npz"
    assert "exists; add --overwrite" in refused(tmp_path, *flags)
    path.write_bytes(b"")
    assert run(*flags, "--overwrite", "--random-return", -9, "--expert-return", 3)[0] == 0
    metadata = load(path)[1]
    assert (metadata["random_return"], metadata["expert_return"]) == (-9, 3)
    assert [file.name for file in path.parent.iterdir()] == ["expert.npz"]
    assert "ends in .npz" in refused(tmp_path, *flags, "--output", tmp_path / "data.h5")
    for left_out in ("--env", "--quality"):
        where = flags.index(left_out)
        assert "--env and --quality" in refused(tmp_path, *flags[:where], *flags[where + 2 :])
    assert "give SOURCE" in refused(tmp_path)
    assert "expected a word" in refused(tmp_path, *flags[:-1], "../expert")
    assert "give both or none" in refused(tmp_path, *flags, "--overwrite", "--random-return", -9)


def test_unmarked_time_limits(tmp_path):
    """D4RL files in which nothing ends are cut by --episode-length, and what is left over is left out."""
    rows = join(play(False, [5] * 4))
    rows["rewards"] = rows.pop("individual_rewards")
    del rows["timeouts"]
    np.savez(tmp_path / "source.npz", **{name: array[:-2] for name, array in rows.items()})
    flags = [tmp_path / "source.npz", "--env", "x", "--quality", "y", "--output", tmp_path / "data.npz"]
    assert "--episode-length" in refused(tmp_path, *flags)
    status, stdout, _ = run(*flags, "--episode-length", 5)
    assert status == 0 and f"--env x --dataset {tmp_path / 'data.npz'}" in stdout
    arrays, _ = load(tmp_path / "data.npz")
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [4, 9, 14] and len(arrays["rewards"]) == 15
    np.testing.assert_array_equal(arrays["final_observations"], rows["next_observations"][[4, 9, 14]])


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C while the file is written leaves nothing behind, and an older file as it was."""
    source, _, _ = write_d4rl_npz(tmp_path)
    (tmp_path / "data.npz").write_bytes(b"older")

    def stop(self, *arguments):
        assert len(list(tmp_path.iterdir())) == 3  # the temporary file
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.tqdm, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, "--env", "x", "--quality", "y", "--output", tmp_path / "data.npz", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz", "d4rl.npz"}
    assert (tmp_path / "data.npz").read_bytes() == b"older"


def test_terminated(tmp_path):
    """SIGTERM while the file is written leaves nothing behind."""
    source, _, _ = write_d4rl_npz(tmp_path)
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(toy.ROOT)!r})
from data import convert, files
convert.tqdm.update = lambda self, size: os.kill(os.getpid(), signal.SIGTERM)
files.run(lambda: convert.main(convert.parse()))"""
    flags = [source, "--env", "x", "--quality", "y", "--output", "data.npz"]
    command = [sys.executable, "-c", code, *flags]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert result.returncode == 143 and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["d4rl.npz"]


def test_the_command_itself(tmp_path):
    """What a user sees in a terminal, in which this file imports nothing of the repository."""
    command = [sys.executable, toy.ROOT / "data" / "convert.py"]
    result = subprocess.run([*command, "nowhere"], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("convert.py: give SOURCE"), result.stderr
    result = subprocess.run([*command, "--check", SHIPPED], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"{SHIPPED}: nothing wrong\n"), result.stderr


# ---- the check ----


def test_what_nobody_reads(tmp_path):
    """Other members of a file, even objects and texts, are named and not loaded."""
    arrays, metadata = healthy("continuous")
    path = save(tmp_path / "source.npz", {**arrays, "infos": np.full(37, None)}, json.dumps(metadata))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README", "read me")
    status, stdout, _ = run("--check", path)
    assert (status, stdout) == (0, f"{path}: not read: infos, README\n{path}: nothing wrong\n")
    status, stdout, stderr = run(path, "--env", "x", "--quality", "y", "--output", tmp_path / "data.npz")
    assert status == 0 and "not read: infos, README" in stdout, stderr
    assert set(load(tmp_path / "data.npz")[0]) == set(arrays)


def healthy(kind):
    """Arrays and metadata without fault: continuous (or with equal rewards), discrete, or discrete with next_*."""
    episodes = play(kind in ("discrete", "next"), [5, 3, 5, 5, 4, 5, 5, 5])
    arrays = ours(episodes)
    if kind == "equal":
        arrays["individual_rewards"][:], arrays["rewards"][:] = 0.25, 0.5
    if kind == "next":
        arrays = join(episodes)
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    returns = [part.sum() / 2 for part in np.split(arrays["rewards"].astype(float), ends[:-1] + 1)]
    metadata = {"schema_version": "1", "env": "toy:matching", "quality": "medium", "transitions": 37, "episodes": 8}
    metadata |= {f"episode_return_{key}": getattr(np, key)(returns) for key in ("mean", "std", "min", "max")}
    mean = metadata["episode_return_mean"]
    return arrays, metadata | {"random_return": mean - 1, "expert_return": mean + 1}


def findings(path):
    status, stdout, stderr = run("--check", path)
    lines = stdout.splitlines()
    assert not stderr and all(line.startswith(f"{path}: ") for line in lines)
    assert (status, lines) == (0, [f"{path}: nothing wrong"]) or (status == 2 and lines)
    return [line.removeprefix(f"{path}: ") for line in lines] if status else []


def save(path, arrays, metadata):
    np.savez(path, **arrays, **({} if metadata is None else {"metadata": np.array(metadata)}))
    return path


def drop(name):
    return lambda arrays, metadata: arrays.pop(name)


def replace(name, change):
    return lambda arrays, metadata: arrays.update({name: change(arrays[name])})


def tell(**values):
    return lambda arrays, metadata: metadata.update(values)


def forbid(arrays, metadata):
    arrays["action_masks"][0, 0] = np.arange(5) != arrays["actions"][0, 0]


def add_masks(arrays, metadata):
    arrays |= {"action_masks": np.ones((37, 2, 5), bool), "final_action_masks": np.ones((8, 2, 5), bool)}


def one_row(arrays, metadata):
    for name, array in arrays.items():
        arrays[name] = array[-1:]
    for name in [name for name in metadata if name not in ("schema_version", "env")]:
        del metadata[name]


def revive(arrays, metadata):
    """The first agent can do only one thing in row 1, and more in row 2 of the same episode."""
    arrays["action_masks"][1, 0] = np.arange(5) == arrays["actions"][1, 0]


def copy_an_episode(arrays, metadata):
    for name in ("observations", "actions", "action_masks"):
        arrays[name][8:13] = arrays[name][0:5]


def copy_a_row(arrays, metadata):
    for name in ("observations", "actions"):
        arrays[name][9] = arrays[name][1]


def at(share, quality):
    """The mean return is at such a share of the way from random to expert."""

    def change(arrays, metadata):
        low = metadata["episode_return_mean"] - share
        metadata.update(quality=quality, random_return=low, expert_return=low + 1)

    return change


FOUND = {
    # what is broken: (which file, how, the words of the only finding)
    **{
        f"no {name}": ("continuous", drop(name), [f"{name} is missing"])
        for name in ("observations", "actions", "rewards", "terminals", "timeouts")
    },
    "nothing next": (
        "continuous",
        drop("final_observations"),
        ["final_observations is missing (or next_observations)"],
    ),
    "agents": ("continuous", replace("actions", lambda x: np.repeat(x, 2, axis=1)), ["actions is float32 [37, 4, 2]"]),
    "rows": ("continuous", replace("individual_rewards", lambda x: x[:-1]), ["[36, 2], expected float [37, 2]"]),
    "dtype": ("continuous", replace("terminals", lambda x: x.astype(int)), ["terminals is int64 [37], expected bool"]),
    "flat": ("continuous", replace("states", np.ravel), ["states is float32 [148], expected float [37, any]"]),
    "masks": ("next", replace("next_action_masks", lambda x: x[..., :4]), ["[37, 2, 4], expected bool [37, 2, 5]"]),
    "nan": ("continuous", replace("observations", put((3, 1, 0), np.nan)), ["observations holds NaN", "in 1 rows"]),
    "infinity": ("continuous", replace("states", put(3, np.inf)), ["states holds NaN, infinity"]),
    "a large number": ("continuous", replace("observations", put((3, 1, 0), -1e9)), ["numbers from 1e9, in 1 rows"]),
    "out of float32": (
        "continuous",
        replace("rewards", lambda x: x.astype(float) * 1e300),
        ["rewards holds NaN, infinity"],
    ),
    "nan at the end": ("continuous", replace("final_observations", put(2, np.nan)), ["final_observations holds NaN"]),
    "far": ("continuous", replace("actions", put((4, 1, 1), -1.5)), ["actions are outside [-1, 1], in 1 rows"]),
    "no such action": ("discrete", replace("actions", put((4, 1), 5)), ["actions are outside 0 to 4, in 1 rows"]),
    "forbidden": ("discrete", forbid, ["action_masks forbid an action that was taken, in 1 rows"]),
    "all forbidden": ("next", replace("next_action_masks", put((4, 0), False)), ["next_action_masks allow an agent"]),
    "sum": ("continuous", replace("rewards", put(6, 7)), ["not the sum of individual_rewards, in 1 rows"]),
    "mean": ("continuous", replace("rewards", lambda x: x / 2), ["not the sum of individual_rewards"]),
    "causes": (
        "continuous",
        lambda arrays, metadata: arrays.update(shapley_rewards=arrays["individual_rewards"] + 1),
        ["rewards are not the sum of shapley_rewards"],
    ),
    "causes of the team": (
        "continuous",
        lambda arrays, metadata: arrays.update(shapley_rewards=arrays["rewards"]),
        ["shapley_rewards is float32 [37], expected float [37, 2]"],
    ),
    "last row": ("next", replace("timeouts", put(-1, False)), ["the last row is not the end of an episode"]),
    "both": ("continuous", replace("terminals", put(4, True)), ["terminals and timeouts are both true, in 1 rows"]),
    "ends": ("continuous", replace("final_observations", lambda x: x[1:]), ["has 7 rows, but 8 episodes end"]),
    "next": ("next", replace("next_observations", put(6, 0.5)), ["next_observations inside an episode", "in 1 rows"]),
    "rolled": (
        "next",
        lambda arrays, metadata: arrays.update(next_observations=np.roll(arrays["observations"], -1, axis=0)),
        ["doubtful: next_observations after a time limit are another episode's"],
    ),
    "next mask": ("next", replace("next_action_masks", put(6, True)), ["next_action_masks inside an episode", "in 1"]),
    "no next mask": ("next", drop("next_action_masks"), ["final_action_masks is missing (or next_action_masks)"]),
    "no final mask": ("discrete", drop("final_action_masks"), ["final_action_masks is missing"]),
    "final masks": ("discrete", replace("final_action_masks", lambda x: x[1:]), ["masks has 7 rows, but 8 episodes"]),
    "a final mask": ("discrete", replace("final_action_masks", put((4, 0), False)), ["final_action_masks allow an"]),
    "continuous masks": ("continuous", add_masks, ["action_masks are given, but actions are not whole numbers"]),
    "one row": ("continuous", one_row, ["there are 1 transitions, expected 2 or more"]),
    "equal rewards": ("equal", lambda arrays, metadata: None, ["rewards are all 0.5, expected different ones"]),
    "back to life": ("discrete", revive, ["doubtful: agents with one allowed action count as dead", "in 1 rows"]),
    "an outlier": (
        "continuous",
        replace("observations", put((3, 1, 0), 1e4)),
        ["1 outliers", "[1, 0]"],
    ),
    "an outlying state": (
        "continuous",
        replace("states", put((3, 2), 1e4)),
        ["states hold 1 outliers", "[2]"],
    ),
    "no last actions": ("discrete", tell(env="smac/3m"), ["observations do not end with the last actions"]),
    "an episode twice": ("discrete", copy_an_episode, ["5 rows (13.5%) repeat earlier ones in whole episodes"]),
    "a row twice": ("continuous", copy_a_row, ["1 rows (2.7%) repeat earlier ones in another episode"]),
    "version": ("continuous", tell(schema_version="2"), ["schema_version is '2'"]),
    "env": ("continuous", tell(env=None), ["env is None"]),
    "transitions": ("continuous", tell(transitions=38), ["transitions is 38, expected 37 as in the arrays"]),
    "episodes": ("continuous", tell(episodes=9), ["episodes is 9, expected 8 as in the arrays"]),
    **{
        f"{key}": ("continuous", tell(**{key: 1e3}), [f"{key} is 1000.0, expected", "as in the arrays"])
        for key in ("episode_return_mean", "episode_return_std", "episode_return_min", "episode_return_max")
    },
    "a word": ("continuous", tell(random_return="low"), ["random_return is 'low', expected a number"]),
    "nan reference": ("continuous", tell(expert_return=float("nan")), ["expert_return is nan, expected a number"]),
    "400 digits": ("continuous", tell(expert_return=10**400), ["expert_return is 1000000", "expected a number"]),
    "true": ("continuous", tell(paper_random_return=True), ["paper_random_return is True, expected a number"]),
    "references": ("continuous", tell(expert_return=-1e8), ["expert_return -1e+08 is not above random_return"]),
    "owners": (
        "continuous",
        tell(state_owner=[0, 0, 1]),
        ["state_owner is a list, expected a list of 4 agents"],
    ),
    "no such owner": ("continuous", tell(state_owner=[0, 0, 1, 2]), ["state_owner", "from 0 to 1, or -1 for none"]),
    "half an owner": ("continuous", tell(state_owner=[0, 0, 1, 0.5]), ["state_owner", "from 0 to 1"]),
    "owner of all": ("continuous", tell(state_owner=1), ["state_owner is 1, expected a list"]),
    "expert": ("continuous", at(0.4, "expert"), ["quality is expert", "40% of the way"]),
    "random": ("continuous", at(0.4, "random"), ["quality is random", "40% of the way"]),
    "medium, too good": ("continuous", at(1.1, "medium"), ["quality is medium", "110% of the way"]),
    "medium, too bad": ("continuous", at(-0.1, "medium"), ["quality is medium", "-10% of the way"]),
    "replay": ("continuous", at(1.1, "medium-replay"), ["quality is medium-replay", "110% of the way"]),
}


@pytest.mark.parametrize("name", toy.SCRIPTS)
def test_one_verdict(name, tmp_path):
    """What a script refuses, the check calls wrong; what the check finds healthy, a script takes."""
    script, refusals, path = importlib.import_module(name), 0, tmp_path / "data.npz"
    sound = [(kind, lambda arrays, metadata: None) for kind in ("continuous", "discrete", "next")]
    for kind, change in [*sound, *(case[:2] for case in FOUND.values())]:
        arrays, metadata = healthy(kind)
        change(arrays, metadata)
        save(path, arrays, json.dumps(metadata))
        report, args = convert.inspect(path), script.Args(env="toy:matching", cuda=False)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                script.build(args, *script.load_dataset(path, args, toy.Matching(kind in ("discrete", "next"))))
        except (SystemExit, Exception) as error:
            refusals += 1
            assert report.wrong, f"{error}: {metadata.keys()} {arrays.keys()}"
    assert refusals > 30


@pytest.mark.parametrize("name", toy.SCRIPTS)
def test_without_masks_every_action_is_allowed(name, tmp_path):
    """For the check and for the scripts."""
    script, path, (arrays, metadata) = importlib.import_module(name), tmp_path / "data.npz", healthy("discrete")
    arrays = {key: array for key, array in arrays.items() if "masks" not in key}
    assert not findings(save(path, arrays, json.dumps(metadata)))
    args = script.Args(env="toy:matching", cuda=False)
    data, _ = script.load_dataset(path, args, toy.Matching(True))
    assert data["alive"].all() and data["next_alive"].all()


@pytest.mark.parametrize("what", FOUND)
def test_finding(what, tmp_path):
    """One thing is broken on purpose: that is found, and nothing else."""
    kind, change, words = FOUND[what]
    arrays, metadata = healthy(kind)
    change(arrays, metadata)
    found = findings(save(tmp_path / "data.npz", arrays, json.dumps(metadata)))
    assert len(found) == 1 and all(word in found[0] for word in words), found


def test_all_findings_at_once(tmp_path):
    """One does not hide another."""
    arrays, metadata = healthy("discrete")
    arrays["observations"][3] = np.nan
    arrays["actions"][4, 1] = -1
    arrays["action_masks"][5, 0] = False
    arrays["timeouts"] = arrays["timeouts"].astype(np.uint8)
    arrays["individual_rewards"][6] += 1
    del metadata["env"]
    found = "\n".join(findings(save(tmp_path / "data.npz", arrays, json.dumps(metadata))))
    words = ["timeouts is uint8", "observations holds NaN", "outside 0 to 4", "forbid", "allow an agent nothing"]
    for word in [*words, "not the sum", "env is None"]:
        assert word in found, found
    assert len(found.splitlines()) == 7


def test_files_that_are_none(tmp_path):
    """No zip, cut short, damaged, pickled, wrong or no metadata, without rows; missing. No advice to load pickles."""
    arrays, metadata = healthy("continuous")
    whole = save(tmp_path / "whole.npz", arrays, json.dumps(metadata)).read_bytes()
    (tmp_path / "text.npz").write_text("these are no arrays")
    (tmp_path / "short.npz").write_bytes(whole[:-300])
    (tmp_path / "damaged.npz").write_bytes(whole[:300] + bytes(9) + whole[309:])
    np.savez(tmp_path / "pickled.npz", observations=np.full((2, 2, 2), None))
    start = whole.index(b"{'descr'")
    (tmp_path / "header.npz").write_bytes(whole[:start] + b"[" + whole[start + 1 :])
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive, zipfile.ZipFile(tmp_path / "claim.npz", "w") as claim:
        for name in archive.namelist():
            claim.writestr(name, archive.read(name).replace(b"(37, 2, 2), }     ", b"(9999999, 2, 2), }"))
    entry = whole.index(b"PK\x01\x02")  # of the first array in the zip's list
    (tmp_path / "method.npz").write_bytes(whole[: entry + 10] + b"c" + whole[entry + 11 :])
    words = {"text": "not an .npz", "short": "not an .npz", "damaged": "", "pickled": "pickled objects"}
    words |= {"header": "damaged header", "claim": "do not make", "method": "compression"}
    for name, word in words.items():
        (finding,) = findings(tmp_path / f"{name}.npz")
        assert "cannot be read" in finding and word in finding and "allow_pickle" not in finding, finding
    nothing = ["metadata is missing, or not the text of a JSON object"]
    assert findings(save(tmp_path / "a.npz", arrays, None)) == nothing
    for content in (
        "{not JSON",
        "3",
        "[1]",
        '[["env", "x"]]',
        '{"a":' * 3000 + "1" + "}" * 3000,
        '{"a": 1' + "0" * 5000,
    ):
        assert findings(save(tmp_path / "a.npz", arrays, content)) == nothing
    empty = {name: array[:0] for name, array in arrays.items()}
    assert "there are 0 transitions, expected 2 or more" in findings(
        save(tmp_path / "a.npz", empty, json.dumps(metadata))
    )
    assert "nowhere.npz is not a file" in refused(tmp_path, "--check", tmp_path / "nowhere.npz")


@pytest.mark.parametrize("kind", ["continuous", "discrete", "next"])
def test_nothing_wrong(kind, tmp_path, monkeypatch):
    """A healthy file is accepted: in pieces too, with other number types, without what is optional."""
    arrays, metadata = healthy(kind)
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in arrays.items()}
    assert not findings(save(tmp_path / "a.npz", arrays, json.dumps(metadata)))
    assert not findings(save(tmp_path / "b.npz", wide, json.dumps(metadata)))
    monkeypatch.setattr(check, "PIECE", 50)
    assert not findings(tmp_path / "a.npz")
    needed = {name: array for name, array in arrays.items() if name not in ("individual_rewards", "states")}
    assert not findings(save(tmp_path / "c.npz", needed, json.dumps({"schema_version": "1", "env": "x"})))


def test_repetition_that_is_healthy(tmp_path):
    """The same start and a dead team in every episode of a discrete task; an agent that rests in a continuous one."""
    arrays, metadata = healthy("discrete")
    del arrays["action_masks"], arrays["final_action_masks"]
    starts = np.flatnonzero(np.append(True, (arrays["terminals"] | arrays["timeouts"])[:-1]))
    for rows in (starts, starts + 1):
        for name in ("observations", "actions"):
            arrays[name][rows] = arrays[name][rows[0]]
    assert not findings(save(tmp_path / "a.npz", arrays, json.dumps(metadata)))
    arrays, metadata = healthy("continuous")
    for name in ("observations", "actions"):
        arrays[name][1:5] = arrays[name][0]
    assert not findings(save(tmp_path / "a.npz", arrays, json.dumps(metadata)))


def test_what_is_no_outlier(tmp_path):
    """Inputs that are mostly zero, rounding errors, a second cluster far away, and one that is nearly constant."""
    rng, (arrays, _) = np.random.default_rng(0), healthy("continuous")
    arrays = {name: np.tile(array, (40, *[1] * (array.ndim - 1))) for name, array in arrays.items()}
    arrays["actions"] = rng.uniform(-1, 1, arrays["actions"].shape)
    length = len(arrays["rewards"])
    arrays["states"] = states = np.zeros((length, 6), np.float32)
    states[:, 0] = rng.random(length) < 0.02  # a rare event
    states[:, 1] = np.where(rng.random(length) < 0.05, rng.normal(size=length), 0)
    states[:, 2] = np.where(rng.random(length) < 0.2, 1, 1e-8 * rng.random(length))
    states[:, 3] = np.where(rng.random(length) < 0.05, 1e4, rng.normal(size=length))  # 5 % are common
    states[7, 4] = 1e4  # nothing else is to be seen there
    states[:, 5] = rng.standard_t(2, length)
    path, about = tmp_path / "a.npz", json.dumps({"schema_version": "1", "env": "x"})
    assert not findings(save(path, arrays, about))
    states[7, 1] = 1e4  # hides the rare values
    (finding,) = findings(save(path, arrays, about))
    assert "states hold 1 outliers, for example in input [1]" in finding


def test_doubts_are_told_and_written(tmp_path):
    """A file whose name its returns belie is written; the card and the check say so."""
    source, flags, _ = write_omar(tmp_path)
    flags = [source, *flags, "--env", "x", "--output", tmp_path / "data.npz", "--overwrite"]
    flags += ["--random-return", -100, "--expert-return", 0]
    status, stdout, _ = run(*flags, "--quality", "random")
    assert status == 0 and "doubtful: quality is random" in stdout
    assert "quality is random" in findings(tmp_path / "data.npz")[0]
    status, stdout, _ = run(*flags, "--quality", "expert")
    assert status == 0 and "doubtful" not in stdout and not findings(tmp_path / "data.npz")
