"""Other people's environments behind data/zoo.py, and the datasets that data/record.py makes of them."""

import contextlib
import functools
import io
import json
import sys

import numpy as np
import pytest
import toy
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import parallel_to_aec

from data import check, files, record, zoo

SHORT = ["--no-cuda", "--batch-size", 16, "--hidden-dim", 8, "--total-iterations", 2, "--causal-iterations", 2]
SHORT += ["--eval-interval", 2, "--final-episodes", 2]


class Script(ParallelEnv):
    """An environment that follows a script: who is there after each step, and who ended how.

    Three agents: "early" is terminated by step 2, "late" comes after step 1, and the time limit stops it and "whole" in
    step 4. Each observes (its number, the step) and earns its number in each step. `received` are all actions.
    """

    AGENTS = ("early", "whole", "late")
    PRESENT = (("early", "whole"), ("early", "whole", "late"), ("whole", "late"), ("whole", "late"), ())
    stays = False  # whether agents that ended stay in `agents`

    def __init__(self):
        self.possible_agents, self.agents, self.metadata, self.received = list(self.AGENTS), [], {"name": "script"}, []

    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (2,))

    def action_space(self, agent):
        return spaces.Discrete(3)

    def observe(self, agent):
        return np.array([self.AGENTS.index(agent) + 1, self.time], np.float32)

    def info(self, agent):
        return {}

    def results(self, agents):
        return {agent: self.observe(agent) for agent in agents}, {agent: self.info(agent) for agent in agents}

    def reset(self, seed=None, options=None):
        self.time, self.agents = 0, list(self.PRESENT[0])
        return self.results(self.agents)

    def step(self, actions):
        assert list(actions) == self.agents, "an action for each agent that is there, and for no other"
        self.received.append(actions)
        before = self.agents
        self.time += 1
        self.agents = [*before, *({*self.PRESENT[self.time]} - {*before})]
        if not self.stays:
            self.agents = list(self.PRESENT[self.time])
        seen = [*before, *(agent for agent in self.agents if agent not in before)]
        rewards = {agent: float(self.AGENTS.index(agent) + 1) for agent in before}
        terminations = {agent: agent == "early" and self.time == 2 for agent in seen}
        truncations = {agent: self.time == 4 and agent != "early" for agent in seen}
        observations, infos = self.results(seen)
        return observations, rewards, terminations, truncations, infos


class Stays(Script):
    stays = True


class Smooth(Script):
    """Continuous, each agent with another number of actions and other bounds."""

    def action_space(self, agent):
        size = self.AGENTS.index(agent) + 1
        return spaces.Box(np.full((size, 1), -1.0, np.float32), np.full((size, 1), 3.0, np.float32))


class Padded(Script):
    """Agents whose numbers of actions and of observations differ; the masks are in the infos."""

    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (2, self.AGENTS.index(agent) + 1))

    def action_space(self, agent):
        return spaces.Discrete(self.AGENTS.index(agent) + 2, start=5)

    def observe(self, agent):
        return np.full((2, self.AGENTS.index(agent) + 1), self.time + 1.0)

    def info(self, agent):
        mask = np.ones(self.AGENTS.index(agent) + 2, np.int8)
        mask[-1] = agent == "early"
        return {"action_mask": mask, "won": True}


class Inside(Padded):
    """The masks are in the observations, beside them a number."""

    def observation_space(self, agent):
        mask = spaces.MultiBinary(self.AGENTS.index(agent) + 2)
        return spaces.Dict({"observation": spaces.Discrete(6), "action_mask": mask})

    def observe(self, agent):
        return {"observation": self.time, "action_mask": super().info(agent)["action_mask"]}

    def info(self, agent):
        return {}


def make(*, agents=2, actions=None, observations=None):
    """A factory of an environment of `toy` in which something is different."""
    env = toy.Matching()
    env.possible_agents = ["a", "b", "c"][:agents]
    if actions:
        env.action_space = lambda agent: actions[agent == "b"]
    if observations:
        env.observation_space = lambda agent: observations
    return env


def in_turns():
    env = parallel_to_aec(toy.Matching())
    env.metadata["is_parallelizable"] = False
    return env


class Stranger(Script):
    """Names an agent in its results that possible_agents does not."""

    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards | {"__all__": 1.0}, *rest


class Nobody(Script):
    PRESENT = ((),)


