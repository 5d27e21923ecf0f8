"""How fast are the iterations of the causal model and of the policy, and the credit; how much memory do data take?

    python paper/speed.py --script macca_omar --threads 1
    python paper/speed.py --transitions 1000000        # a made-up dataset of Cooperative Navigation's sizes
    python paper/speed.py --env smax/2s3z              # at StarCraft's sizes, on the expert dataset (needs jaxmarl)
    python paper/speed.py --physics                    # data/mpe.py's many worlds at once against mpe2's environments
    python paper/speed.py --omar DIR --threads 1       # our update of OMAR's sizes and theirs, from a clone of
                                                       # https://github.com/ling-pan/OMAR

Times start after a burn-in; figures compared with each other are measured in turn, in the same process.
"""

import importlib
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from rows import ROOT, dataset_path, fail
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
    graph: bool = True
    """there, iterations as CUDA graphs, which repeat one minibatch; --no-graph: call by call"""
    rounds: int = 20
    """timed rounds of 10 iterations each, after 3 that are not counted"""
    omar: str = ""
    """a clone of OMAR's code, whose update is timed beside ours, with the same sizes and minibatches"""
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


def omar_update(clone: Path, batches: list[dict[str, torch.Tensor]], settings: Any) -> Callable[[], None]:
    """An iteration of OMAR's published code: the update of every agent, then of all targets."""
    # Of what it imports beside torch, the update uses nothing.
    for name in ("gym", "gym.spaces", "multiagent"):
        sys.modules.setdefault(name, types.ModuleType(name))
    patches = [(sys.modules["gym"], "spaces", sys.modules["gym.spaces"])]
    patches += [(torch.nn.utils, "clip_grad_norm", torch.nn.utils.clip_grad_norm_)]
    if not settings.cuda:  # calls that move tensors to a GPU do nothing
        patches += [(torch.Tensor, "cuda", lambda self, *_, **__: self), (torch.cuda, "FloatTensor", torch.FloatTensor)]
    for owner, name, value in patches:
        setattr(owner, name, value)
    sys.path.insert(0, str(clone))
    (size, n, in_dim), dim = batches[0]["observations"].shape, batches[0]["actions"].shape[2]
    sizes = {"num_in_pol": in_dim, "num_out_pol": dim, "num_in_critic": in_dim + dim}
    omar = {"omar": True, "omar_coe": settings.tau, "omar_mu": 0.0, "omar_sigma": 2.0, "omar_iters": 3}
    omar |= {"omar_num_samples": 10, "omar_num_elites": 10, "num_sampled_actions": 10, "cql_alpha": settings.alpha}
    try:
        theirs = importlib.import_module("algorithms.maddpg").MATD3(
            [sizes] * n, ["td3"] * n, agent_max_actions=[1.0] * n, cql=True, batch_size=size, env_id="", lr=0.01, **omar
        )
    except ImportError as error:
        fail(f"{clone} is no clone of https://github.com/ling-pan/OMAR: {error}")
    torch.distributions.Distribution.set_default_validate_args(False)  # which were no part of the torch of its time
    names = ("observations", "actions", "credit", "next_observations")
    samples = [[[x[name][:, i].contiguous() for i in range(n)] for name in names] for x in batches]
    never = [torch.zeros(size, device=batches[0]["actions"].device)] * n
    turn = itertools.cycle([[*sample, never] for sample in samples])
    if settings.cuda:
        theirs.prep_training(device="gpu")

    def update() -> None:
        sample = next(turn)
        for agent in range(n):
            theirs.update(sample, agent)
        theirs.update_all_targets()

    return update


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
    if args.omar:
        args.script = "macca_omar"
    script: Any = importlib.import_module(args.script)
    settings = script.Args(env=args.env, dataset=args.dataset, batch_size=args.batch_size, cuda=args.cuda)
    env, _ = script.make_env(args.env)
    discrete = isinstance(env.action_space(env.possible_agents[0]), gymnasium.spaces.Discrete)
    if args.omar and discrete:
        fail(f"--omar: of OMAR's code only its continuous actions are timed, --env {args.env} has discrete ones")
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
    for group in [group for name in ("causal", "critic", "actor") for group in optimizers[name].param_groups]:
        group["capturable"] = args.cuda
    warnings.filterwarnings("ignore", ".* capturable=True")  # torch warns of the few steps before a graph
    graph = args.cuda and args.graph
    policy = script.repeated(lambda: script.update(batch, nets, optimizers, settings), graph)
    causal = script.repeated(lambda: script.update_causal_model(batch, causal_model, optimizers), graph)
    functions = {
        "sampling": lambda: script.sample(data, args.batch_size),
        "policy": lambda: next(policy),
        "causal model": lambda: next(causal),
        "credit": lambda: causal_model.assign(*inputs),  # what assign_credit does a thousand rows at a time
    }
    if args.omar:
        batches = [script.sample(data, args.batch_size) for _ in range(40)]
        for x in batches:
            x["credit"] = torch.randn(x["alive"].shape, device=device)
        turn = itertools.cycle(batches)
        ours = script.repeated(lambda: script.update(next(turn), nets, optimizers, settings), graph)
        functions = {"theirs": omar_update(Path(args.omar), batches, settings), "ours": lambda: next(ours)}
        ms = milliseconds(functions, args.rounds, args.cuda)
        print(f"batch {args.batch_size}: OMAR's {ms['theirs']:.1f} ms, ours {ms['ours']:.1f} ms", end="")
        print(f", ratio {ms['theirs'] / ms['ours']:.2f}")
        raise SystemExit
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
