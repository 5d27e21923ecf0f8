# Paper: https://openreview.net/forum?id=gwUOzI4DuV (Section 4; equation numbers below are the paper's)
"""The causal model of MACCA: which state and action dimensions cause which agent's reward, and how much each caused.

The team reward is taken to be a sum of individual rewards that nobody recorded, each a function of a few dimensions of
the joint state and joint action. Two networks are fitted to the team reward alone:

    structure predictor  psi_g(s, a, i) -> masks c^i, one entry per state and action dimension          (Eq. 3)
    reward predictor     psi_r(c^i * (s, a), i) -> the individual reward of agent i                     (Eq. 2)
    loss    (R - sum_i psi_r(c^i * (s, a), i))^2 + lambda1 * ||c^{s->r}||_1 + lambda2 * ||c^{a->r}||_1  (Eq. 4, 5)
    credit  slots:   r_hat^i = psi_r(1[c^i >= h] * (s, a), i)                                           (Eq. 6)
            shapley: agent i's Shapley value in the learned sum R_hat = sum_i psi_r(1[c^i >= h] * (s, a), i)

The loss determines the sum, but not whose its parts are. Eq. 6 is right where every part depends on one agent. The
Shapley value asks the sum: by how much does it change when agent i's own variables and action take the place of a
reference's, on average over who else is there already? It also splits what several agents cause together.

    model = CausalModel(num_agents=3, state_dim=18, action_dim=2, state_owner=[0] * 4 + [1] * 4 + [2] * 4 + [-1] * 6)
    model.fit_statistics(states, actions, team_rewards)             # once, from the dataset
    optimizer = torch.optim.Adam(model.parameter_groups())
    loss, _ = model.loss(state, action, team_reward)                # Algorithm 1, line 5, then as with any loss:
    optimizer.zero_grad(); loss.backward(); optimizer.step(); model.project()
    rewards = model.assign(state, action, team_reward)              # [batch, num_agents], Algorithm 1, line 4
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


def coalitions(num_agents: int) -> tuple[Tensor, Tensor]:
    """The C coalitions S whose values v(S) are needed, [C, N] bool, and weights [N, C]: Shapley's phi = weights @ v.

    phi_i is the mean over orders of the agents of v(those before i, and i) - v(those before i): all orders of up to
    four agents, of more two random ones and their reverses. Other orders for each transition would be reward noise.
    """
    g = torch.Generator().manual_seed(0)
    two = [torch.randperm(num_agents, generator=g).tolist() for _ in range(2)]
    orders = [*itertools.permutations(range(num_agents))] if num_agents < 5 else [*two, *(x[::-1] for x in two)]
    sets = sorted({tuple(sorted(order[:size])) for order in orders for size in range(num_agents + 1)})
    members, weights = torch.zeros(len(sets), num_agents, dtype=torch.bool), torch.zeros(num_agents, len(sets))
    for number, coalition in enumerate(sets):
        members[number, list(coalition)] = True
    for order, size in itertools.product(orders, range(num_agents)):
        before, after = (sets.index(tuple(sorted(order[:k]))) for k in (size, size + 1))
        weights[order[size], before] -= 1 / len(orders)
        weights[order[size], after] += 1 / len(orders)
    return members, weights


class CausalModel(nn.Module):
    """Splits a team reward among agents by a learned causal graph.

    Shapes: B batch, N agents, S state_dim (joint), A action_dim (of one agent; one-hot for discrete actions),
    D = S + N * A, the number of possible parents of a reward, K references.

    Args:
        state_owner: for each state dimension the agent whose own it is, or -1 for nobody's.
        share: `shapley`, or `slots` for Eq. 6.
        graph: `dynamic` masks depend on (s, a) (Eq. 3), `fixed` is one learned mask per agent, `full` is all ones.
        anchor: the price of an edge from another agent's dimension, as a multiple of the others'; in the paper 1.
        lambda1, lambda2: L1 penalties on state and action edges (Eq. 5). Less probable edges than h do not count.
        references: K, rows of the dataset that stand for the agents that are not in a coalition.
    """

    def __init__(
        self,
        num_agents: int,
        state_dim: int,
        action_dim: int,
        state_owner: Sequence[int],
        share: Literal["shapley", "slots"] = "shapley",
        graph: Literal["dynamic", "fixed", "full"] = "dynamic",
        anchor: float = 5.0,
        lambda1: float = 3e-3,
        lambda2: float = 3e-3,
        h: float = 0.1,
        references: int = 8,
        hidden_dim: int = 64,
    ):
        super().__init__()
        if graph not in ("dynamic", "fixed", "full") or share not in ("shapley", "slots"):
            raise ValueError(f"{graph=} must be dynamic, fixed or full, and {share=} shapley or slots")
        if len(state_owner) != state_dim or not {*state_owner} <= {*range(-1, num_agents)}:
            raise ValueError(f"state_owner must name {state_dim} agents below {num_agents}, or -1 for nobody")
        self.share, self.graph, self.h = share, graph, h
        num_parents = state_dim + num_agents * action_dim
        owner = torch.cat([torch.as_tensor(state_owner), torch.arange(num_agents).repeat_interleave(action_dim)])
        foreign = (owner >= 0) & (owner != torch.arange(num_agents)[:, None])
        price = torch.where(torch.arange(num_parents) < state_dim, lambda1, lambda2)
        self.edge_price = nn.Buffer(price * torch.where(foreign, anchor, 1.0), persistent=False)  # [N, D]
        # What each coalition takes from the row itself, its members' own and what is nobody's: [C, D]
        members, weights = coalitions(num_agents)
        self.kept = nn.Buffer((owner < 0) | members[:, owner], persistent=False)
        self.weights = nn.Buffer(weights, persistent=False)
        # Units and references are stored with the weights, which mean nothing without them.
        self.state_mean, self.state_std = nn.Buffer(torch.zeros(state_dim)), nn.Buffer(torch.ones(state_dim))
        self.reward_mean, self.reward_std = nn.Buffer(torch.zeros(())), nn.Buffer(torch.ones(()))
        self.references = nn.Buffer(torch.zeros(references, num_parents))

        # psi_g. A free network for the gates collapses: an edge's logit is a number plus, if `dynamic`, a bounded part
        # of (s, a, i). What a slot learns first it keeps, so other agents' dimensions start half open only.
        self.edge_logits = nn.Parameter(torch.where(foreign, 0.0, 4.0))
        last = nn.Linear(64, num_agents * num_parents)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.edge_network = nn.Sequential(nn.Linear(num_parents, 64), nn.ReLU(), last, nn.Tanh())

        # psi_r: one network for all slots. A one-hot identity is a bias of the first layer for each agent.
        self.first_layer = nn.Linear(num_parents, hidden_dim)
        self.identity = nn.Parameter(torch.empty(num_agents, hidden_dim).uniform_(-1, 1) / math.sqrt(num_parents))
        layers = [layer for _ in range(2) for layer in (nn.ReLU(inplace=True), nn.Linear(hidden_dim, hidden_dim))]
        self.reward_network = nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Linear(hidden_dim, 1))

    def parameter_groups(self, learning_rate: float = 1e-2) -> list[dict]:
        """Adam's parameter groups: psi_r, the edges' own logits, and the rest of psi_g."""
        psi_r = [*self.first_layer.parameters(), self.identity, *self.reward_network.parameters()]
        edges = [{"params": [self.edge_logits], "lr": 2e-2}, {"params": self.edge_network.parameters(), "lr": 5e-4}]
        return [{"params": psi_r, "lr": learning_rate}, *edges]

    def fit_statistics(self, state: Tensor, action: Tensor, team_reward: Tensor) -> None:
        """Units and references from states [T, S], actions [T, N, A] and team rewards [T], the same for every seed."""
        std = state.std(0)
        self.state_mean.copy_(state.mean(0))
        self.state_std.copy_(torch.where(std > 1e-6, std, 1.0))
        self.reward_mean.copy_(team_reward.mean())
        self.reward_std.copy_(team_reward.std().clamp(min=1e-6))
        g = torch.Generator().manual_seed(0)
        rows = torch.randint(len(state), (len(self.references),), generator=g)
        self.references.copy_(self._parents(state[rows], action[rows]))

    def _parents(self, state: Tensor, action: Tensor) -> Tensor:
        """States [B, S] and actions [B, N, A], scaled (actions as if uniform): the possible parents [B, D]."""
        return torch.cat([(state - self.state_mean) / self.state_std, 3**0.5 * action.flatten(1)], dim=1)

    def _logits(self, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of every edge (Eq. 3), and a fifth of their part that depends on (s, a): both [B or 1, N, D]."""
        own = self.edge_logits[None]
        if self.graph != "dynamic":
            return (torch.full_like(own, torch.inf) if self.graph == "full" else own), torch.zeros_like(own)
        varying = self.edge_network(parents).view(-1, *self.edge_logits.shape)
        return own + 5 * varying, varying

    def _slots(self, parents: Tensor, alive: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        """psi_r of parents [B, D] * masks [B or 1, N, D] (default: Eq. 6): scaled rewards [B, N], 0 if dead."""
        masks = (torch.sigmoid(self._logits(parents)[0]) >= self.h).float() if masks is None else masks
        slots = self.reward_network(self.first_layer(parents[:, None] * masks) + self.identity).squeeze(2)
        return slots if alive is None else slots * alive

    def _shapley(self, parents: Tensor, alive: Tensor | None) -> Tensor:
        """phi [B, N], Shapley values in the game v(S) = mean_k R_hat(own variables and actions of the agents in S and
        what is nobody's from this row, those of the other agents from reference k)."""
        phi, count = [], len(self.kept) * len(self.references)
        size = 2**17 if parents.is_cuda else 512  # fills the device, or fits the cache
        for rows in torch.arange(len(parents), device=parents.device).split(size // count + 1):
            mixed = torch.where(self.kept[:, None], parents[rows, None, None], self.references)  # [b, C, K, D]
            living = None if alive is None else alive[rows].repeat_interleave(count, dim=0)
            values = self._slots(mixed.flatten(0, 2), living).sum(1).view(len(rows), len(self.kept), -1)
            phi.append(values.mean(2) @ self.weights.T)
        return torch.cat(phi)

    @torch.no_grad()
    def probabilities(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Edge probabilities (Eq. 3) from states [B, S] and actions [B, N, A]: [B, N, S] and [B, N, N * A]."""
        edges = torch.sigmoid(self._logits(self._parents(state, action))[0]).expand(len(state), -1, -1)
        return edges[..., : state.shape[1]], edges[..., state.shape[1] :]

    @torch.no_grad()
    def predict(self, state: Tensor, action: Tensor, alive: Tensor | None = None) -> Tensor:
        """R_hat [B], the learned sum, in the team reward's units."""
        return self._slots(self._parents(state, action), alive).sum(1) * self.reward_std + self.reward_mean

    @torch.no_grad()
    def assign(self, state: Tensor, action: Tensor, team_reward: Tensor, alive: Tensor | None = None) -> Tensor:
        """Individual rewards for states [B, S] and actions [B, N, A] that add up to the team reward [B]: [B, N].

        What the model leaves unexplained is split evenly, as is what no agent causes. Agents that are not `alive`
        [B, N] get nothing, and no part of what is split (None: all are). No gradient leaves this function.
        """
        parents = self._parents(state, action)
        if self.share == "shapley":
            own = self._shapley(parents, alive)
        else:  # a constant in a slot is nobody's merit
            own = self._slots(parents, alive) - self._slots(self.references).mean(0)
        living = torch.ones_like(own) if alive is None else alive.float()
        own = own * living * self.reward_std
        return own + living * ((team_reward - own.sum(1)) / living.sum(1).clamp(min=1))[:, None]

    def loss(
        self, state: Tensor, action: Tensor, team_reward: Tensor, alive: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """L_m of a minibatch (Eq. 4 with the L1 term of Eq. 5), for the arguments of `assign`; and its squared-error
        part alone (detached), in units of the team reward's variance. After the optimizer's step, call `project`."""
        if team_reward.shape != state.shape[:1]:  # torch would broadcast it to a wrong loss
            raise ValueError(f"team_reward is {list(team_reward.shape)}, expected {list(state.shape[:1])}")
        parents = self._parents(state, action)
        logits, varying = self._logits(parents)
        # Gates are drawn 0 or 1 (binary concrete), with the gradient of the soft one: a soft gate could shrink towards
        # 0, and with it the penalty, while the next layer's weights grow to undo it.
        uniform = torch.rand(len(parents), *logits.shape[1:], device=logits.device).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid(logits + torch.logit(uniform))
        slots = self._slots(parents, alive, (soft > 0.5).float() + soft - soft.detach())
        error = (slots.sum(1) - (team_reward - self.reward_mean) / self.reward_std).square().mean()
        if self.graph == "full":
            return error, error.detach()
        # The expected L1 norm of the drawn masks. An edge that comes and goes costs more, or it would close wherever
        # its dimension is near 0. The price grows with what is explained: at first no edge has had a chance.
        penalty = (self.edge_price * (torch.sigmoid(logits) + varying.abs())).sum((1, 2)).mean()
        return error + (1 - error.detach()).clamp(min=0) * penalty, error.detach()

    @torch.no_grad()
    def project(self) -> None:
        """Keep every edge's own probability above 0.047, so that a closed one is tried now and then and can return."""
        self.edge_logits.clamp_(min=-3.0)

    @torch.no_grad()
    def report(
        self,
        state: Tensor,
        action: Tensor,
        team_reward: Tensor,
        alive: Tensor | None = None,
        paid: Tensor | None = None,
        cause: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """How dense the graph and how good the credit is, as scalars, for the arguments of `assign`.

        `state_density`, `action_density`: the share of edges that count. `team_nmse`: squared error of R_hat over the
        team reward's variance. Compared with what agents are paid, and with what they cause (the Shapley value of the
        true reward function), both [B, N]: errors of the credit and of the even split, `paid_mse`, `paid_mae`,
        `paid_even_mse`, `paid_even_mae`, and `paid_skill` = 1 - mse / even_mse: 1 is perfect, 0 no better than even.
        A constant per agent is no error, as no sum determines it. What is not defined is left out.
        """
        density = [(edges >= self.h).float().mean() for edges in self.probabilities(state, action)]
        report = {"state_density": density[0], "action_density": density[1]}
        if len(team_reward) > 1 and team_reward.var() > 1e-12 * team_reward.square().mean():
            report["team_nmse"] = (self.predict(state, action, alive) - team_reward).square().mean() / team_reward.var()
        credit = self.assign(state, action, team_reward, alive)
        living = torch.ones_like(credit) if alive is None else alive.float()
        shares = {"": credit, "even_": team_reward[:, None] * living / living.sum(1, keepdim=True).clamp(min=1)}
        for name, truth in ((n, x) for n, x in (("cause", cause), ("paid", paid)) if x is not None):
            for who, x in shares.items():
                error = x - truth - (x - truth).mean(0)
                report |= {f"{name}_{who}mse": error.square().mean(), f"{name}_{who}mae": error.abs().mean()}
            if report[f"{name}_even_mse"] > 1e-9 * team_reward.square().mean():
                report[f"{name}_skill"] = 1 - report[f"{name}_mse"] / report[f"{name}_even_mse"]
        return report
