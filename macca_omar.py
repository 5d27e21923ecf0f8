# Paper: MACCA: Offline Multi-agent Reinforcement Learning with Causal Credit Assignment,
#        https://openreview.net/forum?id=gwUOzI4DuV
# OMAR:  Plan Better Amid Conservatism: Offline Multi-Agent RL with Actor Rectification, https://arxiv.org/abs/2111.11188
"""MACCA-OMAR: offline multi-agent RL from a team reward, split by a causal model, learned by OMAR.

    python macca_omar.py --env mpe/simple_spread --dataset expert

One iteration is one pass of Algorithm 1: draw a minibatch, assign each agent its individual reward (Eq. 6), then take
one step of the causal model (Eq. 4), of the critics (conservative, Eq. 7) and of the actors (Eq. 8). Agents share no
actor and no critic; these are computed together, as stacks with the agent's index first: [N, ...].
"""

import csv
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from causal_model import CausalModel, owners


@dataclass
class Args:
    env: str = "mpe/simple_spread"
    """where to evaluate: `mpe/TASK`, `smax/MAP`, `smac/MAP` (data/), or `package.module:factory`, a PettingZoo one"""
    dataset: str = "expert"
    """an .npz file, or `random`, `medium-replay`, `medium`, `expert`: data/datasets/ENV/QUALITY.npz"""
    credit: Literal["macca", "team", "uniform", "truth"] = "macca"
    """an agent's reward: the causal model's share, the team reward, its N-th part, or the one in the dataset"""
    standardize_rewards: bool = True
    """scale each agent's rewards to deviation 1 over the minibatch and, where only time ends lives, to mean 0"""
    seed: int = 1
    """seed of weights, minibatches and evaluation episodes"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    total_iterations: int = 3_000
    """iterations, each one update of everything; 0 evaluates `--checkpoint` and ends"""
    batch_size: int = 256
    """transitions in a minibatch, each with all agents"""
    gamma: float = 0.95
    """discount factor"""
    learning_rate: float = 1e-3
    """Adam's learning rate of actors and critics"""
    hidden_dim: int = 64
    """width of the two hidden layers of actors and critics"""
    layer_norm: bool = True
    """normalise the hidden layers of the critics"""
    last_action: bool = True
    """actors and critics see the agent's last action too (discrete actions)"""
    target_rate: float = 0.01
    """share of the way that target networks move towards their networks each iteration"""
    max_grad_norm: float = 0.5
    """largest gradient norm of one agent's actor or critics"""
    eval_interval: int = 1000
    """iterations between evaluations and checkpoints"""
    eval_episodes: int = 32
    """episodes of an evaluation during training"""
    final_episodes: int = 100
    """episodes of the evaluation at the end"""
    preset: Literal["none", "paper"] = "none"
    """`paper`: the paper's Tables 9 and 10 for the dataset's quality as defaults; flags given beside it still win"""
    checkpoint: str = ""
    """a checkpoint.pt to start from, or a policy.pt to evaluate"""
    resume: str = ""
    """a run folder to go on with, under its own arguments; only --total-iterations may be given anew"""

    # The causal model, used by `--credit macca` only
    graph: Literal["dynamic", "fixed", "full"] = "dynamic"
    """masks that depend on state and action (Eq. 3), one learned mask per agent, or no masks"""
    lambda1: float = 7e-3
    """L1 penalty on edges from states (Eq. 5)"""
    lambda2: float = 7e-3
    """L1 penalty on edges from actions (Eq. 5)"""
    anchor: float = 5.0
    """how much more an edge costs from a dimension that is not the agent's own; 1, as in the paper: no more"""
    own_share: float = 0.01
    """an observed dimension is the agent's own if the others' leave this share of it unexplained; 0: always its own"""
    h: float = 0.1
    """an edge counts in the credit when its probability is at least this (Eq. 6)"""
    causal_learning_rate: float = 1e-3
    """Adam's learning rate of the individual-reward predictor"""
    causal_target: Literal["team", "truth"] = "team"
    """fit the sum of individual rewards to the team reward (Eq. 4), or each to the recorded one (Table 5)"""
    causal_schedule: Literal["alternate", "first"] = "alternate"
    """train the causal model beside the policy, or before it and then freeze it"""
    causal_pretrain_iterations: int = 5_000
    """iterations of the causal model alone under `--causal-schedule first`, before the `--total-iterations`"""

    # Algorithm specific
    alpha: float = 1.0
    """weight of the conservative penalty (Eq. 7)"""
    cql_samples: int = 5
    """actions drawn uniformly for the penalty's logsumexp, and as many near the policy's (continuous actions)"""
    tau: float = 0.9
    """share of imitating the zeroth-order optimum, against following the critic's gradient (Eq. 8)"""
    omar_rounds: int = 3
    """rounds of the zeroth-order optimiser (continuous actions)"""
    omar_samples: int = 10
    """candidate actions of a round"""


# Tables 9 and 10 of the paper, the latter by the dataset's quality. An anchor of 1: edges cost alike.
PAPER: dict[str, Any] = {"batch_size": 1024, "learning_rate": 3e-4, "causal_learning_rate": 5e-2, "anchor": 1.0}
PAPER |= {"h": 0.1, "gamma": 0.95, "hidden_dim": 64, "standardize_rewards": False, "layer_norm": False}
PAPER_QUALITY: dict[str, dict[str, Any]] = {
    "expert": {"tau": 0.9, "alpha": 5.0, "lambda1": 7e-3, "lambda2": 7e-3},
    "medium": {"tau": 0.7, "alpha": 0.5, "lambda1": 5e-3, "lambda2": 5e-3},
    "medium-replay": {"tau": 0.7, "alpha": 1.0, "lambda1": 5e-3, "lambda2": 7e-3},
    "random": {"tau": 0.99, "alpha": 1.0, "lambda1": 1e-7, "lambda2": 1e-3},
}


