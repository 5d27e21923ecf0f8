"""The particle tasks of the paper as PettingZoo parallel environments, on the physics of `mpe2`.

The tasks are those of the offline multi-agent literature since OMAR (https://arxiv.org/abs/2111.11188). An action is
a force in x and y, two numbers in [-1, 1]. An episode ends after 25 steps, always by truncation. Physics and
observations are mpe2's (in WORLD without leader and speech). Two things differ: the rewards, and the prey is part of
the environment.

data/README.md lists the tasks and their rewards, whose sum over the agents is the team reward. The prey plays a policy
that was trained against predators (data/policies/mpe/TASK/prey.npz); with `parallel_env(task, prey="random")` it acts
at random.

A task is a class that says what is in the world, what agents observe and what they earn, on arrays of positions with
any number of leading dimensions. Two classes play tasks: `ParticleEnv` plays one world on mpe2's own physics, to
evaluate policies. `BatchedEnv` plays many worlds on the same equations in NumPy, to train and record.
Source of the physics: https://github.com/Farama-Foundation/MPE2
"""

import itertools
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gymnasium import spaces
from mpe2._mpe_utils.core import Agent, Landmark, World
from pettingzoo import ParallelEnv
from tqdm import tqdm

EPISODE_STEPS = 25
DT, DAMPING, CONTACT_FORCE, CONTACT_MARGIN = 0.1, 0.25, 100.0, 1e-3  # from mpe2's World
DISCRETE_FORCES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], dtype=np.float64)  # none left right down up


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[..., A, 2] and [..., B, 2] -> [..., A, B]"""
    dx = a[..., :, None, 0] - b[..., None, :, 0]
    dy = a[..., :, None, 1] - b[..., None, :, 1]
    return np.sqrt(dx * dx + dy * dy)


def relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The positions b [..., B, 2] relative to each of a [..., A, 2], coordinates side by side: [..., A, 2 B]"""
    delta = b[..., None, :, :] - a[..., :, None, :]
    return delta.reshape(*delta.shape[:-2], -1)


# ---- the tasks ----
# Every task has M entities: first N agents that learn, then P prey, then landmarks. `pos` is [..., M, 2], and `vel` of
# those that move is [..., N + P, 2].


class SimpleSpread:
    """Cooperative Navigation: three agents cover three landmarks and must not touch each other.

    The reward of agent i is the sum over landmarks of min(1 / distance of the nearest agent, 10), minus 5 for every
    other agent that it touches.
    """

    num_agents, num_prey = 3, 0
    obs_dim = 18
    discrete = False
    sizes = np.array([0.15] * 3 + [0.05] * 3)  # [M]
    collides = np.array([True] * 3 + [False] * 3)  # [M]
    accel = np.full(3, 5.0)  # force per unit of action, [N + P]
    max_speed = np.full(3, np.inf)  # [N + P]
    spread = np.ones(6)  # entities start in [-spread, spread], [M]
    colors = np.array([[0.35, 0.35, 0.85]] * 3 + [[0.25, 0.25, 0.25]] * 3)  # [M, 3]
    others = np.array([[1, 2], [0, 2], [0, 1]])  # the other agents of each agent

    def observations(self, pos: np.ndarray, vel: np.ndarray) -> np.ndarray:
        """[..., 3, 18]: velocity 2, position 2, landmarks relative 6, others relative 4, others' silent channels 4."""
        agents = pos[..., :3, :]
        others = relative(agents, agents).reshape(*agents.shape[:-1], 3, 2)
        others = others[..., np.arange(3)[:, None], self.others, :].reshape(*agents.shape[:-1], 4)
        silent = np.zeros_like(others)
        parts = [vel, agents, relative(agents, pos[..., 3:, :]), others, silent]
        return np.concatenate(parts, axis=-1, dtype=np.float32)

    def rewards(self, pos: np.ndarray) -> np.ndarray:
        """[..., 3] individual rewards."""
        agents, landmarks = pos[..., :3, :], pos[..., 3:, :]
        nearest = distances(landmarks, agents).min(axis=-1)  # [..., landmarks]
        covered = (1.0 / np.maximum(nearest, 0.1)).sum(axis=-1)  # min(1/d, 10) without dividing by zero
        touching = distances(agents, agents) < 2 * self.sizes[0]  # [..., 3, 3], each agent touches itself
        return covered[..., None] - 5.0 * (touching.sum(axis=-1) - 1)


