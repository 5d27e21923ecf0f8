"""The causal model against slow NumPy loops, and on problems whose causal graph and individual rewards are known."""

import numpy as np
import pytest
import torch

from causal_model import CausalModel, owners

B, N, S, A = 7, 3, 6, 2  # batch, agents, joint state, action of one agent; two state dimensions belong to each agent
M = N + 1  # slots: the agents' and, last, the common one
D = S + N * A  # possible parents of one reward
OWNER = [0, 0, 1, 1, 2, -1]  # the last state dimension is nobody's


def make(graph, **arguments):
    """A model with every weight random, the zeros of the edge network included, and statistics that matter."""
    torch.manual_seed(0)
    model = CausalModel(N, S, A, graph, state_owner=OWNER, hidden_dim=16, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        model.edge_logits.copy_(torch.randn(M, D) * 2 - 1)
    model.fit_statistics(3 + 2 * torch.randn(500, S), 40 + 10 * torch.randn(500))
    model.slot_mean.copy_(torch.randn(M))
    model.unexplained.fill_(0.4)
    return model


def make_batch():
    torch.manual_seed(1)
    return 3 + 2 * torch.randn(B, S), torch.rand(B, N, A) * 2 - 1, 40 + 10 * torch.randn(B)


def make_alive(dead):
    """Who is alive, [B, N]: all, or nobody in one row, one agent in another, two in two more."""
    alive = torch.ones(B, N, dtype=torch.bool)
    if dead:
        alive[[1, 1, 1, 2, 2, 4, 5], [0, 1, 2, 0, 2, 1, 2]] = False
    return alive


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
    """[D]: what a mask is laid over, for one row: the standardised state, then agent after agent's action.

    An action that is uniform over [-1, 1] has variance 1/3.
    """
    mean, std = model.state_mean.double().numpy(), model.state_std.double().numpy()
    row = [(float(state[b, s]) - mean[s]) / std[s] for s in range(S)]
    return np.array(row + [float(action[b, j, a]) / np.sqrt(1 / 3) for j in range(N) for a in range(A)])


def slow_edges(model, state, action):
    """Eq. 3, row by row and edge by edge: each slot's probabilities and the part of the logits that varies."""
    rows = len(state)
    edges, varying = np.ones((rows, M, D)), np.zeros((rows, M, D))
    own = model.edge_logits.detach().double().numpy()
    for b in range(rows):
        output = perceptron(numpy_weights(model.edge_network), slow_parents(model, state, action, b))
        for i in range(M):
            for d in range(D):
                if model.graph == "dynamic":
                    varying[b, i, d] = np.tanh(output[i * D + d])
                if model.graph != "full":
                    edges[b, i, d] = sigmoid(own[i, d] + 5 * varying[b, i, d])
    return edges, varying


def slow_probabilities(model, state, action):
    """What an agent's reward depends on, through its own slot or through the common one: [B, N, D]."""
    edges, _ = slow_edges(model, state, action)
    probabilities = np.zeros((len(state), N, D))
    for b in range(len(state)):
        for i in range(N):
            for d in range(D):
                probabilities[b, i, d] = max(edges[b, i, d], edges[b, N, d])
    return probabilities


def slow_slots(model, state, action, masks, alive):
    """psi_r of the masked parents (Eq. 2), slot by slot: standardised rewards [B, N + 1], 0 for the dead."""
    rewards = np.zeros((len(state), M))
    for b in range(len(state)):
        parents = slow_parents(model, state, action, b)
        for i in [*np.flatnonzero(alive[b]), N]:
            identity = [1.0 if j == i else 0.0 for j in range(M)]
            x = np.concatenate([masks[b, i] * parents, identity])
            rewards[b, i] = perceptron(numpy_weights(model.reward_network), x)[0]
    return rewards


def slow_credit(model, state, action, team=None, alive=None):
    """Eq. 6: what an agent's slot says beyond its mean is the agent's; whatever else there is, the living share."""
    edges, _ = slow_edges(model, state, action)
    alive = np.ones((len(state), N), bool) if alive is None else alive.numpy()
    slots = slow_slots(model, state, action, (edges >= model.h).astype(float), alive)
    usual, mean, std = model.slot_mean.double().numpy(), float(model.reward_mean), float(model.reward_std)
    credit = np.zeros((len(state), N))
    for b in range(len(state)):
        whole = slots[b].sum() * std + mean if team is None else float(team[b])
        living = np.flatnonzero(alive[b])
        owned = {i: (slots[b, i] - usual[i]) * std for i in living}
        for i in living:
            credit[b, i] = owned[i] + (whole - sum(owned.values())) / len(living)
    return credit


def slow_prices(lambda1, lambda2, anchor):
    """What an edge costs, [N + 1, D]: the common slot is to own things what an agent is to those of the others."""
    prices = np.zeros((M, D))
    for i in range(M):
        for d in range(D):
            price, owner = (lambda1, OWNER[d]) if d < S else (lambda2, (d - S) // A)
            if i < N:
                prices[i, d] = price if owner == i else price * anchor
            else:
                prices[i, d] = price / anchor if owner == -1 else price * anchor
    return prices


def gates_of(model, compute):
    """Calls compute() and looks at what the reward network was given: the result, that input [B, N + 1, D + N + 1]."""
    seen = []
    hook = model.reward_network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    result = compute()
    hook.remove()
    (given,) = seen
    return result, given


def drawn_gates(model, given, state, action):
    """The gates [B, N + 1, D], 0 or 1, behind a masked input that gates_of has seen."""
    parents = np.array([slow_parents(model, state, action, b) for b in range(len(state))])  # [B, D]
    gates = given[..., :D].double().numpy() / parents[:, None]
    np.testing.assert_allclose(gates, np.round(gates), atol=1e-4)
    assert set(np.unique(np.round(gates))) <= {0.0, 1.0}
    return np.round(gates)


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
def test_edge_probabilities(graph):
    """Eq. 3: wrong if the mask of an agent were another's, left out the common slot, or a fixed graph varied."""
    model, (state, action, _) = make(graph), make_batch()
    state_edges, action_edges = model.probabilities(state, action)
    assert state_edges.shape == (B, N, S) and action_edges.shape == (B, N, N * A)
    expected = slow_probabilities(model, state, action)
    np.testing.assert_allclose(torch.cat([state_edges, action_edges], 2).numpy(), expected, rtol=1e-4, atol=1e-6)
    if graph == "dynamic":
        assert expected.std(0).max() > 0.01  # they do depend on the row, or the line above would prove little
    if graph != "full":
        own = slow_edges(model, state, action)[0][:, :N] == expected
        assert 0 < own.mean() < 1  # now the own slot's edge was the more probable one, now the common slot's


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("h", [0.1, 0.8])
@pytest.mark.parametrize("recorded", [False, True])
def test_assignment(graph, h, recorded):
    """Eq. 6: wrong if edges below h still counted, gates were soft, or rewards came in standardised units."""
    model, (state, action, team) = make(graph, h=h), make_batch()
    masks = (slow_edges(model, state, action)[0] >= h).astype(float)  # [B, N + 1, D]
    if graph != "full":
        assert 0 < masks.mean() < 1
    given_team = (team,) if recorded else ()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assigned, given = gates_of(model, lambda: model.assign(state, action, *given_team))
    np.testing.assert_allclose(assigned.numpy(), slow_credit(model, state, action, *given_team), rtol=1e-4, atol=1e-3)
    assert not assigned.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    parents = np.array([slow_parents(model, state, action, b) for b in range(B)])  # [B, D]
    np.testing.assert_allclose(given[..., :D].numpy(), masks * parents[:, None], atol=1e-5)
    state_masks, action_masks = model.masks(state, action)
    expected = (slow_probabilities(model, state, action) >= h).astype(float)
    np.testing.assert_array_equal(torch.cat([state_masks, action_masks], 2).numpy(), expected)


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("recorded", [False, True])
def test_assignment_among_the_living(graph, recorded):
    """Wrong if the dead earned something, were counted in the even split, or took a part of the team reward away."""
    model, (state, action, team), alive = make(graph), make_batch(), make_alive(True)
    given = team if recorded else None
    credit = model.assign(state, action, given, alive)
    np.testing.assert_allclose(credit.numpy(), slow_credit(model, state, action, given, alive), rtol=1e-4, atol=1e-3)
    assert (credit[~alive] == 0).all() and (credit[alive] != 0).all()
    if recorded:
        somebody = alive.any(1)
        torch.testing.assert_close(credit.sum(1)[somebody], team[somebody])
    torch.testing.assert_close(model.assign(state, action, given, alive.float()), credit)


@pytest.mark.parametrize("graph", ["dynamic", "full"])
def test_all_alive_is_the_default(graph):
    """None and all ones are the same numbers to the last bit, in credit, loss, statistics and report."""
    found, (state, action, team), truth = [], make_batch(), torch.randn(B, N)
    for alive in (None, torch.ones(B, N, dtype=torch.bool)):
        model = make(graph)
        numbers = [model.assign(state, action, team, alive), model.assign(state, action, alive=alive)]
        for individual in (None, truth):
            torch.manual_seed(4)
            numbers += [*model.loss(state, action, team, individual, alive), *model.state_dict().values()]
            numbers += model.report(state, action, team, individual, alive).values()
        found.append(numbers)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_whoever_is_not_there_keeps_its_mean():
    """An agent that is alive in no row of a minibatch has earned nothing that could be averaged."""
    model, (state, action, team) = make("dynamic"), make_batch()
    alive, before = torch.ones(B, N, dtype=torch.bool), model.slot_mean.clone()
    alive[:, 1] = False
    model.loss(state, action, team, None, alive)
    assert (model.slot_mean == before).tolist() == [slot == 1 for slot in range(M)]


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
def test_credit_adds_up_to_the_recorded_team_reward(graph):
    """Whatever the model predicts: what it does not explain is not lost, but split evenly."""
    model, (state, action, team) = make(graph), make_batch()
    credit, predicted = model.assign(state, action, team), model.assign(state, action)
    torch.testing.assert_close(credit.sum(1), team)
    rest = credit - predicted
    torch.testing.assert_close(rest, rest[:, :1].expand(B, N), rtol=0, atol=1e-4)
    assert rest.abs().min() > 0.01  # or it would say nothing


def test_what_is_constant_is_split_evenly():
    """The units: a predictor that knows nothing but whose slot it is must answer equal parts, whatever it says."""
    model, (state, action, team) = make("fixed"), make_batch()
    with torch.no_grad():
        model.edge_logits.fill_(-20)
        layers = numpy_weights(model.reward_network)
        constants = [perceptron(layers, np.array([0.0] * D + [float(i == j) for j in range(M)]))[0] for i in range(M)]
        model.slot_mean.copy_(torch.tensor(constants))
    assert np.std(constants) > 0.01
    torch.testing.assert_close(model.assign(state, action, team), (team[:, None] / N).expand(B, N))
    whole = torch.tensor(sum(constants), dtype=torch.float32) * model.reward_std + model.reward_mean
    torch.testing.assert_close(model.assign(state, action), (whole / N).expand(B, N))
    assert abs(float(model.reward_mean) - 40) < 2 and abs(float(model.reward_std) - 10) < 1


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_loss(graph, individual, dead):
    """Eq. 4 and 5 with the gates that were drawn: wrong for any other error, price, owner or sum in the L1 term."""
    lambda1, lambda2, anchor = 0.03, 0.2, 4.0
    model, (state, action, team) = make(graph, lambda1=lambda1, lambda2=lambda2, anchor=anchor), make_batch()
    truth = torch.randn(B, N) * 10 + 13 if individual else None
    usual, unexplained = model.slot_mean.double().numpy().copy(), float(model.unexplained)
    alive = make_alive(dead)
    (loss, error), given = gates_of(model, lambda: model.loss(state, action, team, truth, alive if dead else None))

    slots = slow_slots(model, state, action, drawn_gates(model, given, state, action), alive)
    mean, std = float(model.reward_mean), float(model.reward_std)
    expected_error = 0.0
    for b in range(B):
        if truth is None:
            expected_error += (slots[b].sum() - (float(team[b]) - mean) / std) ** 2 / B
        else:
            living = np.flatnonzero(alive[b])
            for i in living:
                prediction = slots[b, i] + slots[b, N] / len(living)
                expected_error += (prediction - (float(truth[b, i]) - mean / len(living)) / std) ** 2 / B
    penalty, prices = 0.0, slow_prices(lambda1, lambda2, anchor)
    edges, varying = slow_edges(model, state, action)
    for b in range(B):
        for i in range(M):
            for d in range(D):
                penalty += prices[i, d] * (edges[b, i, d] + abs(varying[b, i, d])) / B
    if graph == "full":
        penalty = 0.0
    else:
        unexplained += (min(expected_error, 1.0) - unexplained) / 100
        assert penalty > 0.1
    np.testing.assert_allclose(error.item(), expected_error, rtol=1e-4)
    np.testing.assert_allclose(loss.item(), expected_error + (1 - unexplained) * penalty, rtol=1e-4)
    np.testing.assert_allclose(model.unexplained.item(), unexplained, rtol=1e-5)
    if not individual:  # where each prediction has a target of its own, its constant is the agent's
        for i in range(M):  # the usual prediction for an agent is that for its life
            there = alive[:, i].numpy() if i < N else np.ones(B, bool)
            usual[i] += (slots[there, i].mean() - usual[i]) / 100
    np.testing.assert_allclose(model.slot_mean.numpy(), usual, rtol=1e-4, atol=1e-5)
    assert not error.requires_grad


def test_the_penalty_grows_with_what_is_explained():
    """Nothing explained, nothing charged; an error beyond the team reward's variance must not pay for edges."""
    model, (state, action, _) = make("fixed", lambda1=0.1, lambda2=0.1), make_batch()
    model.unexplained.fill_(1.0)
    for factor, errors in [(100.0, "large"), (0.0, "small")]:
        with torch.no_grad():
            for parameter in model.reward_network[-1].parameters():
                parameter.mul_(factor)
        followed = float(model.unexplained)
        for _ in range(30):
            loss, error = model.loss(state, action, model.reward_mean.expand(B))
            followed = 0.99 * followed + 0.01 * min(float(error), 1.0)
            np.testing.assert_allclose(model.unexplained.item(), followed, rtol=1e-5)
            if errors == "large":
                assert error > 1 and loss == error
            else:
                assert error == 0 and loss > 0
    np.testing.assert_allclose(model.unexplained.item(), 0.99**30, rtol=1e-5)


@pytest.mark.parametrize("anchor", [5.0, 1.0])
def test_prices_and_where_the_edges_start(anchor):
    """Own things to the owner, nobody's to all; the cheaper an edge, the wider open it starts."""
    model = CausalModel(N, S, A, lambda1=0.5, lambda2=0.25, anchor=anchor, state_owner=OWNER)
    prices = slow_prices(0.5, 0.25, anchor)
    np.testing.assert_allclose(model.edge_price.numpy(), prices, rtol=1e-6)
    factors = prices / slow_prices(0.5, 0.25, 1.0)
    for i in range(M):
        for d in range(D):
            factor = factors[i, d]
            assert model.edge_logits[i, d].item() == (4 if factor == 1 else 0 if factor > 1 else 6)
    state, action, _ = make_batch()
    torch.testing.assert_close(  # and the part that depends on the state starts at zero
        torch.cat(model.probabilities(state, action), dim=2),
        torch.maximum(model.edge_logits[:N], model.edge_logits[N:]).sigmoid().expand(B, N, D),
    )
    if anchor == 1:
        assert (model.edge_price[:, :S] == 0.5).all() and (model.edge_price[:, S:] == 0.25).all()
    # A state without owners is nobody's: cheap for the common slot alone.
    unowned = CausalModel(N, S, A, lambda1=0.5, lambda2=0.25, anchor=anchor)
    torch.testing.assert_close(unowned.edge_price[:N, :S], torch.full((N, S), 0.5 * anchor))
    torch.testing.assert_close(unowned.edge_price[N, :S], torch.full((S,), 0.5 / anchor))
    assert torch.equal(unowned.edge_price[:, S:], model.edge_price[:, S:])


@pytest.mark.parametrize("graph", ["dynamic", "fixed"])
def test_gates_are_binary_and_drawn_with_their_probability(graph):
    """Training with soft gates would let the L1 norm shrink without an edge going away (a gate is 0 or 1, afresh)."""
    model, (state, action, team) = make(graph), make_batch()
    draws = []
    for _ in range(2000):
        _, given = gates_of(model, lambda: model.loss(state, action, team))
        draws.append(given[..., :D])
    parents = torch.tensor(np.array([slow_parents(model, state, action, b) for b in range(B)]))[:, None]  # [B, 1, D]
    gates = torch.stack(draws) / parents  # [2000, B, N + 1, D]
    assert ((gates.abs() < 1e-4) | ((gates - 1).abs() < 1e-4)).all()
    np.testing.assert_allclose(gates.mean(0), slow_edges(model, state, action)[0], atol=0.06)  # > 5 sigma
    # Each slot, row and edge draws for itself.
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
        plain, priced = make(graph, lambda1=0.0, lambda2=0.0), make(graph, lambda1=0.1, lambda2=0.3, anchor=2.0)
        torch.manual_seed(5)
        with_price = torch.autograd.grad(priced.loss(state, action, team)[0], priced.edge_logits)[0]
        torch.manual_seed(5)
        without = torch.autograd.grad(plain.loss(state, action, team)[0], plain.edge_logits)[0]
        edges, weight = torch.sigmoid(priced.edge_logits.detach()), 1 - priced.unexplained
        expected = weight * torch.tensor(slow_prices(0.1, 0.3, 2.0)).float() * edges * (1 - edges)
        torch.testing.assert_close(with_price - without, expected, rtol=1e-3, atol=1e-4)


def test_a_closed_edge_can_come_back():
    """Below -3 an edge is hardly ever drawn, and what is never tried never pays: training must not leave it there."""
    model, (state, action, team) = make("fixed"), make_batch()
    before = model.edge_logits.detach().clone()
    assert (before < -3).any() and (before > -3).any()
    model.loss(state, action, team)
    assert torch.equal(model.edge_logits.detach(), before.clamp(min=-3.0))
    assert torch.sigmoid(torch.tensor(-3.0)) < model.h  # there it is still closed

    torch.manual_seed(2)
    model = CausalModel(2, 2, 1, "fixed", state_owner=[0, 1], hidden_dim=32)
    with torch.no_grad():
        model.edge_logits.fill_(-30.0)
    state, action = torch.randn(2000, 2), torch.rand(2000, 2, 1) * 2 - 1
    team = 2 * state[:, 0] - 3 * action[:, 1, 0]
    model.fit_statistics(state, team)
    fit(model, state, action, team, iterations=400, batch=256)
    masks = torch.cat(model.masks(state, action), dim=2)[0]  # [2, 4]: both states, both actions
    assert masks[0, 0] == 1 and masks[1, 3] == 1  # what earns something is open again,
    assert (masks[:, 1:3] == 0).all()  # the rest is not


def test_parameter_groups_hold_every_parameter_once():
    """A parameter in no group would never learn; in two, Adam would step it twice."""
    model = make("dynamic")
    groups = model.parameter_groups(learning_rate=3e-3, edge_learning_rate=2e-2)
    listed = [id(p) for group in groups for p in (group.update(params=list(group["params"])) or group["params"])]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.edge_logits)] == 2e-2
    assert all(rate[id(p)] == 3e-3 for p in model.reward_network.parameters())
    assert all(rate[id(p)] == pytest.approx(5e-4) for p in model.edge_network.parameters())


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
    assert model.slot_mean.tolist() == [0] * M and model.unexplained == 1  # before anything is learned
    model, (states, actions, teams) = make("dynamic"), make_batch()
    other = CausalModel(N, S, A, hidden_dim=16)  # without the owners, which only training needs
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.assign(states, actions, teams), model.assign(states, actions, teams))
    assert other.unexplained == model.unexplained


