"""Layouts that a converter reads wrongly if it assumes a shape, a type, a name or a single agent's ends."""

import fuzz_convert
import numpy as np
import pytest
from test_convert import LENGTHS, load, minari, only, play, pymarl, refused, run, write_h5

RNG = np.random.default_rng(0)
AGENTS = 2


def rows(length, **changes):
    """A flat file of continuous actions, without any ends."""
    arrays = {
        "observations": RNG.normal(size=(length, AGENTS, 3)).astype(np.float32),
        "actions": RNG.uniform(-1, 1, (length, AGENTS, 2)).astype(np.float32),
        "rewards": np.arange(length, dtype=np.float32),
    }
    return arrays | changes


def at(length, *marked):
    return np.isin(np.arange(length), marked)


def convert(source, *flags):
    """Arrays, and what is printed."""
    path = source.parent / "ours.npz"
    status, stdout, stderr = run(source, "--env", "x", "--quality", "y", "--output", path, "--overwrite", *flags)
    assert status == 0, stderr
    return load(path)[0], stdout


def refusal(source, *flags):
    return refused(source.parent, source, "--env", "x", "--quality", "y", "--output", source.parent / "no.npz", *flags)


# ---- actions ----


@pytest.mark.parametrize("stored", [np.float32, np.int64, np.uint8, bool])
def test_one_hot(tmp_path, stored):
    """PyMARL's batch, and a flat file, whose only actions are one-hot."""
    batch = pymarl(play(True, [5, 3, 5]))
    expected = convert(write_h5(tmp_path / "indices.h5", batch))[0]
    hot = np.eye(5)[batch.pop("actions")[..., 0]].astype(stored)
    for name in ("actions", "actions_onehot"):
        arrays, stdout = convert(write_h5(tmp_path / f"{name}.h5", batch | {name: hot}))
        assert "actions read as one-hot over 5 actions" in stdout
        for key in expected:
            np.testing.assert_array_equal(arrays[key], expected[key])
            assert arrays[key].dtype == expected[key].dtype
    wide = write_h5(tmp_path / "wide.h5", batch | {"actions": np.pad(hot, [(0, 0)] * 3 + [(0, 1)])})
    assert "expected one-hot over 5 actions, as action_masks have" in refusal(wide)
    flat = only(tmp_path, **rows(9, actions=hot[0, :1].repeat(9, axis=0), terminals=at(9, 3, 8)))
    np.testing.assert_array_equal(convert(flat)[0]["actions"], hot[0, :1].argmax(axis=2).repeat(9, axis=0))


@pytest.mark.parametrize("masks", [None, 1, 0])
def test_continuous_actions_in_a_batch(tmp_path, masks):
    """FACMAC's [E, T, N, A] stay as they are; its masks allow everything and are left out."""
    batch = pymarl(play(True, [5, 3, 5]))
    batch["actions"] = RNG.uniform(-1, 1, (3, 6, AGENTS, 4)).astype(np.float32)
    batch["avail_actions"][:, :, 0, 0] |= masks == 1
    batch["avail_actions"][batch["filled"][..., 0] > 0] |= masks == 1
    if masks is None:
        del batch["avail_actions"]
    source = write_h5(tmp_path / "facmac.h5", batch)
    if masks == 0:
        assert "expected indices, because action_masks forbid some" in refusal(source)
        return
    arrays, stdout = convert(source)
    taken = np.concatenate([batch["actions"][e, :n] for e, n in enumerate((5, 3, 5))])
    np.testing.assert_array_equal(arrays["actions"], taken)
    assert arrays["actions"].dtype == np.float32 and "action_masks" not in arrays
    assert ("left out: action_masks, because actions are continuous" in stdout) == (masks == 1)