class SimpleSpreadDiscrete(SimpleSpread):
    discrete = True  # five moves


class SimpleSpreadSparse(SimpleSpread):
    """Cooperative Navigation where the team gets 1 in every step that ends with an agent on each landmark, else 0.

    "On" means closer than 0.1: there mpe2 calls a landmark occupied, and the dense reward reaches its cap. An agent
    counts for one landmark only. There is only a team reward, so every agent gets its N-th part.
    """

    radius = 0.1

    def rewards(self, pos: np.ndarray) -> np.ndarray:
        on = distances(pos[..., 3:, :], pos[..., :3, :]) < self.radius  # [..., landmarks, 3]
        ways = [on[..., range(3), way].all(axis=-1) for way in itertools.permutations(range(3))]
        return np.repeat(np.any(ways, axis=0)[..., None] / 3, 3, axis=-1)


class SimpleTag:
    """Predator-Prey: three predators chase one faster prey among two obstacles.

    All predators get the same reward: minus 0.1 times the sum of their distances to the nearest prey, plus 10 for every
    predator on a prey. In a local task each gets its own part of it.
    """

    num_agents, num_prey = 3, 1
    obs_dim, prey_obs_dim = 16, 14
    discrete = False
    sizes = np.array([0.075] * 3 + [0.05] + [0.2] * 2)
    collides = np.full(6, True)
    accel = np.array([3.0] * 3 + [4.0])
    max_speed = np.array([1.0] * 3 + [1.3])
    spread = np.array([1.0] * 4 + [0.9] * 2)
    colors = np.array([[0.85, 0.35, 0.35]] * 3 + [[0.35, 0.85, 0.35]] + [[0.25, 0.25, 0.25]] * 2)
    contact_reward = 10.0
    local = False

    def _seen(self, pos: np.ndarray, vel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each of the K = N + P that move sees: relative positions of all K [..., K, K, 2], velocities of the
        prey [..., K, P, 2], and more in WORLD [..., K, anything]."""
        moving = pos[..., : len(self.accel), :]
        others = moving[..., None, :, :] - moving[..., :, None, :]
        prey = vel[..., self.num_agents :, :]
        return others, np.broadcast_to(prey[..., None, :, :], (*moving.shape[:-1], *prey.shape[-2:])), moving[..., :0]

    def _views(self, pos: np.ndarray, vel: np.ndarray, viewers: range) -> np.ndarray:
        """The observations of `viewers`, all predators or all prey [..., viewers, dims]: velocity, position, relative
        landmarks, relative others, the prey's velocities, and more in WORLD."""
        others, prey_vel, more = self._seen(pos, vel)
        landmarks = relative(pos[..., : len(self.accel), :], pos[..., len(self.accel) :, :])
        views = []
        for i in viewers:
            rest = [j for j in range(len(self.accel)) if j != i]
            prey = [j - self.num_agents for j in rest if j >= self.num_agents]
            last = [prey_vel[..., i, prey, :].reshape(*pos.shape[:-2], -1), more[..., i, :]]
            last = last if i < self.num_agents else last[::-1]  # the order of mpe2's WORLD for predators and for prey
            seen = others[..., i, rest, :].reshape(*pos.shape[:-2], -1)
            views.append([vel[..., i, :], pos[..., i, :], landmarks[..., i, :], seen, *last])
        return np.stack([np.concatenate(view, axis=-1, dtype=np.float32) for view in views], axis=-2)

    def observations(self, pos: np.ndarray, vel: np.ndarray) -> np.ndarray:
        """[..., N, obs_dim]"""
        return self._views(pos, vel, range(self.num_agents))

    def prey_observations(self, pos: np.ndarray, vel: np.ndarray) -> np.ndarray:
        """[..., P, prey_obs_dim]"""
        return self._views(pos, vel, range(self.num_agents, len(self.accel)))

    def _caught(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances between predators and prey [..., N, P], and which pairs touch."""
        n, k = self.num_agents, len(self.accel)
        apart = distances(pos[..., :n, :], pos[..., n:k, :])
        return apart, apart < self.sizes[0] + self.sizes[n]

    def rewards(self, pos: np.ndarray) -> np.ndarray:
        """[..., N] individual rewards: the same for all or, if the task is local, for each predator's own actions."""
        apart, touching = self._caught(pos)
        own = self.contact_reward * touching.sum(axis=-1) - 0.1 * apart.min(axis=-1)
        return own if self.local else np.repeat(own.sum(axis=-1, keepdims=True), self.num_agents, axis=-1)

    def _beyond(self, pos: np.ndarray) -> np.ndarray:
        """[..., P]: the cost of leaving the square. Without it the prey would run away for ever."""
        x = np.abs(pos[..., self.num_agents : len(self.accel), :])
        cost = np.where(x < 1.0, np.maximum(x - 0.9, 0) * 10, np.exp(np.minimum(2 * x - 2, np.log(10))))
        return cost.sum(axis=-1)

    def prey_rewards(self, pos: np.ndarray) -> np.ndarray:
        """[..., P], as in mpe2: a prey pays for being caught and for leaving the square."""
        _, touching = self._caught(pos)
        return -self.contact_reward * touching.sum(axis=-2) - self._beyond(pos)


class SimpleTagLocal(SimpleTag):
    local = True


class SimpleWorld(SimpleTag):
    """WORLD: four predators, two prey, an obstacle, two pieces of food, two forests that hide who is inside."""

    num_agents, num_prey = 4, 2
    obs_dim, prey_obs_dim = 30, 28
    contact_reward = 5.0

    def __init__(self):
        n, p = self.num_agents, self.num_prey
        self.sizes = np.array([0.075] * n + [0.045] * p + [0.2] + [0.03] * 2 + [0.3] * 2)
        self.collides = np.array([True] * (n + p + 1) + [False] * 4)
        self.accel = np.array([3.0] * n + [4.0] * p)
        self.max_speed = np.array([1.0] * n + [1.3] * p)
        self.spread = np.array([1.0] * (n + p) + [0.9] * 5)
        colors = [[0.95, 0.45, 0.45]] * n + [[0.45, 0.95, 0.45]] * p + [[0.25, 0.25, 0.25]]
        self.colors = np.array(colors + [[0.15, 0.15, 0.65]] * 2 + [[0.6, 0.9, 0.6]] * 2)

    def _seen(self, pos, vel):
        """Those inside a forest and those outside do not see each other. Each also observes which forests it is in: 1
        or -1."""
        others, prey_vel, _ = super()._seen(pos, vel)
        k = len(self.accel)
        reach = self.sizes[:k, None] + self.sizes[-2:]
        inside = distances(pos[..., :k, :], pos[..., -2:, :]) < reach  # [..., K, forests]
        together = (inside[..., :, None, :] & inside[..., None, :, :]).any(axis=-1)  # [..., K, K]
        outside = np.asarray(inside.sum(axis=-1) == 0)  # [..., K]
        visible = together | (outside[..., :, None] & outside[..., None, :])
        prey_visible = visible[..., self.num_agents :]
        return others * visible[..., None], prey_vel * prey_visible[..., None], np.where(inside, 1.0, -1.0)

    def prey_rewards(self, pos: np.ndarray) -> np.ndarray:
        """[..., P]: as above, but leaving the square costs double, and food pays."""
        n, k = self.num_agents, len(self.accel)
        apart = distances(pos[..., n:k, :], pos[..., -4:-2, :])  # [..., P, food]
        fed = 2.0 * (apart < self.sizes[n] + self.sizes[-4]).sum(axis=-1) - 0.05 * apart.min(axis=-1)
        return super().prey_rewards(pos) - self._beyond(pos) + fed


class SimpleWorldLocal(SimpleWorld):
    local = True


class SimpleWorld3v1(SimpleWorld):
    """WORLD with three predators and one prey, the sizes of OMAR's datasets."""

    num_agents, num_prey = 3, 1
    obs_dim, prey_obs_dim = 24, 22


Task = SimpleSpread | SimpleTag
TASKS: dict[str, type[SimpleSpread] | type[SimpleTag]] = {
    "simple_spread": SimpleSpread,
    "simple_spread_discrete": SimpleSpreadDiscrete,
    "simple_spread_sparse": SimpleSpreadSparse,
    "simple_tag": SimpleTag,
    "simple_tag_local": SimpleTagLocal,
    "simple_world": SimpleWorld,
    "simple_world_local": SimpleWorldLocal,
    "simple_world_3v1": SimpleWorld3v1,
}

# ---- the prey ----

PreyPolicy = Callable[[np.ndarray], np.ndarray]  # observations [E, P, prey_obs_dim] to actions [E, P, 2] in [-1, 1]


def make_prey(name: str, prey: str | PreyPolicy, rng: Callable[[], np.random.Generator]) -> PreyPolicy:
    """The policy of the prey in the task `name`; `prey` is "trained", "random" or a policy.

    Random actions come from `rng()`, a function, because a reset replaces the environment's generator.
    """
    if callable(prey):
        return prey
    if prey == "random":
        return lambda obs: rng().uniform(-1, 1, (*obs.shape[:-1], 2))
    if prey != "trained":
        raise ValueError(f"unknown prey {prey!r}, expected 'trained' or 'random'")
    return load_prey(Path(__file__).resolve().parent / "policies" / "mpe" / name.removesuffix("_local") / "prey.npz")


def load_prey(path: Path) -> PreyPolicy:
    """The prey whose weights data/collect_mpe.py wrote to `path`."""
    if not path.exists():
        task = f"--env mpe/{path.parent.name}"
        raise ValueError(f"the prey's weights {path} are missing; train them: data/collect_mpe.py {task} --train")
    try:
        with np.load(path, allow_pickle=False) as file:
            w1, w2, w3 = (file[f"weight_{i}"] for i in range(3))  # [P, in, out]
            b1, b2, b3 = (file[f"bias_{i}"] for i in range(3))  # [P, 1, out]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a policy that data/collect_mpe.py wrote ({error})") from error

    def policy(obs):
        x = np.maximum(np.swapaxes(obs, 0, 1) @ w1 + b1, 0)  # [P, E, hidden]
        return np.swapaxes(np.tanh(np.maximum(x @ w2 + b2, 0) @ w3 + b3), 0, 1)

    return policy


# ---- many worlds at once ----
class BatchedEnv:
    """E worlds of one task that step together. All of them start together and end after 25 steps."""

    def __init__(self, name: str, number: int, prey: str | PreyPolicy = "trained"):
        self.name, self.task, self.number = name, make_task(name), number
        self.rng = np.random.default_rng()
        self.prey = make_prey(name, prey, lambda: self.rng) if self.task.num_prey else None
        task, movers = self.task, len(self.task.accel)
        pairs = [
            (a, b)
            for a, b in itertools.combinations(range(len(task.sizes)), 2)
            if task.collides[a] and task.collides[b] and a < movers
        ]
        self.first, self.second = np.array(pairs).T  # [pairs]
        self.reach = task.sizes[self.first] + task.sizes[self.second]  # the distance at which a pair touches
        moving = np.arange(movers)
        # +1 for the first of a pair, which the force pushes away, -1 for the second: [pairs, N + P]
        self.pushes = 1.0 * (self.first[:, None] == moving) - 1.0 * (self.second[:, None] == moving)

    def reset(self, seed: int) -> np.ndarray:
        """New positions from the seed; returns observations [E, N, obs_dim]."""
        self.rng = np.random.default_rng(seed)
        shape = (self.number, len(self.task.sizes), 2)
        self.pos = self.rng.uniform(-1, 1, shape) * self.task.spread[:, None]  # [E, M, 2]
        self.vel = np.zeros((self.number, len(self.task.accel), 2))  # [E, N + P, 2]
        return self.task.observations(self.pos, self.vel)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions [E, N, 2] in [-1, 1], or [E, N] moves; returns observations [E, N, obs_dim] and rewards [E, N]."""
        force = DISCRETE_FORCES[actions] if self.task.discrete else np.clip(actions, -1.0, 1.0)
        if self.prey is not None and isinstance(self.task, SimpleTag):
            fled = np.clip(self.prey(self.task.prey_observations(self.pos, self.vel)), -1.0, 1.0)
            force = np.concatenate([force, fled], axis=1)
        self.physics(force * self.task.accel[:, None])
        return self.task.observations(self.pos, self.vel), self.task.rewards(self.pos)

    def physics(self, force: np.ndarray) -> None:
        """mpe2's World.step for forces [E, N + P, 2]: contacts, then damped motion with a limit on speed."""
        x, y = self.pos[..., 0], self.pos[..., 1]
        dx, dy = x[:, self.first] - x[:, self.second], y[:, self.first] - y[:, self.second]  # [E, pairs]
        apart = np.sqrt(dx * dx + dy * dy)
        overlap = (self.reach - apart) / CONTACT_MARGIN
        near = overlap > -50  # elsewhere the force is below 1e-20
        strength = np.zeros_like(apart)
        strength[near] = CONTACT_FORCE * CONTACT_MARGIN * np.logaddexp(0, overlap[near]) / apart[near]
        push = np.stack([(strength * dx) @ self.pushes, (strength * dy) @ self.pushes], axis=-1)  # [E, N + P, 2]
        self.pos[:, : len(self.task.accel)] += self.vel * DT
        self.vel = self.vel * (1 - DAMPING) + (force + push) * DT
        speed = np.sqrt((self.vel * self.vel).sum(axis=-1))
        self.vel *= np.minimum(1.0, self.task.max_speed / np.maximum(speed, 1e-12))[..., None]


# ---- a state factored by agent, and who caused the reward ----
def factored_states(name: str, observations: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The joint state of a particle task, each variable once, from the agents' observations [T, N, obs_dim].

    Returns states [T, S], and for each of the S numbers the agent whose own it is, or -1. First each agent's velocity
    and position, then nobody's: the landmarks' positions, and each prey's position and velocity. In WORLD not every
    agent sees a prey. So a prey has one more number there, 1 if anybody sees it; if nobody does, all five are 0.
    """
    task = make_task(name)
    n, movers, prey = task.num_agents, len(task.accel), task.num_prey
    rows, landmarks = len(observations), len(task.sizes) - movers
    own = observations[:, :, 2:4]  # positions [T, N, 2]
    first = 4 + 2 * landmarks  # where the others begin
    around = observations[:, 0, 4:first].reshape(rows, landmarks, 2) + own[:, :1]
    parts = [observations[:, :, :4].reshape(rows, 4 * n), around.reshape(rows, 2 * landmarks)]
    for i in range(prey):
        there, speed = (start + 2 * i for start in (first + 2 * (n - 1), first + 2 * (movers - 1)))
        apart = observations[:, :, there : there + 2]  # [T, N, 2]
        # What is not seen reads as exactly zero. Elsewhere everything is seen.
        sees = (apart != 0).any(axis=2, keepdims=True) if isinstance(task, SimpleWorld) else np.ones((rows, n, 1), bool)
        both = np.concatenate([own + apart, observations[:, :, speed : speed + 2]], axis=2)
        parts.append((both * sees).sum(axis=1) / np.maximum(sees.sum(axis=1), 1))
        if isinstance(task, SimpleWorld):
            parts.append(np.asarray(sees.any(axis=1)))
    states = np.concatenate(parts, axis=1, dtype=np.float32)
    return states, [i for i in range(n) for _ in range(4)] + [-1] * (states.shape[1] - 4 * n)


def shapley_rewards(name: str, positions: np.ndarray, rewards: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Who caused the team reward: the agents' Shapley values, [T, N].

    `positions` [T, M, 2] are those after the step, `rewards` [T] the team's, `references` [K, N, 2] positions of the
    agents in K other rows. A coalition's value is the mean team reward over the K references, with the coalition's
    agents where they are, the other agents where the reference has them, and the rest of the world as it is. All 2^N
    coalitions count. What the values leave of the reward, the part that no agent caused, is split evenly.
    """
    task = make_task(name)
    n, k = task.num_agents, len(references)
    coalitions = np.array([*itertools.product([False, True], repeat=n)])  # [2^N, N]
    size = coalitions.sum(axis=1)[:, None]
    ways = np.vectorize(math.factorial)
    # How often a coalition's value counts for an agent in it, and against one outside: [2^N, N].
    weight = np.where(
        coalitions,
        ways(np.maximum(size - 1, 0)) * ways(n - size),
        -ways(size) * ways(np.maximum(n - size - 1, 0)),
    ) / math.factorial(n)
    shares = np.empty((len(positions), n), np.float32)
    step = max(1, 2**14 // k)  # so many worlds at a time stay in the processor's cache
    progress = tqdm(total=len(shares), unit="transition", unit_scale=True, desc="Shapley values", mininterval=1)
    for start in range(0, len(shares), step):
        here = positions[start : start + step]
        worlds = np.repeat(here[:, None], k, axis=1)  # [t, K, M, 2]
        values = np.empty((len(here), len(coalitions)))
        for number, inside in enumerate(coalitions):
            worlds[:, :, :n] = np.where(inside[:, None], here[:, None, :n], references)
            values[:, number] = task.rewards(worlds).sum(axis=-1).mean(axis=1)
        share = values @ weight
        left = rewards[start : start + step] - share.sum(axis=1)
        shares[start : start + step] = share + left[:, None] / n
        progress.update(len(here))
    progress.close()
    return shares


# ---- one world, on mpe2 ----
def make_task(name: str) -> Task:
    """The task of this name."""
    if name not in TASKS:
        raise ValueError(f"unknown particle task {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]()


def parallel_env(task: str, prey: str | PreyPolicy = "trained", render_mode: str | None = None) -> "ParticleEnv":
    """The particle task of this name. `prey`: "trained" or "random". `render_mode="rgb_array"`: `render()` returns an
    image."""
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"unknown render_mode {render_mode!r}, expected None or 'rgb_array'")
    return ParticleEnv(task, prey, render_mode)


class ParticleEnv(ParallelEnv):
    """One particle task behind PettingZoo's Parallel API. Observations are float32, rewards are individual."""

    def __init__(self, name: str, prey: str | PreyPolicy, render_mode: str | None = None):
        self.task = make_task(name)
        self.prey = make_prey(name, prey, lambda: self.rng) if self.task.num_prey else None
        self.world = World()
        self.world.dim_c = 2
        self.world.agents = [Agent() for _ in self.task.accel]
        self.world.landmarks = [Landmark() for _ in self.task.sizes[len(self.task.accel) :]]
        for agent, limit in zip(self.world.agents, self.task.max_speed, strict=True):
            agent.silent, agent.max_speed = True, None if np.isinf(limit) else float(limit)
        looks = zip(self.world.entities, self.task.sizes, self.task.collides, self.task.colors, strict=True)
        for entity, size, collides, color in looks:
            entity.size, entity.collide, entity.color = float(size), bool(collides), color
        self.metadata = {"name": name, "render_modes": ["rgb_array"], "render_fps": 10, "is_parallelizable": True}
        self.render_mode = render_mode
        self.possible_agents = [f"agent_{i}" for i in range(self.task.num_agents)]
        self.agents = []
        # A space carries its own random generator, so every agent has its own.
        self.observation_spaces = {a: spaces.Box(-np.inf, np.inf, (self.task.obs_dim,)) for a in self.possible_agents}
        self.action_spaces = {
            a: spaces.Discrete(5) if self.task.discrete else spaces.Box(-1.0, 1.0, (2,)) for a in self.possible_agents
        }
        self.rng = np.random.default_rng()
        self.steps = 0
        self.obs = np.zeros((self.task.num_agents, self.task.obs_dim), dtype=np.float32)  # [N, obs_dim]
        self.state_space = spaces.Box(-np.inf, np.inf, self.state().shape)

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        """Start an episode; returns ({agent: [obs_dim]}, {agent: info}). A seed also fixes all later episodes."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        for entity, spread in zip(self.world.entities, self.task.spread, strict=True):
            entity.state.p_pos, entity.state.p_vel = self.rng.uniform(-1, 1, 2) * spread, np.zeros(2)
        self.agents = self.possible_agents[:]
        self.steps = 0
        self.obs = self.task.observations(*self.positions_and_velocities())
        return dict(zip(self.agents, self.obs, strict=True)), {agent: {} for agent in self.agents}

    def step(self, actions):
        """Takes {agent: [2] or 0..4}; returns PettingZoo's five dicts. Actions outside [-1, 1] are clipped."""
        if not self.agents:  # PettingZoo's convention after the end of an episode
            return {}, {}, {}, {}, {}
        forces = np.array([self._force(name, actions) for name in self.agents])
        if self.prey is not None and isinstance(self.task, SimpleTag):
            fled = self.prey(self.task.prey_observations(*self.positions_and_velocities())[None])[0]
            forces = np.concatenate([forces, np.clip(fled, -1.0, 1.0)])
        for agent, force, accel in zip(self.world.agents, forces, self.task.accel, strict=True):
            agent.action.u = force * accel
        self.world.step()
        self.steps += 1

        agents, over = self.agents, self.steps >= EPISODE_STEPS
        pos, vel = self.positions_and_velocities()
        self.obs = self.task.observations(pos, vel)
        observations = dict(zip(agents, self.obs, strict=True))
        rewards = dict(zip(agents, self.task.rewards(pos).tolist(), strict=True))
        terminations, truncations = dict.fromkeys(agents, False), dict.fromkeys(agents, over)
        infos = {agent: {} for agent in agents}
        if over:
            self.agents = []
        return observations, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        """[S]: the joint state, as `factored_states` has it and datasets."""
        return factored_states(self.metadata["name"], self.obs[None])[0][0]

    def render(self) -> np.ndarray | None:
        """[400, 400, 3] uint8: the square from -1.5 to 1.5, discs in the task's colours; None without a render mode."""
        if self.render_mode is None:
            return None
        axis = np.linspace(-1.5, 1.5, 400)
        image = np.full((400, 400, 3), 255, dtype=np.uint8)
        for entity in [*self.world.landmarks, *self.world.agents]:
            x, y = entity.state.p_pos
            disc = (axis[None, :] - x) ** 2 + (-axis[:, None] - y) ** 2 < entity.size**2  # y points up
            image[disc] = (0.5 * image[disc] + 0.5 * 255 * entity.color).astype(np.uint8)  # see-through: discs overlap
        return image

    def positions_and_velocities(self) -> tuple[np.ndarray, np.ndarray]:
        """The state of the world, as tasks use it: [M, 2] and [N + P, 2]."""
        pos = np.array([entity.state.p_pos for entity in self.world.entities])
        return pos, np.array([agent.state.p_vel for agent in self.world.agents])

    def _force(self, name, actions) -> np.ndarray:
        """[2] in [-1, 1]"""
        if name not in actions:
            raise ValueError(f"no action for {name}; step() needs one for each of {', '.join(self.agents)}")
        action = np.asarray(actions[name])
        if self.task.discrete:
            if action.shape != () or not 0 <= action < 5 or action != int(action):
                raise ValueError(f"the action of {name} is {action.tolist()}, expected a whole number from 0 to 4")
            return DISCRETE_FORCES[int(action)]
        if action.shape != (2,) or not (-np.inf < action[0] < np.inf and -np.inf < action[1] < np.inf):
            raise ValueError(f"the action of {name} is {action.tolist()}, expected two finite numbers in [-1, 1]")
        return np.minimum(np.maximum(action, -1.0), 1.0).astype(np.float64)