# ---- report ----


def slow_ranks(values):
    """How many of the values are smaller, for each of them."""
    return np.array([sum(other < value for other in values) for value in values], float)


@pytest.mark.parametrize("graph", ["dynamic", "full"])
@pytest.mark.parametrize("dead", [False, True])
def test_report(graph, dead):
    """Every number by hand; without the individual rewards none that needs them."""
    model = make(graph, h=0.5)
    torch.manual_seed(3)
    state, action, truth = 3 + 2 * torch.randn(40, S), torch.rand(40, N, A) * 2 - 1, 13 + 5 * torch.randn(40, N)
    truth += 0.5 * model.assign(state, action)  # so that the ranks have something in common
    alive = torch.ones(40, N, dtype=torch.bool)
    if dead:  # each agent in one row: their credit, 0 in all such rows, would else be tied
        alive[[3, 3, 8], [0, 1, 2]] = False
    truth *= alive
    team = truth.sum(1) + torch.randn(40)
    given = alive if dead else None
    report = {name: float(value) for name, value in model.report(state, action, team, truth, given).items()}

    credit = slow_credit(model, state, action, team, alive)
    predicted = slow_credit(model, state, action, alive=alive).sum(1)
    masks = slow_probabilities(model, state, action) >= 0.5
    individual, recorded = truth.double().numpy(), team.double().numpy()
    even = np.array([[alive[b, i].item() * recorded[b] / alive[b].sum().item() for i in range(N)] for b in range(40)])
    correlations = []
    for i in range(N):
        one, other = slow_ranks(credit[:, i]), slow_ranks(individual[:, i])
        assert len(set(one)) == len(set(other)) == 40  # no ties
        covariance = sum((one[b] - one.mean()) * (other[b] - other.mean()) for b in range(40))
        correlations.append(covariance / np.sqrt(((one - one.mean()) ** 2).sum() * ((other - other.mean()) ** 2).sum()))
    expected = {
        "state_density": masks[..., :S].mean(),
        "action_density": masks[..., S:].mean(),
        "team_nmse": ((predicted - recorded) ** 2).mean() / recorded.var(ddof=1),
        "credit_mse": ((credit - individual) ** 2).mean(),
        "credit_mae": np.abs(credit - individual).mean(),
        "even_mse": ((even - individual) ** 2).mean(),
        "even_mae": np.abs(even - individual).mean(),
        "credit_rank": np.mean(correlations),
    }
    expected["credit_skill"] = 1 - expected["credit_mse"] / expected["even_mse"]
    assert report == pytest.approx(expected, rel=1e-4)
    assert np.ptp(correlations) > 0.01 and 0.01 < report["credit_rank"] < 0.99
    assert model.report(state, action, team).keys() == {"state_density", "action_density", "team_nmse"}
    # Where all agents earn the same, the even split is exact but for rounding, and nothing can be better.
    alike = truth[:, :1].expand(-1, N)
    assert report.keys() - model.report(state, action, alike.sum(1), alike).keys() == {"credit_skill"}