def fail(message: str) -> NoReturn:
    """A mistake of the user's: one sentence, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse numbers that cannot be meant, before anything is loaded or written."""
    for name, value in dataclasses.asdict(args).items():
        low, high = 0, math.inf
        if name in ("gamma", "h", "tau", "target_rate", "expectile", "own_share"):
            high = 1
        elif name == "anchor":
            low = 1
        elif name.endswith(("_size", "_dim", "_interval", "_episodes", "_samples", "_rounds", "pretrain_iterations")):
            low = 2 if name == "batch_size" else 1  # one row has no deviation to standardise by
        elif name in ("learning_rate", "causal_learning_rate", "max_grad_norm", "beta"):
            low = 1e-9
        if type(value) in (int, float) and not (low <= value <= high and math.isfinite(value)):
            fail(f"--{name.replace('_', '-')} is {value}, expected a number from {low} to {high}")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda was given but torch sees no CUDA device; give --no-cuda or install a CUDA build of torch")
    if args.total_iterations == 0 and not args.checkpoint:
        fail("--total-iterations is 0 and there is nothing to evaluate; give --checkpoint PATH")


# --- Environment and evaluation ---------------------------------------------------------------------------------------


def make_env(name: str):
    """The PettingZoo parallel environment called `family/task` (module data.family) or `package.module:factory`."""
    if ":" in name:
        module, factory, arguments = *name.split(":", 1), []
    elif "/" in name:
        family, task = name.split("/", 1)
        module, factory, arguments = f"data.{family}", "parallel_env", [task]
    else:
        fail(f"--env is {name}, expected something like mpe/simple_spread or package.module:factory")
    sys.path.append(os.getcwd())  # after the script's own folder, look in the user's
    try:
        env = getattr(importlib.import_module(module), factory)(*arguments)
        spaces = {(env.observation_space(a).shape, str(env.action_space(a))) for a in env.possible_agents}
        space, shape = env.action_space(env.possible_agents[0]), env.observation_space(env.possible_agents[0]).shape
    except Exception as error:  # whatever somebody else's module may raise
        fail(f"--env {name} is not a PettingZoo parallel environment that can be made here: {error}")
    if not shape or len(shape) != 1:
        fail(f"--env {name} has observations of shape {shape}, expected vectors")
    if len(spaces) > 1:
        fail(f"--env {name} has agents with different spaces, expected the same shape for all: {sorted(spaces)}")
    if isinstance(space, gymnasium.spaces.Box):
        if not (np.all(space.low == -1) and np.all(space.high == 1)):
            fail(f"--env {name} has actions in {space}, expected a Box from -1 to 1; wrap it to rescale them")
    elif not isinstance(space, gymnasium.spaces.Discrete):
        fail(f"--env {name} has actions in {space}, expected a Box from -1 to 1 or a Discrete space")
    return env


@torch.no_grad()
def evaluate(env, actor: "Actor", episodes: int, seed: int, device: torch.device) -> dict[str, np.ndarray]:
    """Play `episodes` with the deterministic policy, from reset seeds `seed`, `seed` + 1, ...

    Returns arrays over episodes: `return`, the mean over agents of the summed individual rewards, and `won` where the
    environment reports it.
    """
    agents, results = env.possible_agents, {"return": []}
    blank = np.zeros(env.observation_space(agents[0]).shape, np.float32)  # what an agent that has left would see
    memory_dim = actor.mean.shape[2] - len(blank)  # of the last action, 0 if the actor does not look at it
    anything = np.ones(actor.action_dim, bool)
    for episode in range(episodes):
        observations, infos = env.reset(seed=seed + episode)
        total, won, memory = 0.0, None, np.zeros((len(agents), 1, memory_dim), np.float32)
        while env.agents:
            joint = np.stack([observations.get(a, blank) for a in agents])[:, None].astype(np.float32)  # [N, 1, O]
            masks = np.stack([infos.get(a, {}).get("action_mask", anything) for a in agents])[:, None].astype(bool)
            joint = np.concatenate([joint, memory], axis=2)
            chosen = (
                actor.act(torch.as_tensor(joint, device=device), torch.as_tensor(masks, device=device)).cpu().numpy()
            )
            actions = dict(zip(agents, chosen[:, 0], strict=True))
            memory = np.eye(memory_dim, dtype=np.float32)[chosen] if memory_dim else memory
            observations, rewards, _, _, infos = env.step({a: actions[a] for a in env.agents})
            total += sum(rewards.values()) / len(agents)
            won = next((info["won"] for info in infos.values() if "won" in info), won)
        results["return"].append(total)
        if won is not None:
            results.setdefault("won", []).append(float(won))
    return {name: np.array(values) for name, values in results.items()}


# --- Dataset ----------------------------------------------------------------------------------------------------------


def dataset_path(args: Args) -> Path:
    """The file that --dataset names."""
    if args.dataset not in PAPER_QUALITY:
        return Path(args.dataset)
    return Path(__file__).resolve().parent / "data" / "datasets" / args.env / f"{args.dataset}.npz"


