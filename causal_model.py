# Paper: MACCA: Offline Multi-agent Reinforcement Learning with Causal Credit Assignment,
#        https://openreview.net/forum?id=gwUOzI4DuV (Section 4; equation numbers below are the paper's)
"""The causal model of MACCA: which state and action dimensions cause which agent's reward, and how much each earned.

The team reward is taken to be a sum of individual rewards that nobody recorded, each a function of a few dimensions of
the joint state and joint action (Eq. 2). Two networks are fitted to the team reward alone:

    structure predictor  psi_g(s, a, i) -> masks c^i, one entry per state and action dimension        (Eq. 3)
    reward predictor     psi_r(c^i * (s, a), i) -> the individual reward of agent i                   (Eq. 2)

    loss    (R - sum_i psi_r(c^i * (s, a), i))^2 + lambda1 * ||c^{s->r}||_1 + lambda2 * ||c^{a->r}||_1  (Eq. 4, 5)
    credit  r_hat^i = psi_r(1[c^i >= h] * (s, a), i)                                                  (Eq. 6)

The file knows nothing of any policy: whatever learns from rewards can use it.

    owner = [agent for agent in range(3) for _ in range(18)]        # the state: 18 dimensions of each of 3 agents
    model = CausalModel(num_agents=3, state_dim=54, action_dim=2, state_owner=owner)
    model.fit_statistics(states, team_rewards)                      # once, from the dataset
    optimizer = torch.optim.Adam(model.parameter_groups())
    loss, _ = model.loss(state, action, team_reward)                # Algorithm 1, line 5, then as with any loss:
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    rewards = model.assign(state, action)                           # [batch, num_agents], Algorithm 1, line 4
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


class CausalModel(nn.Module):
    """Splits a team reward among agents by a learned causal graph.

    Shapes: B batch, N agents, S state_dim (joint), A action_dim (of one agent; one-hot for discrete actions),
    D = S + N * A, the number of possible parents of an individual reward.

    Args:
        graph: `dynamic` masks depend on the state and action (Eq. 3), `fixed` is one learned mask per agent, `full` is
            all ones (no structure, no penalty).
        state_owner: for each state dimension the agent that it describes, or -1 for nobody's; None: all nobody's.
        anchor: the L1 penalty of an edge from *another* agent's dimension, as a multiple of that of an own one.
            1 is the paper's loss to the letter. Since the team reward is a sum, nothing in Eq. 4 and 5 says whose slot
            explains which part of it; a heavier price on foreign dimensions breaks that symmetry.
        lambda1, lambda2: L1 penalties on state and action edges (Eq. 5).
        h: an edge counts at assignment when its probability is at least h (Eq. 6).
        hidden_dim: width of the three hidden layers of the reward predictor (Appendix F.2).
    """

    edge_price: torch.Tensor
    agent_id: torch.Tensor
    state_mean: torch.Tensor
    state_std: torch.Tensor
    reward_mean: torch.Tensor
    reward_std: torch.Tensor

    def __init__(
        self,
        num_agents: int,
        state_dim: int,
        action_dim: int,
        graph: Literal["dynamic", "fixed", "full"] = "dynamic",
        state_owner: Sequence[int] | None = None,
        anchor: float = 5.0,
        lambda1: float = 7e-3,
        lambda2: float = 7e-3,
        h: float = 0.1,
        hidden_dim: int = 256,
    ):
        super().__init__()
        if graph not in ("dynamic", "fixed", "full"):
            raise ValueError(f"graph is {graph!r}, expected 'dynamic', 'fixed' or 'full'")
        self.num_agents, self.state_dim, self.graph, self.h = num_agents, state_dim, graph, h
        num_parents = state_dim + num_agents * action_dim

        # The price of each edge: [N, D], lambda1 or lambda2, times the anchor where the dimension is another agent's.
        owner = torch.cat(
            [
                torch.full((state_dim,), -1) if state_owner is None else torch.as_tensor(state_owner),
                torch.arange(num_agents).repeat_interleave(action_dim),
            ]
        )
        foreign = (owner >= 0) & (owner != torch.arange(num_agents)[:, None])
        price = torch.where(torch.arange(num_parents) < state_dim, lambda1, lambda2).expand(num_agents, -1).clone()
        self.register_buffer("edge_price", price * torch.where(foreign, anchor, 1.0), persistent=False)
        self.register_buffer("agent_id", torch.eye(num_agents), persistent=False)

        # Dataset statistics, stored with the weights: the model means nothing without its units.
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

        # psi_g. A free network for the gates collapses, so an edge's logit is a number of its own plus, for the
        # dynamic graph, a bounded part that depends on (s, a, i), starts at zero and learns slowly.
        self.edge_logits = nn.Parameter(torch.full((num_agents, num_parents), 2.0))
        last = nn.Linear(64, num_agents * num_parents)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.edge_network = nn.Sequential(nn.Linear(num_parents, 64), nn.ReLU(), last, nn.Tanh())

        # psi_r: one network for all agents, told by a one-hot identity whose reward is asked for.
        self.reward_network = nn.Sequential(
            nn.Linear(num_parents + num_agents, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1),
        )

    def parameter_groups(self, learning_rate: float = 1e-3, edge_learning_rate: float = 1e-2) -> list[dict]:
        """Adam's parameter groups: psi_r, the edges' own logits, and the rest of psi_g at a hundredth of their rate."""
        return [
            {"params": self.reward_network.parameters(), "lr": learning_rate},
            {"params": [self.edge_logits], "lr": edge_learning_rate},
            {"params": self.edge_network.parameters(), "lr": edge_learning_rate / 100},
        ]

    def fit_statistics(self, state: torch.Tensor, team_reward: torch.Tensor) -> None:
        """Mean and standard deviation of states [T, S] and team rewards [T]; a constant dimension keeps unit scale."""
        std = state.std(0)
        self.state_mean.copy_(state.mean(0))
        self.state_std.copy_(torch.where(std > 1e-6, std, 1.0))
        self.reward_mean.copy_(team_reward.mean())
        self.reward_std.copy_(team_reward.std().clamp(min=1e-6))

    def _parents(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Standardised states [B, S] and actions [B, N, A], side by side: the possible parents [B, D]."""
        return torch.cat([(state - self.state_mean) / self.state_std, action.flatten(1)], dim=1)

    def _logits(self, parents: torch.Tensor) -> torch.Tensor:
        """Log-odds of every edge (Eq. 3): [B, N, D], or [1, N, D] for the graphs that do not depend on the state."""
        if self.graph == "full":
            return torch.full_like(self.edge_logits, torch.inf)[None]
        if self.graph == "fixed":
            return self.edge_logits[None]
        return self.edge_logits + 2 * self.edge_network(parents).view(-1, *self.edge_logits.shape)

    def _predict(self, parents: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """psi_r of masked parents [B, D] * [B, N, D] and agent identities: standardised individual rewards [B, N]."""
        masked = parents[:, None] * masks
        identity = self.agent_id.expand(len(parents), -1, -1)
        return self.reward_network(torch.cat([masked, identity], dim=2)).squeeze(2)

    @torch.no_grad()
    def probabilities(self, state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Edge probabilities (Eq. 3) from states [B, S] and actions [B, N, A]: [B, N, S] and [B, N, N * A]."""
        edges = torch.sigmoid(self._logits(self._parents(state, action))).expand(len(state), -1, -1)
        return edges[..., : self.state_dim], edges[..., self.state_dim :]

    def masks(self, state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The edges that count at assignment, 0 or 1: [B, N, S] and [B, N, N * A]."""
        state_edges, action_edges = self.probabilities(state, action)
        return (state_edges >= self.h).float(), (action_edges >= self.h).float()

    @torch.no_grad()
    def assign(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Individual rewards (Eq. 6) for states [B, S] and actions [B, N, A]: [B, N], in the team reward's units.

        No gradient leaves this function: a policy loss cannot change the credit.
        """
        parents = self._parents(state, action)
        masks = (torch.sigmoid(self._logits(parents)) >= self.h).float()
        return self._predict(parents, masks) * self.reward_std + self.reward_mean / self.num_agents

    def loss(
        self,
        state: torch.Tensor,
        action: torch.Tensor,
        team_reward: torch.Tensor,
        individual_rewards: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L_m of a minibatch (Eq. 4 with the L1 term of Eq. 5).

        Args:
            state, action, team_reward: [B, S], [B, N, A], [B].
            individual_rewards: [B, N] where they are known and wanted: each prediction is then fitted to its
                reward instead of their sum to the team's (Table 5, "MACCA with ground truth").

        Returns:
            The loss, and its squared-error part alone (detached), as a share of the team reward's variance.
        """
        shapes = {
            "team_reward": (team_reward, (len(state),)),
            "individual_rewards": (individual_rewards, action.shape[:2]),
        }
        for name, (given, shape) in shapes.items():
            if given is not None and given.shape != shape:  # torch would broadcast it to a wrong loss
                raise ValueError(f"{name} has shape {list(given.shape)}, expected {list(shape)}")
        parents = self._parents(state, action)
        logits = self._logits(parents)
        if self.graph == "full":
            gates = torch.ones_like(logits)
        else:
            # Gates are drawn 0 or 1 (binary concrete), so that training and assignment see the same kind of mask: a
            # soft gate could shrink towards 0, and with it the penalty, while the next layer's weights grow to undo
            # it. The gradient passes straight through, as if the gate were the soft one.
            uniform = torch.rand(len(parents), *logits.shape[1:], device=logits.device).clamp(1e-6, 1 - 1e-6)
            soft = torch.sigmoid(logits + torch.logit(uniform))
            gates = (soft > 0.5).float() + soft - soft.detach()
        prediction = self._predict(parents, gates)
        if individual_rewards is None:
            target = (team_reward - self.reward_mean) / self.reward_std
            error = F.mse_loss(prediction.sum(1), target)
        else:
            target = (individual_rewards - self.reward_mean / self.num_agents) / self.reward_std
            error = F.mse_loss(prediction, target) * self.num_agents
        if self.graph == "full":
            return error, error.detach()
        # A gate is 1 with probability sigmoid(logit): this is the expected L1 norm of the drawn masks, without noise.
        penalty = (self.edge_price * torch.sigmoid(logits)).sum((1, 2)).mean()
        return error + penalty, error.detach()

    @torch.no_grad()
    def report(
        self,
        state: torch.Tensor,
        action: torch.Tensor,
        team_reward: torch.Tensor,
        individual_rewards: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """How dense the graph and how good the credit is: scalars, for the arguments of `loss`.

        `state_density`, `action_density`: the share of edges that count, mean over agents. `team_nmse`: squared error
        of the summed credit over the team reward's variance. Where the individual rewards are known, `credit_mse` and
        `credit_mae` against them, and `credit_skill`, 1 - credit_mse / mse of the even split R / N: 0 is no better than
        an even split, 1 is perfect. Where all agents earn the same the even split is exact and skill undefined (-inf).
        """
        credit = self.assign(state, action)  # [B, N]
        state_masks, action_masks = self.masks(state, action)
        team_error = (credit.sum(1) - team_reward).square().mean()
        report = {"state_density": state_masks.mean(), "action_density": action_masks.mean()}
        report["team_nmse"] = team_error / team_reward.var()
        if individual_rewards is not None:
            error = credit - individual_rewards
            even_error = team_reward[:, None] / self.num_agents - individual_rewards
            report["credit_mse"], report["credit_mae"] = error.square().mean(), error.abs().mean()
            report["credit_skill"] = 1 - report["credit_mse"] / even_error.square().mean()
        return report
