"""Record a dataset in any PettingZoo environment, with random actions or with a policy of your own.

    python data/record.py --env package.module:factory --transitions 20000 --output random.npz
    python data/record.py --env package.module:factory --policy package.module:function --epsilon 0.3 --output mixed.npz
    python macca_omar.py --env zoo/package.module:factory --dataset mixed.npz

`factory()` returns the environment, `function(agent, observation, action_space, rng)` the action of an agent. All are
as the environment has them: its name of the agent, its observation, its action space, an action of that space. Where
it gives masks, the observation is a dictionary of `observation` and `action_mask`. `rng` is NumPy's generator, for
whatever is random. Actions beyond the bounds of a Box are clipped; an action that a mask forbids is an error.

data/zoo.py says how an environment becomes one that the scripts can play, data/README.md what a file holds. The team
reward is the sum of the agents' rewards, and `individual_rewards` are the agents' own. A return is the sum over an
episode, mean over all possible agents. An absent agent observes zeros and does nothing.
"""

import os
import sys

if __name__ == "__main__":
    # Modules are looked up as the scripts do: where the package `data` is, not in it, then in the user's folder.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.append(os.getcwd())

import dataclasses
import importlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from data import files
from data.zoo import FittedEnv, parallel_env

SCRIPT = "record.py"
Policy = Callable[[Any, Any, Any, np.random.Generator], Any]


class PolicyError(Exception):
    """Not the environment failed but the user's policy."""


@dataclass
class Args:
    env: str  # package.module:factory, with or without zoo/ before it
    policy: str = "random"  # random, or package.module:function
    quality: str = "recorded"  # the name of the dataset, if there is no --output
    transitions: int = 50_000  # size of the dataset, rounded down to whole episodes
    epsilon: float = 0.0  # probability that an agent acts at random instead
    seed: int = 0  # the same seed and package versions give the same dataset, if the environment obeys seeds
    output: Path | None = None  # by default data/datasets/zoo/ENV/QUALITY.npz
    overwrite: bool = False  # replace the file if it exists
    reference_episodes: int = 100  # episodes that measure random_return and expert_return, with which scores are made
    expert_return: float | None = None  # the return that scores 100, mean over the agents
    expert_policy: str = ""  # or the policy whose return is measured for it, package.module:function


def check_args(args: Args) -> None:
    files.check_range(args, 2, math.inf, "transitions")
    files.check_range(args, 1, math.inf, "reference_episodes")
    files.check_range(args, 0, 1, "epsilon")
    files.check_range(args, 0, 2**31 - 1, "seed")
    if args.expert_return is not None:
        files.check_range(args, -1e9, 1e9, "expert_return")
        if args.expert_policy:
            files.fail("--expert-return and --expert-policy say the same; leave one of them out")


def load_policy(flag: str, name: str) -> Policy | None:
    """The function of this name; None for random actions."""
    if name == "random":
        return None
    module, _, function = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever somebody else's code may raise
        files.fail(f"{flag} {name} cannot be loaded, expected random or package.module:function: {error!r}")
    if not callable(policy):
        files.fail(f"{flag} {name} is no function of (agent, observation, action_space, rng)")
    return policy


def choose(env: FittedEnv, agent, policy: Policy | None, epsilon: float, rng: np.random.Generator) -> np.ndarray | int:
    """The action of an agent that plays, as `env.step` takes it."""
    if policy is None or rng.random() < epsilon:
        mask = env.masks[agent]
        if not env.discrete:
            padding = env.num_actions - env.sizes[agent]
            return np.pad(rng.uniform(-1, 1, env.sizes[agent]), (0, padding)).astype(np.float32)
        return int(rng.choice(env.sizes[agent] if mask is None else np.flatnonzero(mask)))
    seen, mask = env.seen[agent], env.masks[agent]
    if mask is not None and agent not in env.masked:  # the masks are in the infos
        seen = {"observation": seen, "action_mask": mask}
    try:
        return env.fit_action(agent, policy(agent, seen, env.own_spaces[agent], rng))
    except Exception as error:  # whatever somebody else's code may raise
        raise PolicyError(f"the policy failed: {error!r}") from error