def load_dataset(path: Path, args: Args, env) -> tuple[dict[str, torch.Tensor], dict]:
    """Read and check a dataset file (format: data/README.md): tensors with leading dimension T, and the metadata."""
    if not path.is_file():
        fail(f"the dataset {path} does not exist; give --dataset FILE, or record it: data/collect.py, collect_smax.py")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        metadata = dict(json.loads(str(arrays.pop("metadata", "{}"))))
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        fail(f"{path} cannot be read ({error}); expected a complete .npz file without pickled objects")
    required = ["observations", "actions", "rewards", "terminals", "timeouts"]
    if "truth" in (args.credit, args.causal_target):
        required.append("individual_rewards")
    missing = [name for name in required if name not in arrays]
    if missing:
        fail(f"{path} lacks {', '.join(missing)}, which a run with these arguments needs (see data/README.md)")
    if metadata.get("env", args.env) != args.env:
        fail(f"{path} was recorded in {metadata['env']}, but --env is {args.env}; give the two that belong together")

    space = env.action_space(env.possible_agents[0])
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    steps, agents = len(np.atleast_1d(arrays["observations"])), len(env.possible_agents)
    choices = int(space.n) if discrete else 0
    seen = ("f", (steps, agents, *env.observation_space(env.possible_agents[0]).shape))
    mask = ("b", (steps, agents, choices))
    expected = {
        "observations": seen,
        "next_observations": seen,
        "actions": ("iu", (steps, agents)) if discrete else ("f", (steps, agents, *space.shape)),
        "rewards": ("f", (steps,)),
        "individual_rewards": ("f", (steps, agents)),
        "terminals": ("b", (steps,)),
        "timeouts": ("b", (steps,)),
        "action_masks": mask,
        "next_action_masks": mask,
        "states": ("f", (steps, arrays.get("states", arrays["rewards"]).size // max(steps, 1))),
    }
    for name in [name for name in expected if name in arrays]:
        kinds, shape = expected[name]
        if arrays[name].shape != shape or arrays[name].dtype.kind not in kinds or not steps:
            kind = {"f": "float", "iu": "integer", "b": "bool"}[kinds]
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            fail(f"{path}: {name} is {found}, expected {kind} {list(shape)} with rows, for --env {args.env}")
        if kinds == "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity and is refused below
                arrays[name] = arrays[name].astype(np.float32, copy=False)
        if kinds == "f" and not np.isfinite(arrays[name]).all():
            fail(f"{path}: {name} holds NaN or infinity; every number must be finite")
    low, high = (0, choices - 1) if discrete else (-1, 1)
    if arrays["actions"].min() < low or arrays["actions"].max() > high:
        fail(f"{path}: actions from {arrays['actions'].min()} to {arrays['actions'].max()}, expected {low} to {high}")
    earned = arrays["individual_rewards"].sum(1) if "individual_rewards" in arrays else arrays["rewards"]
    if not np.allclose(arrays["rewards"], earned, rtol=1e-3, atol=1e-2):
        fail(f"{path}: rewards are not the sum of individual_rewards; the team reward must be that sum")
    references = {key: value for key, value in metadata.items() if key.endswith(("random_return", "expert_return"))}
    for key, value in references.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            fail(f"{path}: the metadata's {key} is {value}, expected a number")
    owner, state_dim = metadata.get("state_owner", []), arrays.get("states", np.empty((1, 0))).shape[1]
    if "state_owner" in metadata and not (
        isinstance(owner, list) and len(owner) == state_dim and all(i in range(-1, agents) for i in owner)
    ):
        fail(
            f"{path}: the metadata's state_owner must name {state_dim} agents from 0 to {agents - 1}, or -1 for nobody"
        )

    # Inside an episode the next observation is the next row's, so a file may store only those after the last steps.
    ends = arrays["terminals"] | arrays["timeouts"]
    if "next_observations" not in arrays:
        final = arrays.pop("final_observations", np.empty(0))
        fits = final.shape == (ends.sum(), *seen[1][1:]) and final.dtype.kind == "f" and ends[-1]
        if not fits or not np.isfinite(final).all():
            fail(f"{path} needs next_observations, or finite final_observations, a row for each terminal or timeout")
        arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
        arrays["next_observations"][ends] = final
    arrays["alive"] = arrays["next_alive"] = np.ones((steps, agents), bool)
    if discrete:
        arrays["actions"] = arrays["actions"].astype(np.int64)
        masks = arrays.setdefault("action_masks", np.ones((steps, agents, choices), bool))
        if not np.take_along_axis(masks, arrays["actions"][..., None], axis=2).all():
            fail(f"{path}: an action was taken that action_masks forbid; every action taken must be allowed")
        if "next_action_masks" not in arrays and arrays["timeouts"].any() and not masks.all():
            fail(f"{path} needs next_action_masks: after a timeout the next row's masks are another episode's")
        next_masks = arrays.setdefault("next_action_masks", np.roll(masks, -1, axis=0))
        arrays["alive"], arrays["next_alive"] = masks.sum(2) > 1, next_masks.sum(2) > 1  # the dead have one action left
        if args.last_action:
            taken = np.eye(choices, dtype=np.float32)[arrays["actions"]]  # [T, N, A]
            arrays["next_observations"] = np.concatenate([arrays["next_observations"], taken], axis=2)
            taken = np.roll(taken, 1, axis=0)
            taken[np.roll(ends, 1)] = taken[0] = 0  # none before the first step of an episode
            arrays["observations"] = np.concatenate([arrays["observations"], taken], axis=2)
    expected |= {"alive": mask, "next_alive": mask}
    return {name: torch.from_numpy(arrays[name]) for name in expected if name in arrays}, metadata


def hold_out(data: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split off whole episodes for measuring the credit: a tenth of the rows, some 10,000 at most.

    The same ones for every seed and every --credit, so that runs are held against the same transitions. A dataset of a
    single episode is not split: it is returned twice.
    """
    ends = (data["terminals"] | data["timeouts"]).long()
    episode = ends.cumsum(0) - ends  # [T]
    lengths = torch.bincount(episode)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    drawn_before = lengths[order].cumsum(0) - lengths[order]
    held = torch.isin(episode, order[drawn_before < min(10_000, len(ends) / 10)])
    if held.all():
        return data, data
    return {name: tensor[~held] for name, tensor in data.items()}, {name: tensor[held] for name, tensor in data.items()}


def sample(data: dict[str, torch.Tensor], batch_size: int) -> dict[str, torch.Tensor]:
    """A minibatch, drawn where the data lies: every tensor [B, ...]. All agents share the rows."""
    rows = torch.randint(len(data["rewards"]), (batch_size,), device=data["rewards"].device)
    return {name: tensor[rows] for name, tensor in data.items()}


def causal_inputs(batch: dict[str, torch.Tensor], action_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint state [B, S] and the actions as vectors [B, N, A] (one-hot where discrete)."""
    state = batch["states"] if "states" in batch else batch["observations"].flatten(1)
    actions = batch["actions"]
    return state, actions if actions.is_floating_point() else F.one_hot(actions, action_dim).float()


def assign_credit(batch: dict, args: Args, causal_model: CausalModel, action_dim: int) -> torch.Tensor:
    """What each agent is said to have earned, [B, N]: Eq. 6, or one of its three controls. The dead earn nothing."""
    if args.credit == "macca":
        return causal_model.assign(*causal_inputs(batch, action_dim), batch["rewards"], batch["alive"])
    if args.credit == "truth":
        return batch["individual_rewards"]
    team = batch["rewards"][:, None] * batch["alive"]
    return team if args.credit == "team" else team / batch["alive"].sum(1, keepdim=True).clamp(min=1)


def rescale(rewards: torch.Tensor, alive: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rewards [B, N], each agent's over its deviation, and minus its mean if `shift`; of the rows where it is alive.

    A shift changes nothing where all lives are equally long. Elsewhere it would reward or punish a long life; there,
    rewards that are nearly all the same are divided by a tenth of their mean, not by a deviation near 0.
    """
    count = alive.sum(0)
    mean = (rewards * alive).sum(0) / count.clamp(min=1)
    std = (((rewards - mean) * alive).square().sum(0) / (count - 1).clamp(min=1)).sqrt()
    scale = torch.maximum(std, 0.1 * mean.abs() * ~shift)
    return (rewards - mean * shift) * alive / (scale + 1e-6)


# --- Networks: one actor and two critics for every agent, as stacks of weights ----------------------------------------


class StackedLinear(nn.Module):
    """Independent linear layers, initialised as nn.Linear: the first n of them on an input [n, B, in_dim]."""

    def __init__(self, stack: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(stack, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[: len(x)], x, self.weight[: len(x)])


class Actor(nn.Module):
    """Deterministic policies pi^i(o^i): actions in [-1, 1] (continuous) or one logit per action (discrete)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, agents: int, observation_dim: int, action_dim: int, hidden_dim: int, discrete: bool):
        super().__init__()
        self.discrete, self.action_dim = discrete, action_dim
        self.register_buffer("mean", torch.zeros(agents, 1, observation_dim))
        self.register_buffer("std", torch.ones(agents, 1, observation_dim))
        self.layer1 = StackedLinear(agents, observation_dim, hidden_dim)
        self.layer2 = StackedLinear(agents, hidden_dim, hidden_dim)
        self.layer3 = StackedLinear(agents, hidden_dim, action_dim)

    def forward(self, observations: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """[N, B, O] and, where discrete, masks [N, B, A] of the actions that can be taken -> [N, B, A]."""
        x = (observations - self.mean) / self.std
        x = self.layer3(F.relu(self.layer2(F.relu(self.layer1(x)))))
        return x.masked_fill(~masks, -1e9) if masks is not None else torch.tanh(x)

    def act(self, observations: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """The action that is played: [N, B, A], or its index [N, B]."""
        return self(observations, masks).argmax(2) if self.discrete else self(observations)


class Critic(nn.Module):
    """Twin critics Q^{i,1}, Q^{i,2} of every agent, a stack of 2 N networks."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, agents: int, observation_dim: int, action_dim: int, hidden_dim: int, discrete: bool, layer_norm: bool
    ):
        super().__init__()
        self.layer_norm = layer_norm
        self.register_buffer("mean", torch.zeros(agents, 1, observation_dim))
        self.register_buffer("std", torch.ones(agents, 1, observation_dim))
        self.layer1 = StackedLinear(2 * agents, observation_dim, hidden_dim)
        self.action_weight = None if discrete else StackedLinear(2 * agents, action_dim, hidden_dim).weight
        self.layer2 = StackedLinear(2 * agents, hidden_dim, hidden_dim)
        self.layer3 = StackedLinear(2 * agents, hidden_dim, action_dim if discrete else 1)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor | None = None, twins: int = 2) -> torch.Tensor:
        """Q-values [twins, N, B, K] of observations [N, B, O].

        Continuous: of K actions [N, B, K, A] for each observation. Discrete: of all K = A actions.
        """
        agents, batch, _ = observations.shape
        x = self.layer1(((observations - self.mean) / self.std).repeat(twins, 1, 1))  # [twins N, B, hidden]
        if actions is not None and self.action_weight is not None:
            # The first layer is linear, so the observation's part of it is computed once for all K actions.
            part = torch.bmm(actions.flatten(1, 2).repeat(twins, 1, 1), self.action_weight[: len(x)])
            x = (x[:, :, None] + part.view(*x.shape[:2], -1, x.shape[2])).flatten(1, 2)  # [twins N, B K, hidden]
        x = F.relu(self.normalize(x), inplace=True)
        x = F.relu(self.normalize(self.layer2(x)), inplace=True)
        return self.layer3(x).view(twins, agents, batch, -1)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Layer normalisation keeps Q bounded where the data have no actions, so that errors there do not compound."""
        return F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x


class Networks(nn.Module):
    """Actors and critics with their target networks. Each agent has its own weights, so none is told its number."""

    shift: torch.Tensor

    def __init__(self, agents: int, observation_dim: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        sizes = (agents, observation_dim, action_dim, args.hidden_dim, discrete)
        self.actor, self.actor_target = Actor(*sizes), Actor(*sizes).requires_grad_(False)
        self.critic, self.critic_target = (Critic(*sizes, args.layer_norm) for _ in range(2))
        self.critic_target.requires_grad_(False)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.register_buffer("shift", torch.tensor(True))

    def fit_statistics(self, observations: torch.Tensor, endings: torch.Tensor) -> None:
        """Standardise inputs by mean and deviation of the dataset's observations [T, N, O], each agent's by its own.

        `rescale` may shift rewards if there are no endings, [T]: terminals or deaths.
        """
        self.shift.copy_(~endings.any())
        mean, std = observations.mean(0)[:, None], observations.std(0)[:, None]
        for network in (self.actor, self.actor_target, self.critic, self.critic_target):
            network.mean.copy_(mean)
            network.std.copy_(torch.where(std > 1e-6, std, 1.0))


def step(
    loss: torch.Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, agents: int, max_norm: float
) -> None:
    """One gradient step of `network` and of nothing else, each agent's gradient scaled to at most `max_norm`.

    One norm over the stacked weights would couple the agents: a large gradient of one would slow the others.
    """
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    per_agent = [g.view(-1, agents, g[0].numel()) for g in gradients]  # actors [1, N, n], twin critics [2, N, n]
    norm = torch.stack([g.square().sum((0, 2)) for g in per_agent]).sum(0).sqrt()  # [N]
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None]
    for parameter, gradient, part in zip(parameters, gradients, per_agent, strict=True):
        part.mul_(scale)  # a view of the gradient
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def move_target(target: nn.Module, network: nn.Module, rate: float) -> None:
    """target <- target + rate (network - target), in place."""
    for old, new in zip(target.parameters(), network.parameters(), strict=True):
        old.lerp_(new, rate)


# === ALGORITHM LOGIC: OMAR (with its arguments above, all that the three scripts differ in) ===========================


def penalty_actions(policy_actions: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions for the conservative penalty and the logarithm of their density: [N, B, 2 K, A] and [N, B, 2 K].

    K are uniform over the action space, K over a box around the policy's action [N, B, A]: where the policy exploits an
    error of the critic, few uniform samples fall. Each half is weighted by its own density, as in CQL's published code,
    so the penalty's integral of exp Q counts the box twice.
    """
    low, high = torch.full_like(policy_actions, -1.0), torch.ones_like(policy_actions)
    near_low, near_high = (policy_actions - 0.2).clamp(min=-1), (policy_actions + 0.2).clamp(max=1)
    low = torch.stack([low, near_low], dim=2).repeat_interleave(samples, dim=2)  # [N, B, 2 K, A]
    high = torch.stack([high, near_high], dim=2).repeat_interleave(samples, dim=2)
    return torch.lerp(low, high, torch.rand_like(low)), -(high - low).log().sum(3)


def critic_loss(batch: dict, rewards: torch.Tensor, nets: Networks, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. 7: the squared error to y plus alpha times the conservative penalty, summed over agents and twins."""
    observations, actions = (
        batch["observations"].transpose(0, 1),
        batch["actions"].transpose(0, 1),
    )  # [N, B, O], [N, B, A]
    next_observations = batch["next_observations"].transpose(0, 1)
    if nets.actor.discrete:
        masks, next_masks = batch["action_masks"].transpose(0, 1), batch["next_action_masks"].transpose(0, 1)
        with torch.no_grad():
            next_actions = nets.actor_target.act(next_observations, next_masks)
            next_q = nets.critic_target(next_observations).min(0).values.gather(2, next_actions[..., None])
        q_all = nets.critic(observations)  # [2, N, B, A]
        q = q_all.gather(3, actions[None, ..., None].expand(2, -1, -1, -1)).squeeze(3)  # [2, N, B]
        soft_maximum = q_all.masked_fill(~masks, -torch.inf).logsumexp(3)
    else:
        with torch.no_grad():
            next_actions = nets.actor_target(next_observations)
            next_q = nets.critic_target(next_observations, next_actions[:, :, None]).min(0).values
            candidates, log_density = penalty_actions(nets.actor(observations), args.cql_samples)
        q_all = nets.critic(observations, torch.cat([actions[:, :, None], candidates], dim=2))  # [2, N, B, 1 + 2 K]
        q = q_all[..., 0]
        # log sum_a exp Q(o, a) as an integral, estimated by importance sampling; up to log 2 K, which has no gradient.
        soft_maximum = (q_all[..., 1:] - log_density).logsumexp(3)
    # y = r_hat + gamma min_k Q_bar^k(o', pi_bar(o')); a time limit is not the end of the world, a terminal or death is.
    goes_on = ~batch["terminals"] & batch["next_alive"].T  # [N, B]
    y = rewards.T + args.gamma * goes_on * next_q.squeeze(2)  # [N, B]
    loss = (((q - y).square() + args.alpha * (soft_maximum - q)) * batch["alive"].T).mean(2).sum()
    return loss, {"critic_loss": loss.detach(), "q_data": q.detach().mean()}


@torch.no_grad()
def zeroth_order_actions(
    observations: torch.Tensor, policy_actions: torch.Tensor, critic: Critic, args: Args
) -> torch.Tensor:
    """OMAR's maximiser a_hat of the first critic over actions: [N, B, A].

    A Gaussian per observation, refitted in each round to its samples weighted by softmax(Q); the best of the last
    round's samples and the policy's own action [N, B, A] wins.
    """
    mean, std = torch.zeros_like(policy_actions)[:, :, None], 2.0
    for _ in range(args.omar_rounds):
        noise = torch.randn(*policy_actions.shape[:2], args.omar_samples, policy_actions.shape[2], device=mean.device)
        samples = (mean + std * noise).clamp(-1, 1)  # [N, B, K, A]
        candidates = torch.cat([samples, policy_actions[:, :, None]], dim=2)
        q = critic(observations, candidates, twins=1)[0]  # [N, B, K + 1]
        weights = q[..., :-1].softmax(2)[..., None]
        mean = (weights * samples).sum(2, keepdim=True)
        std = (weights * (samples - mean).square()).sum(2, keepdim=True).sqrt()
    best = q.argmax(2)[..., None, None].expand(-1, -1, 1, policy_actions.shape[2])
    return candidates.gather(2, best).squeeze(2)


def actor_loss(batch: dict, nets: Networks, args: Args) -> tuple[torch.Tensor, dict]:
    """Eq. 8: tau times the distance to the zeroth-order optimum a_hat, minus (1 - tau) times Q, summed over agents."""
    observations, actions = batch["observations"].transpose(0, 1), batch["actions"].transpose(0, 1)
    if nets.actor.discrete:
        masks = batch["action_masks"].transpose(0, 1)
        logits = nets.actor(observations, masks)  # [N, B, A]
        q_all = nets.critic(observations, twins=1)[0]
        # The maximum over a finite set is found exactly, and the distance becomes a cross-entropy.
        a_hat = q_all.masked_fill(~masks, -torch.inf).argmax(2)
        distance = F.cross_entropy(logits.flatten(0, 1), a_hat.flatten(), reduction="none").view_as(a_hat)
        q = (logits.softmax(2) * q_all).sum(2)  # the expected Q under pi
        data_distance = (logits.argmax(2) != actions).float().mean()
    else:
        policy_actions = nets.actor(observations)
        q = nets.critic(observations, policy_actions[:, :, None], twins=1)[0].squeeze(2)
        a_hat = zeroth_order_actions(observations, policy_actions.detach(), nets.critic, args)
        distance = (policy_actions - a_hat).square().sum(2)
        data_distance = (policy_actions.detach() - actions).square().mean()
    loss = ((args.tau * distance - (1 - args.tau) * q) * batch["alive"].T).mean(1).sum()
    return loss, {"actor_loss": loss.detach(), "q_policy": q.detach().mean(), "data_distance": data_distance}


# === End of the algorithm =============================================================================================


def update(
    batch: dict, nets: Networks, causal_model: CausalModel, optimizers: dict, args: Args, policy: bool, causal: bool
) -> dict:
    """One iteration of Algorithm 1 on a minibatch. Nothing in it waits for the host."""
    agents, losses = causal_model.num_agents, {}
    rewards = assign_credit(batch, args, causal_model, nets.actor.action_dim)  # line 4 (Eq. 6): [B, N]
    if args.standardize_rewards:
        rewards = rescale(rewards, batch["alive"], nets.shift)
    if causal:  # line 5 (Eq. 4)
        half = {name: tensor[: (len(rewards) + 1) // 2] for name, tensor in batch.items()}  # at half the price, enough
        truth = half["individual_rewards"] if args.causal_target == "truth" else None
        inputs = causal_inputs(half, nets.actor.action_dim)
        loss, team_error = causal_model.loss(*inputs, half["rewards"], truth, half["alive"])
        optimizers["causal"].zero_grad()
        loss.backward()
        optimizers["causal"].step()
        losses |= {"causal_loss": loss.detach(), "team_error": team_error}
    if policy:  # line 6
        loss, logs = critic_loss(batch, rewards, nets, args)
        step(loss, nets.critic, optimizers["critic"], agents, args.max_grad_norm)
        losses |= logs
        loss, logs = actor_loss(batch, nets, args)
        step(loss, nets.actor, optimizers["actor"], agents, args.max_grad_norm)
        losses |= logs
        move_target(nets.critic_target, nets.critic, args.target_rate)
        move_target(nets.actor_target, nets.actor, args.target_rate)
    return losses


# --- A run ------------------------------------------------------------------------------------------------------------


def measure(
    env, nets: Networks, causal_model: CausalModel | None, held_out: dict, metadata: dict, args: Args, episodes: int
):
    """Play `episodes`, normalise the return by the dataset's references, hold the credit against a recorded truth."""
    results = evaluate(env, nets.actor, episodes, 1000 * args.seed, held_out["rewards"].device)
    row = {"return": results["return"].mean(), "return_std": results["return"].std()}
    for name, prefix in [("score", ""), ("score_paper", "paper_")]:
        low, high = (metadata.get(f"{prefix}{policy}_return") for policy in ("random", "expert"))
        if low is not None and high is not None and low != high:
            row[name] = 100 * (row["return"] - low) / (high - low)
    if "won" in results:
        row["won"] = results["won"].mean()
    if args.credit == "macca" and causal_model:
        inputs, truth = causal_inputs(held_out, nets.actor.action_dim), held_out.get("individual_rewards")
        row |= causal_model.report(*inputs, held_out["rewards"], truth, held_out["alive"])
    return {name: float(value) for name, value in row.items()}


def provenance(path: Path) -> dict:
    """What a run depends on besides its arguments."""
    try:
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"command": sys.argv, "commit": commit, "versions": versions, "dataset_sha256": digest}


def save(path: Path, content: dict) -> None:
    """Write under another name first, so that a crash leaves the old checkpoint whole."""
    try:
        torch.save(content, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch raises the latter when a disk is full
        path.with_suffix(".tmp").unlink(missing_ok=True)
        fail(f"{path} cannot be written ({str(error).splitlines()[0]}); an older checkpoint is left as it was")


def load(path: Path, identity: dict) -> dict:
    """Read a checkpoint and refuse one that belongs to another script, dataset or size of network."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here
        fail(f"{path} cannot be read ({type(error).__name__}); expected a checkpoint.pt or policy.pt")
    for name, value in identity.items():
        found = content.get(name) if isinstance(content, dict) else type(content).__name__
        if found != value:
            made = f"; it was made with --dataset {content['dataset']}" if "dataset" in content else ""
            fail(f"{path} was made with {name} {found}, but this run has {value}{made}")
    return content


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    run = Path(args.resume)
    if args.resume:
        try:
            stored = json.loads((run / "config.json").read_text())["args"]
            args = tyro.cli(Args, default=Args(**{**stored, "cuda": args.cuda}))
            free = ("resume", "cuda", "total_iterations")
            changed = [name for name, value in vars(args).items() if name not in free and value != stored[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--resume {run} is not a run folder of this script ({error}); expected one with a config.json")
        if changed:
            fail(f"--resume goes on with the run's own arguments, but {changed[0]} is not the run's; leave it out")
    check_args(args)
    env = make_env(args.env)
    data_path = dataset_path(args)
    data, metadata = load_dataset(data_path, args, env)
    if args.preset == "paper" and not args.resume:
        quality = metadata.get("quality", "")
        if quality not in PAPER_QUALITY:
            print(f"{data_path} names no quality of the paper's, so --preset paper takes its row for expert data")
        args = tyro.cli(Args, default=Args(**PAPER, **PAPER_QUALITY.get(quality, PAPER_QUALITY["expert"])))
    if args.dataset not in PAPER_QUALITY:
        args.dataset = str(data_path.resolve())  # so that the run can be resumed from another folder
    script, source = Path(__file__).name, provenance(data_path)
    identity = {"script": script, "dataset_sha256": source["dataset_sha256"]}
    identity |= {name: getattr(args, name) for name in ("hidden_dim", "layer_norm", "last_action", "graph")}

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    data, held_out = ({name: tensor.to(device) for name, tensor in part.items()} for part in hold_out(data))
    observations, space = data["observations"], env.action_space(env.possible_agents[0])
    num_agents, observation_dim = observations.shape[1:]
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    action_dim = int(space.n) if discrete else space.shape[0]
    nets = Networks(num_agents, observation_dim, action_dim, discrete, args).to(device)
    nets.fit_statistics(observations, data["terminals"] | ~data["next_alive"].all(1))
    # The joint state is the observations side by side, unless the dataset brings one of its own, and says whose it is.
    states, owner = data.get("states", observations.flatten(1)), metadata.get("state_owner")
    if "states" not in data:
        owner = owners(observations, args.own_share)
    causal_model = CausalModel(
        num_agents, states.shape[1], action_dim, args.graph, owner, args.anchor, args.lambda1, args.lambda2, args.h
    ).to(device)
    causal_model.fit_statistics(states, data["rewards"])
    optimizers = {
        "causal": torch.optim.Adam(causal_model.parameter_groups(args.causal_learning_rate), fused=True),
        "critic": torch.optim.Adam(nets.critic.parameters(), lr=args.learning_rate, fused=True),
        "actor": torch.optim.Adam(nets.actor.parameters(), lr=args.learning_rate, fused=True),
    }
    pretrain = args.causal_pretrain_iterations if (args.credit, args.causal_schedule) == ("macca", "first") else 0
    iteration, last, rows, edges, seconds = 0, pretrain + args.total_iterations, [], {}, 0.0

    if args.checkpoint or args.resume:
        path = run / "checkpoint.pt" if args.resume else Path(args.checkpoint)
        stored = load(path, identity)
        whole = "networks" in stored
        if not whole and args.total_iterations:
            fail(f"{path} holds actors alone, which --total-iterations 0 evaluates; to train on give a checkpoint.pt")
        try:
            if whole:
                nets.load_state_dict(stored["networks"])
                causal_model.load_state_dict(stored["causal_model"])
                for name, optimizer in optimizers.items():  # the state; the learning rates are this run's
                    groups = optimizer.state_dict()["param_groups"]
                    optimizer.load_state_dict({**stored["optimizers"][name], "param_groups": groups})
            else:
                nets.actor.load_state_dict(stored["actor"])
            if args.resume:
                rows, edges, seconds = (stored[name] for name in ("rows", "edges", "seconds"))
                iteration = stored["iteration"]
                torch.set_rng_state(stored["rng"])
                if args.cuda and stored["cuda_rng"] is not None:
                    torch.cuda.set_rng_state(stored["cuda_rng"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            fail(f"{path} is not a whole checkpoint of this script ({str(error).splitlines()[0]}); give another one")
        if iteration > last:
            fail(f"{run} has done {iteration} iterations, more than --total-iterations leaves for it; give more")
    if args.total_iterations == 0:
        learned = causal_model if whole else None  # a policy.pt brings none
        for name, value in measure(env, nets, learned, held_out, metadata, args, args.final_episodes).items():
            print(f"{name} {value:.4g}")
        raise SystemExit

    if not args.resume:
        task = args.env.replace("/", "-").replace(":", "-")
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        run = Path("runs") / f"{task}__{Path(script).stem}__{args.credit}__{args.seed}__{stamp}"
        try:
            run.mkdir(parents=True)
        except OSError as error:
            fail(f"{run} cannot be made here ({error}); run the script in a folder that can be written to")
    first = json.loads((run / "config.json").read_text()) if args.resume else source  # keep the command that began it
    (run / "config.json").write_text(json.dumps({**first, "args": dataclasses.asdict(args)}, indent=2))
    counts = f"{len(observations)} transitions of {data_path}, {len(held_out['rewards'])} more held out"
    print(f"{script}: {counts}; --credit {args.credit}, run folder {run}")
    writer = SummaryWriter(str(run), purge_step=iteration + 1 if args.resume else None)
    started = time.monotonic() - seconds

    def record(episodes: int) -> None:
        """Evaluate, write the row to metrics.csv and TensorBoard, and print it."""
        row = measure(env, nets, causal_model, held_out, metadata, args, episodes)
        rows.append({"iteration": iteration, "episodes": episodes, "seconds": time.monotonic() - started, **row})
        with open(run / "metrics.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
        for name, value in row.items():
            writer.add_scalar(f"eval/{name}", value, iteration)
        shown = ("return", "score", "score_paper", "won", "team_nmse", "credit_mae", "credit_rank", "credit_skill")
        progress.write(
            f"iteration {iteration}: " + ", ".join(f"{name} {row[name]:.3g}" for name in shown if name in row)
        )

    def record_edges() -> None:
        """The mean probability of every edge, [N, S + N A], for the heat maps of paper/pictures.py."""
        if args.credit != "macca":
            return
        inputs = causal_inputs(held_out, action_dim)
        edges[iteration] = torch.cat(causal_model.probabilities(*inputs), dim=2).mean(0).cpu()

    def checkpoint() -> None:
        content = {
            **identity,
            "dataset": args.dataset,
            "networks": nets.state_dict(),
            "causal_model": causal_model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "iteration": iteration,
            "rows": rows,
            "edges": edges,
            "seconds": time.monotonic() - started,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if args.cuda else None,
        }
        save(run / "checkpoint.pt", content)
        save(run / "policy.pt", {**identity, "dataset": args.dataset, "actor": nets.actor.state_dict()})

    # The first Ctrl-C ends the run after the iteration in progress, with a checkpoint; the second ends it at once.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))
    progress = tqdm(total=last, initial=iteration, unit="it", mininterval=1, dynamic_ncols=True)
    if not edges:
        record_edges()
    while iteration < last and not signals:
        policy, causal = iteration >= pretrain, args.credit == "macca" and (pretrain == 0 or iteration < pretrain)
        losses = update(sample(data, args.batch_size), nets, causal_model, optimizers, args, policy, causal)
        iteration += 1
        progress.update()
        evaluates = iteration % args.eval_interval == 0 and iteration < last
        if iteration % 100 == 0 or evaluates or iteration == last or signals:
            for name, value in losses.items():
                if not torch.isfinite(value):
                    there = (run / "checkpoint.pt").exists()
                    kept = f"the last good checkpoint is in {run}" if there else "there was no checkpoint yet"
                    progress.close()
                    writer.close()
                    fail(f"{name} is {value.item()} at iteration {iteration}; {kept}; try a smaller --learning-rate")
                writer.add_scalar(f"losses/{name}", value.item(), iteration)
            writer.add_scalar("charts/iterations_per_second", progress.format_dict["rate"] or 0, iteration)
        if evaluates:
            record_edges()
            record(args.eval_episodes)
            checkpoint()
    if iteration == last:
        record_edges()
    checkpoint()
    if iteration == last and (not rows or rows[-1]["iteration"] < last):
        record(args.final_episodes)
        checkpoint()  # once more, with that row
    progress.close()
    writer.close()
    if iteration < last:
        print(f"stopped at iteration {iteration}; to go on: python {script} --resume {run}")
        raise SystemExit(128 + signals[0])
    print(f"the line above is the last policy's, over {args.final_episodes} episodes; run folder: {run}")
