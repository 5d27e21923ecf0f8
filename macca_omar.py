"""MACCA-OMAR: offline multi-agent RL from a team reward, split by a causal model, learned by OMAR.

    python macca_omar.py --env mpe/simple_spread --dataset expert  # OMAR: https://arxiv.org/abs/2111.11188

MACCA: https://openreview.net/forum?id=gwUOzI4DuV (equation numbers are its).
`update_causal_model`, `assign_credit` and `update` are Algorithm 1. Each agent has its own actor and twin critics, all
computed at once: in them N agents come first. T transitions, B batch, O observation, A action, S state, K samples.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports

import hashlib
import importlib
import io
import json
import math
import os
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from causal_model import CausalModel

Batch = dict[str, Tensor]


@dataclass
class Args:
    env: str = "mpe/simple_spread"  # mpe/TASK, smax/MAP, smac/MAP, or [zoo/]package.module:factory
    dataset: str = "expert"  # a file, or a QUALITY: data/datasets/ENV/QUALITY.npz
    credit: Literal["macca", "team", "uniform", "truth", "oracle"] = "macca"  # its share, R, R / N, paid, caused
    standardize_rewards: bool = True  # by one deviation, of all agents' rewards
    seed: int = 1  # of weights, minibatches and evaluation episodes
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    total_iterations: int = 2_000  # each one update of actors and critics
    batch_size: int = 256  # transitions, each with all agents
    gamma: float = 0.95  # discount factor
    learning_rate: float = 1e-2  # of actors and critics (Adam)
    hidden_dim: int = 64  # width of the two hidden layers
    target_rate: float = 0.01  # Polyak step of the targets
    max_grad_norm: float = 0.5  # gradient clipping, per agent
    eval_interval: int = 1_000  # between evaluations and checkpoints
    eval_episodes: int = 32  # of an evaluation during training
    final_episodes: int = 100  # of the last evaluation
    resume: str = ""  # run folder to continue, or to evaluate if finished
    # Causal model (--credit macca)
    share: Literal["shapley", "slots"] = "shapley"  # of the learned sum, or each slot's (Eq. 6)
    graph: Literal["dynamic", "fixed", "full"] = "dynamic"  # masks from (s, a), constant, or none
    lambda1: float = 3e-3  # L1 penalty on state edges (Eq. 5)
    lambda2: float = 3e-3  # L1 penalty on action edges (Eq. 5)
    anchor: float = 5.0  # price of edges from other agents' dimensions; paper: 1
    h: float = 0.1  # less probable edges do not count in the credit (Eq. 6)
    references: int = 8  # rows that stand for absent agents (Shapley)
    causal_iterations: int = 3_000  # of its training, which comes first: iterations below 0
    causal_learning_rate: float = 1e-2  # of the reward predictor; all rates of the model fall to 0
    # Algorithm specific
    alpha: float = 1.0  # weight of the conservative penalty (Eq. 7); 0.2 where data are no expert's
    cql_samples: int = 5  # uniform actions, and as many near the policy's
    tau: float = 0.9  # weight of imitating a_hat (Eq. 8)
    omar_rounds: int = 3  # rounds of the search for a_hat
    omar_samples: int = 10  # candidate actions per round


RANGES = {"batch_size": (2, 1e6), "anchor": (1, 1e6), "seed": (0, 1e9), "references": (1, 1e3)}
RANGES |= {"gamma": (0, 1), "target_rate": (0, 1), "h": (0, 1), "tau": (0, 1)}


def require(condition: object, message: str) -> None:
    """A user's mistake ends in one sentence and exit status 2."""
    if not condition:
        tqdm.write(f"{Path(__file__).name}: {message}", file=sys.stderr)
        raise SystemExit(2)