def play(env: FittedEnv, policy: Policy | None, epsilon: float, rng: np.random.Generator):
    """One episode: yields a row for each transition, the last one with what followed."""
    agents = env.possible_agents
    (observations, infos), gone = env.reset(seed=int(rng.integers(2**31))), set()
    while env.agents:
        idle = 0 if env.discrete else np.zeros(env.num_actions, np.float32)
        actions = {a: choose(env, a, policy, epsilon, rng) if a in env.playing else idle for a in agents}
        row: dict[str, Any] = {"observations": np.stack([observations[a] for a in agents])}
        row["actions"] = np.stack([actions[a] for a in agents])
        if env.discrete:
            row["action_masks"] = np.stack([infos[a]["action_mask"] for a in agents]) > 0
        observations, rewards, terminations, truncations, infos = env.step(actions)
        row["individual_rewards"] = np.array([rewards[a] for a in agents], np.float32)
        ended = {a for a in agents if terminations[a] or truncations[a]}
        # A time limit, if it stopped one of those that ended last.
        row["timeouts"] = not env.agents and any(truncations[a] for a in ended - gone)
        row["terminals"], gone = not env.agents and not row["timeouts"], ended
        if not env.agents:
            row["final_observations"] = np.stack([observations[a] for a in agents])
            if env.discrete:
                row["final_action_masks"] = np.stack([infos[a]["action_mask"] for a in agents]) > 0
        yield row


def measure(env: FittedEnv, policy: Policy | None, episodes: int, what: str, seed: int) -> tuple[float, float]:
    """The mean return of a policy, and its standard error."""
    rng, returns = np.random.default_rng([seed, 1]), []
    for _ in tqdm(range(episodes), desc=what, unit="episode", mininterval=1):
        returns.append(sum(float(row["individual_rewards"].mean(dtype=float)) for row in play(env, policy, 0.0, rng)))
    return float(np.mean(returns)), float(np.std(returns) / max(1, episodes - 1) ** 0.5)


def record(env: FittedEnv, args: Args, policy: Policy | None) -> dict[str, np.ndarray]:
    """The arrays of a dataset: --transitions rows, the last episode perhaps without its end."""
    rng, rows = np.random.default_rng(args.seed), []
    with tqdm(total=args.transitions, unit="step", unit_scale=True, desc="recording", mininterval=1) as progress:
        while len(rows) < args.transitions:
            for row in play(env, policy, args.epsilon, rng):
                rows.append(row)
                progress.update()
                if len(rows) == args.transitions:
                    break
    finals = [name for name in ("final_observations", "final_action_masks") if any(name in row for row in rows)]
    data = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in finals}
    data |= {name: np.stack([row[name] for row in rows if name in row]) for name in finals}
    data["rewards"] = data["individual_rewards"].sum(axis=1)
    if env.discrete and data["action_masks"].all() and data.get("final_action_masks", np.ones(1)).all():
        del data["action_masks"]  # everything was always allowed
        data.pop("final_action_masks", None)
    for name, array in data.items():
        if not (np.abs(array) < 1e9).all():
            files.fail(f"--env {args.env} gave {name} that are NaN, infinite or more than 1e9")
    return data


def main(args: Args) -> None:
    check_args(args)
    args = dataclasses.replace(args, env=f"zoo/{args.env.removeprefix('zoo/')}")  # as the scripts are told
    path = files.output_file(args)
    policy = load_policy("--policy", args.policy)
    expert = load_policy("--expert-policy", args.expert_policy) if args.expert_policy else None
    random.seed(args.seed)  # some environments and policies draw from the global generators
    np.random.seed(args.seed)
    try:
        env = parallel_env(args.env.removeprefix("zoo/"))
        for number, agent in enumerate(env.possible_agents):
            env.own_spaces[agent].seed(args.seed + number)  # for policies that sample from it
        low, error = measure(env, None, args.reference_episodes, "random policy", args.seed)
        about: dict[str, Any] = {"random_return": low, "random_return_standard_error": error}
        high = args.expert_return
        if args.expert_policy:
            high, error = measure(env, expert, args.reference_episodes, "expert policy", args.seed)
            about["expert_return_standard_error"] = error
        if high is not None:
            about["expert_return"] = high
            if high <= low:
                files.fail(f"the expert's return {high:g} is not above the random one {low:g}, so there is no score")
        data = record(env, args, policy)
    except PolicyError as error:
        files.fail(str(error))
    except Exception as error:  # whatever somebody else's code may raise
        files.fail(f"--env {args.env} is no working PettingZoo environment: {error!r}")
    agents = [str(agent) for agent in env.possible_agents]
    about |= {"noise": args.epsilon, "policy": args.policy, "agents": agents, "changes": env.changes}
    files.write_dataset(path, args, SCRIPT, data, about, ("numpy", "gymnasium", "pettingzoo"))
    print(f"random return {low:.3g}; to train: python macca_omar.py --env {args.env} --dataset {path}")


if __name__ == "__main__":
    files.run(lambda: main(tyro.cli(Args, description=__doc__)))
