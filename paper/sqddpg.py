"""SQDDPG: deterministic policy gradients from agents' Shapley values. Discrete and continuous actions.

    python paper/sqddpg.py --env smax/2s3z --dataset medium          # SQDDPG: https://arxiv.org/abs/1907.05707
    python paper/sqddpg.py --env mpe/simple_spread --gamma 0.95

    Phi_i(s, a_C, a_i)  what agent i adds by joining the agents C, a network's output; actions of agents not there are 0
    Q_i(s, a)           mean of Phi_i over M orders of the agents, C those before i: the Shapley value
    critic              (R + gamma sum_i Q_bar_i(s', mu_bar(o')) - sum_i Q_i(s, a))^2, a the dataset's
    actor               - sum_i Q_i(s, mu(o)), through a_i = mu_i(o_i) alone; discrete: - entropy_weight entropy

R is the team reward, s the joint state; no loss says which part of the sum is whose. Each agent has an actor and a
Phi of its own. Actions enter Phi in the agents' order. Discrete ones are one-hot: the actor's loss draws them
(Gumbel, straight through), mu_bar names the likeliest. The dead take no part in any sum or order.
N agents, B batch, O observation, A action, S state, M orders, H hidden.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from qmix_cql import joint_states, train
from shaq import before, statistics
from torch import Tensor, nn
from torch.optim import Adam

from macca_icq import Batch, StackedLinear, stacked_mlp


@dataclass
class Args:
    env: str = "mpe/simple_spread"  # mpe/TASK, smax/MAP, smac/MAP, or [zoo/]package.module:factory
    dataset: str = "expert"  # a file, or a QUALITY: data/datasets/ENV/QUALITY.npz
    standardize_rewards: bool = True  # by the team reward's deviation
    seed: int = 1  # of weights, minibatches and evaluation episodes
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    total_iterations: int = 2_000  # each one update of critic and actor
    batch_size: int = 256  # transitions, each with all agents
    gamma: float = 0.99  # discount factor
    learning_rate: float = 1e-3  # of critic and actor (Adam)
    hidden_dim: int = 64  # width of the two hidden layers
    target_rate: float = 0.01  # Polyak step of the targets
    max_grad_norm: float = 10.0  # of the critic and of the actor, all agents together
    eval_interval: int = 1_000  # between evaluations
    eval_episodes: int = 32  # of an evaluation during training
    final_episodes: int = 100  # of the last evaluation
    # Algorithm specific
    orders: int = 10  # random orders of the agents, all of them if they are no more
    entropy_weight: float = 0.005  # in the actor's loss, discrete actions


RANGES = {"batch_size": (2, 1e6), "seed": (0, 1e9), "gamma": (0, 1), "target_rate": (0, 1), "orders": (1, 1e3)}


# === ALGORITHM LOGIC: SQDDPG ===
class Critic(nn.Module):
    """Phi of every agent: N networks of the joint state and all actions."""

    def __init__(self, n: int, state_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.layer1 = StackedLinear(n, state_dim, hidden_dim)
        self.action_weight = StackedLinear(n, n * action_dim, hidden_dim).weight
        self.rest = nn.Sequential(
            nn.ReLU(), StackedLinear(n, hidden_dim, hidden_dim), nn.ReLU(), StackedLinear(n, hidden_dim, 1)
        )

    def forward(self, state: Tensor, actions: Tensor, members: Tensor) -> Tensor:
        """[B, S], each agent's view of the actions [B, N (i), N (j), A] and coalitions [B, M, N, N] -> [B, M, N]."""
        batch, orders, n, _ = members.shape
        slots = (actions[:, None] * members[..., None]).permute(2, 0, 1, 3, 4).reshape(n, batch * orders, -1)
        x = self.layer1(state.expand(n, -1, -1))  # [N, B, H]: the layer is linear, so states enter once for all orders
        x = x.repeat_interleave(orders, dim=1) + slots @ self.action_weight  # [N, B M, H]
        return self.rest(x).view(n, batch, orders).permute(1, 2, 0)


