"""The particle tasks of the paper as PettingZoo parallel environments, on the physics of `mpe2`.

`parallel_env("simple_spread")` is Cooperative Navigation (CN) as the offline multi-agent literature since OMAR uses
it. It differs from `mpe2.simple_spread_v3` in its actions and its reward; the physics and the observations are mpe2's:

- an action is the force in x and y, two numbers in [-1, 1]; an episode ends after 25 steps, always by truncation;
- the reward of agent i is the sum over landmarks of min(1 / distance of the nearest agent, 10), minus 5 for every
  other agent that it touches. The first part is the same for all agents; the sum over agents is the team reward.

`simple_spread_discrete` has the moves none, left, right, down, up instead (and action masks that allow all of them);
`simple_spread_sparse` pays the team only while every landmark has an agent of its own.

A task is a small class (`make_world`, `reset_world`, `observations`, `rewards`); `ParticleEnv` is the same for all.
Source of the physics: https://github.com/Farama-Foundation/MPE2
"""

import itertools

import numpy as np
from gymnasium import spaces
from mpe2._mpe_utils.core import Agent, Landmark, World
from pettingzoo import ParallelEnv

EPISODE_STEPS = 25
SENSITIVITY = 5.0  # mpe2's force per unit of action, where an agent does not bring its own (`agent.accel`)
DISCRETE_FORCES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], dtype=np.float64)  # none left right down up


class SimpleSpread:
    """Cooperative Navigation: three agents cover three landmarks and avoid touching each other."""

    num_agents = 3
    obs_dim = 18
    discrete = False

    def make_world(self) -> World:
        world = World()
        world.dim_c = 2
        world.agents = [Agent() for _ in range(self.num_agents)]
        for agent in world.agents:
            agent.silent, agent.size, agent.color = True, 0.15, np.array([0.35, 0.35, 0.85])
        world.landmarks = [Landmark() for _ in range(3)]
        for landmark in world.landmarks:
            landmark.collide, landmark.color = False, np.array([0.25, 0.25, 0.25])
        others = [[j for j in range(self.num_agents) if j != i] for i in range(self.num_agents)]
        self.others = np.array(others)  # [N, N-1], the other agents of each agent
        return world

    def reset_world(self, world: World, rng: np.random.Generator) -> None:
        for entity in world.entities:  # agents first, then landmarks: the order in which mpe2 draws positions
            entity.state.p_pos = rng.uniform(-1, 1, world.dim_p)
            entity.state.p_vel = np.zeros(world.dim_p)
        for agent in world.agents:
            agent.state.c = np.zeros(world.dim_c)

    def observations(self, world: World) -> np.ndarray:
        """[N, 18]: velocity 2, position 2, landmarks relative 6, others relative 4, others' silent channels 4."""
        n = self.num_agents
        pos, landmarks = positions(world.agents), positions(world.landmarks)
        obs = np.zeros((n, self.obs_dim), dtype=np.float32)  # the channels stay zero
        obs[:, 0:2] = [agent.state.p_vel for agent in world.agents]
        obs[:, 2:4] = pos
        obs[:, 4:10] = (landmarks[None] - pos[:, None]).reshape(n, -1)
        obs[:, 10:14] = (pos[self.others] - pos[:, None]).reshape(n, -1)
        return obs

    def rewards(self, world: World) -> np.ndarray:
        """[N] individual rewards."""
        pos, landmarks = positions(world.agents), positions(world.landmarks)
        nearest = distances(landmarks, pos).min(axis=1)  # [landmarks]
        covered = (1.0 / np.maximum(nearest, 0.1)).sum()  # min(1/d, 10) without dividing by zero
        touching = distances(pos, pos) < 2 * world.agents[0].size  # [N, N], each agent touches itself
        return covered - 5.0 * (touching.sum(axis=1) - 1)


class SimpleSpreadDiscrete(SimpleSpread):
    """Cooperative Navigation with five moves."""

    discrete = True


class SimpleSpreadSparse(SimpleSpread):
    """Cooperative Navigation with a team reward of 1 in every step that ends with an agent on each landmark, else 0.

    "On" means closer than 0.1, where mpe2 calls a landmark occupied and the dense reward reaches its cap; an agent
    counts for one landmark only. The reward is the team's alone, so every agent gets its N-th part.
    """

    radius = 0.1

    def rewards(self, world: World) -> np.ndarray:
        on = distances(positions(world.landmarks), positions(world.agents)) < self.radius  # [landmarks, N]
        ways = itertools.permutations(range(self.num_agents), len(world.landmarks))
        solved = any(all(on[landmark, agent] for landmark, agent in enumerate(way)) for way in ways)
        return np.full(self.num_agents, float(solved) / self.num_agents)


TASKS = {
    "simple_spread": SimpleSpread,
    "simple_spread_discrete": SimpleSpreadDiscrete,
    "simple_spread_sparse": SimpleSpreadSparse,
}


