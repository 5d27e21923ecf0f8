"""SMAC behind PettingZoo's interface, on a stand-in for the package `smac`, and on the real game where there is one.

The tests that take `env` ask nothing that only one of the two can answer: they run on both if SC2PATH is set and `smac`
can be imported. Those that take `battle` are about what the game cannot be told to do: crash, say, or be missing.
"""

import contextlib
import gc
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from gymnasium import spaces
from pettingzoo.test import parallel_api_test

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import smac  # noqa: E402

MAPS = {name: {"n_agents": 3, "limit": 20} for name in ("3m", "2s3z")}  # what the stand-in knows


class Battle:
    """A stand-in for smac.env.StarCraft2Env: its methods, its bad habits, and a made-up battle of 3 against 2.

    Everyone has 6 points of health. An attack takes 1, or in the first step is out of range; the enemies hit the first
    agent alive that did not move, for 1 to 3 points. So those who attack win, who stops loses, who runs lasts.
    """

    launches, running, crash_at = [], 0, None  # the seeds of all launches; processes; the step that ends in a crash

    def __init__(self, map_name="8m", seed=None, continuing_episode=False):
        self.limit, self.seed, self.continuing = MAPS[map_name]["limit"], seed, continuing_episode
        self.process, self.stats = False, {"battles_won": 0, "battles_game": 0, "timeouts": 0}

    def _launch(self):
        Battle.launches.append(self.seed)
        Battle.running += 1
        self.process, self.rng = True, np.random.default_rng(self.seed)

    def get_env_info(self):
        return {"n_agents": 3, "n_actions": 8, "obs_shape": 6, "state_shape": 30, "episode_limit": self.limit}

    def reset(self):
        if self.stats["battles_game"] == 0:  # as SMAC: whether or not a process runs
            self._launch()
        self.steps, self.last = 0, np.zeros((3, 8))
        self.allies, self.enemies = np.full(3, 6.0), np.full(2, 6.0)
        return self.get_obs(), self.get_state()

    def step(self, actions):
        for mask, action in zip(self.get_avail_actions(), actions, strict=True):
            assert mask[action] == 1, "SMAC asserts this, too"
        self.steps += 1
        if self.steps == self.crash_at:
            self.close()
            self._launch()
            return 0, True, {}
        before, self.last = self.enemies.sum(), np.eye(8)[actions]
        for action in actions:
            if action >= 6:
                self.enemies[action - 6] = max(self.enemies[action - 6] - 1, 0)
        standing = [i for i in range(3) if (self.allies[i] > 0 and actions[i] < 2) or actions[i] >= 6]
        if standing and self.enemies.any():
            self.allies[standing[0]] = max(self.allies[standing[0]] - self.rng.integers(1, 4), 0)
        won, lost = not self.enemies.any(), not self.allies.any()
        reward, info = before - self.enemies.sum() + 8 * won, {"battle_won": won}
        if self.steps >= self.limit and not won and not lost:
            self.stats["timeouts"] += 1
            if self.continuing:
                info["episode_limit"] = True
        over = won or lost or self.steps >= self.limit
        self.stats["battles_won"] += won
        self.stats["battles_game"] += over
        return reward, over, info

    def get_obs(self):
        alive = self.allies > 0
        return [alive[i] * np.array([i + 1, self.steps, self.allies[i], *self.enemies, 1]) for i in range(3)]

    def get_state(self):
        return np.concatenate([[self.steps], self.allies, self.enemies, self.last.flatten()])

    def get_avail_agent_actions(self, agent):
        if self.allies[agent] == 0:
            return [1] + [0] * 7
        shots = [int(self.steps > 0 and health > 0) for health in self.enemies]
        return [0, 1, 1, 1, 1, int(agent > 0), *shots]  # a wall is west of the first agent

    def get_avail_actions(self):
        return [self.get_avail_agent_actions(agent) for agent in range(3)]

    def get_stats(self):
        return self.stats

    def close(self):
        if self.process:
            Battle.running -= 1
        self.process = False


@contextlib.contextmanager
def without_smac():
    """No module of the package is loaded; afterwards those are that were."""

    def loaded():
        return [name for name in sys.modules if name.split(".")[0] == "smac"]

    before = {name: sys.modules.pop(name) for name in loaded()}
    yield
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


