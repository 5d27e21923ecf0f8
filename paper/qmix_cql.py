"""QMIX-CQL: offline multi-agent RL from the team reward, one value of the joint action, discrete actions.

    python paper/qmix_cql.py --env smax/2s3z --dataset medium

QMIX: https://arxiv.org/abs/1803.11485, CQL: https://arxiv.org/abs/2006.04779. Nobody is told a share of R.

    Q_tot(s, a) = elu(q W1(s) + b1(s)) w2(s) + V(s),  q = (Q_1(o_1, a_1), ..., Q_N(o_N, a_N)),  W1, w2 >= 0
    y = R + gamma Qbar_tot(s', a*),  a*_i = argmax over legal a of Q_i(o'_i, a);  y = R after a terminal
    loss = mean of (Q_tot(s, a) - y)^2 / 2 + w (log sum_k exp Q_tot(s, a^k) - Q_tot(s, a))

a^0 is the dataset's joint action a, a^1 ... a^K are uniform over the legal joint actions. Qbar is a copy of agents and
mixer, renewed every `target_interval` updates. s is `states` of the dataset, or the observations side by side. Every
agent has its own network. A dead agent adds nothing: its Q_i is 0.
Shapes: T transitions, B batch, N agents, O observation, A actions, S state, K joint actions, E embedding.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from tqdm import tqdm

sys.path.insert(0, str(rows.ROOT))
import macca_icq
from macca_icq import Batch, evaluate, hold_out, make_env, require, sample, stacked_mlp, standardize, write


@dataclass
class Args:
    env: str = "smax/2s3z"  # mpe/TASK, smax/MAP, smac/MAP, or [zoo/]package.module:factory
    dataset: str = "medium"  # a file, or a QUALITY: data/datasets/ENV/QUALITY.npz
    standardize_rewards: bool = True  # by the deviation of the team reward over the whole dataset
    seed: int = 1  # of weights, minibatches and evaluation episodes
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    total_iterations: int = 2_000  # each one update
    batch_size: int = 1024  # transitions, each with all agents
    gamma: float = 0.99  # discount factor
    learning_rate: float = 1e-3  # of agents and mixer (Adam)
    hidden_dim: int = 64  # width of the agents' two hidden layers, and of the hypernetworks' one
    embed_dim: int = 32  # width of the mixer
    target_interval: int = 25  # updates between two copies to the targets
    max_grad_norm: float = 10.0  # gradient clipping, over agents and mixer
    eval_interval: int = 1_000  # between evaluations
    eval_episodes: int = 32  # of an evaluation during training
    final_episodes: int = 100  # of the last evaluation
    # Algorithm specific
    cql_weight: float = 3.0  # of the conservative penalty; 0 is QMIX
    cql_samples: int = 20  # joint actions beside the dataset's


RANGES = {"batch_size": (2, 1e6), "seed": (0, 1e9), "gamma": (0, 1), "learning_rate": (1e-9, 1), "cql_weight": (0, 1e6)}


def joint_states(data: Batch) -> tuple[Tensor, Tensor]:
    """s and s', [T, S] each: the dataset's states, or the observations side by side."""
    name = "states" if "states" in data else "observations"
    return data[name].flatten(1), data[f"next_{name}"].flatten(1)


# === ALGORITHM LOGIC: QMIX and CQL ===
class Mixer(nn.Module):
    """Q_tot of the agents' values: rises with each of them, so every agent's best action is part of the joint best."""

    def __init__(self, n: int, state_dim: int, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.weight1 = nn.Sequential(nn.Linear(state_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, n * embed_dim))
        self.weight2 = nn.Sequential(nn.Linear(state_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embed_dim))
        self.bias1 = nn.Linear(state_dim, embed_dim)
        self.value = nn.Sequential(nn.Linear(state_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 1))

    def forward(self, q: Tensor, state: Tensor) -> Tensor:
        """The values [B, K, N] of K joint actions, states [B, S] -> Q_tot [B, K]."""
        weight1 = self.weight1(state).abs().view(len(q), q.shape[2], -1)  # [B, N, E]
        weight2 = self.weight2(state).abs()[..., None]  # [B, E, 1]
        hidden = F.elu(q @ weight1 + self.bias1(state)[:, None])  # [B, K, E]
        return (hidden @ weight2).squeeze(2) + self.value(state)


class Networks(nn.Module):
    """Agents, mixer, their targets, and what standardizes observations and states."""

    def __init__(self, data: Batch, args: Args):
        super().__init__()
        state, _ = joint_states(data)
        (n, in_dim), self.action_dim = data["observations"].shape[1:], data["action_masks"].shape[2]
        dims = (n, in_dim, args.hidden_dim, args.hidden_dim, self.action_dim)
        self.agents, self.agents_target = stacked_mlp(*dims), stacked_mlp(*dims)
        dims = (n, state.shape[1], args.embed_dim, args.hidden_dim)
        self.mixer, self.mixer_target = Mixer(*dims), Mixer(*dims)
        std, state_std = data["observations"].std(0)[:, None], state.std(0)
        self.mean, self.state_mean = nn.Buffer(data["observations"].mean(0)[:, None]), nn.Buffer(state.mean(0))
        self.std = nn.Buffer(torch.where(std > 1e-6, std, 1.0))
        self.state_std = nn.Buffer(torch.where(state_std > 1e-6, state_std, 1.0))
        self.updates = 0
        self.update_targets()
        self.optimizer = Adam([*self.agents.parameters(), *self.mixer.parameters()], lr=args.learning_rate)

    def update_targets(self) -> None:
        self.agents_target.requires_grad_(False).load_state_dict(self.agents.state_dict())
        self.mixer_target.requires_grad_(False).load_state_dict(self.mixer.state_dict())

    def inputs(self, observations: Tensor) -> Tensor:
        """[B, N, O] -> standardized, agents first: [N, B, O]."""
        return (observations.transpose(0, 1) - self.mean) / self.std

    def states(self, states: Tensor) -> Tensor:
        return (states - self.state_mean) / self.state_std

    def act(self, observations: Tensor, masks: Tensor) -> Tensor:
        """The best legal actions [B, N]; masks are [B, N, A]."""
        q = self.agents(self.inputs(observations)).transpose(0, 1)
        return q.masked_fill(~masks, -torch.inf).argmax(2)


def joint_values(batch: Batch, nets: Networks, args: Args) -> Tensor:
    """Q_tot [B, 1 + K] of the dataset's joint action, which comes first, and of K uniform legal ones."""
    masks = batch["action_masks"]  # [B, N, A]
    uniform = torch.multinomial(masks.flatten(0, 1).float(), args.cql_samples, replacement=True)
    actions = torch.cat([batch["actions"][..., None], uniform.view(*masks.shape[:2], -1)], dim=2)  # [B, N, 1 + K]
    q = nets.agents(nets.inputs(batch["observations"])).transpose(0, 1).gather(2, actions)
    q = (q * batch["alive"][..., None]).transpose(1, 2)  # a dead agent's network learns nothing from its one action
    return nets.mixer(q, nets.states(joint_states(batch)[0]))