@pytest.mark.parametrize("stored", ["int64", "uint8", "bool", "float32", "float64"])
@pytest.mark.parametrize("shape", [(20, 2), (20, 2, 1)])
def test_indices(tmp_path, stored, shape):
    """[T, N] and [T, N, 1], integers or whole numbers stored as float, become int64 [T, N]."""
    actions = RNG.integers(0, 4, shape).astype(stored)
    source = only(tmp_path, **rows(20, actions=actions, terminals=at(20, 4, 19)))
    arrays, stdout = convert(source)
    np.testing.assert_array_equal(arrays["actions"], actions.reshape(20, 2))
    assert arrays["actions"].dtype == np.int64
    assert ("read as indices, though they are float" in stdout) == stored.startswith("float")
    assert "discrete actions; leave out --clip-actions" in refusal(source, "--clip-actions")


def test_batches_without_the_last_axis(tmp_path):
    """[E, T, N] actions, [E, T] flags and rewards."""
    batch = pymarl(play(True, [5, 3, 5]))
    expected = convert(write_h5(tmp_path / "usual.h5", batch))[0]
    flat = {
        name: x[..., 0] if name in ("actions", "filled", "terminated", "reward") else x for name, x in batch.items()
    }
    arrays = convert(write_h5(tmp_path / "flat.h5", flat))[0]
    for key in expected:
        np.testing.assert_array_equal(arrays[key], expected[key])


@pytest.mark.parametrize(
    "actions, words",
    [
        (np.zeros((20, 2, 1), np.float32) + at(20, 3)[:, None, None], "float32 [2, 1], expected integers if"),
        (RNG.uniform(-1, 1, (20, 2)), "float64 [2], expected integers if they are indices"),
        (RNG.integers(0, 3, (20, 2, 3)) + 1, "int64 [2, 3], expected an index from 0 for each agent, or one-hot"),
        (RNG.integers(-3, 3, (20, 2)), "int64 [2], expected an index from 0"),
        (RNG.uniform(-1, 1, (20, 3, 2)), "float64 [3, 2], expected [2 agents] or [2 agents, numbers]"),
        (RNG.uniform(-1, 1, (20, 2, 2, 2)), "float64 [2, 2, 2], expected [2 agents]"),
        (RNG.uniform(-1, 1, 20), "float64 [], expected [2 agents]"),
        (RNG.uniform(-1, 1, (20, 2, 2)) + 0j, "actions holds complex128, expected numbers"),
        (np.full((20, 2), "left"), "actions holds <U4, expected numbers"),
    ],
)
def test_other_actions(tmp_path, actions, words):
    """What can be read in two ways, or in none, is refused with its shape and type."""
    assert words in refusal(only(tmp_path, **rows(20, actions=actions, terminals=at(20, 4, 19))))


def test_actions_that_overshoot(tmp_path):
    """A Gaussian policy's: refused with the way out, which clips them and says so."""
    arrays = rows(20, terminals=at(20, 4, 19))
    arrays["actions"][3, 0, 0], arrays["actions"][7, 1, 1] = 1.02, -1.5
    source = only(tmp_path, **arrays)
    assert "outside [-1, 1] in 2 rows, up to 1.5; add --clip-actions" in refusal(source)
    found, stdout = convert(source, "--clip-actions")
    np.testing.assert_array_equal(found["actions"], arrays["actions"].clip(-1, 1))
    assert "clipped: actions outside [-1, 1] in 2 rows, up to 1.5" in stdout
    arrays["actions"][3, 0, 0] = np.inf
    assert "actions holds NaN, infinity" in refusal(only(tmp_path, **arrays), "--clip-actions")


# ---- ends ----


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("name", ["terminals", "terminations", "dones"])
def test_agents_that_die_early(tmp_path, name, goes_on):
    """Flags per agent: the episode ends when all have ended, whether the first one goes on saying so or not."""
    step, ends = np.tile(np.arange(6), 3), np.zeros((18, 2), bool)
    ends[:, 0] = step >= 2 if goes_on else step == 2
    ends[:, 1] = step == 5
    arrays = rows(18, **{name: ends})
    following = np.roll(arrays["observations"], -1, axis=0)
    following[5::6] = 9
    for more in ({}, {"next_observations": following}):
        found, stdout = convert(only(tmp_path, **arrays, **more))
        assert np.flatnonzero(found["terminals"]).tolist() == [5, 11, 17] and not found["timeouts"].any()
        assert "agents ended before their team in 3 episodes" in stdout
        np.testing.assert_array_equal(found["observations"], arrays["observations"])
        if more:
            np.testing.assert_array_equal(found["final_observations"], following[5::6])