@pytest.mark.parametrize("known", [False, True])
def test_report_leaves_out_what_is_not_defined(known):
    """Where the team reward is constant, or there is one row, no number may be NaN, infinite or made up."""
    model, (state, action, team) = make("dynamic"), make_batch()
    truth = team[:, None] * torch.tensor([0.5, 0.3, 0.2]) if known else None
    everything = model.report(state, action, team, truth)
    constant = torch.full((B,), 40.1)
    parts = [constant[:, None] * torch.tensor([0.5, 0.3, 0.2]) + torch.randn(B, N), truth[:1]] if known else [None] * 2
    without = [
        (model.report(state, action, constant, parts[0]), {"team_nmse"}),
        (model.report(state[:1], action[:1], team[:1], parts[1]), {"team_nmse", "credit_rank"}),
    ]
    for report, missing in without:
        assert report.keys() == everything.keys() - missing
        assert all(value.isfinite() for value in report.values())
    assert ("credit_rank" in everything) == known and "team_nmse" in everything
    assert all(value.isfinite() for value in everything.values())


# ---- whose own a dimension is ----


def slow_owners(observations):
    """Each dimension in turn, regressed on all that the other agents see: its owner, or -1."""
    x, owner = observations.double().numpy(), []
    transitions, agents, size = x.shape
    for i in range(agents):
        for d in range(size):
            target = x[:, i, d]
            seen = [x[:, j, k] for j in range(agents) if j != i for k in range(size)]
            regressors = np.stack([np.ones(transitions), *seen], axis=1)
            rest = target - regressors @ np.linalg.lstsq(regressors, target, rcond=None)[0]
            owner.append(i if target.std() > 1e-5 and rest.var() > 0.01 * target.var() else -1)
    return owner