def install_stand_in(folder):
    """Modules as of the package, files as of the game in `folder`; returns what SC2PATH has to be."""
    names = [
        "smac",
        "smac.env",
        "smac.env.starcraft2",
        "smac.env.starcraft2.maps",
        "smac.env.starcraft2.maps.smac_maps",
    ]
    modules = {name: types.ModuleType(name) for name in names}
    modules["smac.env"].StarCraft2Env = Battle
    modules[names[-1]].get_smac_map_registry = lambda: MAPS
    sys.modules.update(modules)
    game = folder / "StarCraftII"
    (game / "Versions" / "Base75689").mkdir(parents=True)
    (game / "Maps" / "SMAC_Maps").mkdir(parents=True)
    (game / "Maps" / "SMAC_Maps" / "3m.SC2Map").touch()
    return str(game)


def game_is_here():
    try:
        smac.import_smac()
        smac.check_game("3m")
    except (ImportError, FileNotFoundError):
        return False
    return True


GAMES = ["stand-in", *(["StarCraft II"] if os.environ.get("SC2PATH") and game_is_here() else [])]


@pytest.fixture
def battle(monkeypatch, tmp_path):
    """The stand-in is installed and nothing of it launched."""
    with without_smac():
        monkeypatch.setenv("SC2PATH", install_stand_in(tmp_path))
        monkeypatch.setattr(Battle, "launches", [])
        monkeypatch.setattr(Battle, "running", 0)
        yield Battle


@pytest.fixture(params=GAMES)
def env(request):
    if request.param == "stand-in":
        request.getfixturevalue("battle")
    env = smac.parallel_env("3m")
    yield env
    env.close()


@pytest.fixture
def reported(env, monkeypatch):
    """What the game itself returns from its steps: a growing list of (team reward, over, info)."""
    rows, game = [], env.make.func
    genuine = game.step
    monkeypatch.setattr(game, "step", lambda self, actions: rows.append(genuine(self, actions)) or rows[-1])
    return rows


# Policies: the actions that a mask [A] allows to one action. For the dead, all of them are no-op.


def idle(mask):
    return np.flatnonzero(mask)[0]


def brave(mask):
    return np.flatnonzero(mask)[-1]


def cowardly(mask):
    return np.flatnonzero(mask[:6])[-1]


def play(env, policy, seed=None):
    """A battle: [(observations, rewards, terminations, truncations, infos)], one for each step."""
    _, infos = env.reset(seed=seed)
    steps = []
    while env.agents:
        steps.append(env.step({agent: policy(infos[agent]["action_mask"]) for agent in env.agents}))
        infos = steps[-1][-1]
    return steps


# ---- the interface ----


class Legal(spaces.Discrete):
    """The actions of one agent; draws those that it can take."""

    def __init__(self, env, index):
        super().__init__(env.masks.shape[1])
        self.env, self.index = env, index

    def sample(self, mask=None, probability=None):
        return super().sample(mask=self.env.masks[self.index])


@pytest.mark.filterwarnings("error")
def test_pettingzoo_api(env, capsys):
    env.action_spaces = {agent: Legal(env, i) for i, agent in enumerate(env.possible_agents)}
    parallel_api_test(env, num_cycles=200)
    assert "Passed" in capsys.readouterr().out


def test_everybody_sees_what_the_game_says(env):
    observations, infos = env.reset(seed=0)
    seen, last = set(), np.zeros((len(env.agents), env.action_space(env.agents[0]).n))
    while env.agents:
        assert list(observations) == list(infos) == env.possible_agents
        for i, agent in enumerate(env.possible_agents):
            assert observations[agent].dtype == np.float32
            assert observations[agent].shape == env.observation_space(agent).shape
            expected = np.float32(np.concatenate([env.game.get_obs()[i], last[i]]))
            np.testing.assert_array_equal(observations[agent], expected)
            np.testing.assert_array_equal(infos[agent]["action_mask"], env.game.get_avail_agent_actions(i))
            assert infos[agent]["action_mask"].shape == (env.action_space(agent).n,)
        assert env.state().dtype == np.float32 and env.state().shape == env.state_space.shape
        np.testing.assert_array_equal(env.state(), np.float32(env.game.get_state()))
        seen.add(env.state().tobytes())
        state, masks = env.state(), [info["action_mask"].copy() for info in infos.values()]
        for info in infos.values():
            info["action_mask"][:] = 1  # what others do with what they were given is no business of the environment's
        state[:] = 9
        np.testing.assert_array_equal(env.masks, masks)
        assert (env.state() != 9).any()
        last = np.eye(last.shape[1])[list(map(brave, masks))]
        observations, *_, infos = env.step(dict(zip(env.agents, map(brave, masks), strict=True)))
    assert len(seen) > 3
    observations, _ = env.reset()
    assert not any(observations[agent][-last.shape[1] :].any() for agent in env.agents)  # not the last battle's


