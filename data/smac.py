"""The StarCraft Multi-Agent Challenge (SMAC) as a PettingZoo parallel environment: `--env smac/2s3z`, or another map.

SMAC (https://arxiv.org/abs/1902.04043, https://github.com/oxwhirl/smac) gives each unit of a small army to an agent,
which sees what is near it. The game's own AI plays the enemy. You need the package `smac` from its repository (PyPI has
another package of that name), the game StarCraft II and the maps. Error messages name what is missing. This file
translates SMAC's interface into PettingZoo's:

- Actions: 0 no-op, 1 stop, 2 to 5 move, then one for each target: attack it (medivacs: heal it).
  `infos[agent]["action_mask"]` marks the allowed actions; any other is an error. A dead agent stays in `agents` to the
  end of the battle and can only take no-op, which living agents never can. So a policy that obeys the masks need not
  know who is dead.
- Observations: SMAC's (zeros for the dead), then the agent's last action as one-hot, zeros before its first step.
- Rewards: SMAC has a team reward only (damage, kills, victory; about 20 for a won battle). Each of N agents gets its
  N-th part, so their sum is the team reward.
- Ends: a won, lost or drawn battle is a termination. The map's time limit and a crash of the game are truncations.
  `infos[agent]["won"]` is true after the step that won the battle, and false after all others.
- Seeds: the game takes a seed only when it is launched. So the seed of the first `reset` holds for all battles of that
  launch. A later seed has no effect until the next launch: call `close()` before `reset(seed=...)`. A launch takes many
  seconds, too long for one per battle. The game does not promise that the same seed repeats the same battles exactly.

An environment has at most one game process. The first `reset` launches it; later ones start the next battle in it. But
a `reset` in the middle of a battle launches the game again: SMAC would leave the old process behind (in its first
battle) or start from a battlefield that is not ready (later, https://github.com/oxwhirl/smac/issues/104).
"""

import functools
import importlib
import importlib.util
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

# smac pins protobuf<3.21; later versions of tensorboard need a newer one.
PACKAGE = "pip install git+https://github.com/oxwhirl/smac.git 'tensorboard<2.21'"
GAME = "https://github.com/Blizzard/s2client-proto#linux-packages"
MAPS = "https://github.com/oxwhirl/smac/releases/download/v0.1-beta1/SMAC_Maps.zip"


# ---- what has to be there ----
def import_smac() -> tuple[Any, dict[str, dict]]:
    """SMAC's environment class and its maps, {name: properties}; an ImportError says what is missing."""
    own, path = str(Path(__file__).resolve().parent), sys.path[:]
    # A script in this folder has the folder on its path, where `smac` is this very file.
    sys.path[:] = [folder for folder in path if os.path.realpath(folder) != own]
    try:
        game = importlib.import_module("smac.env").StarCraft2Env
        maps = importlib.import_module("smac.env.starcraft2.maps.smac_maps").get_smac_map_registry()
        # pysc2 launches the game, and refuses to while its command-line flags are not parsed.
        importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    except Exception as error:  # of any kind: protobuf raises a TypeError
        raise ImportError(explain(error)) from error
    finally:
        sys.path[:] = path
    return game, maps


def explain(error: Exception) -> str:
    """What is wrong if the import of SMAC ended in `error`."""
    spec = importlib.util.find_spec("smac")
    if spec is None or spec.origin is None:  # without an origin it is only a folder of that name, such as a clone
        return f"the package smac is missing; {PACKAGE} (`pip install smac` brings another package)"
    if not any((Path(folder) / "env").is_dir() for folder in spec.submodule_search_locations or []):
        place = Path(spec.origin).parent
        other = f"the package in {place} is PyPI's smac, which tunes hyper-parameters, not StarCraft's"
        return f"{other}; pip uninstall smac, then {PACKAGE}"
    reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    remedy = "if protobuf is the cause, pip install 'protobuf<3.21' 'tensorboard<2.21'"
    return f"the package smac cannot be imported ({reason}); {remedy}"


def check_game(map_name: str) -> None:
    """Look for StarCraft II and the map where pysc2 will; a FileNotFoundError says what is missing."""
    named = os.environ.get("SC2PATH")
    folder = Path("~/StarCraftII" if named is None else named).expanduser()
    if named == "" or not any(folder.glob("Versions/Base*")):
        value = {None: "not set", "": "empty"}.get(named, named)
        found = f"SC2PATH is {value}" + ("" if named == "" else f" and {folder} has no Versions/Base...")
        raise FileNotFoundError(f"StarCraft II is missing ({found}); unpack {GAME} and set SC2PATH to its folder")
    file = folder / "Maps" / "SMAC_Maps" / f"{map_name}.SC2Map"
    if not file.is_file():
        raise FileNotFoundError(f"the map {map_name} is missing ({file}); unpack {MAPS} in {folder / 'Maps'}")