def made_up_observations(transitions):
    """Three agents, six dimensions, at offsets and in units that must not matter; and whose own each dimension is."""
    shared, own = torch.randn(transitions), torch.randn(transitions, 3, 3)
    x = torch.zeros(transitions, 3, 6)
    x[:, :, 0] = own[:, :, 0]  # everybody's own
    x[:, :, 1] = 7.1  # constant
    x[:, :, 2] = shared[:, None] * torch.tensor([1.0, -3.0, 0.5])  # all see the same, each in its own units
    x[:, :, 3] = shared[:, None] + own[:, :, 1] * torch.tensor([0.0025, 0.0225, 0.0225]).sqrt()  # nearly the same
    x[:, 0, 4] = x[:, 1, 0] - 2 * x[:, 2, 0]  # what the others see; and what one of them sees follows from the rest
    x[:, 1, 4] = x[:, 2, 4] = 0.0
    x[:, :, 5] = own[:, :, 2]
    x[:, 1, 5] = x[:, 2, 5]  # two of three see the same
    x = x * torch.tensor([1.0, 1.0, 100.0, 1e-3, 1.0, 20.0]) + torch.tensor([0.0, 0.0, 50.0, 3.0, -4.0, 1000.0])
    first, second, third = [0, -1, -1, -1, -1, 0], [-1, -1, -1, 1, -1, -1], [-1, -1, -1, 2, -1, -1]
    return x, [*first, *second, *third]