def parallel_env(task: str, render_mode: str | None = None) -> "ParticleEnv":
    """The particle task of this name; `render_mode="rgb_array"` lets `render()` return an image."""
    if task not in TASKS:
        raise ValueError(f"unknown particle task {task!r}: choose one of {', '.join(TASKS)}.")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"unknown render_mode {render_mode!r}: choose None or 'rgb_array'.")
    return ParticleEnv(task, render_mode)


class ParticleEnv(ParallelEnv):
    """One particle task behind PettingZoo's Parallel API. Observations are float32, rewards are individual."""

    def __init__(self, task: str, render_mode: str | None = None):
        self.task = TASKS[task]()
        self.world = self.task.make_world()
        self.metadata = {"name": task, "render_modes": ["rgb_array"], "render_fps": 10, "is_parallelizable": True}
        self.render_mode = render_mode
        self.possible_agents = [f"agent_{i}" for i in range(self.task.num_agents)]
        self.agents = []
        # A space carries its own random generator, so every agent has its own.
        self.observation_spaces = {a: spaces.Box(-np.inf, np.inf, (self.task.obs_dim,)) for a in self.possible_agents}
        self.action_spaces = {
            a: spaces.Discrete(5) if self.task.discrete else spaces.Box(-1.0, 1.0, (2,)) for a in self.possible_agents
        }
        self.state_space = spaces.Box(-np.inf, np.inf, (self.task.num_agents * self.task.obs_dim,))
        self.rng = np.random.default_rng()
        self.steps = 0
        self.obs = np.zeros((self.task.num_agents, self.task.obs_dim), dtype=np.float32)  # [N, obs_dim]

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        """Starts an episode; returns ({agent: [obs_dim]}, {agent: info}). A seed makes all later episodes follow."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.task.reset_world(self.world, self.rng)
        self.agents = self.possible_agents[:]
        self.steps = 0
        self.obs = self.task.observations(self.world)
        return dict(zip(self.agents, self.obs, strict=True)), self._infos()

    def step(self, actions):
        """Takes {agent: [2] in [-1, 1], or 0..4}; returns the usual five dicts. Actions beyond the box are clipped."""
        if not self.agents:  # PettingZoo's convention after the end of an episode
            return {}, {}, {}, {}, {}
        for name, agent in zip(self.agents, self.world.agents, strict=True):
            agent.action.u = self._force(name, actions) * (SENSITIVITY if agent.accel is None else agent.accel)
        self.world.step()
        self.steps += 1

        agents, over = self.agents, self.steps >= EPISODE_STEPS
        self.obs = self.task.observations(self.world)
        observations = dict(zip(agents, self.obs, strict=True))
        rewards = dict(zip(agents, self.task.rewards(self.world).tolist(), strict=True))
        terminations, truncations = dict.fromkeys(agents, False), dict.fromkeys(agents, over)
        infos = self._infos()
        if over:
            self.agents = []
        return observations, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        """[N * obs_dim]: the agents' observations side by side."""
        return self.obs.reshape(-1).copy()

    def render(self) -> np.ndarray | None:
        """[400, 400, 3] uint8: the square from -1.5 to 1.5, agents blue, landmarks grey; None without a render mode."""
        if self.render_mode is None:
            return None
        axis = np.linspace(-1.5, 1.5, 400)
        image = np.full((400, 400, 3), 255, dtype=np.uint8)
        for entity in [*self.world.landmarks, *self.world.agents]:
            x, y = entity.state.p_pos
            disc = (axis[None, :] - x) ** 2 + (-axis[:, None] - y) ** 2 < entity.size**2  # y points up
            image[disc] = (0.5 * image[disc] + 0.5 * 255 * entity.color).astype(np.uint8)  # see-through: discs overlap
        return image

    def close(self):
        pass

    def _infos(self):
        if not self.task.discrete:
            return {agent: {} for agent in self.agents}
        return {agent: {"action_mask": np.ones(5, dtype=np.int8)} for agent in self.agents}

    def _force(self, name, actions) -> np.ndarray:
        """[2] in [-1, 1]"""
        if name not in actions:
            raise ValueError(f"no action for {name}: step() needs one for each of {', '.join(self.agents)}.")
        action = np.asarray(actions[name])
        if self.task.discrete:
            if action.shape != () or not 0 <= action < 5 or action != int(action):
                raise ValueError(f"the action of {name} is {action.tolist()}, expected a whole number from 0 to 4.")
            return DISCRETE_FORCES[int(action)]
        if action.shape != (2,) or not (-np.inf < action[0] < np.inf and -np.inf < action[1] < np.inf):
            raise ValueError(f"the action of {name} is {action.tolist()}, expected two finite numbers in [-1, 1].")
        return np.minimum(np.maximum(action, -1.0), 1.0).astype(np.float64)


def positions(entities) -> np.ndarray:
    """[number of entities, 2]"""
    return np.array([entity.state.p_pos for entity in entities])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[A, 2] and [B, 2] to [A, B]"""
    delta = a[:, None] - b[None]
    return np.sqrt((delta * delta).sum(axis=-1))
