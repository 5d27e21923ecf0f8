"""MA-ICQ: offline multi-agent RL from the team reward by implicit constraints, discrete or continuous actions.

    python paper/ma_icq.py --env mpe/simple_spread --dataset expert

ICQ: https://arxiv.org/abs/2106.03400. Nobody is told a share of R. With n rows in the minibatch:

    Q_tot(s, a) = sum_i k_i(s) Q_i(s, o_i, a_i),  k(s) = |W1(s)| |w2(s)| over the sum of its entries
    y = R + gamma v Qbar_tot(s', a'),  v = n softmax_rows(Qbar_tot(s', a') / critic_beta);  y = R after a terminal
    critic loss = mean of (Q_tot(s, a) - y)^2
    A_i = Q_i(s, o_i, a_i) - sum_a pi_i(a | o_i) Q_i(s, o_i, a)  (continuous: - Q_i(s, o_i, mu_i(o_i)))
    u_i = n softmax_rows(A_i / beta),  actor loss = - mean over rows and agents of k_i(s) u_i log pi_i(a_i | o_i)

a and a' are the dataset's: no Q is asked for an action that the data do not have, except in A_i. Continuous: pi_i is a
Gaussian around mu_i, so - log pi_i is a squared error. Qbar is a copy of critics and mixer, renewed every
`target_interval` updates. s is `states` of the dataset, or the observations side by side. Every agent has its own
networks. A dead agent has k_i = 0 and learns nothing.
Shapes: T transitions, B batch, N agents, O observation, A action, S state, E embedding.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the slow imports

import sys
from dataclasses import dataclass

import rows
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

sys.path.insert(0, str(rows.ROOT))
from qmix_cql import joint_states, train

from macca_icq import Batch, Critic, stacked_mlp


@dataclass
class Args:
    env: str = "mpe/simple_spread"  # mpe/TASK, smax/MAP, smac/MAP, or [zoo/]package.module:factory
    dataset: str = "expert"  # a file, or a QUALITY: data/datasets/ENV/QUALITY.npz
    standardize_rewards: bool = True  # by the deviation of the team reward over the whole dataset
    seed: int = 1  # of weights, minibatches and evaluation episodes
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    total_iterations: int = 2_000  # each one update of critics and mixer, then of actors
    batch_size: int = 1024  # transitions, each with all agents
    gamma: float = 0.95  # discount factor
    learning_rate: float = 3e-3  # of actors, critics and mixer (Adam)
    hidden_dim: int = 64  # width of the two hidden layers
    embed_dim: int = 32  # width of the mixer
    target_interval: int = 25  # updates between two copies to the targets
    max_grad_norm: float = 20.0  # gradient clipping, over critics and mixer, and over actors
    eval_interval: int = 1_000  # between evaluations
    eval_episodes: int = 32  # of an evaluation during training
    final_episodes: int = 100  # of the last evaluation
    # Algorithm specific
    beta: float = 1.0  # temperature of the actors' weights; 1e6 clones
    critic_beta: float = 1_000.0  # temperature of the target's weights; 1e6 is SARSA


RANGES = {"batch_size": (2, 1e6), "seed": (0, 1e9), "gamma": (0, 1), "learning_rate": (1e-9, 1)}
RANGES |= {"beta": (1e-6, 1e9), "critic_beta": (1e-6, 1e9)}


# === ALGORITHM LOGIC: ICQ ===
class Mixer(nn.Module):
    """The weights k(s) of the agents: positive, of sum 1, so each Q_i is on the scale of the team's return."""

    def __init__(self, n: int, state_dim: int, embed_dim: int):
        super().__init__()
        self.weight1 = nn.Linear(state_dim, n * embed_dim)
        self.weight2 = nn.Linear(state_dim, embed_dim)

    def forward(self, state: Tensor, alive: Tensor) -> Tensor:
        """States [B, S], who lives [B, N] -> k [B, N]; 0 for the dead, all 0 where nobody lives."""
        weight2 = self.weight2(state).abs()[..., None]  # [B, E, 1]
        k = (self.weight1(state).abs().view(*alive.shape, -1) @ weight2).squeeze(2) + 1e-6
        return k * alive / (k * alive).sum(1, keepdim=True).clamp(min=1e-9)


class Networks(nn.Module):
    """Actors, critics, mixer, targets, and what standardizes observations and states."""

    def __init__(self, data: Batch, args: Args):
        super().__init__()
        state, _ = joint_states(data)
        self.discrete = "action_masks" in data
        self.action_dim = data["action_masks" if self.discrete else "actions"].shape[2]
        (n, in_dim), state_dim, hidden = data["observations"].shape[1:], state.shape[1], args.hidden_dim
        self.actor = stacked_mlp(n, in_dim, hidden, hidden, self.action_dim)
        dims = (n, in_dim + state_dim, self.action_dim, hidden, self.discrete)
        self.critic, self.critic_target = Critic(*dims), Critic(*dims)
        dims = (n, state_dim, args.embed_dim)
        self.mixer, self.mixer_target = Mixer(*dims), Mixer(*dims)
        std, state_std = data["observations"].std(0)[:, None], state.std(0)
        self.mean, self.state_mean = nn.Buffer(data["observations"].mean(0)[:, None]), nn.Buffer(state.mean(0))
        self.std = nn.Buffer(torch.where(std > 1e-6, std, 1.0))
        self.state_std = nn.Buffer(torch.where(state_std > 1e-6, state_std, 1.0))
        self.updates = 0
        self.update_targets()
        self.critic_optimizer = Adam([*self.critic.parameters(), *self.mixer.parameters()], lr=args.learning_rate)
        self.actor_optimizer = Adam(self.actor.parameters(), lr=args.learning_rate)

    def update_targets(self) -> None:
        self.critic_target.requires_grad_(False).load_state_dict(self.critic.state_dict())
        self.mixer_target.requires_grad_(False).load_state_dict(self.mixer.state_dict())

    def inputs(self, observations: Tensor) -> Tensor:
        """[B, N, O] -> standardized, agents first: [N, B, O]."""
        return (observations.transpose(0, 1) - self.mean) / self.std

    def states(self, states: Tensor) -> Tensor:
        return (states - self.state_mean) / self.state_std

    def act(self, observations: Tensor, masks: Tensor) -> Tensor:
        """The actions to play [B, N, A], or their indices [B, N]."""
        out = self.actor(self.inputs(observations)).transpose(0, 1)
        return out.masked_fill(~masks, -torch.inf).argmax(2) if self.discrete else out.tanh()