def make_env(name: str, seed: int = 0) -> tuple[Any, bool]:
    """A PettingZoo parallel environment that plays a step, and whether it has action masks."""
    sys.path.append(os.getcwd())  # after the script's own folder, look in the user's
    try:
        family, _, task = name.partition("/")
        module, _, factory = family.partition(":")
        module = importlib.import_module(module if factory else f"data.{family}")
        env = getattr(module, factory)() if factory else module.parallel_env(task)
        spaces = [(env.observation_space(a).shape, env.action_space(a)) for a in env.possible_agents]
        shape, space = spaces[0]
        vector, discrete = shape and len(shape) == 1, isinstance(space, Discrete) and space.start == 0
        box = isinstance(space, Box) and len(space.shape) == 1 and (space.low == -1).all() and (space.high == 1).all()
        require(len({*map(str, spaces)}) == 1, f"--env {name} has agents of different spaces, expected equal ones")
        require(box or discrete, f"--env {name} acts in {space}, not Box(-1, 1, (A,)) or Discrete")
        require(vector, f"--env {name} observes no vectors; masks belong in its infos")
        first, infos = env.reset(seed=seed)
        masks = {a: np.int8(x["action_mask"]) for a, x in infos.items() if "action_mask" in x}
        actions = {a: env.action_space(a).sample(masks.get(a)) for a in env.agents}
        second, rewards, terminations, truncations, _ = env.step(actions)
        seen = {np.shape(x) for x in (*first.values(), *second.values())}
        strangers = {*second, *rewards, *terminations, *truncations} - {*env.possible_agents}
    except Exception as error:  # whatever somebody else's code may raise
        require(False, f"--env {name} is no working parallel environment: {error!r}")
    require(seen == {shape}, f"--env {name} observes shapes {seen}, expected {shape} as in its space")
    require(not strangers, f"--env {name} names {strangers}, expected only its possible_agents")
    return env, bool(masks)


@torch.no_grad()
def evaluate(env, nets: "Networks", metadata: dict, episodes: int, seed: int) -> dict[str, float]:
    """Play the deterministic policy from reset seeds `seed`, `seed` + 1, ..."""
    agents, device = env.possible_agents, nets.mean.device
    returns, won = np.zeros(episodes), {}
    gone, all_actions = np.zeros(nets.mean.shape[2]), np.ones(nets.action_dim, bool)
    for episode in range(episodes):
        observations, infos = env.reset(seed=seed + episode)
        over: set = set()
        while env.agents and len(over) < len(agents):
            joint = np.stack([observations.get(a, gone) for a in agents])[None].astype(np.float32)
            masks = [infos.get(a, {}).get("action_mask", all_actions) for a in agents]
            inputs = (torch.from_numpy(x).to(device) for x in (joint, np.stack(masks)[None] > 0))
            chosen = dict(zip(agents, nets.act(*inputs)[0].cpu().numpy(), strict=True))
            observations, rewards, *ends, infos = env.step({a: chosen[a] for a in env.agents})
            returns[episode] += sum(rewards.values()) / len(agents)
            over |= {a for flags in ends for a, flag in flags.items() if flag}
            if any("won" in info for info in infos.values()):
                won[episode] = any(info.get("won") for info in infos.values())
    results = {"return": returns.mean(), "return_std": returns.std()}
    low, high = (metadata.get(name, math.nan) for name in ("random_return", "expert_return"))
    if low < high:  # both are known
        results["score"] = 100 * (returns.mean() - low) / (high - low)
    if won:  # an episode that does not report it counts as lost
        results["won"] = sum(won.values()) / episodes
    return results


