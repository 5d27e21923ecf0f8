# Paper: MACCA: Offline Multi-agent Reinforcement Learning with Causal Credit Assignment,
#        https://openreview.net/forum?id=gwUOzI4DuV (Section 4; equation numbers below are the paper's)
"""The causal model of MACCA: which state and action dimensions cause which agent's reward, and how much each earned.

The team reward is taken to be a sum of individual rewards that nobody recorded, each a function of a few dimensions of
the joint state and joint action (Eq. 2). Two networks are fitted to the team reward alone:

    structure predictor  psi_g(s, a, i) -> masks c^i, one entry per state and action dimension        (Eq. 3)
    reward predictor     psi_r(c^i * (s, a), i) -> the individual reward of agent i                   (Eq. 2)

    loss    (R - sum_i psi_r(c^i * (s, a), i))^2 + lambda1 * ||c^{s->r}||_1 + lambda2 * ||c^{a->r}||_1  (Eq. 4, 5)
    credit  r_hat^i = psi_r(1[c^i >= h] * (s, a), i)                                                  (Eq. 6)

A sum does not say whose its parts are, so two conventions decide. *Own things to the owner*: an edge from a dimension
that is not the agent's own costs `anchor` times more. *What cannot be attributed, evenly*: beside the agents' slots
i = 1..N the sum has a common one, whose value all agents share alike; there, dimensions that are nobody's own are the
cheap ones. The file knows nothing of any policy: whatever learns from rewards can use it.

    model = CausalModel(num_agents=3, state_dim=54, action_dim=2, state_owner=owners(observations))
    model.fit_statistics(states, team_rewards)                      # once, from the dataset
    optimizer = torch.optim.Adam(model.parameter_groups())
    loss, _ = model.loss(state, action, team_reward)                # Algorithm 1, line 5, then as with any loss:
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    rewards = model.assign(state, action, team_reward)              # [batch, num_agents], Algorithm 1, line 4
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn


def owners(observations: Tensor, own_share: float = 0.01) -> list[int]:
    """Whose own each dimension of the joint state is, where that is the agents' observations [T, N, O] side by side.

    A dimension is the observer's own unless it is constant or the others' observations determine it (linearly, but for
    `own_share` of its variance): a reward that depends on it is then as well a function of what the others see. With
    an `own_share` of 0 whatever an agent observes is its own: for tasks in which its reward depends on where it is
    itself, and on nobody else. The team reward alone cannot say which of the two is meant.
    Returns N * O agent numbers, -1 for nobody's.
    """
    x = observations[:: len(observations) // 5000 + 1].double().cpu()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)  # a constant becomes 0
    owner = []
    for agent in range(x.shape[1]):
        own, others = x[:, agent], torch.cat([x[:, :agent], x[:, agent + 1 :]], dim=1).flatten(1)
        gram = others.T @ others / len(x) + 1e-6 * torch.eye(others.shape[1])
        unexplained = own - others @ torch.linalg.solve(gram, others.T @ own / len(x))
        owner += [agent if share > own_share else -1 for share in unexplained.square().mean(0).tolist()]
    return owner


class CausalModel(nn.Module):
    """Splits a team reward among agents by a learned causal graph.

    Shapes: B batch, N agents, S state_dim (joint), A action_dim (of one agent; one-hot for discrete actions),
    D = S + N * A, the number of possible parents of a reward. Of N + 1 slots the last is the common one.

    Args:
        graph: `dynamic` masks depend on the state and action (Eq. 3), `fixed` is one learned mask per slot, `full` is
            all ones (no structure, no penalty).
        state_owner: for each state dimension the agent whose own it is, or -1 for nobody's; None: all nobody's.
        anchor: the L1 penalty of an edge between an agent's slot and a dimension that is not its own, or between the
            common slot and one that is somebody's own, as a multiple of an own edge's; an edge between the common slot
            and what is nobody's own costs the anchor-th part. 1: all edges cost alike, as in the paper.
        lambda1, lambda2: L1 penalties on state and action edges (Eq. 5).
        h: an edge counts at assignment when its probability is at least h (Eq. 6).
        hidden_dim: width of the three hidden layers of the reward predictor (Appendix F.2).
    """

    edge_price: Tensor
    slot_id: Tensor
    state_mean: Tensor
    state_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor
    slot_mean: Tensor
    unexplained: Tensor

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
        named = state_owner is None or {*state_owner} <= {*range(-1, num_agents)}
        if not named or (state_owner is not None and len(state_owner) != state_dim):
            raise ValueError(f"state_owner must name {state_dim} agents below {num_agents}, or -1 for nobody")
        self.num_agents, self.state_dim, self.graph, self.h = num_agents, state_dim, graph, h
        num_parents, slots = state_dim + num_agents * action_dim, num_agents + 1

        # The price of each edge: [N + 1, D]. The common slot (number -1, like nobody) owns what is nobody's own.
        owner = torch.full((state_dim,), -1) if state_owner is None else torch.as_tensor(state_owner)
        owner = torch.cat([owner, torch.arange(num_agents).repeat_interleave(action_dim)])
        slot = torch.cat([torch.arange(num_agents), torch.tensor([-1])])[:, None]
        factor = torch.where(slot == owner, 1.0, anchor)
        factor[-1, owner == -1] = 1 / anchor
        price = torch.where(torch.arange(num_parents) < state_dim, lambda1, lambda2)
        self.register_buffer("edge_price", price * factor, persistent=False)
        self.register_buffer("slot_id", torch.eye(slots), persistent=False)

        # Statistics, stored with the weights: the model means nothing without its units.
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.register_buffer("slot_mean", torch.zeros(slots))  # running mean of each slot's prediction
        self.register_buffer("unexplained", torch.ones(()))  # running share of the team reward's variance, 1 at most

        # psi_g. A free network for the gates collapses, so an edge's logit is a number of its own plus, for the dynamic
        # graph, a bounded part that depends on (s, a, i) and starts at zero. What a slot learns first it keeps, so the
        # cheaper an edge, the wider open it starts.
        self.edge_logits = nn.Parameter(torch.where(factor < 1, 6.0, torch.where(factor > 1, 0.0, 4.0)))
        last = nn.Linear(64, slots * num_parents)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.edge_network = nn.Sequential(nn.Linear(num_parents, 64), nn.ReLU(), last, nn.Tanh())

        # psi_r: one network for all slots, told by a one-hot identity whose reward is asked for.
        sizes = [num_parents + slots, hidden_dim, hidden_dim, hidden_dim]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        self.reward_network = nn.Sequential(*hidden, nn.Linear(hidden_dim, 1))

    def parameter_groups(self, learning_rate: float = 1e-3, edge_learning_rate: float = 2e-2) -> list[dict]:
        """Adam's parameter groups: psi_r, the edges' own logits, and the rest of psi_g at 1/40 of their rate."""
        return [
            {"params": self.reward_network.parameters(), "lr": learning_rate},
            {"params": [self.edge_logits], "lr": edge_learning_rate},
            {"params": self.edge_network.parameters(), "lr": edge_learning_rate / 40},
        ]

    def fit_statistics(self, state: Tensor, team_reward: Tensor) -> None:
        """Mean and standard deviation of states [T, S] and team rewards [T]; a constant dimension keeps unit scale."""
        std = state.std(0)
        self.state_mean.copy_(state.mean(0))
        self.state_std.copy_(torch.where(std > 1e-6, std, 1.0))
        self.reward_mean.copy_(team_reward.mean())
        self.reward_std.copy_(team_reward.std().clamp(min=1e-6))

    def _parents(self, state: Tensor, action: Tensor) -> Tensor:
        """States [B, S] and actions [B, N, A], scaled (actions as if uniform): the possible parents [B, D]."""
        return torch.cat([(state - self.state_mean) / self.state_std, 3**0.5 * action.flatten(1)], dim=1)

    def _logits(self, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of every edge (Eq. 3), and a fifth of their part that depends on (s, a): both [B or 1, N + 1, D]."""
        own = self.edge_logits[None]
        if self.graph != "dynamic":
            return (torch.full_like(own, torch.inf) if self.graph == "full" else own), torch.zeros_like(own)
        varying = self.edge_network(parents).view(-1, *self.edge_logits.shape)
        return own + 5 * varying, varying

    def _predict(self, parents: Tensor, masks: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
        """psi_r of masked parents [B, D] * [B, N + 1, D] and slot identities: standardised rewards [B, N + 1].

        And which slots count, likewise [B, N + 1]: those of the agents that are `alive`, and the common one.
        """
        masked = parents[:, None] * masks
        identity = self.slot_id.expand(len(parents), -1, -1)
        present = torch.ones(masked.shape[:2], device=masked.device)
        if alive is not None:
            present[:, :-1] = alive
        return self.reward_network(torch.cat([masked, identity], dim=2)).squeeze(2) * present, present

    @torch.no_grad()
    def probabilities(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Edge probabilities (Eq. 3) from states [B, S] and actions [B, N, A]: [B, N, S] and [B, N, N * A].

        An agent's reward depends on a dimension through its own slot or the common one: the more probable edge of both.
        """
        slots = torch.sigmoid(self._logits(self._parents(state, action))[0]).expand(len(state), -1, -1)
        edges = torch.maximum(slots[:, :-1], slots[:, -1:])
        return edges[..., : self.state_dim], edges[..., self.state_dim :]

    def masks(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The edges that count at assignment, in either slot, 0 or 1: [B, N, S] and [B, N, N * A]."""
        state_edges, action_edges = self.probabilities(state, action)
        return (state_edges >= self.h).float(), (action_edges >= self.h).float()

    @torch.no_grad()
    def assign(
        self, state: Tensor, action: Tensor, team_reward: Tensor | None = None, alive: Tensor | None = None
    ) -> Tensor:
        """Individual rewards (Eq. 6) for states [B, S] and actions [B, N, A]: [B, N], in the team reward's units.

        With the recorded team reward [B] they add up to it: what the model leaves unexplained is split evenly, as is
        what is constant. Agents that are not `alive` [B, N] get nothing, and no part of what is split (None: all are).
        No gradient leaves this function: a policy loss cannot change the credit.
        """
        parents = self._parents(state, action)
        slots, present = self._predict(parents, (torch.sigmoid(self._logits(parents)[0]) >= self.h).float(), alive)
        total = slots.sum(1) * self.reward_std + self.reward_mean if team_reward is None else team_reward
        living = present[:, :-1]
        own = (slots - self.slot_mean)[:, :-1] * living * self.reward_std
        return own + living * ((total - own.sum(1)) / living.sum(1).clamp(min=1))[:, None]

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        team_reward: Tensor,
        individual_rewards: Tensor | None = None,
        alive: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """L_m of a minibatch (Eq. 4 with the L1 term of Eq. 5). It changes the model: it clamps the edges' logits
        from below and updates the running means `slot_mean` and `unexplained`.

        Args:
            state, action, team_reward: [B, S], [B, N, A], [B].
            individual_rewards: [B, N] where they are known and wanted: each prediction is then fitted to its
                reward instead of their sum to the team's (Table 5, "MACCA with ground truth").
            alive: [B, N], whose predictions count (None: all).

        Returns:
            The loss, and its squared-error part alone (detached), in units of the team reward's variance.
        """
        shapes = {
            "team_reward": (team_reward, [len(state)]),
            "individual_rewards": (individual_rewards, action.shape[:2]),
            "alive": (alive, action.shape[:2]),
        }
        for name, (given, shape) in shapes.items():
            if given is not None and given.shape != (*shape,):  # torch would broadcast it to a wrong loss
                raise ValueError(f"{name} has shape {list(given.shape)}, expected {list(shape)}")
        with torch.no_grad():
            self.edge_logits.clamp_(min=-3.0)  # so that a closed edge is tried now and then, and can come back
        parents = self._parents(state, action)
        logits, varying = self._logits(parents)
        # Gates are drawn 0 or 1 (binary concrete), so that training and assignment see the same kind of mask: a soft
        # gate could shrink towards 0, and with it the penalty, while the next layer's weights grow to undo it. The
        # gradient passes straight through, as if the gate were the soft one.
        uniform = torch.rand(len(parents), *logits.shape[1:], device=logits.device).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid(logits + torch.logit(uniform))
        slots, present = self._predict(parents, (soft > 0.5).float() + soft - soft.detach(), alive)  # [B, N + 1]
        if individual_rewards is None:
            error = (slots.sum(1) - (team_reward - self.reward_mean) / self.reward_std).square().mean()
            count = present.sum(0)  # an agent that is alive in no row keeps its mean
            self.slot_mean.lerp_(slots.detach().sum(0) / count.clamp(min=1), 0.01 * (count > 0))
        else:
            living = present[:, :-1]
            count = living.sum(1, keepdim=True).clamp(min=1)
            target = (individual_rewards - self.reward_mean / count) / self.reward_std
            error = ((slots[:, :-1] + slots[:, -1:] / count - target) * living).square().sum(1).mean()
        if self.graph == "full":
            return error, error.detach()
        # A gate is 1 with probability sigmoid(logit): this is the expected L1 norm of the drawn masks, without noise.
        # An edge that comes and goes costs more, or it would close wherever its dimension is near 0 and does no harm.
        # The price grows with what is explained: at first no edge has had a chance to prove its worth.
        self.unexplained.lerp_(error.detach().clamp(max=1.0), 0.01)
        penalty = (self.edge_price * (torch.sigmoid(logits) + varying.abs())).sum((1, 2)).mean()
        return error + (1 - self.unexplained) * penalty, error.detach()

    @torch.no_grad()
    def report(
        self,
        state: Tensor,
        action: Tensor,
        team_reward: Tensor,
        individual_rewards: Tensor | None = None,
        alive: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """How dense the graph and how good the credit is: scalars, for the arguments of `loss`.

        `state_density`, `action_density`: the share of edges that count, mean over agents. `team_nmse`: squared error
        of the summed prediction over the team reward's variance. Where the individual rewards are known: errors of the
        credit and of the even split among the living, `credit_mse`, `credit_mae`, `even_mse`, `even_mae`;
        `credit_skill`, 1 - credit_mse / even_mse (1 is perfect, 0 no better than the even split; left out where that
        is exact, but for rounding); and `credit_rank`, Spearman's correlation, mean over agents. What is not defined,
        because rewards do not vary, is left out.
        """
        credit = self.assign(state, action, team_reward, alive)  # [B, N]
        state_masks, action_masks = self.masks(state, action)
        team_error = (self.assign(state, action, alive=alive).sum(1) - team_reward).square().mean()
        report = {"state_density": state_masks.mean(), "action_density": action_masks.mean()}
        if len(team_reward) > 1 and (team_reward != team_reward[0]).any() and team_reward.var() > 1e-30:
            report["team_nmse"] = team_error / team_reward.var()
        if individual_rewards is not None:
            living = torch.ones_like(credit) if alive is None else alive.float()
            even = team_reward[:, None] * living / living.sum(1, keepdim=True).clamp(min=1) - individual_rewards
            error = credit - individual_rewards
            report |= {"credit_mse": error.square().mean(), "credit_mae": error.abs().mean()}
            report |= {"even_mse": even.square().mean(), "even_mae": even.abs().mean()}
            if report["even_mse"] > 1e-9 * team_reward.square().mean():
                report["credit_skill"] = 1 - report["credit_mse"] / report["even_mse"]
            ranks = [x.argsort(0).argsort(0).double() for x in (credit, individual_rewards)]  # ties as they come
            centred = [x - x.mean(0) for x in ranks]
            if len(credit) > 1:
                report["credit_rank"] = ((centred[0] * centred[1]).mean(0) / ranks[0].var(0, correction=0)).mean()
        return report
