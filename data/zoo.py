"""Any PettingZoo environment: `--env zoo/package.module:factory`, where `factory()` returns it.

The scripts need agents that observe vectors of one length and act in one `Box(-1, 1)` or `Discrete`. This file makes
that of other people's environments. What it changes, it says once on stderr; what already fits stays as it is:

- Actions: a Box of any finite bounds becomes [-1, 1], and its shape a vector. Discrete actions begin at 0.
- Masks: `action_mask` in infos, or in a Dict observation, from which it is taken out.
- Observations: matrices, images, Dicts and Discrete become vectors of at most 2,048 numbers.
- Agents that differ: shorter observations and Box actions are padded (with zeros, with numbers that nobody reads).
  Missing discrete actions are forbidden by the mask.
- Agents that come and go: each one stays in `agents` from the first step to the last. An absent agent observes zeros,
  and its action goes nowhere. After its end it has one allowed action, so it counts as dead. An agent that has not
  come yet may choose anything. Continuous actions have no masks, so there an absent agent counts as alive.
- Ends: an episode ends when every agent that came has ended, also if the environment never removes one. The first end
  of an agent is its last: an environment that lets agents live again is not understood.
- Rewards stay, also those that an agent gets after its end.
- An AEC environment is converted, if its metadata call it parallelizable.

Refused, in one sentence: mixed Box and Discrete, bounds that are infinite or not of floats, MultiDiscrete and other
actions, observations that are no numbers or too many, agents that `possible_agents` does not name, AEC environments
whose agents take turns.
"""

import importlib
import math
import sys
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils.conversions import aec_to_parallel

LARGEST = 2048  # numbers observed: more are an image, which the scripts' networks cannot read


def parallel_env(name: str) -> "FittedEnv":
    """The environment that the factory of this name, `package.module:factory`, returns; it may be an AEC one."""
    module, _, factory = name.partition(":")
    if not (module and factory):
        raise ValueError(f"zoo/ must be followed by package.module:factory, not by {name!r}")
    env = FittedEnv(getattr(importlib.import_module(module), factory)())
    if env.changes:
        print(f"zoo/{name}: {'; '.join(env.changes)}", file=sys.stderr)
    return env


def without_mask(space: spaces.Space) -> spaces.Space:
    """What an agent observes beside its mask."""
    if not isinstance(space, spaces.Dict) or "action_mask" not in space.spaces:
        return space
    rest = {key: part for key, part in space.spaces.items() if key != "action_mask"}
    return rest["observation"] if rest.keys() == {"observation"} else spaces.Dict(rest)