def test_the_last_agent_decides(tmp_path):
    """If the time limit stops the last agent alive, the episode is cut; if it dies, the episode is over."""
    terminals, timeouts = np.zeros((12, 2), bool), np.zeros((12, 2), bool)
    terminals[[1, 7], 0] = True
    timeouts[5, 1] = terminals[11, 1] = True
    arrays = rows(12, terminals=terminals, timeouts=timeouts, final_observations=np.ones((2, 2, 3), np.float32))
    found, _ = convert(only(tmp_path, **arrays))
    assert np.flatnonzero(found["timeouts"]).tolist() == [5] and np.flatnonzero(found["terminals"]).tolist() == [11]
    arrays["terminals"][11, 1] = False
    found, stdout = convert(only(tmp_path, **arrays | {"final_observations": np.ones((1, 2, 3), np.float32)}))
    assert len(found["rewards"]) == 6 and "left out: 6 rows at the end" in stdout


def test_agents_that_die_early_in_a_batch(tmp_path):
    """PyMARL's layout with `terminated` per agent; OMIGA's with d per agent."""
    batch = pymarl(play(True, [5, 3, 5, 4]))
    expected, _ = convert(write_h5(tmp_path / "usual.h5", batch))
    batch["terminated"] = batch["terminated"].repeat(2, axis=2)
    batch["terminated"][[0, 1, 3], 1, 0] = 1
    found, stdout = convert(write_h5(tmp_path / "batch.h5", batch))
    assert "agents ended before their team in 3 episodes" in stdout
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])

    o = RNG.normal(size=(14, 2, 3))
    d = np.zeros((14, 2), bool)
    d[[6, 13]], d[3:6, 1] = True, True
    omiga = {"o": o, "s": o.reshape(14, 6), "a": RNG.uniform(-1, 1, (14, 2, 2)), "r": np.arange(14.0), "d": d}
    found, stdout = convert(write_h5(tmp_path / "omiga.h5", omiga))
    assert np.flatnonzero(found["terminals"]).tolist() == [5, 11] and "before their team in 1 episodes" in stdout
    np.testing.assert_array_equal(found["final_observations"], o[[6, 13]].astype(np.float32))


def test_flags_that_are_none(tmp_path):
    for name, flags, words in (
        ("terminals", at(20, 4, 19) * 0.5, "terminals holds 0.5, expected 0 or 1"),
        ("timeouts", np.where(at(20, 4, 19), np.nan, 0), "timeouts holds nan, expected 0 or 1"),
        ("dones", np.zeros((20, 3)), "a row has 3 dones, expected one, or one for each of 2 agents"),
    ):
        assert words in refusal(only(tmp_path, **rows(20, **{"terminals": at(20, 4, 19), name: flags})))


# ---- names ----


@pytest.mark.parametrize("name", ["timeouts", "truncations", "truncated", "timeout"])
def test_time_limits_by_other_names(tmp_path, name):
    arrays = rows(40, terminals=at(40, 19, 39), **{name: at(40, 9, 29)})
    found, stdout = convert(only(tmp_path, **arrays, next_observations=np.roll(arrays["observations"], -1, axis=0)))
    assert np.flatnonzero(found["terminals"]).tolist() == [19, 39]
    assert np.flatnonzero(found["timeouts"]).tolist() == [9, 29]
    assert (f"read: {name} as timeouts" in stdout) == (name != "timeouts")