# ---- the environment ----
def parallel_env(map_name: str) -> "StarCraftEnv":
    """The battle on the SMAC map of this name."""
    return StarCraftEnv(map_name)


class StarCraftEnv(ParallelEnv):
    """One SMAC map behind PettingZoo's Parallel API. Observations and states are float32."""

    def __init__(self, map_name: str):
        game, maps = import_smac()
        if map_name not in maps:
            raise ValueError(f"unknown SMAC map {map_name!r}, expected one of {', '.join(maps)}")
        check_game(map_name)
        # SMAC reports a time limit only for "continuing" episodes; they are played like others.
        self.make = functools.partial(game, map_name=map_name, continuing_episode=True)
        sizes = self.make().get_env_info()  # does not launch the game
        self.metadata = {"name": f"smac/{map_name}", "render_modes": [], "is_parallelizable": True}
        self.possible_agents = [f"agent_{i}" for i in range(sizes["n_agents"])]
        self.agents = []
        # A space carries its own random generator, so every agent has its own.
        seen = (sizes["obs_shape"] + sizes["n_actions"],)
        self.observation_spaces = {a: spaces.Box(-np.inf, np.inf, seen) for a in self.possible_agents}
        self.action_spaces = {a: spaces.Discrete(sizes["n_actions"]) for a in self.possible_agents}
        self.state_space = spaces.Box(-np.inf, np.inf, (sizes["state_shape"],))
        self.rng = np.random.default_rng()  # draws the seeds of launches
        self.game: Any = None
        self.stop = weakref.finalize(self, lambda: None)  # ends the game's process, if there is one
        self.ready = False  # whether SMAC can start another battle in the running process
        self.masks = np.zeros((sizes["n_agents"], sizes["n_actions"]), dtype=np.int8)  # [N, A]
        self.last_actions = np.zeros(self.masks.shape, dtype=np.float32)  # [N, A], one-hot
        self.joint = np.zeros(sizes["state_shape"], dtype=np.float32)  # [state_dim]

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        """Start a battle; returns ({agent: [obs_dim]}, {agent: info}). For seeds see the top of this file."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if self.game is None or not self.ready:
            self.close()
            self.game = self.make(seed=int(self.rng.integers(2**31)))
            self.stop = weakref.finalize(self, self.game.close)  # also at exit, or when the environment is deleted
        self.ready = False
        self.game.reset()
        self.agents, self.last_actions = self.possible_agents[:], np.zeros_like(self.last_actions)
        return self._observe(), self._infos(won=False)

    def step(self, actions):
        """Takes {agent: action} of all agents, also the dead; returns PettingZoo's five dicts."""
        if not self.agents:  # PettingZoo's convention after the end of an episode
            return {}, {}, {}, {}, {}
        chosen = [self._action(i, actions) for i in range(len(self.agents))]
        team_reward, over, info = self.game.step(chosen)
        self.last_actions = np.eye(self.masks.shape[1], dtype=np.float32)[chosen]
        crashed = over and "battle_won" not in info  # SMAC has launched the game again and has nothing to report
        truncated = crashed or (over and info.get("episode_limit", False))
        self.ready = over and not crashed

        agents = self.agents
        observations, infos = self._observe(), self._infos(won=bool(info.get("battle_won", False)))
        rewards = dict.fromkeys(agents, float(team_reward) / len(agents))
        terminations, truncations = dict.fromkeys(agents, over and not truncated), dict.fromkeys(agents, truncated)
        if over:
            self.agents = []
        return observations, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        """[state_dim]: all units of both sides, seen or not, and the agents' last actions."""
        return self.joint.copy()

    def close(self):
        """End the game's process; a later `reset` launches a new one."""
        self.stop()
        self.game, self.agents = None, []

    def _observe(self):
        self.masks = np.array(self.game.get_avail_actions(), dtype=np.int8)
        self.joint = np.array(self.game.get_state(), dtype=np.float32)
        seen = np.concatenate([self.game.get_obs(), self.last_actions], axis=1, dtype=np.float32)
        return dict(zip(self.agents, seen, strict=True))

    def _infos(self, won: bool):
        masks = zip(self.agents, self.masks.copy(), strict=True)
        return {agent: {"action_mask": mask, "won": won} for agent, mask in masks}

    def _action(self, index: int, actions) -> int:
        name = self.agents[index]
        if name not in actions:
            raise ValueError(f"no action for {name}; step() needs one for each of {', '.join(self.agents)}")
        action, allowed = np.asarray(actions[name]), np.flatnonzero(self.masks[index])
        if action.shape != () or action not in allowed:
            raise ValueError(f"the action of {name} is {action.tolist()}, its mask allows {allowed.tolist()}")
        return int(action)
