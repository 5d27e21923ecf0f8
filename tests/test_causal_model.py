"""The causal model against slow NumPy loops, and on a problem whose causal graph and individual rewards are known."""

import numpy as np
import pytest
import torch

from causal_model import CausalModel

B, N, S, A = 7, 3, 6, 2  # batch, agents, joint state, action of one agent; two state dimensions belong to each agent
D = S + N * A  # possible parents of one individual reward
OWNER = [0, 0, 1, 1, 2, -1]  # the last state dimension is nobody's


def make(graph, **arguments):
    """A model with every weight random, the zeros of the edge network included, and statistics that matter."""
    torch.manual_seed(0)
    model = CausalModel(N, S, A, graph, state_owner=OWNER, hidden_dim=16, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        model.edge_logits.copy_(torch.randn(N, D) * 2 - 1)
    model.fit_statistics(3 + 2 * torch.randn(500, S), 40 + 10 * torch.randn(500))
    return model


def make_batch():
    torch.manual_seed(1)
    return 3 + 2 * torch.randn(B, S), torch.rand(B, N, A) * 2 - 1, 40 + 10 * torch.randn(B)


def numpy_weights(network):
    """[(weight [out, in], bias [out])] of the linear layers of an nn.Sequential."""
    layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    return [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in layers]


def perceptron(layers, x):
    for number, (weight, bias) in enumerate(layers):
        x = weight @ x + bias
        if number + 1 < len(layers):
            x = np.maximum(x, 0)
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_parents(model, state, action, b):
    """[D]: what a mask is laid over, for one row: the standardised state, then agent after agent's action."""
    mean, std = model.state_mean.double().numpy(), model.state_std.double().numpy()
    row = [(float(state[b, s]) - mean[s]) / std[s] for s in range(S)]
    return np.array(row + [float(action[b, j, a]) for j in range(N) for a in range(A)])


def slow_probabilities(model, state, action):
    """Eq. 3, row by row and edge by edge: [B, N, D]."""
    edges, own = np.ones((B, N, D)), model.edge_logits.detach().double().numpy()
    for b in range(B):
        output = perceptron(numpy_weights(model.edge_network), slow_parents(model, state, action, b))
        for i in range(N):
            for d in range(D):
                if model.graph == "dynamic":
                    edges[b, i, d] = sigmoid(own[i, d] + 2 * np.tanh(output[i * D + d]))
                elif model.graph == "fixed":
                    edges[b, i, d] = sigmoid(own[i, d])
    return edges


def slow_rewards(model, state, action, masks):
    """psi_r of the masked parents (Eq. 2), agent by agent: standardised individual rewards [B, N]."""
    rewards = np.zeros((B, N))
    for b in range(B):
        parents = slow_parents(model, state, action, b)
        for i in range(N):
            identity = [1.0 if j == i else 0.0 for j in range(N)]
            x = np.concatenate([masks[b, i] * parents, identity])
            rewards[b, i] = perceptron(numpy_weights(model.reward_network), x)[0]
    return rewards


def gates_of(model, compute):
    """Calls compute() and looks at what the reward network was given: its result and that input [B, N, D + N]."""
    seen = []
    hook = model.reward_network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    result = compute()
    hook.remove()
    (given,) = seen
    return result, given


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
def test_edge_probabilities(graph):
    """Eq. 3: wrong if the mask of an agent were another's, or the fixed graph depended on the state."""
    model, (state, action, _) = make(graph), make_batch()
    state_edges, action_edges = model.probabilities(state, action)
    assert state_edges.shape == (B, N, S) and action_edges.shape == (B, N, N * A)
    expected = slow_probabilities(model, state, action)
    np.testing.assert_allclose(torch.cat([state_edges, action_edges], 2).numpy(), expected, rtol=1e-4, atol=1e-6)
    if graph == "dynamic":
        assert expected.std(0).max() > 0.01  # they do depend on the row, or the line above would prove little


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("h", [0.1, 0.8])
def test_assignment(graph, h):
    """Eq. 6: wrong if edges below h still counted, gates were soft, or rewards came in standardised units."""
    model, (state, action, _) = make(graph, h=h), make_batch()
    masks = (slow_probabilities(model, state, action) >= h).astype(float)  # [B, N, D]
    if graph != "full":
        assert 0 < masks.mean() < 1
    mean, std = float(model.reward_mean), float(model.reward_std)
    expected = slow_rewards(model, state, action, masks) * std + mean / N
    assigned, given = gates_of(model, lambda: model.assign(state, action))
    np.testing.assert_allclose(assigned.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert not assigned.requires_grad
    parents = np.array([slow_parents(model, state, action, b) for b in range(B)])  # [B, D]
    np.testing.assert_allclose(given[..., :D].numpy(), masks * parents[:, None], atol=1e-5)
    state_masks, action_masks = model.masks(state, action)
    np.testing.assert_array_equal(torch.cat([state_masks, action_masks], 2).numpy(), masks)


def test_assigned_rewards_add_up_to_the_team_reward():
    """The units: a predictor that knows nothing (all zero) must answer the mean team reward, in equal parts."""
    model, (state, action, _) = make("fixed"), make_batch()
    with torch.no_grad():
        for parameter in model.reward_network.parameters():
            parameter.zero_()
    assigned = model.assign(state, action)
    torch.testing.assert_close(assigned, (model.reward_mean / N).expand(B, N))
    torch.testing.assert_close(assigned.sum(1), model.reward_mean.expand(B))
    assert abs(float(model.reward_mean) - 40) < 2 and abs(float(model.reward_std) - 10) < 1


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("individual", [False, True])
def test_loss(graph, individual):
    """Eq. 4 and 5 with the gates that were drawn: wrong for any other error, price, owner or sum in the L1 term."""
    lambda1, lambda2, anchor = 0.03, 0.2, 4.0
    model, (state, action, team) = make(graph, lambda1=lambda1, lambda2=lambda2, anchor=anchor), make_batch()
    truth = torch.randn(B, N) * 10 + 13 if individual else None
    (loss, error), given = gates_of(model, lambda: model.loss(state, action, team, truth))

    parents = np.array([slow_parents(model, state, action, b) for b in range(B)])  # [B, D]
    gates = given[..., :D].double().numpy() / parents[:, None]
    np.testing.assert_allclose(gates, np.round(gates), atol=1e-4)  # 0 or 1
    rewards = slow_rewards(model, state, action, np.round(gates))
    mean, std = float(model.reward_mean), float(model.reward_std)
    expected_error = 0.0
    for b in range(B):
        if truth is None:
            expected_error += (rewards[b].sum() - (float(team[b]) - mean) / std) ** 2 / B
        else:
            for i in range(N):
                expected_error += (rewards[b, i] - (float(truth[b, i]) - mean / N) / std) ** 2 / B
    penalty = 0.0
    probabilities = slow_probabilities(model, state, action)
    for b in range(B):
        for i in range(N):
            for d in range(D):
                owner = OWNER[d] if d < S else (d - S) // A
                price = (lambda1 if d < S else lambda2) * (anchor if owner not in (i, -1) else 1)
                penalty += price * probabilities[b, i, d] / B
    np.testing.assert_allclose(error.item(), expected_error, rtol=1e-4)
    np.testing.assert_allclose(loss.item(), expected_error + (0 if graph == "full" else penalty), rtol=1e-4)
    assert not error.requires_grad


def test_without_an_owner_state_edges_cost_the_same():
    """A state that is nobody's own has no foreign dimensions: the anchor may only touch actions."""
    model = CausalModel(N, S, A, lambda1=0.5, lambda2=0.25, anchor=3.0)
    assert (model.edge_price[:, :S] == 0.5).all()
    for i in range(N):
        for j in range(N):
            price = model.edge_price[i, S + j * A : S + (j + 1) * A]
            assert (price == (0.25 if i == j else 0.75)).all()
    assert (CausalModel(N, S, A, lambda1=0.5, lambda2=0.5, anchor=1.0, state_owner=OWNER).edge_price == 0.5).all()


@pytest.mark.parametrize("graph", ["dynamic", "fixed"])
def test_gates_are_binary_and_drawn_with_their_probability(graph):
    """Training with soft gates would let the L1 norm shrink without an edge going away (a gate is 0 or 1, afresh)."""
    model, (state, action, team) = make(graph), make_batch()
    parents = torch.tensor(np.array([slow_parents(model, state, action, b) for b in range(B)]))[:, None]  # [B, 1, D]
    draws = []
    for _ in range(2000):
        _, given = gates_of(model, lambda: model.loss(state, action, team))
        draws.append(given[..., :D] / parents)
    gates = torch.stack(draws)  # [2000, B, N, D]
    assert ((gates.abs() < 1e-4) | ((gates - 1).abs() < 1e-4)).all()
    np.testing.assert_allclose(gates.mean(0), slow_probabilities(model, state, action), atol=0.06)  # > 5 sigma
    # Each agent, row and edge draws for itself.
    centred = (gates - gates.mean(0)).flatten(1)
    correlation = torch.corrcoef(centred[:, (gates.std(0) > 0.2).flatten()].T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.15


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
def test_gradients_of_the_loss(graph):
    """The straight-through gates must pass the error's gradient (not only the penalty's) to the edges."""
    model, (state, action, team) = make(graph, lambda1=0.0, lambda2=0.0), make_batch()
    loss, _ = model.loss(state, action, team)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.reward_network.parameters())
    if graph == "full":
        assert model.edge_logits.grad is None
    else:
        assert (model.edge_logits.grad != 0).float().mean() > 0.5
    moves = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.edge_network.parameters()]
    assert all(moves) if graph == "dynamic" else not any(moves)
    # The penalty alone: d/dlogit of price * sigmoid(logit), for the fixed graph without any noise.
    if graph == "fixed":
        priced = make(graph, lambda1=0.1, lambda2=0.3, anchor=2.0)
        torch.manual_seed(5)
        with_price = torch.autograd.grad(priced.loss(state, action, team)[0], priced.edge_logits)[0]
        torch.manual_seed(5)
        without = torch.autograd.grad(model.loss(state, action, team)[0], model.edge_logits)[0]
        edges = torch.sigmoid(priced.edge_logits.detach())
        torch.testing.assert_close(with_price - without, priced.edge_price * edges * (1 - edges), rtol=1e-3, atol=1e-4)


def test_parameter_groups_hold_every_parameter_once():
    """A parameter in no group would never learn; in two, Adam would step it twice."""
    model = make("dynamic")
    groups = model.parameter_groups(learning_rate=3e-3, edge_learning_rate=2e-2)
    listed = [id(p) for group in groups for p in (group.update(params=list(group["params"])) or group["params"])]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.edge_logits)] == 2e-2
    assert all(rate[id(p)] == 3e-3 for p in model.reward_network.parameters())
    assert all(rate[id(p)] < 2e-2 for p in model.edge_network.parameters())


