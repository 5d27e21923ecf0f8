"""SHAQ: the team's Q is a sum of the agents' Q, weighted by Shapley values. With --alpha SHAQ-CQL. Discrete actions.

    python paper/shaq.py --env smax/2s3z --dataset medium              # SHAQ: https://arxiv.org/abs/2105.15013
    python paper/shaq.py --env smax/2s3z --dataset medium --alpha 1    # SHAQ-CQL, of MACCA's Table 3

    loss         (R + gamma sum_i Q_bar_i(o'_i, a*_i) - sum_i delta_i Q_i(o_i, a_i))^2 + alpha penalty
    a*_i         the allowed action with the largest Q_i(o'_i, .); Q_bar is a copy of Q, made now and then
    delta_i      1 if a_i is the allowed action with the largest Q_i(o_i, .), else alpha_hat_i
    alpha_hat_i  1 + mean of |F_s(mean of Q_j(o_j, a_j) over the agents j before i, Q_i(o_i, a_i))| over M orders
    F_s(x)       elu(x |W1(s)| + b1(s)) |w2(s)| + b2(s) for two numbers x
    penalty      sum_i log sum_a exp Q_i(o_i, a) - Q_i(o_i, a_i), a allowed

The target is a plain sum. R is the team reward, s the joint state. Each agent has a network of its own. The dead take
no part in any sum or order. N agents, B batch, O observation, A action, S state, M orders.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports

import math
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
import tyro
from qmix_cql import joint_states, train
from torch import Tensor, nn
from torch.optim import Adam

from macca_icq import Batch, stacked_mlp


@dataclass
class Args:
    env: str = "smax/2s3z"  # mpe/TASK, smax/MAP, smac/MAP, or [zoo/]package.module:factory
    dataset: str = "medium"  # a file, or a QUALITY: data/datasets/ENV/QUALITY.npz
    standardize_rewards: bool = True  # by the team reward's deviation
    seed: int = 1  # of weights, minibatches and evaluation episodes
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    total_iterations: int = 2_000  # each one update
    batch_size: int = 256  # transitions, each with all agents
    gamma: float = 0.99  # discount factor
    learning_rate: float = 1e-3  # Adam
    hidden_dim: int = 64  # width of the two hidden layers of Q
    target_interval: int = 25  # updates between two copies of Q
    max_grad_norm: float = 10.0  # of Q, all agents together, and of F_s
    eval_interval: int = 1_000  # between evaluations
    eval_episodes: int = 32  # of an evaluation during training
    final_episodes: int = 100  # of the last evaluation
    # Algorithm specific
    alpha: float = 0.0  # weight of the conservative penalty: 0 is SHAQ, more SHAQ-CQL
    orders: int = 10  # random orders of the agents, all of them if they are no more


RANGES = {"batch_size": (2, 1e6), "seed": (0, 1e9), "gamma": (0, 1), "orders": (1, 1e3)}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the first dimension, 1 where nothing varies."""
    std = x.std(0)
    return x.mean(0), torch.where(std > 1e-6, std, 1.0)


def before(alive: Tensor, orders: int) -> Tensor:
    """Orders of the agents for a batch [B, N], the same for all agents: is j before i? [B, M, N (i), N (j)], bool."""
    batch_size, n = alive.shape
    if math.factorial(n) <= orders:  # all of them cost no more
        places = torch.tensor(list(permutations(range(n))), device=alive.device).expand(batch_size, -1, -1)
    else:
        places = torch.rand(batch_size, orders, n, device=alive.device).argsort(2)  # [B, M, N]
    return places[:, :, None, :] < places[:, :, :, None]


# === ALGORITHM LOGIC: SHAQ ===
class Weighting(nn.Module):
    """F_s: two numbers and the state to one number, by a network whose weights depend on the state."""

    def __init__(self, state_dim: int, embed_dim: int = 32, hidden_dim: int = 64):
        super().__init__()
        self.w1 = nn.Sequential(nn.Linear(state_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 2 * embed_dim))
        self.w2 = nn.Sequential(nn.Linear(state_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embed_dim))
        self.b1 = nn.Linear(state_dim, embed_dim)
        self.b2 = nn.Sequential(nn.Linear(state_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 1))

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """[B, S] and K pairs [B, K, 2] -> [B, K]."""
        w1, w2 = self.w1(state).abs().unflatten(1, (2, -1)), self.w2(state).abs()[..., None]
        hidden = F.elu(x @ w1 + self.b1(state)[:, None])  # [B, K, E]
        return (hidden @ w2).squeeze(2) + self.b2(state)