class FittedEnv(ParallelEnv):
    """A PettingZoo environment as the scripts need it; `changes` tells what that took.

    Beside PettingZoo's interface: `playing` are the agents that act now, `seen` [agent] is what such an agent observes
    as its environment gives it, `masks` [agent] the allowed actions or None, and `own_spaces` the own action spaces.
    """

    def __init__(self, env: Any):
        self.changes: list[str] = []
        if isinstance(env, AECEnv):
            if not env.metadata.get("is_parallelizable"):
                raise ValueError("its agents take turns: an AEC environment whose metadata lack is_parallelizable")
            env = aec_to_parallel(env)
            self.changes.append("an AEC environment, all agents act at once")
        self.env, self.metadata, self.render_mode = env, getattr(env, "metadata", {}), getattr(env, "render_mode", None)
        self.possible_agents, self.agents = list(getattr(env, "possible_agents", [])), []
        if not self.possible_agents:
            raise ValueError("it has no possible_agents, which must name every agent that may ever play")
        self._fit_actions()
        self._fit_observations()
        self.playing: list = []
        self.seen: dict = {}
        self.masks: dict = {}
        self.came: set = set()
        self.terminated: set = set()
        self.truncated: set = set()

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def _fit_actions(self) -> None:
        own = self.own_spaces = {agent: self.env.action_space(agent) for agent in self.possible_agents}
        kinds = {type(space) for space in own.values()}
        for agent, space in own.items():
            if not isinstance(space, spaces.Box | spaces.Discrete):
                raise ValueError(f"{agent} acts in {space}; only Box and Discrete can be served")
            if isinstance(space, spaces.Box) and not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise ValueError(f"{agent} acts in {space}; wrap the environment so that the bounds are finite")
            if isinstance(space, spaces.Box) and space.dtype.kind != "f":
                raise ValueError(f"{agent} acts in {space}; a Box of actions must be of floats")
        if len(kinds) > 1:
            raise ValueError("some agents act in a Box, others in Discrete; all must be of one kind")
        self.discrete = kinds == {spaces.Discrete}
        self.sizes = {a: int(x.n) if self.discrete else math.prod(x.shape) for a, x in own.items()}
        size = self.num_actions = max(self.sizes.values())
        # A space carries its own random generator, so every agent has its own.
        self.action_spaces = {
            agent: spaces.Discrete(size) if self.discrete else spaces.Box(-1.0, 1.0, (size,)) for agent in own
        }
        if self.discrete and any(space.start for space in own.values()):
            self.changes.append("actions are counted from 0")
        if not self.discrete:
            bounds = {agent: (x.low.ravel().astype(float), x.high.ravel().astype(float)) for agent, x in own.items()}
            self.middle = {agent: (low + high) / 2 for agent, (low, high) in bounds.items()}
            self.half = {agent: (high - low) / 2 for agent, (low, high) in bounds.items()}
            if any((low != -1).any() or (high != 1).any() for low, high in bounds.values()):
                self.changes.append("actions from -1 to 1 are rescaled to the bounds of their space")
            if any(len(space.shape) != 1 for space in own.values()):
                self.changes.append("actions are vectors, reshaped for the environment")
        if len(set(self.sizes.values())) > 1:
            what = "those that an agent lacks are forbidden" if self.discrete else "what an agent lacks goes nowhere"
            self.changes.append(f"agents have {min(self.sizes.values())} to {size} actions; {what}")

    def _fit_observations(self) -> None:
        own = {agent: self.env.observation_space(agent) for agent in self.possible_agents}
        self.masked = {agent for agent, space in own.items() if without_mask(space) is not space}
        self.observed = {agent: without_mask(space) for agent, space in own.items()}
        if self.masked:
            self.changes.append("masks are taken out of the observations")
        dims = {}
        for agent, space in self.observed.items():
            if not space.is_np_flattenable:
                raise ValueError(f"{agent} observes {space}, which is no array of numbers of one size")
            dims[agent] = spaces.flatdim(space)
            if dims[agent] > LARGEST:
                size = f"{list(space.shape or [])}, {dims[agent]:,} numbers"
                raise ValueError(f"{agent} observes {size}, more than {LARGEST:,}; use features instead of pixels")
            flat = isinstance(space, spaces.Box) and len(space.shape) == 1
            change = f"observations {space.shape or type(space).__name__} are flattened to {dims[agent]} numbers"
            self.changes += [] if flat or change in self.changes else [change]
        self.obs_dim = max(dims.values())
        if len(set(dims.values())) > 1:
            self.changes.append(f"observations of {min(dims.values())} numbers are padded to {self.obs_dim} with zeros")
        self.observation_spaces = {agent: spaces.Box(-np.inf, np.inf, (self.obs_dim,)) for agent in own}

    def reset(self, seed=None, options=None):
        """Start an episode; returns ({agent: [obs_dim]}, {agent: info}) of all possible agents."""
        observations, infos = self.env.reset(seed=seed, **({} if options is None else {"options": options}))
        self._refuse_strangers(observations, self.env.agents)
        if not self.env.agents:
            raise ValueError("it has no agents after reset()")
        self.agents, self.playing = self.possible_agents[:], [a for a in self.possible_agents if a in self.env.agents]
        self.came, self.terminated, self.truncated = set(self.playing), set(), set()
        return self._results(observations, infos, set())

    def step(self, actions):
        """Takes {agent: action} of all agents, as `action_space` says; returns PettingZoo's five dicts."""
        if not self.agents:  # PettingZoo's convention after the end of an episode
            return {}, {}, {}, {}, {}
        before = self.playing
        own = {agent: self._own_action(agent, actions[agent] if agent in before else None) for agent in self.env.agents}
        observations, rewards, terminations, truncations, infos = self.env.step(own)
        self._refuse_strangers(observations, rewards, terminations, truncations, self.env.agents)
        ended = {a for a in before if terminations.get(a) or truncations.get(a) or a not in self.env.agents}
        cut = {agent for agent in ended if truncations.get(agent) and not terminations.get(agent)}
        self.terminated, self.truncated = self.terminated | ended - cut, self.truncated | cut
        over = self.terminated | self.truncated
        self.playing = [a for a in self.possible_agents if a in self.env.agents and a not in over]
        self.came |= set(self.playing)
        agents, self.agents = self.agents, self.agents if self.playing else []
        observations, infos = self._results(observations, infos, ended)
        rewards = {agent: rewards.get(agent, 0.0) for agent in agents}
        flags = ({agent: agent in group for agent in agents} for group in (self.terminated, self.truncated))
        return observations, rewards, *flags, infos

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()

    def _refuse_strangers(self, *named) -> None:
        if strangers := {agent for names in named for agent in names} - {*self.possible_agents}:
            raise ValueError(f"it names {strangers}, which are not in possible_agents")

    def _results(self, observations: dict, infos: dict, ended: set) -> tuple[dict, dict]:
        """Observations and infos of all agents; `ended` are those whose last observations these are."""
        self.seen, self.masks, fitted, all_infos = {}, {}, {}, {}
        for agent in self.possible_agents:
            vector = fitted[agent] = np.zeros(self.obs_dim, np.float32)
            info = all_infos[agent] = {key: x for key, x in infos.get(agent, {}).items() if key != "action_mask"}
            seen = observations.get(agent)
            mask = infos.get(agent, {}).get("action_mask")
            if agent in self.masked and seen is not None:
                mask = seen["action_mask"]
            self.masks[agent] = self._own_mask(agent, mask) if self.discrete and mask is not None else None
            if agent in self.playing or (agent in ended and seen is not None):
                if seen is None:
                    raise ValueError(f"it gives no observation of {agent}, which is in its agents")
                x = self._flat(agent, seen)
                vector[: len(x)] = x
                self.seen[agent] = seen
            if self.discrete:
                info["action_mask"] = self._mask(agent, ended)
        return fitted, all_infos

    def _flat(self, agent, seen) -> np.ndarray:
        """[its own number of numbers], float32: an observation, as a vector."""
        space = self.observed[agent]
        if agent in self.masked:
            rest = {key: x for key, x in seen.items() if key != "action_mask"}
            seen = rest if isinstance(space, spaces.Dict) else rest["observation"]
        x = np.asarray(seen if isinstance(space, spaces.Box) else spaces.flatten(space, seen), np.float32).ravel()
        if len(x) != spaces.flatdim(space):
            raise ValueError(f"{agent} observes {len(x)} numbers, but its space says {spaces.flatdim(space)}")
        return x

    def _own_mask(self, agent, mask) -> np.ndarray:
        """[its own number of actions], bool"""
        mask = np.asarray(mask).ravel() > 0
        if len(mask) != self.sizes[agent]:
            raise ValueError(f"the mask of {agent} has {len(mask)} entries, but it has {self.sizes[agent]} actions")
        if agent in self.playing and not mask.any():
            raise ValueError(f"the mask of {agent} allows nothing")
        return mask

    def _mask(self, agent, ended: set) -> np.ndarray:
        """[num_actions], int8: the agent's own mask; all its actions before it came, one after its end."""
        mask, own = np.zeros(self.num_actions, np.int8), self.masks[agent]
        # Where the time limit ends the episode, learning goes on from here as if the agent could still act.
        stopped = not self.playing and agent in ended & self.truncated
        if agent in self.came and agent not in self.playing and not stopped:
            mask[0] = 1
        elif agent in self.came and own is not None and own.any():
            mask[: len(own)] = own
        else:
            mask[: self.sizes[agent]] = 1
        return mask

    def _own_action(self, agent, action):
        """An action as the environment wants it. None: of an agent that the environment should have removed."""
        space = self.own_spaces[agent]
        if self.discrete:
            mask = self.masks[agent]
            number = action if action is not None else 0 if mask is None else mask.argmax()
            return int(number) + int(space.start)
        x = np.zeros(self.sizes[agent]) if action is None else np.asarray(action, float)[: self.sizes[agent]]
        x = (self.middle[agent] + x * self.half[agent]).astype(space.dtype).reshape(space.shape)
        return np.clip(x, space.low, space.high)

    def fit_action(self, agent, action) -> np.ndarray | int:
        """An action of the environment's own as ours; clipped to its bounds. A ValueError says why it is none."""
        space, given = self.own_spaces[agent], np.asarray(action)
        if self.discrete:
            number = int(given) - int(space.start) if given.shape == () and given.dtype.kind in "iu" else -1
            if not 0 <= number < space.n:
                raise ValueError(f"{agent} got the action {action!r}, which is not in {space}")
            if (mask := self.masks[agent]) is not None and not mask[number]:
                raise ValueError(f"{agent} got the action {action!r}, which its mask forbids")
            return number
        fits = given.shape == space.shape and given.dtype.kind in "fiu" and np.isfinite(given).all()
        if not fits:
            raise ValueError(f"{agent} got the action {action!r}, which is not in {space}")
        x = np.zeros(self.num_actions, np.float32)
        half = self.half[agent]
        x[: given.size] = np.divide(given.ravel() - self.middle[agent], half, out=np.zeros(half.shape), where=half > 0)
        return x.clip(-1, 1)
