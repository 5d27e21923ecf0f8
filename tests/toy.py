"""Tiny tasks with a known best policy, a dataset of random actions on them, and a way to run a script on those.

Used as `--env toy:matching` and so on; this file imports nothing of the repository, so that it can be copied away.
"""

import contextlib
import io
import json
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import tqdm
from gymnasium import spaces
from pettingzoo import ParallelEnv

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["macca_cql", "macca_omar", "macca_icq"]
AGENTS = ["a", "b"]
EPISODE_STEPS = 5


class Matching(ParallelEnv):
    """Two agents, each of which sees a point x of the square [-1, 1]^2, a new one in every step.

    Continuous: the action that earns most is x for the first agent and -x for the second, the reward is minus the
    squared distance to it. Discrete: of 5 actions the one that names the quadrant of x earns 1 (the second agent
    counts quadrants backwards), the others 0; one of the other four actions, a random one, cannot be taken.
    """

    def __init__(self, discrete=False):
        self.discrete, self.possible_agents, self.agents = discrete, AGENTS[:], []
        self.rng, self.metadata = np.random.default_rng(), {"name": "matching"}

    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (2,))

    def action_space(self, agent):
        return spaces.Discrete(5) if self.discrete else spaces.Box(-1.0, 1.0, (2,))

    def best(self):
        """The best action of each agent: [2, 2] or, discrete, [2]."""
        if not self.discrete:
            return self.x * np.array([[1.0], [-1.0]])
        quadrant = (self.x > 0) @ np.array([1, 2])
        return np.array([quadrant[0], 3 - quadrant[1]])

    def _observe(self):
        """The next points, and which actions are allowed there: masks [2, 5]."""
        self.x = self.rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        observations = dict(zip(AGENTS, self.x, strict=True))
        if not self.discrete:
            return observations, {agent: {} for agent in AGENTS}
        self.masks = np.ones((2, 5), bool)
        for agent, best in enumerate(self.best()):
            self.masks[agent, (best + self.rng.integers(1, 5)) % 5] = False
        return observations, {agent: {"action_mask": mask} for agent, mask in zip(AGENTS, self.masks, strict=True)}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents, self.steps = self.possible_agents[:], 0
        return self._observe()

    def step(self, actions):
        taken = np.array([actions[agent] for agent in AGENTS])
        if self.discrete:
            assert self.masks[[0, 1], taken].all(), "an action was taken that is not allowed"
            rewards = (taken == self.best()).astype(float)
        else:
            assert np.abs(taken).max() <= 1, "an action was taken that is outside of the space"
            rewards = -np.square(taken - self.best()).sum(1)
        self.steps += 1
        observations, infos = self._observe()
        over = self.steps >= EPISODE_STEPS
        self.agents = [] if over else self.agents
        rewards = dict(zip(AGENTS, rewards.tolist(), strict=True))
        return observations, rewards, dict.fromkeys(AGENTS, False), dict.fromkeys(AGENTS, over), infos

    def state(self):
        return self.x.flatten()


def matching():
    return Matching()


def matching_discrete():
    return Matching(discrete=True)


class Unequal(Matching):
    """Agents whose observations differ in size."""

    def observation_space(self, agent):
        return spaces.Box(-1.0, 1.0, (2 if agent == "a" else 3,))


class Wide(Matching):
    """Actions beyond [-1, 1]."""

    def action_space(self, agent):
        return spaces.Box(-2.0, 2.0, (2,))


class Several(Matching):
    """Actions of a kind that no script knows."""

    def action_space(self, agent):
        return spaces.MultiDiscrete([2, 2])


def record(env, transitions, seed=0):
    """Uniformly random (allowed) actions: the arrays of a dataset; every episode ends by a time limit."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < transitions:
        observations, infos = env.reset(seed=int(rng.integers(2**31)))
        while env.agents:
            if env.discrete:
                masks = np.array([infos[agent]["action_mask"] for agent in AGENTS])  # [2, 5]
                actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])  # [2]
            else:
                masks, actions = None, rng.uniform(-1, 1, (2, 2)).astype(np.float32)
            following, rewards, _, _, infos = env.step(dict(zip(AGENTS, actions, strict=True)))
            individual = np.array([rewards[agent] for agent in AGENTS], np.float32)
            row = {
                "observations": np.array([observations[agent] for agent in AGENTS]),  # [2, 2]
                "next_observations": np.array([following[agent] for agent in AGENTS]),  # [2, 2]
                "actions": actions,
                "rewards": individual.sum(),
                "individual_rewards": individual,  # [2]
                "terminals": False,
                "timeouts": not env.agents,
            }
            if env.discrete:
                following_masks = np.array([infos[agent]["action_mask"] for agent in AGENTS])
                row |= {"action_masks": masks, "next_action_masks": following_masks}
            rows.append(row)
            observations = following
    return {name: np.array([row[name] for row in rows[:transitions]]) for name in rows[0]}


def final_arrays(arrays):
    """The same data, but what follows a row is stored for the last row of each episode only."""
    ends = arrays["terminals"] | arrays["timeouts"]
    following = {name: array for name, array in arrays.items() if name.startswith("next_")}
    finals = {name.replace("next_", "final_"): array[ends] for name, array in following.items()}
    return {name: array for name, array in arrays.items() if name not in following} | finals


def write(path, discrete=False, transitions=100, drop=(), metadata=None, final=False, **changes):
    """A dataset file on the task; `changes` replace arrays, `drop` leaves some out, `metadata` adds to it.

    What follows a row is stored as next_* or, if `final`, as final_*.
    """
    arrays = record(Matching(discrete), transitions) | changes
    arrays = final_arrays(arrays) if final else arrays
    arrays = {name: value for name, value in arrays.items() if name not in drop}
    about = {"env": f"toy:matching{'_discrete' if discrete else ''}", "quality": "random", "schema_version": "1"}
    if "metadata" not in changes:
        arrays["metadata"] = np.array(json.dumps({**about, **(metadata or {})}))
    np.savez(path, **arrays)
    return path


def run(script, folder, *flags, monkeypatch):
    """`python SCRIPT FLAGS` in `folder`, but in this process, which saves importing torch: (status, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    from torch.utils import tensorboard  # not at the top: as an environment this file needs no torch

    writers, genuine = [], tensorboard.SummaryWriter
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda *a, **b: writers.append(genuine(*a, **b)) or writers[-1])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers, folders = {number: signal.getsignal(number) for number in numbers}, sys.path[:]
    status, stdout, stderr = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:  # what the end of a process would do
            for writer in writers:
                writer.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            sys.path[:] = folders  # a script appends the folder that it runs in
    return status, stdout.getvalue(), stderr.getvalue()


def after(iterations, action, monkeypatch):
    """Does something in the middle of training: after that many of a run's iterations."""
    genuine, count = tqdm.tqdm.update, []

    def update(self, *arguments):
        count.append(1)
        if len(count) == iterations:
            action()
        return genuine(self, *arguments)

    monkeypatch.setattr(tqdm.tqdm, "update", update)


def run_folder(folder):
    """The only run under `folder`."""
    (only,) = (Path(folder) / "runs").iterdir()
    return only