def test_dones(tmp_path):
    """They mark terminals and time limits alike: what is not told to be the one is the other."""
    done, limit, final = at(20, 4, 9, 19), at(20, 9), np.zeros((3, 2, 3), np.float32)
    for marks, terminals, timeouts in (
        ({"dones": done}, [4, 9, 19], []),
        ({"done": done, "truncations": limit}, [4, 19], [9]),
        ({"dones": done, "terminals": done & ~limit}, [4, 19], [9]),
        ({"dones": done, "terminals": at(20, 4), "timeouts": limit}, [4], [9, 19]),
    ):
        found, _ = convert(only(tmp_path, **rows(20, final_observations=final, **marks)))
        assert np.flatnonzero(found["terminals"]).tolist() == terminals
        assert np.flatnonzero(found["timeouts"]).tolist() == timeouts


def test_what_is_not_read_is_named(tmp_path):
    """In every format: arrays, objects, groups, files."""
    flat = rows(20, terminals=at(20, 4, 19), qpos=np.zeros(3), infos=np.array([{}] * 20, object))
    found, stdout = convert(only(tmp_path, **flat))
    assert "not read: qpos, infos" in stdout and {*found} <= {*rows(1), "terminals", "timeouts", "final_observations"}
    source = write_h5(tmp_path / "d4rl.h5", {name: flat[name] for name in flat if name != "infos"} | {"infos/q": [1]})
    assert "not read: infos, qpos" in convert(source)[1]

    batch = pymarl(play(True, [5, 3, 5]))
    batch |= {"actions_onehot": np.zeros((3, 6, 2, 5)), "probs": np.zeros((3, 6, 2, 5))}
    assert "not read: actions_onehot, probs" in convert(write_h5(tmp_path / "batch.h5", batch))[1]
    folder = tmp_path / "parts"
    for part in range(2):
        write_h5(folder / f"part_{part}.h5", pymarl(play(True, [5, 3], part)))
    for name in ("._part_0.h5", ".DS_Store", "README.md"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    found, stdout = convert(folder)
    assert len(found["rewards"]) == 16 and "not read in parts: .DS_Store, README.md, ._part_0.h5" in stdout

    arrays, seed = rows(10), tmp_path / "omar" / "seed_0_data"
    seed.mkdir(parents=True)
    for i in range(2):
        for kind, array in {"obs": arrays["observations"], "acs": arrays["actions"]}.items():
            np.save(seed / f"{kind}_{i}.npy", array[:, i])
        following = np.roll(arrays["observations"][:, i], -1, axis=0)
        following[4::5] = 9
        np.save(seed / f"next_obs_{i}.npy", following)
        np.save(seed / f"rews_{i}.npy", arrays["rewards"])
        np.save(seed / f"dones_{i}.npy", np.zeros(10))
        np.save(seed / f"states_{i}.npy", np.zeros(10))
    (seed / "._obs_0.npy").write_bytes(b"\0\5\x16\7")
    (seed.parent / "notes.txt").touch()
    stdout = convert(seed.parent, "--episode-length", 5)[1]
    assert "not read in seed_0_data: states_0, states_1" in stdout and "not read in omar: notes.txt" in stdout


# ---- other layouts ----


def test_one_step_games(tmp_path):
    """A batch of T = 2: `terminated` counts, unless --episode-length says that it was a time limit."""
    batch = {name: array[:, :2] for name, array in pymarl(play(True, [1] * 12)).items()}
    source = write_h5(tmp_path / "matrix.h5", batch)
    found, _ = convert(source)
    assert len(found["rewards"]) == 12 and found["terminals"].all() and not found["timeouts"].any()
    assert convert(source, "--episode-length", 1)[0]["timeouts"].all()
    batch["terminated"][3] = 0
    assert np.flatnonzero(convert(write_h5(source, batch))[0]["timeouts"]).tolist() == [3]


def test_time_limits_that_a_batch_tells(tmp_path):
    """Where a batch has `truncated`, a terminal in the very last step stays one."""
    batch = pymarl(play(True, [5, 3, 5, 4]))
    batch["truncated"] = np.zeros_like(batch["terminated"])
    batch["truncated"][0, 4], batch["terminated"][0, 4] = 1, 0
    found, _ = convert(write_h5(tmp_path / "batch.h5", batch))
    assert np.flatnonzero(found["timeouts"]).tolist() == [4]
    assert np.flatnonzero(found["terminals"]).tolist() == [7, 12, 16]


def test_batches_that_lack_the_last_observation(tmp_path):
    """Offpymarl's conversions of vaults: L steps fill L rows. What a time limit ends loses its last step."""
    lengths = [8, 5, 8, 3, 6, 1]
    batch = {
        "obs": np.zeros((6, 9, 2, 4), np.float32),
        "actions": np.zeros((6, 9, 2, 1), int),
        "avail_actions": np.zeros((6, 9, 2, 5), int),
        "reward": np.zeros((6, 9, 1), np.float32),
        "terminated": np.zeros((6, 9, 1), int),
        "filled": np.zeros((6, 9, 1), int),
    }
    for e, n in enumerate(lengths):
        batch["obs"][e, :n] = RNG.normal(size=(n, 2, 4))
        batch["actions"][e, :n] = RNG.integers(0, 5, (n, 2, 1))
        batch["avail_actions"][e, :n], batch["filled"][e, :n], batch["terminated"][e, n - 1] = 1, 1, 1
        batch["reward"][e, :n, 0] = np.arange(n)
    found, stdout = convert(write_h5(tmp_path / "vault.h5", batch))
    kept = [n - (n == 8) for n in lengths]
    taken = {name: np.concatenate([batch[name][e, :n] for e, n in enumerate(kept)]) for name in ("obs", "reward")}
    np.testing.assert_array_equal(found["observations"], taken["obs"])
    np.testing.assert_array_equal(found["rewards"], taken["reward"][:, 0])
    finals = [batch["obs"][e, n - 1] for e, n in enumerate(lengths)]
    np.testing.assert_array_equal(found["final_observations"], finals)
    ends = np.cumsum(kept) - 1
    assert np.flatnonzero(found["timeouts"]).tolist() == [ends[0], ends[2]]
    assert np.flatnonzero(found["terminals"]).tolist() == ends[[1, 3, 4, 5]].tolist()
    assert "the last step of the 2 episodes that a time limit ended" in stdout and "left out: 0" not in stdout
    batch["filled"][1, 5] = 1
    assert "in episode 1 `filled` does not end one row after" in refusal(write_h5(tmp_path / "mixed.h5", batch))


def test_states_that_differ_between_agents(tmp_path):
    """OMIGA's `s` is one state for all agents; what is not is left out."""
    o, d = RNG.normal(size=(14, 2, 3)), at(14, 6, 13)
    omiga = {"o": o, "s": o, "a": RNG.uniform(-1, 1, (14, 2, 2)), "r": np.arange(14.0), "d": d}
    found, stdout = convert(write_h5(tmp_path / "omiga.h5", omiga))
    assert "states" not in found and "not read: s, because it is not one state for all agents" in stdout


def test_agents_that_only_wait(tmp_path):
    """One allowed action for a step is no death: the card says that scripts take it for one."""
    batch = pymarl(play(True, [5, 5, 5]))
    batch["avail_actions"][1, 2, 0] = np.arange(5) == batch["actions"][1, 2, 0]
    _, stdout = convert(write_h5(tmp_path / "wait.h5", batch))
    assert "doubtful: agents with one allowed action count as dead, but act again later, in 1 rows" in stdout


# ---- Minari ----


def without(*words):
    return lambda arrays: [arrays.pop(path) for path in [*arrays] if any(word in path for word in words)]


def both_end(arrays):
    arrays["episode_4/terminations"] = at(5, 2, 4)


def as_long_as_actions(arrays):
    for path in [path for path in arrays if path.startswith("episode_2/observations")]:
        arrays[path] = arrays[path][1:]


@pytest.mark.parametrize(
    "change, agents, words",
    [
        (as_long_as_actions, [], "observations has [0, 1] rows more than there are actions, expected 1 rows more"),
        (without("rewards"), "ab", "lacks rewards; an episode has actions/a, actions/b, observations/a"),
        (without("2/rewards"), "ab", "not every episode has rewards, for example not both episode_0 and episode_2"),
        (without("actions/b"), "ab", "actions are of ['a'], but observations of ['a', 'b']"),
        (both_end, [], "episode_4 goes on after all agents have ended"),
        (lambda x: x.update({"episode_12": np.ones(3)}), [], "/episode_12 is an array, expected a group"),
        (lambda x: x.update({"episode_1/observations/a/more": np.ones((4, 2))}), "b", "not every episode has"),
        (lambda x: x.update({p: a[:, 0] for p, a in x.items() if "obs" in p}), [], "a row of observations is [2]"),
        (lambda x: x.update({p: a[:, :1] for p, a in x.items() if "actions/b" in p}), "ab", "agents' actions differ"),
        (lambda x: x.update({p: a[:0] for p, a in x.items() if "3/act" in p}), "ab", "episode_3 has no actions"),
        (lambda x: x.update({f"episode_{e}/infos/state": np.ones((9, 2)) for e in range(12)}), "ab", "infos/state has"),
    ],
)
def test_minari_refused(tmp_path, change, agents, words):
    arrays = minari(play(False, LENGTHS), agents)
    change(arrays)
    assert words in refusal(write_h5(tmp_path / "main_data.hdf5", arrays))


def test_minari_in_arrow(tmp_path):
    (tmp_path / "toy-v0" / "data" / "0").mkdir(parents=True)
    (tmp_path / "toy-v0" / "data" / "metadata.json").write_text("{}")
    assert "is Minari's, but not in HDF5" in refusal(tmp_path / "toy-v0")


def test_minari_agents(tmp_path):
    """Prey is left out, tuples are agents, flags may be per agent; what else is in a file is named."""
    episodes = play(False, [5, 3, 4])
    arrays = minari(episodes, ["_index_0", "_index_1"])
    for e, n in enumerate((5, 3, 4)):
        for kind in ("observations", "actions"):
            arrays[f"episode_{e}/{kind}/_index_2"] = RNG.normal(size=(n + (kind == "observations"), 3))
        arrays[f"episode_{e}/infos/_index_0/speed"] = np.ones(n + 1)
        arrays[f"episode_{e}/terminations"] = np.arange(n)[:, None] >= [n - 1, n - 1, 1]
        arrays[f"episode_{e}/truncations"] = np.zeros(n, bool)
    arrays["about"] = np.ones(2)
    found, stdout = convert(write_h5(tmp_path / "main_data.hdf5", arrays))
    assert found["observations"].shape == (12, 2, 2) and np.flatnonzero(found["terminals"]).tolist() == [4, 7, 11]
    assert "left out: the agents [2], which observe [3] numbers" in stdout and "before their team" not in stdout
    assert "not read: about" in stdout and "not read: infos/_index_0/speed" in stdout
    found, stdout = convert(tmp_path / "main_data.hdf5", "--agents", 1)
    assert found["actions"].shape == (12, 1, 2) and "the agents are _index_0\n" in stdout
    for e, n in enumerate((5, 3, 4)):
        arrays[f"episode_{e}/terminations"] = np.arange(n)[:, None] == [n - 1, 1, 0]
    found, stdout = convert(write_h5(tmp_path / "early.h5", arrays))
    assert np.flatnonzero(found["terminals"]).tolist() == [4, 7, 11] and "before their team in 3 episodes" in stdout


# ---- and what nobody thought of ----


def test_changed_files(capsys):
    """The short form of fuzz_convert.py."""
    status = fuzz_convert.main(fuzz_convert.Args(cases=10))
    stdout = capsys.readouterr().out
    assert status == 0, stdout
    for name in fuzz_convert.FORMATS:
        assert f"{name}: 10 refused" not in stdout and f"{name}: 10 converted" not in stdout