@torch.no_grad()
def target(batch: Batch, nets: Networks, args: Args) -> Tensor:
    """y [B]: the agents choose a*, their targets and the mixer's value it (double Q-learning)."""
    x = nets.inputs(batch["next_observations"])
    best = nets.agents(x).transpose(0, 1).masked_fill(~batch["next_action_masks"], -torch.inf).argmax(2)
    q = nets.agents_target(x).transpose(0, 1).gather(2, best[..., None]).squeeze(2)  # [B, N]
    total = nets.mixer_target((q * batch["next_alive"])[:, None], nets.states(joint_states(batch)[1])).squeeze(1)
    # Only a terminal ends the team's future, not the death of one agent.
    return batch["rewards"] + args.gamma * ~batch["terminals"] * total


def loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """The squared error of QMIX plus the conservative penalty on the joint action."""
    values = joint_values(batch, nets, args)  # [B, 1 + K]
    q, known = values[:, 0], batch["has_next_state"]
    errors = (q - target(batch, nets, args)).square() / 2 * known
    td_loss = errors.sum() / known.sum().clamp(min=1)
    penalty = (values.logsumexp(1) - q).mean()
    total = td_loss + args.cql_weight * penalty
    logs = {"loss": total, "td_loss": td_loss, "penalty": penalty, "q_data": q.mean(), "q_max": values.max()}
    return total, {name: x.detach() for name, x in logs.items()}


def update(batch: Batch, nets: Networks, args: Args) -> Batch:
    """One step of agents and mixer on a minibatch."""
    total, logs = loss(batch, nets, args)
    nets.optimizer.zero_grad()
    total.backward()
    # One norm over all: the mixer couples the agents anyway.
    clip_grad_norm_([*nets.agents.parameters(), *nets.mixer.parameters()], args.max_grad_norm)
    nets.optimizer.step()
    nets.updates += 1
    if nets.updates % args.target_interval == 0:
        nets.update_targets()
    return logs