class Networks(nn.Module):
    """Actors, critics, their targets, and what standardises observations and states."""

    def __init__(self, data: Batch, args: Args):
        super().__init__()
        self.discrete = "action_masks" in data
        self.action_dim = data["action_masks" if self.discrete else "actions"].shape[2]
        (n, in_dim), hidden = data["observations"].shape[1:], args.hidden_dim
        self.mean, self.std = (nn.Buffer(x[:, None]) for x in statistics(data["observations"]))  # [N, 1, O]
        self.state_mean, self.state_std = map(nn.Buffer, statistics(joint_states(data)[0]))
        dims = (n, in_dim, hidden, hidden, self.action_dim)
        self.actor, self.actor_target = stacked_mlp(*dims), stacked_mlp(*dims).requires_grad_(False)
        dims = (n, len(self.state_mean), self.action_dim, hidden)
        self.critic, self.critic_target = Critic(*dims), Critic(*dims).requires_grad_(False)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        networks = {"critic": self.critic, "actor": self.actor}
        self.optimizers = {
            name: Adam(x.parameters(), lr=args.learning_rate, fused=True) for name, x in networks.items()
        }

    def outputs(self, actor: nn.Module, observations: Tensor, masks: Tensor | None) -> Tensor:
        """What an actor says of observations [B, N, O]: logits [B, N, A], forbidden ones -1e9, or before tanh."""
        out = actor((observations.transpose(0, 1) - self.mean) / self.std).transpose(0, 1)
        return out if masks is None else out.masked_fill(~masks, -1e9)

    def act(self, observations: Tensor, masks: Tensor) -> Tensor:
        """The actions to play [B, N, A], or their indices [B, N]."""
        out = self.outputs(self.actor, observations, masks if self.discrete else None)
        return out.argmax(2) if self.discrete else out.tanh()


def shapley(critic: nn.Module, state: Tensor, actions: Tensor, alive: Tensor, earlier: Tensor) -> Tensor:
    """Q_i [B, N] of actions as vectors [B, N, A]; 0 for the dead. Orders of `before`. Q_i has no gradient in a_j."""
    own = torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)  # [N, N]
    views = torch.where(own[..., None], actions[:, None], actions[:, None].detach())  # [B, N, N, A]
    members = (earlier | own) & alive[:, None, None]
    return critic(state, views, members).mean(1) * alive


def critic_loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """The squared error of the sum of the Shapley values, on the actions of the dataset."""
    actions, alive = batch["actions"], batch["alive"]
    if nets.discrete:
        actions = F.one_hot(actions, nets.action_dim).float()
    state, next_state = ((x - nets.state_mean) / nets.state_std for x in joint_states(batch))
    q = shapley(nets.critic, state, actions, alive, before(alive, args.orders)).sum(1)  # [B]
    with torch.no_grad():
        out = nets.outputs(nets.actor_target, batch["next_observations"], batch.get("next_action_masks"))
        following = F.one_hot(out.argmax(2), nets.action_dim).float() if nets.discrete else out.tanh()
        next_alive = batch["next_alive"]
        next_q = shapley(nets.critic_target, next_state, following, next_alive, before(next_alive, args.orders))
        # The team's future ends with the episode, not with an agent.
        y = batch["rewards"] + args.gamma * ~batch["terminals"] * next_q.sum(1)
    known = batch["has_next_state"].float()
    loss = ((q - y).square() * known).sum() / known.sum().clamp(min=1)
    return loss, {"critic_loss": loss.detach(), "q_data": q.detach().mean()}


def actor_loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """Each agent raises its own Shapley value, the others' actions being the current policies'."""
    actions, alive = batch["actions"], batch["alive"]
    out = nets.outputs(nets.actor, batch["observations"], batch.get("action_masks"))  # [B, N, A]
    entropy = torch.zeros_like(out[..., 0])
    if nets.discrete:
        pi = F.gumbel_softmax(out, hard=True)
        entropy = torch.distributions.Categorical(logits=out).entropy()
        distance = (out.argmax(2) != actions)[alive].float().mean()
    else:
        pi = out.tanh()
        distance = (pi.detach() - actions)[alive].square().mean()
    state = (joint_states(batch)[0] - nets.state_mean) / nets.state_std
    q = shapley(nets.critic, state, pi, alive, before(alive, args.orders))
    loss = -(q + args.entropy_weight * entropy * alive).sum(1).mean()
    logs = {"q_policy": q.detach().sum(1).mean(), "q_max": q.detach().sum(1).max(), "data_distance": distance}
    return loss, logs


def update(batch: Batch, nets: Networks, args: Args) -> Batch:
    """One step of the critic, then one of the actor, on a minibatch."""
    logs = {}
    for name, loss_of in (("critic", critic_loss), ("actor", actor_loss)):
        network, target = getattr(nets, name), getattr(nets, f"{name}_target")
        loss, found = loss_of(batch, nets, args)
        nets.zero_grad()  # the actor's loss reaches the critic too, which must not follow it
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
        nets.optimizers[name].step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), network.parameters(), strict=True):
                old.lerp_(new, args.target_rate)
        logs |= found
    return logs


# === End of the algorithm ===
if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__), RANGES, Networks, update, continuous=True)