def load_dataset(path: Path, args: Args, env) -> tuple[Batch, dict[str, Any]]:
    """Tensors [T, ...] and metadata. `data/convert.py --check FILE` names every fault of a file."""
    require(path.is_file(), f"the dataset {path} does not exist; record it (data/collect_*.py) or convert it")
    require(zipfile.is_zipfile(path) and path.open("rb").read(2) == b"PK", f"{path} is no whole .npz file")
    file, data = np.load(path, allow_pickle=False), {}
    metadata = dict(json.loads(str(file["metadata"])))
    fits = metadata.get("env", args.env) == args.env
    require(fits, f"{path} was recorded in {metadata.get('env')}, but --env is {args.env}")

    def take(name: str, kind: str, *shape: int) -> np.ndarray:
        require(name in file, f"{path} lacks {name} (see data/README.md)")
        x = file[name]
        fits, found = x.shape == shape and kind in x.dtype.name, f"{x.dtype} {list(x.shape)}"
        require(fits, f"{path}: {name} is {found}, expected {kind} {list(shape)} for --env {args.env}")
        within = -1e9 < x.min(initial=0).item() and x.max(initial=0).item() < 1e9  # before the cast, which can overflow
        require(within, f"{path}: {name} holds NaN, infinity or more than 1e9")
        return x.astype({"float": np.float32, "int": np.int64, "bool": bool}[kind], copy=False)

    agent, N, T = env.possible_agents[0], len(env.possible_agents), file["rewards"].size
    shape, space = env.observation_space(agent).shape, env.action_space(agent)
    discrete = isinstance(space, Discrete)
    A = int(space.n) if discrete else space.shape[0]
    data["rewards"] = rewards = take("rewards", "float", T)
    data |= {name: take(name, "bool", T) for name in ("terminals", "timeouts")}
    terminals, ends = data["terminals"], data["terminals"] | data["timeouts"]

    def following(name: str, kind: str, *shape: int) -> np.ndarray:
        """What follows a row: the next one, or what is stored for the end of an episode."""
        x, given = np.roll(data[name], -1, axis=0), f"next_{name}" in file
        when, rows = ("next", T) if given else ("final", int(ends.sum()))
        stored = take(f"{when}_{name}", kind, rows, *shape)
        x[ends] = stored[ends] if given else stored
        require(not given or np.allclose(stored[:-1], x[:-1], atol=1e-6), f"{path}: next_{name} are not the next row's")
        return x

    data["observations"] = take("observations", "float", T, N, *shape)
    data["next_observations"] = following("observations", "float", N, *shape)
    data["actions"] = actions = take("actions", "int", T, N) if discrete else take("actions", "float", T, N, A)
    for name, credit in (("individual_rewards", "truth"), ("shapley_rewards", "oracle")):
        if name in file or args.credit == credit:
            data[name] = take(name, "float", T, N)
    if "state_owner" in metadata:  # else the joint state is the observations side by side
        data["states"] = take("states", "float", T, file["states"].shape[-1] if "states" in file else 0)
    data["alive"] = data["next_alive"] = allowed = np.ones((T, N), bool)
    if discrete:
        masked, everything = "action_masks" in file, np.ones((T, N, A), bool)
        data["action_masks"] = masks = take("action_masks", "bool", T, N, A) if masked else everything
        data["next_action_masks"] = following("action_masks", "bool", N, A) if masked else everything
        data["alive"] = masks.sum(2) > 1  # a dead agent has one action left
        data["next_alive"] = data["next_action_masks"].sum(2) > 1
        allowed = np.take_along_axis(masks, actions.clip(0, A - 1)[..., None], axis=2)
    low, high = (0, A - 1) if discrete else (-1, 1)
    unequal = not all(np.allclose(rewards, data[x].sum(1), 1e-3, 1e-3) for x in data if x.endswith("_rewards"))
    references = [metadata.get(name, 0) for name in ("random_return", "expert_return")]
    for fault, found in {
        "all rewards are equal, so there is nothing to learn": (rewards == rewards[0]).all(),
        "rewards are not the sum of individual_rewards or of shapley_rewards": unequal,
        f"actions are not from {low} to {high}": actions.min() < low or actions.max() > high,
        "an action was taken that action_masks forbid": not allowed.all(),
        "a row is both terminal and timeout": (terminals & data["timeouts"]).any(),
        "the last row is neither terminal nor timeout": not ends[-1],
        "random_return or expert_return is no number": not np.isfinite(references).all(),
    }.items():
        require(not found, f"{path}: {fault}")
    return {name: torch.from_numpy(x) for name, x in data.items()}, metadata


def hold_out(data: Batch) -> tuple[Batch, Batch]:
    """Split off random whole episodes to measure the credit on, the same for all seeds. Overwrites `data`."""
    ends = (data["terminals"] | data["timeouts"]).long()
    episode = ends.cumsum(0) - ends  # [T]
    order = torch.randperm(int(ends.sum()), generator=torch.Generator().manual_seed(0))
    lengths = torch.bincount(episode)[order]
    held = torch.isin(episode, order[lengths.cumsum(0) - lengths < min(1e4, len(ends) / 10)])
    kept = ~held if (~held).sum() > 1 else torch.ones_like(held)  # a single episode is both
    held_out = {name: x[held] for name, x in data.items()}
    for x in data.values():  # in place, as a second copy may find no room; only constants share memory
        for number, rows in enumerate(kept.nonzero().squeeze(1).split(1000)):
            x[1000 * number :][: len(rows)] = x[rows]
    return {name: x[: kept.sum()] for name, x in data.items()}, held_out