# === End of the algorithm ===
def load(args: Any, env: Any) -> tuple[Batch, dict, dict]:
    """The dataset [T, ...] to train on, its metadata, and what config.json says about it."""
    path = rows.dataset_path(args.env, args.dataset).resolve()
    try:
        data, metadata = macca_icq.load_dataset(path, macca_icq.Args(env=args.env, credit="team"), env)
        digest = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
    except Exception as error:  # of many kinds
        require(False, f"the dataset {path} cannot be used: {error}")
    for name in ("individual_rewards", "shapley_rewards"):  # only R is used
        data.pop(name, None)
    data["has_next_state"] = torch.ones_like(data["timeouts"])
    if "states" in data:  # before rows are left out: the next one is the next state
        data["next_states"] = data["states"].roll(-1, dims=0)
        data["has_next_state"] = ~data["timeouts"]  # none is stored after a time limit
    if args.standardize_rewards:
        # If episodes can end early, minus the mean would reward or punish survival.
        center, rewards = ~data["terminals"].any() & data["next_alive"].all(), data["rewards"][:, None]
        data["rewards"] = standardize(rewards, torch.ones_like(rewards, dtype=torch.bool), center).squeeze(1)
    data, _ = hold_out(data)  # as in the other scripts, so that all train on the same rows
    return data, metadata, {"dataset_sha256": digest, "transitions": len(data["rewards"])}


def train(args: Any, ranges: dict, build: Callable, update: Callable[..., Batch], continuous: bool) -> None:
    """Train `build(data, args)` by `update(batch, nets, args)`, evaluate, and write runs/RUN/metrics.csv."""
    macca_icq.__file__ = sys.argv[0]  # whose name its errors start with
    for name, value in vars(args).items():
        low, high = ranges.get(name, (int(type(value) is int), 1e9))  # integers from 1
        fits = type(value) not in (int, float) or low <= value <= high
        require(fits, f"--{name.replace('_', '-')} is {value}, expected {low} to {high:g}")
    require(torch.cuda.is_available() or not args.cuda, "--cuda: torch sees no CUDA device; give --no-cuda")
    env, gives_masks = make_env(args.env, 1000 * args.seed)
    discrete = hasattr(env.action_space(env.possible_agents[0]), "n")
    require(discrete or continuous, f"--env {args.env} has continuous actions, this algorithm needs discrete ones")
    torch.manual_seed(args.seed)
    data, metadata, about = load(args, env)
    unmasked = data.get("action_masks", data["alive"]).all()
    require(gives_masks or unmasked, f"the dataset has action masks, --env {args.env} has none")
    data = {name: x.to("cuda" if args.cuda else "cpu") for name, x in data.items()}
    nets = build(data, args).to(data["rewards"].device)
    name = f"{args.env.replace('/', '-').replace(':', '-')}__{Path(sys.argv[0]).stem}__{args.seed}"
    run, table = Path("runs", f"{name}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"), []
    write(run / "config.json", json.dumps({"args": vars(args), **about, "command": sys.argv}, indent=2).encode())
    print(f"{about['transitions']} transitions; run folder {run}")
    stop: list[int] = []  # the first Ctrl-C ends after this update or evaluation, the second at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    progress = tqdm(total=args.total_iterations, unit="it", mininterval=1)
    for iteration in range(1, args.total_iterations + 1):
        logs = update(sample(data, args.batch_size), nets, args)
        progress.update()
        if stop:
            progress.close()
            print(f"stopped at iteration {iteration}; what was evaluated is in {run}")
            raise SystemExit(128 + stop[0])
        last = iteration == args.total_iterations
        due = last or iteration % args.eval_interval == 0
        for name, x in logs.items() if due or iteration % 100 == 0 else ():
            require(x.isfinite(), f"{name} is {x:g} at iteration {iteration} of {run}; lower the learning rate")
        if due:
            episodes = args.final_episodes if last else args.eval_episodes
            row = evaluate(env, nets, metadata, episodes, seed=1000 * args.seed)
            progress.write(f"iteration {iteration}: {', '.join(f'{name} {x:.3g}' for name, x in row.items())}")
            row |= {name: x.item() for name, x in logs.items()}
            table.append({"iteration": iteration, "episodes": episodes, **row})
            lines = [[*table[0]], *([row.get(name, math.nan) for name in table[0]] for row in table)]
            write(run / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    progress.close()
    print(f"that was the last policy over {args.final_episodes} episodes; run folder: {run}")


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__), RANGES, Networks, update, continuous=False)