class Networks(nn.Module):
    """Q of every agent, its target, F_s, and what standardises observations and states."""

    def __init__(self, data: Batch, args: Args):
        super().__init__()
        n, self.action_dim = data["action_masks"].shape[1:]
        dims = (n, data["observations"].shape[2], args.hidden_dim, args.hidden_dim, self.action_dim)
        self.q, self.q_target = stacked_mlp(*dims), stacked_mlp(*dims).requires_grad_(False)
        self.q_target.load_state_dict(self.q.state_dict())
        self.mean, self.std = (nn.Buffer(x[:, None]) for x in statistics(data["observations"]))  # [N, 1, O]
        self.state_mean, self.state_std = map(nn.Buffer, statistics(joint_states(data)[0]))
        self.weighting = Weighting(len(self.state_mean))
        self.updates = 0
        self.optimizer = Adam([*self.q.parameters(), *self.weighting.parameters()], lr=args.learning_rate, fused=True)

    def inputs(self, observations: Tensor) -> Tensor:
        """[B, N, O] -> standardised, agents first: [N, B, O]."""
        return (observations.transpose(0, 1) - self.mean) / self.std

    def act(self, observations: Tensor, masks: Tensor) -> Tensor:
        """The actions to play [B, N]."""
        q = self.q(self.inputs(observations)).transpose(0, 1)
        return q.masked_fill(~masks, -torch.inf).argmax(2)


def alpha_hat(state: Tensor, q: Tensor, alive: Tensor, nets: Networks, earlier: Tensor) -> Tensor:
    """The weights of actions that are not greedy [B, N], from 1. Q of the actions taken [B, N], orders of `before`."""
    members = (earlier & alive[:, None, None]).float()  # [B, M, N, N]
    others = (members * q[:, None, None]).sum(3) / members.sum(3).clamp(min=1)  # [B, M, N], 0 without others
    pairs = torch.stack([others, q[:, None].expand_as(others)], dim=3)  # [B, M, N, 2]
    weights = nets.weighting((state - nets.state_mean) / nets.state_std, pairs.flatten(1, 2))
    return 1 + weights.abs().view_as(others).mean(1)


def shaq_loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """The loss of the docstring over a minibatch, and what to log."""
    actions, alive = batch["actions"], batch["alive"]
    q_all = nets.q(nets.inputs(batch["observations"])).transpose(0, 1)  # [B, N, A]
    allowed = q_all.masked_fill(~batch["action_masks"], -torch.inf)
    q_taken = q_all.gather(2, actions[..., None]).squeeze(2)
    q = q_taken * alive  # [B, N]
    greedy = allowed.argmax(2) == actions
    weights = alpha_hat(joint_states(batch)[0], q, alive, nets, before(alive, args.orders))
    delta = torch.where(greedy, 1.0, weights)
    with torch.no_grad():
        next_x = nets.inputs(batch["next_observations"])
        next_q = nets.q(next_x).transpose(0, 1).masked_fill(~batch["next_action_masks"], -torch.inf)
        best = next_q.argmax(2, keepdim=True)  # by the online Q
        next_q = nets.q_target(next_x).transpose(0, 1).gather(2, best).squeeze(2) * batch["next_alive"]
        # The team's future ends with the episode, not with an agent.
        y = batch["rewards"] + args.gamma * ~batch["terminals"] * next_q.sum(1)
    error = (delta * q).sum(1) - y
    penalty = ((allowed.logsumexp(2) - q_taken) * alive).sum(1)
    loss = (error.square() + args.alpha * penalty).mean()
    best_q = (allowed.max(2).values * alive).sum(1)
    distance = (~greedy & alive).sum() / alive.sum().clamp(min=1)
    logs = {"loss": loss, "q_data": q.sum(1).mean(), "q_best": best_q.mean(), "q_max": best_q.max()}
    return loss, {n: x.detach() for n, x in logs.items()} | {"data_distance": distance, "delta": delta.detach().mean()}


def update(batch: Batch, nets: Networks, args: Args) -> Batch:
    """One step of Q and F_s on a minibatch, and now and then a new target."""
    loss, logs = shaq_loss(batch, nets, args)
    nets.optimizer.zero_grad()
    loss.backward()
    for network in (nets.q, nets.weighting):
        nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
    nets.optimizer.step()
    nets.updates += 1
    if nets.updates % args.target_interval == 0:
        nets.q_target.load_state_dict(nets.q.state_dict())
    return logs


# === End of the algorithm ===
if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__), RANGES, Networks, update, continuous=False)