class Breaks(toy.Matching):
    """Ctrl-C in step 50."""

    steps_of_all = 0

    def step(self, actions):
        Breaks.steps_of_all += 1
        if Breaks.steps_of_all == 50:
            raise KeyboardInterrupt
        return super().step(actions)


BOXES = (spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-1.0, 1.0, (2,)))
REFUSED = {
    "mixed actions": (functools.partial(make, actions=(BOXES[0], spaces.Discrete(3))), "one kind"),
    "infinite bounds": (functools.partial(make, actions=(spaces.Box(-np.inf, 1.0, (2,)), BOXES[1])), "finite"),
    "whole numbers": (functools.partial(make, actions=(spaces.Box(0, 5, (2,), np.int64), BOXES[1])), "floats"),
    "several actions": (toy.Several, "MultiDiscrete"),
    "pixels": (functools.partial(make, observations=spaces.Box(0, 255, (64, 64, 3), np.uint8)), "12,288"),
    "a sequence": (functools.partial(make, observations=spaces.Sequence(spaces.Discrete(2))), "Sequence"),
    "no agents": (functools.partial(make, agents=0), "possible_agents"),
    "in turns": (in_turns, "take turns"),
    "another agent": (Stranger, "__all__"),
    "nobody there": (Nobody, "no agents after reset"),
    "another size than its space": (functools.partial(make, observations=spaces.Box(-1, 1, (3,))), "its space says 3"),
}
factories = {f"refused_{number}": factory for number, (factory, _) in enumerate(REFUSED.values())}
globals().update(factories)


# ---- the environment ----
@pytest.mark.parametrize("discrete", [False, True])
def test_what_fits_stays_as_it_is(discrete):
    """The same observations, rewards, ends and masks, and every action arrives bit for bit."""
    plain, fitted = toy.Matching(discrete), zoo.FittedEnv(toy.Matching(discrete))
    arrived, step, rng = [], fitted.env.step, np.random.default_rng(0)
    fitted.env.step = lambda actions: arrived.append(actions) or step(actions)
    assert not fitted.changes
    for agent in toy.AGENTS:
        assert fitted.action_space(agent) == plain.action_space(agent)
        assert fitted.observation_space(agent).shape == plain.observation_space(agent).shape
    for seed in (0, 1):
        ours, theirs = fitted.reset(seed=seed), plain.reset(seed=seed)
        while plain.agents:
            np.testing.assert_equal(ours, theirs)
            assert fitted.agents == plain.agents
            actions = dict(zip(toy.AGENTS, (rng.uniform(-1, 1, (2, 2)) * [1, 1e-20]).astype(np.float32), strict=True))
            if discrete:
                actions = {agent: np.flatnonzero(theirs[-1][agent]["action_mask"])[0] for agent in toy.AGENTS}
            ours, theirs = fitted.step(actions), plain.step(actions)
            np.testing.assert_equal(arrived[-1], actions)
        np.testing.assert_equal(ours, theirs)
        assert fitted.agents == []


@pytest.mark.parametrize("discrete", [False, True])
def test_a_script_reaches_the_same_result(discrete, tmp_path, monkeypatch):
    """The whole metrics.csv, with and without zoo/ before the environment."""
    name, results = f"toy:matching{'_discrete' if discrete else ''}", []
    dataset = toy.write(tmp_path / "data.npz", discrete, metadata={"env": None})
    with np.load(dataset) as file:
        arrays = {key: file[key] for key in file if key != "metadata"}
    np.savez(dataset, **arrays, metadata=np.array(json.dumps({"schema_version": "1"})))
    for env in (name, f"zoo/{name}"):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        flags = ["--env", env, "--dataset", dataset, *SHORT]
        status, _, stderr = toy.run("macca_omar", folder, *flags, monkeypatch=monkeypatch)
        assert status == 0, stderr
        results.append((toy.run_folder(folder) / "metrics.csv").read_text())
    assert results[0] == results[1]