def test_the_dead_stay_and_can_only_do_nothing(env):
    dead, waited = set(), 0
    for observations, rewards, _, _, infos in play(env, idle):
        assert list(infos) == list(rewards) == env.possible_agents
        for agent, info in infos.items():
            if info["action_mask"][0]:
                assert info["action_mask"].sum() == 1 and not observations[agent][: -len(info["action_mask"])].any()
                dead.add(agent)
            else:
                assert agent not in dead and info["action_mask"].any()
        waited += 0 < len(dead) < len(infos)
    assert len(dead) == len(env.possible_agents) and waited  # or nothing was tested


def test_the_team_reward_is_shared(env, reported):
    steps = play(env, brave)
    assert len(steps) == len(reported)
    for (_, rewards, *_), (team_reward, _, _) in zip(steps, reported, strict=True):
        assert len(set(rewards.values())) == 1 and all(type(reward) is float for reward in rewards.values())
        assert sum(rewards.values()) == pytest.approx(team_reward)
    assert sum(team_reward for team_reward, _, _ in reported) > 0


def test_ends_are_those_that_the_game_counts(env):
    won, truncated, policies = 0, 0, [idle, brave, cowardly, brave]
    for policy in policies:
        *before, (_, _, terminations, truncations, infos) = play(env, policy)
        for _, _, early, late, told in before:
            assert not any(early.values()) and not any(late.values())
            assert not any(info["won"] for info in told.values())
        assert len({*terminations.values()}) == len({*truncations.values()}) == 1
        assert all(terminations[agent] != truncations[agent] for agent in env.possible_agents)
        assert len({info["won"] for info in infos.values()}) == 1
        won += infos["agent_0"]["won"]
        truncated += truncations["agent_0"]
        assert terminations["agent_0"] or len(before) + 1 == env.game.get_env_info()["episode_limit"]
        assert env.agents == [] and env.step({}) == ({}, {}, {}, {}, {})
    stats = env.game.get_stats()
    assert (won, truncated, len(policies)) == (stats["battles_won"], stats["timeouts"], stats["battles_game"])