def sample(data: Batch, batch_size: int) -> Batch:
    """A minibatch, drawn where the data lie: every tensor is [B, ...]."""
    rows = torch.randint(len(data["rewards"]), (batch_size,), device=data["rewards"].device)
    return {name: x[rows] for name, x in data.items()}


def causal_inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    """The joint state [B, S] and the actions as vectors [B, N, A] (one-hot if discrete)."""
    state, actions = batch.get("states", batch["observations"].flatten(1)), batch["actions"]
    if "action_masks" in batch:
        actions = F.one_hot(actions, batch["action_masks"].shape[2]).float()
    return state, actions


def assign_credit(data: Batch, args: Args, causal_model: CausalModel) -> Tensor:
    """What each agent is told for each transition [T, N]: its share, or a control."""
    if args.credit == "macca":  # line 4 of Algorithm 1
        inputs = (*causal_inputs(data), data["rewards"], data["alive"])
        parts = list(zip(*(x.split(1000) for x in inputs), strict=True))
        return torch.cat([causal_model.assign(*part) for part in tqdm(parts, "credit", unit="k")])
    if args.credit in ("truth", "oracle"):
        return data["individual_rewards" if args.credit == "truth" else "shapley_rewards"]
    rewards, alive = data["rewards"][:, None] * data["alive"], data["alive"]
    return rewards if args.credit == "team" else rewards / alive.sum(1, keepdim=True).clamp(min=1)


def standardize(rewards: Tensor, alive: Tensor, center: Tensor) -> Tensor:
    """Rewards [T, N] in units of the deviation of all agents' rewards, centered before if `center`."""
    mean, std = rewards[alive].mean(), rewards[alive].std()  # one scale: an agent's own may be 0
    scale = torch.maximum(std, 0.1 * mean.abs() * ~center)  # std may be near 0
    return (rewards - mean * center) * alive / (scale + 1e-6)