@pytest.mark.parametrize("transitions", [600, 10_001])
def test_owners(transitions):
    """Own is what no other agent sees: not what is constant, shared, or follows from what the others see."""
    observations, expected = made_up_observations(transitions)
    assert slow_owners(observations) == expected
    assert owners(observations) == expected


def test_everything_observed_can_be_own():
    """With a share of 0, whatever varies is its observer's own; with a larger one, less is than by default."""
    observations, expected = made_up_observations(10_001)
    own = owners(observations, own_share=0.0)
    varies = (observations.std(0) > 1e-6).tolist()
    assert own == [agent if varies[agent][k] else -1 for agent in range(3) for k in range(6)]
    assert own != expected and set(owners(observations, own_share=1.1)) == {-1}


def test_owner_of_a_single_agent():
    """With nobody else to see it, everything that varies is the agent's own."""
    x = torch.stack([torch.randn(50), torch.full((50,), 7.1)], dim=1)
    assert owners(x[:, None]) == [0, -1]


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


def r_squared(found, rewards):
    """Of credit [T, N]: what is constant in a reward is nobody's (any split of it adds up), so that does not count."""
    found, rewards = found - found.mean(0), rewards - rewards.mean(0)
    return 1 - float((found - rewards).square().mean() / rewards.square().mean())