def test_evaluate_plays_it_with_an_untrained_actor(env, reported):
    import torch

    import macca_cql  # here, since other tests run this file in a process of its own that needs no torch

    agents, first = len(env.possible_agents), env.possible_agents[0]
    seen, choices = env.observation_space(first).shape[0], env.action_space(first).n
    data = {"observations": torch.zeros(4, agents, seen), "action_masks": torch.ones(4, agents, choices, dtype=bool)}
    data |= {"terminals": torch.zeros(4, dtype=bool), "next_alive": torch.ones(4, agents, dtype=bool)}
    results = macca_cql.evaluate(env, macca_cql.Networks(data, macca_cql.Args(hidden_dim=8)), {}, 3, 0)
    ends = [i + 1 for i, (_, over, _) in enumerate(reported) if over]
    battles = [reported[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert len(battles) == 3 and ends[-1] == len(reported)
    returns = [sum(reward for reward, _, _ in battle) / agents for battle in battles]
    assert results["return"] == pytest.approx(np.mean(returns))
    assert results["won"] == pytest.approx(np.mean([battle[-1][2]["battle_won"] for battle in battles]))


@pytest.mark.parametrize("action", [0, 5, 6, 8, -1, 1.5, [1, 1], "stop", None])
def test_an_action_that_cannot_be_taken(battle, action):
    env = smac.parallel_env("3m")
    env.reset()
    with pytest.raises(ValueError, match=r"the action of agent_0 is .*, its mask allows \[1, 2, 3, 4\]"):
        env.step({"agent_0": action, "agent_1": 1, "agent_2": 1})
    with pytest.raises(ValueError, match="no action for agent_2"):
        env.step({"agent_0": 1, "agent_1": 1})
    assert env.game.steps == 0


# ---- ends, launches and seeds ----


@pytest.mark.parametrize("policy, won, truncated", [(idle, 0, 0), (brave, 1, 0), (cowardly, 0, 1)])
def test_defeat_victory_and_time_limit(battle, policy, won, truncated):
    *_, truncations, infos = play(smac.parallel_env("3m"), policy)[-1]
    assert {info["won"] for info in infos.values()} == {bool(won)}
    assert {*truncations.values()} == {bool(truncated)}


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_crash_is_a_truncation(battle, monkeypatch, earlier):
    """In the first battle of a launch, too, after which SMAC would launch a second process."""
    env = smac.parallel_env("3m")
    for _ in range(earlier):
        play(env, brave)
    monkeypatch.setattr(battle, "crash_at", 2)
    first, (_, rewards, terminations, truncations, infos) = play(env, brave)
    assert not any(first[3].values()) and all(truncations.values()) and not any(terminations.values())
    assert not any(info["won"] for info in infos.values()) and not any(rewards.values()) and env.agents == []
    monkeypatch.setattr(battle, "crash_at", None)
    assert play(env, brave)[-1][-1]["agent_0"]["won"] and battle.running == 1


def test_one_process_for_all_battles(battle):
    env = smac.parallel_env("3m")
    assert battle.launches == []  # one that is made to look at its spaces costs nothing
    for seed in (1, 2, None):
        play(env, brave, seed)
        assert len(battle.launches) == battle.running == 1
    env.reset()
    assert len(battle.launches) == 1
    env.step(dict.fromkeys(env.agents, 1))
    env.reset()  # in the middle of a battle
    env.reset()
    assert len(battle.launches) == 3 and battle.running == 1
    env.close()
    assert battle.running == 0 and env.agents == []
    env.close()
    play(env, brave)
    assert len(battle.launches) == 4 and battle.running == 1


def test_a_seed_is_that_of_a_launch(battle):
    def run(env, seed):
        """Three battles and the launch they began with."""
        battles = [play(env, idle, seed + i) for i in range(3)]
        health = [[observations["agent_0"][2] for observations, *_ in steps] for steps in battles]
        return battle.launches[-1], health

    env, other = smac.parallel_env("3m"), smac.parallel_env("3m")
    first = run(env, 7)
    assert first == run(other, 7)
    assert first[1] != run(other, 7)[1]  # the game went on with its own random numbers
    other.close()
    assert first == run(other, 7)
    other.close()
    assert first[0] != run(other, 8)[0]
    unseeded = [smac.parallel_env("3m") for _ in range(2)]
    for env in unseeded:
        env.reset()
    assert battle.launches[-1] != battle.launches[-2]


def test_a_dropped_environment_ends_its_process(battle):
    env = smac.parallel_env("3m")
    env.reset()
    assert battle.running == 1
    del env
    gc.collect()
    assert battle.running == 0


def test_the_end_of_python_ends_the_process(tmp_path):
    code = f"""
import os, pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_smac
os.environ["SC2PATH"] = test_smac.install_stand_in(pathlib.Path("."))
test_smac.Battle.close = lambda self: print("closed" if self.process else "idle")
env = test_smac.smac.parallel_env("3m")
env.reset()
print("end of file")"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert (result.stdout.split("\n")[:2], result.stderr) == (["end of file", "closed"], "")


# ---- what is missing ----

MESSAGES = {  # words that only this message has
    "no package": ["the package smac is missing; pip install git+https://github.com/oxwhirl/smac.git"],
    "PyPI's package": ["PyPI's smac", "pip uninstall smac, then pip install git+https://github.com/oxwhirl/smac.git"],
    "broken package": ["TypeError: Descriptors cannot be created directly.", "protobuf<3.21"],
    "no game": ["StarCraft II is missing", "set SC2PATH"],
    "no map": ["the map 2s3z is missing", "SMAC_Maps.zip"],
    "unknown map": ["unknown SMAC map 'nosuchmap'", "3m, 2s3z"],
}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Asks macca_cql for an environment and returns the sentence it refuses with; checks which of MESSAGES it is."""
    import macca_cql

    monkeypatch.setattr(sys, "path", sys.path[:])  # make_env appends to it
    monkeypatch.setattr(sys, "argv", ["macca_cql.py"])

    def refuse(name, kind):
        with pytest.raises(SystemExit) as stop:
            macca_cql.make_env(name)
        output = capsys.readouterr()
        assert stop.value.code == 2 and output.out == "" and output.err.count("\n") == 1, output
        assert output.err.startswith(f"macca_cql.py: --env {name} ")
        assert [other for other, words in MESSAGES.items() if any(word in output.err for word in words)] == [kind]
        assert all(word in output.err for word in MESSAGES[kind])
        return output.err

    with without_smac():
        yield refuse


def write_package(folder, files):
    for name, text in files.items():
        (folder / "smac" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "smac" / name).write_text(text)


def test_no_package(refusal, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "smac", None)  # Python's way to say that there is none
    refusal("smac/3m", "no package")


def test_a_clone_is_no_package(refusal, monkeypatch, tmp_path):
    """`git clone` leaves a folder smac that can be imported, if no package is installed; it holds the package."""
    write_package(tmp_path, {"setup.py": "", "smac/__init__.py": "", "smac/env/__init__.py": ""})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *[p for p in sys.path if not (Path(p) / "smac").is_dir()]])
    refusal("smac/3m", "no package")