def test_statistics():
    """A constant dimension must not be divided by its zero deviation; the statistics travel with the weights."""
    model = CausalModel(N, S, A)
    state = torch.randn(100, S) * torch.arange(S) + 4  # the first dimension is constant
    team = torch.randn(100) * 3 - 8
    model.fit_statistics(state, team)
    np.testing.assert_allclose(model.state_mean, state.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.state_std[1:], state.numpy().std(0, ddof=1)[1:], rtol=1e-5)
    assert model.state_std[0] == 1
    np.testing.assert_allclose([model.reward_mean, model.reward_std], [team.mean(), team.std()], rtol=1e-5)
    other = CausalModel(N, S, A)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.state_mean, model.state_mean) and torch.equal(other.reward_std, model.reward_std)


# ---- what it is for ----


def synthetic_problem(transitions):
    """Three agents with 8 state and 2 action dimensions each, independent Gaussians; each earns by 4 of its own 10.

    Returns states [T, 24], actions [T, 3, 2], individual rewards [T, 3], and the true edges [3, 30].
    """
    state, action = torch.randn(transitions, 3 * 8), torch.randn(transitions, 3, 2)
    own = torch.cat([state.view(-1, 3, 8), action], dim=2)  # [T, 3, 10]
    parents = [(0, 3, 8, 5), (1, 4, 9, 6), (2, 5, 8, 7)]
    edges, rewards = torch.zeros(3, 30), []
    for i, used in enumerate(parents):
        x1, x2, x3, x4 = (own[:, i, d] for d in used)
        rewards.append((1.5 * x1).sin() + x2 * x3 + (1 + i / 2) * x4.square())
        for d in used:
            edges[i, i * 8 + d if d < 8 else 24 + i * 2 + d - 8] = 1
    return state, action, torch.stack(rewards, dim=1), edges