class StackedLinear(nn.Module):
    """n linear layers, [n, B, in] -> [n, B, out]; a shorter input uses the first ones."""

    def __init__(self, n: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(n, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[: len(x)], x, self.weight[: len(x)])


def stacked_mlp(n: int, *dims: int) -> nn.Sequential:
    """n networks of linear layers with ReLU in between."""
    layers = [layer for dim in pairwise(dims) for layer in (StackedLinear(n, *dim), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """Twin critics Q^{i,1}, Q^{i,2} of every agent: 2 N networks, first all first twins."""

    def __init__(self, n: int, in_dim: int, action_dim: int, hidden_dim: int, discrete: bool):
        super().__init__()
        self.layer1 = StackedLinear(n, in_dim, hidden_dim)
        self.action_weight = None if discrete else StackedLinear(n, action_dim, hidden_dim).weight
        self.layer2 = StackedLinear(n, hidden_dim, hidden_dim)
        self.layer3 = StackedLinear(n, hidden_dim, action_dim if discrete else 1)

    def forward(self, x: Tensor, actions: Tensor | None = None, twins: int = 2) -> Tensor:
        """[N, B, O], K actions each [N, B, K, A] (discrete: all) -> Q-values [twins, N, B, K]."""
        agents, batch, _ = x.shape
        x = self.layer1(x.repeat(twins, 1, 1))  # [twins N, B, H], then [twins N, B, K, H]
        if actions is not None and self.action_weight is not None:
            # The first layer is linear: observations enter once for all K actions.
            actions = actions.flatten(1, 2).repeat(twins, 1, 1)  # [twins N, B K, A]
            part = torch.bmm(actions, self.action_weight[: len(x)])
            x = x[:, :, None] + part.view(*x.shape[:2], -1, x.shape[2])
        x = self.layer3(self.layer2(x.relu_().flatten(1, -2)).relu_())
        return x.view(twins, agents, batch, -1)


class Networks(nn.Module):
    """Actors, critics, their targets, and what standardizes observations."""

    def __init__(self, data: Batch, args: Args):
        super().__init__()
        self.discrete = "action_masks" in data
        self.action_dim = data["action_masks" if self.discrete else "actions"].shape[2]
        (n, in_dim), hidden = data["observations"].shape[1:], args.hidden_dim
        dims = (n, in_dim, hidden, hidden, self.action_dim)
        self.actor, self.actor_target = stacked_mlp(*dims), stacked_mlp(*dims)
        dims = (2 * n, in_dim, self.action_dim, hidden, self.discrete)
        self.critic, self.critic_target = Critic(*dims), Critic(*dims)
        self.actor_target.requires_grad_(False).load_state_dict(self.actor.state_dict())
        self.critic_target.requires_grad_(False).load_state_dict(self.critic.state_dict())
        std = data["observations"].std(0)[:, None]
        self.mean = nn.Buffer(data["observations"].mean(0)[:, None])
        self.std = nn.Buffer(torch.where(std > 1e-6, std, 1.0))
        # If episodes can end early, minus the mean would reward or punish survival.
        self.center = nn.Buffer(~data["terminals"].any() & data["next_alive"].all())

    def inputs(self, observations: Tensor) -> Tensor:
        """[B, N, O] -> standardized, agents first: [N, B, O]."""
        return (observations.transpose(0, 1) - self.mean) / self.std

    def act(self, observations: Tensor, masks: Tensor) -> Tensor:
        """The actions to play [B, N, A], or their indices [B, N]."""
        out = self.actor(self.inputs(observations)).transpose(0, 1)
        return out.masked_fill(~masks, -torch.inf).argmax(2) if self.discrete else out.tanh()


def optimize(loss: Tensor, nets: Networks, name: str, optimizer: Adam, args: Args) -> None:
    """One step of the actors or critics, then of their target by `target_rate`."""
    parameters, targets = (list(getattr(nets, x).parameters()) for x in (name, f"{name}_target"))
    gradients = torch.autograd.grad(loss, parameters)
    # Clipped per agent: one norm over all would couple the agents.
    per_agent = [g.view(-1, len(nets.mean), g[0].numel()) for g in gradients]  # [twins or 1, N, n]
    norm = torch.stack([g.square().sum((0, 2)) for g in per_agent]).sum(0).sqrt()  # [N]
    scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)[:, None]
    for parameter, part in zip(parameters, per_agent, strict=True):
        parameter.grad = part.mul_(scale).view_as(parameter)
    optimizer.step()
    with torch.no_grad():
        for old, new in zip(targets, parameters, strict=True):
            old.lerp_(new, args.target_rate)


# === ALGORITHM LOGIC: OMAR ===
def penalty_actions(pi: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """K uniform actions and K near pi's [N, B, A]: [N, B, 2 K, A], and their log-densities."""
    low = torch.stack([torch.full_like(pi, -1.0), (pi - 0.2).clamp(min=-1)], dim=2).repeat_interleave(samples, dim=2)
    high = torch.stack([torch.ones_like(pi), (pi + 0.2).clamp(max=1)], dim=2).repeat_interleave(samples, dim=2)
    return torch.lerp(low, high, torch.rand_like(low)), -(high - low).log().sum(3)


def critic_loss(batch: Batch, rewards: Tensor, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """Eq. 7: squared error to y plus alpha times the penalty, summed over agents."""
    x, next_x = nets.inputs(batch["observations"]), nets.inputs(batch["next_observations"])
    actions = batch["actions"].transpose(0, 1)  # [N, B, A] or [N, B]
    if nets.discrete:
        masks, next_masks = (batch[x].transpose(0, 1) for x in ("action_masks", "next_action_masks"))  # [N, B, A]
        with torch.no_grad():
            next_actions = nets.actor_target(next_x).masked_fill(~next_masks, -torch.inf).argmax(2)
            next_q = nets.critic_target(next_x).min(0).values.gather(2, next_actions[..., None])
        q_all = nets.critic(x)  # [2, N, B, A]
        q = q_all.gather(3, actions[None, ..., None].expand(2, -1, -1, -1)).squeeze(3)  # [2, N, B]
        soft_maximum = q_all.masked_fill(~masks, -torch.inf).logsumexp(3)
    else:
        with torch.no_grad():
            next_actions = nets.actor_target(next_x).tanh()
            next_q = nets.critic_target(next_x, next_actions[:, :, None]).min(0).values
            candidates, log_density = penalty_actions(nets.actor(x).tanh(), args.cql_samples)
        q_all = nets.critic(x, torch.cat([actions[:, :, None], candidates], dim=2))  # [2, N, B, 1 + 2 K]
        q = q_all[..., 0]
        # log of exp Q's integral over all actions plus that near pi's, by importance sampling, plus log K.
        soft_maximum = (q_all[..., 1:] - log_density).logsumexp(3)
    # y = r_hat + gamma min_k Q_bar^k(o', pi_bar(o')), r_hat alone after a terminal or a death
    bootstrap = ~batch["terminals"] & batch["next_alive"].T  # [N, B]
    y = rewards.T + args.gamma * bootstrap * next_q.squeeze(2)  # [N, B]
    loss = (((q - y).square() + args.alpha * (soft_maximum - q)) * batch["alive"].T).mean(2).sum()
    return loss, {"critic_loss": loss.detach(), "q_data": q.detach().mean()}


@torch.no_grad()
def zeroth_order_actions(x: Tensor, pi: Tensor, critic: Critic, args: Args) -> Tensor:
    """a_hat [N, B, A]: of the last samples and pi's action, the first critic's best."""
    own = pi[:, :, None]  # [N, B, 1, A]
    mean, std, candidates, q = torch.zeros_like(own), 2.0, own, own
    for _ in range(args.omar_rounds):
        samples = (mean + std * torch.randn_like(own.expand(-1, -1, args.omar_samples, -1))).clamp(-1, 1)
        candidates = torch.cat([samples, own], dim=2)  # [N, B, K + 1, A]
        q = critic(x, candidates, twins=1)[0]  # [N, B, K + 1]
        weights = q[..., :-1].softmax(2)[..., None]  # refit the Gaussian to the good samples
        mean = (weights * samples).sum(2, keepdim=True)
        std = (weights * (samples - mean).square()).sum(2, keepdim=True).sqrt()
    return candidates.gather(2, q.argmax(2)[..., None, None].expand_as(own)).squeeze(2)


def actor_loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """Eq. 8: tau times the distance to a_hat, minus (1 - tau) times Q, summed over agents."""
    x = nets.inputs(batch["observations"])
    if nets.discrete:
        masks = batch["action_masks"].transpose(0, 1)
        logits = nets.actor(x).masked_fill(~masks, -1e9)  # [N, B, A]
        q_all = nets.critic(x, twins=1)[0]
        a_hat = q_all.masked_fill(~masks, -torch.inf).argmax(2)  # a finite set is searched exactly
        distance = F.cross_entropy(logits.movedim(2, 1), a_hat, reduction="none")
        q = (logits.softmax(2) * q_all).sum(2)  # the expected Q under pi
    else:
        pi = nets.actor(x).tanh()
        q = nets.critic(x, pi[:, :, None], twins=1)[0].squeeze(2)
        a_hat = zeroth_order_actions(x, pi.detach(), nets.critic, args)
        distance = (pi - a_hat).square().sum(2)
    loss = ((args.tau * distance - (1 - args.tau) * q) * batch["alive"].T).mean(1).sum()
    return loss, {"q_policy": q.detach().mean(), "actor_loss": loss.detach()}


# === End of the algorithm ===
def update_causal_model(batch: Batch, causal_model: CausalModel, optimizers) -> Batch:
    """Line 5 of Algorithm 1 (Eq. 4, 5) on one minibatch."""
    loss, error = causal_model.loss(*causal_inputs(batch), batch["rewards"], batch["alive"])
    optimizers["causal"].zero_grad()
    loss.backward()
    optimizers["causal"].step()
    causal_model.project()
    return {"causal_loss": loss.detach(), "team_error": error}


def update(batch: Batch, nets, optimizers, args: Args) -> Batch:
    """Line 6 of Algorithm 1 on one minibatch. Nothing in here waits for a GPU."""
    loss, logs = critic_loss(batch, batch["credit"], nets, args)
    optimize(loss, nets, "critic", optimizers["critic"], args)
    loss, actor_logs = actor_loss(batch, nets, args)
    optimize(loss, nets, "actor", optimizers["actor"], args)
    return logs | actor_logs


def build(args: Args, data: Batch, metadata: dict) -> tuple[Networks, CausalModel, dict[str, Any]]:
    """Everything that learns, on the device of the data."""
    nets = Networks(data, args).to(data["rewards"].device)
    (states, actions), (n, dim) = causal_inputs(data), data["observations"].shape[1:]
    owner = metadata["state_owner"] if "states" in data else torch.arange(n).repeat_interleave(dim).tolist()
    options = (args.share, args.graph, args.anchor, args.lambda1, args.lambda2, args.h, args.references)
    causal_model = CausalModel(n, states.shape[1], nets.action_dim, owner, *options).to(states.device)
    causal_model.fit_statistics(states, actions, data["rewards"])
    optimizers: dict[str, Any] = {"causal": Adam(causal_model.parameter_groups(args.causal_learning_rate), fused=True)}
    optimizers["schedule"] = torch.optim.lr_scheduler.LinearLR(optimizers["causal"], 1.0, 0.0, args.causal_iterations)
    optimizers |= {x: Adam(getattr(nets, x).parameters(), args.learning_rate, fused=True) for x in ("critic", "actor")}
    return nets, causal_model, optimizers


def repeated(step, as_graph: bool):
    """The logs of a step, again and again; on a GPU from the fourth on a CUDA graph, in which no Python code runs."""
    for _ in range(3) if as_graph else count():  # the first calls make the optimizers' state
        yield step()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):  # records the step, does not run it
        logs = step()
    while True:
        graph.replay()  # reads and writes the recorded tensors, also those of the logs
        yield logs


def write(path: Path, content: bytes) -> None:
    """Write beside the old file, then replace it: a crash leaves one of the two whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_bytes(content)
        path.with_suffix(".tmp").replace(path)
    except OSError as error:
        require(False, f"{path} cannot be written here: {error}")


def load_checkpoint(run: Path) -> dict[str, Any]:
    """What a run saved last. A checksum at its end tells whether a single bit has changed."""
    path, script = run / "checkpoint.pt", Path(__file__).name
    content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b""
    whole = content and hashlib.sha256(content[:-32]).digest() == content[-32:]
    require(whole, f"{run} has no whole checkpoint; give a run folder, or start again without --resume")
    checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    same = checkpoint["script"] == script and checkpoint["args"].keys() == vars(Args()).keys()
    require(same, f"{run} is a run of {checkpoint['script']}, or of another version")
    return checkpoint


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    script, run, checkpoint = Path(__file__).name, Path(args.resume), {}
    if args.resume:
        checkpoint = load_checkpoint(run)
        stored = Args(**{**checkpoint["args"], "resume": args.resume, "cuda": args.cuda})
        args = tyro.cli(Args, default=stored)
        given = [n for n, x in vars(args).items() if n != "total_iterations" and x != getattr(stored, n)]
        require(not given, f"--resume keeps the run's arguments; leave out --{', --'.join(given).replace('_', '-')}")
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (int(type(value) is int), 1e9))  # integers from 1
        fits = type(value) not in (int, float) or low <= value <= high
        require(fits, f"--{name.replace('_', '-')} is {value}, expected {low} to {high:g}")
    require(torch.cuda.is_available() or not args.cuda, "--cuda: torch sees no CUDA device; give --no-cuda")
    env, gives_masks = make_env(args.env, 1000 * args.seed)
    path = Path(args.dataset).resolve()
    if path.suffix != ".npz":  # a quality
        path = Path(__file__).resolve().parent / "data" / "datasets" / args.env / f"{args.dataset}.npz"
    torch.manual_seed(args.seed)
    try:
        data, metadata = load_dataset(path, args, env)
        digest = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        parts, device = hold_out(data), "cuda" if args.cuda else "cpu"
        data, held = ({name: x.to(device) for name, x in part.items()} for part in parts)
        nets, causal_model, optimizers = build(args, data, metadata)
    except Exception as error:  # of many kinds
        require(False, f"the dataset {path} cannot be used: {error}")
    free = data.get("action_masks", data["alive"]).all()  # every action is allowed
    require(gives_masks or free, f"{path} has action masks, --env {args.env} has none")
    modules = {"nets": nets, "causal_model": causal_model, **optimizers}
    first, last_iteration = -args.causal_iterations * (args.credit == "macca"), args.total_iterations
    iteration, rows, logs, report = first, [], {}, {}  # below 0 the causal model learns
    if args.resume:
        require(checkpoint["dataset_sha256"] == digest, f"{run} had another dataset than {path}")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        write(run / "checkpoint.pt", (run / "checkpoint.pt").read_bytes())  # a read-only folder fails here
        iteration, rows = checkpoint["iteration"], checkpoint["rows"]
        torch.set_rng_state(checkpoint["rng"][0])
        if args.cuda and len(checkpoint["rng"]) == 2:
            torch.cuda.set_rng_state(checkpoint["rng"][1])
        require(iteration <= last_iteration, f"{run} has {iteration} iterations; give more in total")
    else:
        args.dataset = str(path)  # absolute, to resume from any folder
        name = f"{args.env.replace('/', '-').replace(':', '-')}__{Path(script).stem}__{args.credit}"
        run = Path("runs", f"{name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        config = {"args": vars(args), "dataset_sha256": digest, "command": sys.argv}
        write(run / "config.json", json.dumps(config, indent=2).encode())
    warnings.filterwarnings("ignore", ".* capturable=True")  # torch warns of the few steps before a graph
    for group in [group for name in ("causal", "critic", "actor") for group in optimizers[name].param_groups]:
        group["capturable"] = args.cuda  # a graph reads the learning rate from a tensor
        group["lr"] = torch.as_tensor(group["lr"], device=device) if args.cuda else float(group["lr"])
    causes = repeated(lambda: update_causal_model(sample(data, args.batch_size), causal_model, optimizers), args.cuda)
    policies = repeated(lambda: update(sample(data, args.batch_size), nets, optimizers, args), args.cuda)
    print(f"{len(data['alive'])} transitions of {path}; run folder {run}")
    writer = SummaryWriter(str(run), purge_step=iteration + 1)
    progress = tqdm(total=last_iteration - first, initial=iteration - first, unit="it", mininterval=1)
    stop: list[int] = []  # the first Ctrl-C saves and ends, the second just ends
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    while True:
        due = iteration == last_iteration or (iteration > 0 and iteration % args.eval_interval == 0)
        over = iteration == last_iteration or bool(stop)  # asked once: signals come any time
        if iteration % 100 == 0 or due or over:
            for name, x in logs.items():
                require(x.isfinite(), f"{name} is {x:g} at iteration {iteration} of {run}; lower the learning rate")
                writer.add_scalar(f"losses/{name}", x.item(), iteration)
        if not logs or iteration == 0 or due or over:  # before what takes long or may crash
            checkpoint = {name: module.state_dict() for name, module in modules.items()}
            checkpoint |= {"script": script, "args": vars(args), "dataset_sha256": digest}
            checkpoint["rng"] = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if args.cuda else [])]
            torch.save(checkpoint | {"iteration": iteration, "rows": rows}, buffer := io.BytesIO())
            write(run / "checkpoint.pt", buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
        if iteration >= 0 and "credit" not in data and (due or not over):
            data["credit"] = assign_credit(data, args, causal_model)
            if args.standardize_rewards:
                data["credit"] = standardize(data["credit"], data["alive"], nets.center)
            if args.credit == "macca":  # how good it is on held-out episodes
                paid, cause = (held.get(name) for name in ("individual_rewards", "shapley_rewards"))
                report = causal_model.report(*causal_inputs(held), held["rewards"], held["alive"], paid, cause)
                shown = [f"{name} {x:.3g}" for name, x in report.items() if name.endswith(("nmse", "skill"))]
                progress.write(f"credit: {', '.join(shown)}")
        if due and all(row["iteration"] != iteration for row in rows):
            episodes = args.final_episodes if iteration == last_iteration else args.eval_episodes
            try:
                row: dict = evaluate(env, nets, metadata, episodes, seed=1000 * args.seed) | report
            except Exception as error:
                require(False, f"--env {args.env} failed: {error!r}; --resume {run} tries again")
            for name, value in row.items():
                row[name] = float(value)
                require(math.isfinite(value), f"{name} is {value} at iteration {iteration} of {run}")
                writer.add_scalar(f"eval/{name}", value, iteration)
            rows.append({"iteration": iteration, "episodes": episodes, **row})
            columns = list(dict.fromkeys(name for row in rows for name in row))
            lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
            write(run / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
            names = [name for name in ("return", "score", "won", "cause_skill") if name in row]
            progress.write(f"iteration {iteration}: {', '.join(f'{name} {row[name]:.3g}' for name in names)}")
        if over:
            break
        logs = next(causes if iteration < 0 else policies)
        if iteration < 0:
            optimizers["schedule"].step()
        iteration += 1
        progress.update()
    progress.close()
    writer.close()
    if iteration < last_iteration:
        print(f"stopped at iteration {iteration}; to go on: python {script} --resume {run}")
        raise SystemExit(128 + stop[0])
    print(f"that was the last policy over {args.final_episodes} episodes; run folder: {run}")
