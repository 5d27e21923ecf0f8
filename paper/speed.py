"""How fast are the iterations of the causal model and of the policy, and the credit; how much memory do data take?

    python paper/speed.py --script macca_omar --threads 1
    python paper/speed.py --transitions 1000000        # a made-up dataset of Cooperative Navigation's sizes
    python paper/speed.py --env smax/2s3z              # at StarCraft's sizes, on the expert dataset (needs jaxmarl)
    python paper/speed.py --physics                    # data/mpe.py's many worlds at once against mpe2's environments

Times start after a burn-in; figures compared with each other are measured in turn, in the same process.
"""

import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from rows import ROOT, dataset_path
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from data import mpe


@dataclass
class Args:
    script: Literal["macca_omar", "macca_cql", "macca_icq"] = "macca_omar"
    """whose update to time"""
    env: str = "mpe/simple_spread"
    """the environment, for its sizes"""
    dataset: str = "expert"
    """its dataset to draw from"""
    transitions: int = 0
    """instead of --dataset, write and load a random dataset with this many transitions"""
    batch_size: int = 256
    """transitions in a minibatch"""
    threads: int = torch.get_num_threads()
    """CPU threads of torch"""
    cuda: bool = torch.cuda.is_available()
    """measure on the GPU"""
    rounds: int = 20
    """timed rounds of 10 iterations each, after 3 that are not counted"""
    physics: bool = False
    """measure joint steps of the particle tasks instead, observations and rewards included"""


def made_up(path: Path, steps: int, env) -> None:
    """A dataset of the environment's shapes, filled with noise, episodes of 25; with joint states if it has them."""
    noise, agents = np.random.default_rng(0), len(env.possible_agents)
    space, seen = env.action_space(env.possible_agents[0]), env.observation_space(env.possible_agents[0]).shape
    individual = noise.standard_normal((steps, agents), dtype=np.float32)
    timeouts = np.arange(1, steps + 1) % 25 == 0
    timeouts[-1] = True
    arrays = {
        "observations": noise.standard_normal((steps, agents, *seen), dtype=np.float32),
        "final_observations": noise.standard_normal((timeouts.sum(), agents, *seen), dtype=np.float32),
        "rewards": individual.sum(1),
        "individual_rewards": individual,
        "terminals": np.zeros(steps, bool),
        "timeouts": timeouts,
        "metadata": "{}",
    }
    if hasattr(env, "state_space"):
        arrays["states"] = noise.standard_normal((steps, *env.state_space.shape), dtype=np.float32)
        arrays["metadata"] = json.dumps({"state_owner": [-1] * arrays["states"].shape[1]})
    if isinstance(space, gymnasium.spaces.Discrete):
        arrays["actions"] = noise.integers(space.n, size=(steps, agents))
        arrays["action_masks"] = np.ones((steps, agents, space.n), bool)
        arrays["final_action_masks"] = np.ones((timeouts.sum(), agents, space.n), bool)
    else:
        arrays["actions"] = noise.uniform(-1, 1, (steps, agents, *space.shape)).astype(np.float32)
    np.savez(path, **arrays)


def milliseconds(functions: dict[str, Callable], rounds: int, cuda: bool) -> dict[str, float]:
    """Median time of one call of each function; the functions take turns, ten calls at a time."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in tqdm(range(-3, rounds), desc="timing", unit="round", leave=False):
        for name, function in functions.items():
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(10):
                function()
            if cuda:
                torch.cuda.synchronize()
            if round_number >= 0:
                times[name].append((time.perf_counter() - started) * 100)
    return {name: statistics.median(values) for name, values in times.items()}


def physics(rounds: int) -> None:
    """Joint steps per second, random actions: mpe2's environments, ParticleEnv, BatchedEnv with 1,000 worlds."""
    print("| task | mpe2 | `ParticleEnv` | `BatchedEnv` | `BatchedEnv` / mpe2 |\n|---|---|---|---|---|")
    tasks = {"simple_spread": "simple_spread_v3", "simple_tag": "simple_tag_v3", "simple_world": "simple_world_comm_v3"}
    for task, module in tasks.items():
        theirs = importlib.import_module(f"mpe2.{module}").parallel_env(continuous_actions=True)
        ours, batched = mpe.parallel_env(task), mpe.BatchedEnv(task, 1000)
        actions = np.random.default_rng(0).uniform(-1, 1, (1000, ours.task.num_agents, 2))

        def one(env):
            if not env.agents:
                env.reset(seed=0)
            env.step({agent: env.action_space(agent).sample() for agent in env.agents})

        theirs.reset(seed=0)
        batched.reset(0)
        one(ours)
        functions = {
            "mpe2": lambda env=theirs: one(env),
            "one": lambda env=ours: one(env),
            "many": lambda env=batched, actions=actions: env.step(actions),
        }
        ms = milliseconds(functions, rounds, cuda=False)
        mpe2, own, many = 1000 / ms["mpe2"], 1000 / ms["one"], 1e6 / ms["many"]
        print(f"| {task} | {mpe2:,.0f} | {own:,.0f} | {many:,.0f} | {many / mpe2:.0f} |")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    if args.physics:
        physics(args.rounds)
        raise SystemExit
    script: Any = importlib.import_module(args.script)
    settings = script.Args(env=args.env, dataset=args.dataset, batch_size=args.batch_size, cuda=args.cuda)
    env, _ = script.make_env(args.env)
    with tempfile.TemporaryDirectory() as folder:
        path = dataset_path(args.env, args.dataset)
        if args.transitions:
            path = Path(folder, "made-up.npz")
            made_up(path, args.transitions, env)
        data, metadata = script.load_dataset(path, settings, env)
    device = torch.device("cuda" if args.cuda else "cpu")
    data = {name: tensor.to(device) for name, tensor in script.hold_out(data)[0].items()}
    nets, causal_model, optimizers = script.build(settings, data, metadata)
    batch, credited = (script.sample(data, size) for size in (args.batch_size, 1000))
    batch["credit"] = batch["alive"].float()  # any rewards
    inputs = (*script.causal_inputs(credited), credited["rewards"], credited["alive"])
    functions = {
        "sampling": lambda: script.sample(data, args.batch_size),
        "policy": lambda: script.update(batch, nets, optimizers, settings),
        "causal model": lambda: script.update_causal_model(batch, causal_model, optimizers),
        "credit": lambda: causal_model.assign(*inputs),  # what assign_credit does a thousand rows at a time
    }
    ms = milliseconds(functions, args.rounds, args.cuda)
    name = torch.cuda.get_device_name() if args.cuda else f"CPU, {args.threads} thread(s)"
    print(f"{args.env}, {args.script}, batch {args.batch_size}, {name}, torch {torch.__version__}")
    print(f"sampling a minibatch: {ms['sampling']:.2f} ms")
    for learner in ("causal model", "policy"):
        rate = 1000 / (ms[learner] + ms["sampling"])
        print(f"{learner}: update {ms[learner]:.1f} ms, {rate:.1f} iterations per second")
    print(f"credit: {ms['credit']:.1f} µs per transition")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"{len(data['rewards'])} transitions, peak memory {peak:.2f} GiB")
    if args.cuda:
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