def fit(model, state, action, team, iterations, batch=128):
    optimizer = torch.optim.Adam(model.parameter_groups(1e-3), fused=True)
    for _ in range(iterations):
        rows = torch.randint(len(state), (batch,))
        loss, _ = model.loss(state[rows], action[rows], team[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("graph", ["fixed", "dynamic"])
def test_recovers_a_known_graph_and_individual_rewards(graph):
    """From the team reward alone: who earned what and why. F1 of the edges and R^2 of the rewards (held out)."""
    torch.manual_seed(1)
    state, action, rewards, edges = synthetic_problem(54_000)
    model = CausalModel(3, 24, 2, graph, state_owner=[i for i in range(3) for _ in range(8)])
    team = rewards.sum(1)
    model.fit_statistics(state[:50_000], team[:50_000])
    fit(model, state[:50_000], action[:50_000], team[:50_000], iterations=1000)

    state, action, rewards = state[50_000:], action[50_000:], rewards[50_000:]
    mask = (torch.cat(model.masks(state, action), dim=2).mean(0) > 0.5).float()  # [3, 30]
    f1 = 2 * (mask * edges).sum() / (mask.sum() + edges.sum())
    centred = rewards - rewards.mean(0)  # what is constant in a reward is nobody's: any split of it adds up
    assigned = model.assign(state, action)
    assigned = assigned - assigned.mean(0)
    r2 = 1 - (assigned - centred).square().mean() / centred.square().mean()
    uniform = centred.sum(1, keepdim=True) / 3
    uniform_r2 = 1 - (uniform - centred).square().mean() / centred.square().mean()
    assert uniform_r2 < 0.4  # what a split into equal parts would reach
    assert f1 >= 0.95 and r2 >= 0.95, f"F1 {f1:.3f}, R^2 {r2:.3f}"


def test_refuses_what_torch_would_broadcast():
    """A reward of shape [B, 1] would broadcast against [B] to a wrong loss; an unknown graph would pass for another."""
    model = CausalModel(2, 4, 1)
    state, action = torch.randn(8, 4), torch.randn(8, 2, 1)
    with pytest.raises(ValueError, match="team_reward"):
        model.loss(state, action, torch.randn(8, 1))
    with pytest.raises(ValueError, match="individual_rewards"):
        model.loss(state, action, torch.randn(8), torch.randn(8, 1))
    with pytest.raises(ValueError, match="graph"):
        CausalModel(2, 4, 1, graph="dynamc")  # type: ignore[arg-type]