@pytest.mark.parametrize("graph", ["fixed", "dynamic"])
def test_recovers_a_known_graph_and_individual_rewards(graph):
    """From the team reward alone: who earned what and why. F1 of the edges and R^2 of the rewards (held out)."""
    torch.manual_seed(1)
    state, action, rewards, edges = synthetic_problem(54_000)
    model = CausalModel(3, 24, 2, graph, state_owner=[i for i in range(3) for _ in range(8)], hidden_dim=64)
    team = rewards.sum(1)
    model.fit_statistics(state[:50_000], team[:50_000])
    fit(model, state[:50_000], action[:50_000], team[:50_000], iterations=1000, batch=512)

    state, action, rewards, team = state[50_000:], action[50_000:], rewards[50_000:], team[50_000:]
    mask = (torch.cat(model.masks(state, action), dim=2).mean(0) > 0.5).float()  # [3, 30]
    f1 = 2 * (mask * edges).sum() / (mask.sum() + edges.sum())
    assert r_squared(team[:, None].expand(-1, 3) / 3, rewards) < 0.4  # what a split into equal parts would reach
    assert f1 >= 0.95, f"F1 {f1:.3f}"
    for credit in (model.assign(state, action), model.assign(state, action, team)):
        assert r_squared(credit, rewards) >= 0.95, f"R^2 {r_squared(credit, rewards):.3f}"
    numbers = model.report(state, action, team, rewards)
    assert numbers["team_nmse"] < 0.05 and numbers["credit_rank"] > 0.95