def test_actions_are_rescaled():
    """-1, 0 and 1 are the lower bound, the middle and the upper bound, in the environment's own shape and kind."""
    env = zoo.FittedEnv(Smooth())
    assert env.action_space("early") == spaces.Box(-1.0, 1.0, (3,))
    assert any("rescaled" in change for change in env.changes) and any("1 to 3 actions" in x for x in env.changes)
    env.reset()
    env.step({"early": np.array([-1, 9, 9]), "whole": np.array([0.0, 1, 9]), "late": np.zeros(3)})
    (received,) = env.env.received
    assert received.keys() == {"early", "whole"}
    np.testing.assert_array_equal(received["early"], [[-1]])
    np.testing.assert_array_equal(received["whole"], [[1], [3]])
    assert received["whole"].dtype == np.float32
    np.testing.assert_array_equal(env.fit_action("whole", np.array([[1], [5]])), [0, 1, 0])  # clipped, and padded
    for wrong in (np.ones(2), np.array([[1], [np.nan]]), "x"):
        with pytest.raises(ValueError, match="whole got the action"):
            env.fit_action("whole", wrong)


@pytest.mark.parametrize("factory", [Padded, Inside])
def test_masks_starts_and_padding(factory):
    """Masks from both places forbid what an agent cannot do; actions are counted from 0."""
    env = zoo.FittedEnv(factory())
    observations, infos = env.reset()
    size = 6  # one-hot of 0 to 5, or the third agent's [2, 3]
    assert env.action_space("early") == spaces.Discrete(4)
    assert all(env.observation_space(agent).shape == (size,) for agent in env.possible_agents)
    expected = [1, 1, 0, 0, 0, 0] if factory is Padded else [1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(observations["early"], expected)
    np.testing.assert_array_equal(observations["late"], np.zeros(size))  # it has not come
    masks = {agent: infos[agent]["action_mask"].tolist() for agent in env.possible_agents}
    assert masks == {"early": [1, 1, 0, 0], "whole": [1, 1, 0, 0], "late": [1, 1, 1, 1]}
    assert ("won" in infos["early"]) == (factory is Padded)
    observations, *_, infos = env.step({"early": 1, "whole": 0, "late": 3})
    assert env.env.received == [{"early": 6, "whole": 5}]
    assert infos["late"]["action_mask"].tolist() == [1, 1, 1, 0]
    expected = [2] * 6 if factory is Padded else [0, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(observations["late"], expected)
    assert env.fit_action("whole", 6) == 1
    for wrong in (4, 7, 8, 5.0):  # below the start, forbidden, beyond, no whole number
        with pytest.raises(ValueError, match="whole got the action"):
            env.fit_action("whole", wrong)
    said = " ".join(env.changes)
    assert "counted from 0" in said and "2 to 4 actions" in said
    assert "masks are taken out" in said if factory is Inside else "padded to 6" in said


@pytest.mark.parametrize("factory", [Script, Stays])
def test_agents_come_and_go(factory):
    """Every agent is there from the first step to the last, and the episode ends with the last one that came."""
    env = zoo.FittedEnv(factory())
    for _ in range(2):  # a second episode is like the first
        observations, infos = env.reset()
        steps = [(observations, {}, {}, {}, infos)]
        while env.agents:
            assert env.agents == env.possible_agents
            steps.append(env.step(dict.fromkeys(env.possible_agents, 2)))
        assert len(steps) == 5 and env.step({}) == ({}, {}, {}, {}, {})
        observed = np.array([[step[0][agent] for agent in env.possible_agents] for step in steps])
        np.testing.assert_array_equal(observed[:, 0], [[1, 0], [1, 1], [1, 2], [0, 0], [0, 0]])
        np.testing.assert_array_equal(observed[:, 1], [[2, time] for time in range(5)])
        np.testing.assert_array_equal(observed[:, 2], [[0, 0], [3, 1], [3, 2], [3, 3], [3, 4]])
        masks = np.array([[step[4][agent]["action_mask"] for agent in env.possible_agents] for step in steps])
        # Dead after its end; free before it came, and where the time limit stopped it.
        np.testing.assert_array_equal(masks.sum(2), [[3, 3, 3], [3, 3, 3], [1, 3, 3], [1, 3, 3], [1, 3, 3]])
        assert masks[2, 0].tolist() == [1, 0, 0]
        last = steps[-1]
        assert last[2] == {"early": True, "whole": False, "late": False}
        assert last[3] == {"early": False, "whole": True, "late": True}
        received = env.env.received[-4:]
        absent = {"early": 0} if factory is Stays else {}
        assert received[2].items() >= {"whole": 2, "late": 2, **absent}.items()


def test_aec_environments():
    """One that is converted plays the same as the parallel one that it was made of."""
    plain, env = toy.Matching(), zoo.FittedEnv(parallel_to_aec(toy.Matching()))
    assert any("AEC" in change for change in env.changes)
    (seen, _), (expected, _) = env.reset(seed=3), plain.reset(seed=3)
    while plain.agents:
        np.testing.assert_equal(seen, expected)
        actions = dict.fromkeys(toy.AGENTS, np.full(2, 0.5, np.float32))
        (seen, rewards, *_), (expected, wanted, *_) = env.step(actions), plain.step(actions)
        assert dict(rewards) == wanted
    assert env.agents == []


@pytest.mark.parametrize("number, case", list(enumerate(REFUSED)))
def test_refused_at_the_start(number, case, tmp_path, monkeypatch):
    """One sentence that says why, by a script and by the recorder, and no file."""
    word = REFUSED[case][1]
    name = f"zoo/test_record:refused_{number}"
    dataset = toy.write(tmp_path / "data.npz")
    status, _, stderr = toy.run("macca_omar", tmp_path, "--env", name, "--dataset", dataset, monkeypatch=monkeypatch)
    assert status == 2 and word in stderr and name in stderr and len(stderr.splitlines()) <= 2, stderr
    status, _, stderr = recorded(tmp_path / "new.npz", name)
    assert status == 2 and word in stderr and "Traceback" not in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data.npz"}


# ---- recording ----
def recorded(path, env, **settings):
    """(status, stdout, stderr) of data/record.py."""
    status, stdout, stderr = 0, io.StringIO(), io.StringIO()
    args = record.Args(env=env, output=path, **({"transitions": 200, "reference_episodes": 4} | settings))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["record.py"])
        try:
            files.run(lambda: record.main(args))
        except SystemExit as stop:
            status = stop.code
    return status, stdout.getvalue(), stderr.getvalue()


def load(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    return arrays, json.loads(str(arrays.pop("metadata")))


def best(agent, observation, action_space, rng):
    """The action that earns most in toy.Matching, from what the environment itself shows."""
    if isinstance(action_space, spaces.Box):
        return observation if agent == "a" else -observation
    seen = observation["observation"]
    quadrant = int(seen[0] > 0) + 2 * int(seen[1] > 0)
    action = quadrant if agent == "a" else 3 - quadrant
    assert observation["action_mask"][action]
    return action


def forbidden(agent, observation, action_space, rng):
    return int(np.argmin(observation["action_mask"]))


def broken(agent, observation, action_space, rng):
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    "env, script",
    [
        ("toy:matching", "macca_omar"),
        ("toy:matching_discrete", "macca_icq"),
        ("test_record:Smooth", "macca_icq"),
        ("test_record:Padded", "macca_omar"),
        ("test_record:Inside", "macca_cql"),
        ("test_record:Stays", "macca_omar"),
    ],
)
def test_recorded_checked_and_trained_on(env, script, tmp_path, monkeypatch):
    """A file without faults, made the same way again by the same seed, and a training on it."""
    path = tmp_path / "data.npz"
    assert recorded(path, env)[0] == 0
    report = check.inspect(path)
    assert not report.wrong and not [x for x in report.doubtful if "repeat" not in x], report
    arrays, metadata = load(path)
    assert metadata["env"] == f"zoo/{env}" and metadata["random_return"] and "expert_return" not in metadata
    np.testing.assert_allclose(arrays["rewards"], arrays["individual_rewards"].sum(1), rtol=1e-6)
    assert recorded(tmp_path / "again.npz", f"zoo/{env}")[0] == 0
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    assert recorded(tmp_path / "other.npz", env, seed=1)[0] == 0
    assert (load(tmp_path / "other.npz")[0]["actions"] != arrays["actions"]).any()
    flags = ["--env", f"zoo/{env}", "--dataset", path, *SHORT]
    status, stdout, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0 and "the last policy" in stdout, stderr


@pytest.mark.parametrize("env", ["Script", "Stays"])
def test_rows_of_agents_that_come_and_go(env, tmp_path):
    """An episode of four rows, which the time limit ends, because it stopped those that ended last."""
    assert recorded(tmp_path / "data.npz", f"test_record:{env}", transitions=10)[0] == 0
    arrays, metadata = load(tmp_path / "data.npz")
    assert metadata["transitions"] == 8 and metadata["agents"] == ["early", "whole", "late"]
    own = [[1, 2, 0], [1, 2, 3], [0, 2, 3], [0, 2, 3]] * 2
    if env == "Stays":
        own = [[1, 2, 0], [1, 2, 3], [1, 2, 3], [1, 2, 3]] * 2  # rewards after the end of an agent stay
    np.testing.assert_array_equal(arrays["individual_rewards"], own)
    np.testing.assert_array_equal(arrays["terminals"], np.zeros(8, bool))
    np.testing.assert_array_equal(arrays["timeouts"], [False, False, False, True] * 2)
    np.testing.assert_array_equal(arrays["observations"][:4, 0], [[1, 0], [1, 1], [1, 2], [0, 0]])
    np.testing.assert_array_equal(arrays["final_observations"], [[[0, 0], [2, 4], [3, 4]]] * 2)
    np.testing.assert_array_equal(arrays["action_masks"].sum(2), [[3, 3, 3], [3, 3, 3], [1, 3, 3], [1, 3, 3]] * 2)
    np.testing.assert_array_equal(arrays["final_action_masks"].sum(2), [[1, 3, 3]] * 2)
    assert (arrays["actions"][[2, 3], 0] == 0).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_policies(discrete, tmp_path):
    """A policy acts, the expert's return is measured, and a part of the actions is random."""
    env, path, settings = f"toy:matching{'_discrete' if discrete else ''}", tmp_path / "data.npz", {"overwrite": True}
    assert recorded(path, env, policy="test_record:best", expert_policy="test_record:best", **settings)[0] == 0
    arrays, metadata = load(path)
    np.testing.assert_allclose(arrays["individual_rewards"], float(discrete), atol=1e-6)
    assert metadata["expert_return"] == pytest.approx(5.0 * discrete, abs=1e-6)
    assert metadata["random_return"] < metadata["expert_return"] and metadata["noise"] == 0
    assert recorded(path, env, policy="test_record:best", epsilon=0.5, expert_return=7.0, **settings)[0] == 0
    arrays, metadata = load(path)
    right = (arrays["individual_rewards"] == 1) if discrete else (arrays["individual_rewards"] > -1e-6)
    assert 0.4 < right.mean() < 0.75
    assert metadata["expert_return"] == 7 and metadata["noise"] == 0.5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"policy": "test_record:nothing"}, ["--policy test_record:nothing", "cannot be loaded"]),
        ({"policy": "best"}, ["--policy best", "package.module:function"]),
        ({"policy": "test_record:SHORT"}, ["--policy test_record:SHORT", "no function"]),
        ({"policy": "test_record:broken"}, ["the policy failed", "no idea"]),
        ({"policy": "test_record:forbidden"}, ["the policy failed", "mask forbids"]),
        ({"expert_return": -5.0}, ["-5 is not above the random one"]),
        ({"expert_return": 5.0, "expert_policy": "test_record:best"}, ["leave one of them out"]),
        ({"expert_return": float("nan")}, ["--expert-return is nan"]),
        ({"epsilon": 1.5}, ["--epsilon is 1.5"]),
        ({"transitions": 4}, ["--transitions is 4, less than one episode"]),
        ({"transitions": 1}, ["--transitions is 1"]),
        ({"seed": -1}, ["--seed is -1"]),
        ({"reference_episodes": 0}, ["--reference-episodes is 0"]),
        ({"env": "toy"}, ["zoo/toy", "package.module:factory"]),
        ({"env": "toy:nothing"}, ["zoo/toy:nothing", "nothing"]),
        ({"env": "test_record:Breaks"}, ["interrupted"]),
    ],
)
def test_mistakes_and_ctrl_c(settings, words, tmp_path):
    """One sentence, exit status 2, and no file."""
    Breaks.steps_of_all = 0
    status, _, stderr = recorded(tmp_path / "data.npz", **{"env": "toy:matching_discrete", **settings})
    last = stderr.replace("\r", "\n").splitlines()[-1]
    assert status == 2 and all(word in last for word in words) and last.startswith("record.py: "), stderr
    assert "Traceback" not in stderr and not [*tmp_path.iterdir()]


def test_a_file_stays_without_overwrite(tmp_path):
    """As for the other collectors."""
    path = tmp_path / "data.npz"
    path.write_bytes(b"mine")
    status, _, stderr = recorded(path, "toy:matching")
    assert status == 2 and "--overwrite" in stderr and path.read_bytes() == b"mine"