def critic_inputs(x: Tensor, state: Tensor) -> Tensor:
    """Observations [N, B, O] and states [B, S], of which every agent gets a copy: [N, B, O + S]."""
    return torch.cat([x, state.expand(len(x), -1, -1)], dim=2)


def q_taken(critic: Critic, x: Tensor, actions: Tensor) -> Tensor:
    """Q_i [N, B] of actions [N, B, A], or indices [N, B], that were taken."""
    if critic.action_weight is None:
        return critic(x, twins=1)[0].gather(2, actions[..., None]).squeeze(2)
    return critic(x, actions[:, :, None], twins=1)[0].squeeze(2)


def softmax_weights(values: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """softmax(values / temperature) over the rows, the last dimension, in which `valid`; their mean there is 1."""
    weights = (values / temperature).masked_fill(~valid, -1e9).softmax(-1) * valid
    return weights * valid.sum(-1, keepdim=True)


def critic_loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """Squared error of Q_tot(s, a) to y, which follows the dataset's next actions."""
    state, next_state = map(nets.states, joint_states(batch))
    x, next_x = nets.inputs(batch["observations"]), nets.inputs(batch["next_observations"])
    actions, next_actions = batch["actions"].transpose(0, 1), batch["next_actions"].transpose(0, 1)
    # After a terminal no next action is needed. After a timeout none was recorded: leave the row out.
    # Only a terminal ends the team's future, not the death of one agent.
    follows, known = batch["has_next_action"], batch["terminals"] | batch["has_next_action"]
    with torch.no_grad():
        next_k = nets.mixer_target(next_state, batch["next_alive"])
        next_q = q_taken(nets.critic_target, critic_inputs(next_x, next_state), next_actions)
        next_total = (next_k * next_q.T).sum(1)  # [B]
        y = batch["rewards"] + args.gamma * softmax_weights(next_total, follows, args.critic_beta) * next_total
    q = q_taken(nets.critic, critic_inputs(x, state), actions)  # [N, B]
    total = (nets.mixer(state, batch["alive"]) * q.T).sum(1)
    loss = ((total - y).square() * known).sum() / known.sum().clamp(min=1)
    return loss, {"critic_loss": loss.detach(), "q_data": total.detach().mean(), "q_max": total.detach().max()}


def actor_loss(batch: Batch, nets: Networks, args: Args) -> tuple[Tensor, Batch]:
    """Cloning of the dataset's actions, weighted by k_i u_i."""
    x, state = nets.inputs(batch["observations"]), nets.states(joint_states(batch)[0])
    actions, alive, joint_x = batch["actions"].transpose(0, 1), batch["alive"].T, critic_inputs(x, state)
    if nets.discrete:
        logits = nets.actor(x).masked_fill(~batch["action_masks"].transpose(0, 1), -1e9)  # [N, B, A]
        with torch.no_grad():
            q_policy = (logits.softmax(2) * nets.critic(joint_x, twins=1)[0]).sum(2)  # [N, B]
        distance = F.cross_entropy(logits.movedim(2, 1), actions, reduction="none")
        data_distance = (logits.argmax(2) != actions)[alive].float().mean()
    else:
        pi = nets.actor(x).tanh()
        with torch.no_grad():
            q_policy = q_taken(nets.critic, joint_x, pi)
        distance = (pi - actions).square().sum(2)  # a Gaussian's negative log-likelihood
        data_distance = (pi.detach() - actions)[alive].square().mean()
    with torch.no_grad():
        advantage = q_taken(nets.critic, joint_x, actions) - q_policy
        weights = softmax_weights(advantage, alive, args.beta)  # u_i, [N, B]
        k = nets.mixer(state, batch["alive"]).T
    loss = (k * weights * distance).sum() / alive.sum().clamp(min=1)
    # How many rows the weights leave, as a fraction: 1 for equal weights.
    rows_used = (alive.sum(1) / weights.square().sum(1).clamp(min=1e-9)).mean()
    return loss, {"actor_loss": loss.detach(), "data_distance": data_distance, "rows_used": rows_used}


def update(batch: Batch, nets: Networks, args: Args) -> Batch:
    """One step of critics and mixer on a minibatch, then one of the actors."""
    loss, logs = critic_loss(batch, nets, args)
    nets.critic_optimizer.zero_grad()
    loss.backward()
    # One norm over all: the mixer couples the agents anyway.
    clip_grad_norm_([*nets.critic.parameters(), *nets.mixer.parameters()], args.max_grad_norm)
    nets.critic_optimizer.step()
    loss, actor_logs = actor_loss(batch, nets, args)
    nets.actor_optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(nets.actor.parameters(), args.max_grad_norm)
    nets.actor_optimizer.step()
    nets.updates += 1
    if nets.updates % args.target_interval == 0:
        nets.update_targets()
    return logs | actor_logs


# === End of the algorithm ===
if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__), RANGES, Networks, update, continuous=True)