@pytest.mark.parametrize("own", [0.0, 1.0], ids=["shared", "shared and own"])
@pytest.mark.parametrize("graph", ["fixed", "dynamic"])
def test_what_is_nobodys_own_is_split_evenly(graph, own):
    """A team reward for what all agents see (and, `own`, for what each sees and does alone): equal parts of it."""
    torch.manual_seed(1)
    alone, everybody = torch.randn(24_000, 3, 3), torch.randn(24_000, 1, 2).expand(-1, 3, -1)
    observations, action = torch.cat([alone, everybody], dim=2), torch.rand(24_000, 3, 2) * 2 - 1  # [T, 3, 5]
    shared = 2 * everybody[:, 0, 0] + everybody[:, 0, 1].square()
    rewards = shared[:, None] / 3 + own * (1.5 * alone[:, :, 0] * action[:, :, 0] + alone[:, :, 1].sin())  # [T, 3]
    team, state = rewards.sum(1), observations.flatten(1)
    owner = owners(observations)
    assert owner == [0, 0, 0, -1, -1, 1, 1, 1, -1, -1, 2, 2, 2, -1, -1]
    model = CausalModel(3, 15, 2, graph, state_owner=owner, hidden_dim=64)
    model.fit_statistics(state[:20_000], team[:20_000])
    fit(model, state[:20_000], action[:20_000], team[:20_000], iterations=1000, batch=512)

    state, action, rewards, team = state[20_000:], action[20_000:], rewards[20_000:], team[20_000:]
    credit = model.assign(state, action, team)
    even = team[:, None] / 3
    if own:
        assert r_squared(even.expand(-1, 3), rewards) < 0.6 and r_squared(credit, rewards) >= 0.95
    else:
        assert (credit - even).square().mean().sqrt() < 0.02 * even.std()
    # Another agent's eyes on the same thing earn it nothing: all that can be said of the shared part is the sum.
    other = state.view(-1, 3, 5).clone()
    other[:, :, 3:] = other.flip(0)[:, :, 3:]
    moved = model.assign(other.flatten(1), action) - model.assign(state, action)  # [T, 3]
    deviation = (moved - moved.mean(1, keepdim=True)).square().mean().sqrt()
    assert moved.mean(1).std() > 0.5 and deviation < 0.1 * moved.mean(1).std(), f"{deviation / moved.mean(1).std():.3f}"