@pytest.mark.parametrize("start", ["", "import a_dependency_that_was_not_installed"])
def test_the_package_of_pypi(refusal, monkeypatch, tmp_path, start):
    write_package(tmp_path, {"__init__.py": start, "facade/__init__.py": "", "scenario.py": ""})
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path / "smac") in refusal("smac/3m", "PyPI's package")


def test_a_package_that_cannot_be_imported(refusal, monkeypatch, tmp_path):
    error = "raise TypeError('Descriptors cannot be created directly.\\nIf this call came from a _pb2.py file, ...')"
    write_package(tmp_path, {"__init__.py": "", "env/__init__.py": error})
    monkeypatch.syspath_prepend(tmp_path)
    refusal("smac/3m", "broken package")


def test_the_package_is_found_behind_our_own_file_of_that_name(monkeypatch, tmp_path):
    maps = {"env/starcraft2/maps/smac_maps.py": "def get_smac_map_registry(): return {'3m': {}}"}
    inits = {f"{folder}__init__.py": "" for folder in ("", "env/starcraft2/", "env/starcraft2/maps/")}
    write_package(tmp_path, {**inits, "env/__init__.py": "StarCraft2Env = 'the class'", **maps})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "data")  # as `python data/collect_mpe.py` has it
    before = sys.path[:]
    with without_smac():
        assert smac.import_smac() == ("the class", {"3m": {}})
    assert sys.path == before


@pytest.mark.parametrize("value", [None, "", "nowhere", "empty"])
def test_no_game(refusal, battle, monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    if value is None:
        monkeypatch.delenv("SC2PATH")
        found = f"SC2PATH is not set and {tmp_path / 'home' / 'StarCraftII'} has no Versions/Base..."
    else:
        path = str(tmp_path / value) if value else ""
        monkeypatch.chdir(os.environ["SC2PATH"])  # where an empty one might lead
        monkeypatch.setenv("SC2PATH", path)
        found = f"SC2PATH is {path} and {path} has no Versions/Base..." if value else "SC2PATH is empty)"
    assert found in refusal("smac/3m", "no game")


@pytest.mark.parametrize("value", [None, "~/StarCraftII"])
def test_the_game_in_the_home_folder(battle, monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SC2PATH")
    if value:
        monkeypatch.setenv("SC2PATH", value)
    assert smac.parallel_env("3m").possible_agents == ["agent_0", "agent_1", "agent_2"]


def test_no_map(refusal, battle):
    assert str(Path("Maps", "SMAC_Maps", "2s3z.SC2Map")) in refusal("smac/2s3z", "no map")


def test_unknown_map(refusal, battle):
    refusal("smac/nosuchmap", "unknown map")


def test_make_env_makes_it(battle, monkeypatch):
    import macca_cql

    monkeypatch.setattr(sys, "path", sys.path[:])
    flags.FLAGS.unparse_flags()
    env, gives_masks = macca_cql.make_env("smac/3m")
    assert env.metadata["name"] == "smac/3m" and gives_masks
    assert battle.running == 1
    env.close()
    assert flags.FLAGS.is_parsed()  # or pysc2 would refuse to launch the game