def test_refuses_what_torch_would_broadcast():
    """A reward of shape [B, 1] would broadcast against [B] to a wrong loss; an unknown graph would pass for another."""
    model = CausalModel(2, 4, 1)
    state, action = torch.randn(8, 4), torch.randn(8, 2, 1)
    with pytest.raises(ValueError, match="team_reward"):
        model.loss(state, action, torch.randn(8, 1))
    with pytest.raises(ValueError, match="individual_rewards"):
        model.loss(state, action, torch.randn(8), torch.randn(8, 1))
    with pytest.raises(ValueError, match="alive"):
        model.loss(state, action, torch.randn(8), alive=torch.ones(8, 1))
    with pytest.raises(ValueError, match="graph"):
        CausalModel(2, 4, 1, graph="dynamc")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [[0] * (S - 1), [0] * (S + 1), [], [N] + [0] * (S - 1), [-2] * S, [0.5] * S])
def test_refuses_owners_that_do_not_exist(wrong):
    """One owner for each state dimension: an agent's number, or -1 for nobody."""
    with pytest.raises(ValueError, match="state_owner"):
        CausalModel(N, S, A, state_owner=wrong)
    for right in (None, [-1] * S, [N - 1] * S, OWNER):
        CausalModel(N, S, A, state_owner=right)
