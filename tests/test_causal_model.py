"""The causal model against slow NumPy loops, and on problems whose causal graph and individual rewards are known."""

import itertools
import math

import numpy as np
import pytest
import torch

from causal_model import CausalModel, coalitions

B, N, A = 7, 3, 2  # batch, agents, action of one agent; two state dimensions belong to each agent
S = 2 * N  # joint state
D = S + N * A  # possible parents of one reward


def owner_of(n):
    """The last state dimension is nobody's."""
    return [d // 2 for d in range(2 * n - 1)] + [-1]


def owners(n):
    """Of all parents: whose own they are, [D]."""
    return torch.tensor(owner_of(n) + [d // A for d in range(n * A)])


def make(graph="dynamic", n=N, **arguments):
    """A model with every weight random, the zeros of the edge network included, and statistics that matter."""
    torch.manual_seed(0)
    arguments = {"hidden_dim": 16, "references": 3} | arguments
    model = CausalModel(n, 2 * n, A, owner_of(n), graph=graph, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        model.edge_logits.copy_(torch.randn_like(model.edge_logits) * 2 - 1)
    state, action = 3 + 2 * torch.randn(500, 2 * n), torch.rand(500, n, A) * 2 - 1
    model.fit_statistics(state, action, 40 + 10 * torch.randn(500))
    return model


def make_batch(n=N, rows=B):
    torch.manual_seed(1)
    return 3 + 2 * torch.randn(rows, 2 * n), torch.rand(rows, n, A) * 2 - 1, 40 + 10 * torch.randn(rows)


def make_alive(dead, n=N):
    """Who is alive, [B, n]: all, or nobody in one row, the first in another, the last in a third."""
    alive = torch.ones(B, n, dtype=torch.bool)
    alive[1], alive[2, 0], alive[4, -1] = not dead, not dead, not dead
    return alive


# ---- the same once more, slowly ----


def numpy_layers(*modules):
    """[(weight [out, in], bias [out])] of the linear layers."""
    layers = [layer for layer in modules if isinstance(layer, torch.nn.Linear)]
    return [[x.detach().double().numpy() for x in (layer.weight, layer.bias)] for layer in layers]


def perceptron(layers, x):
    for number, (weight, bias) in enumerate(layers):
        x = weight @ x + bias
        if number + 1 < len(layers):
            x = np.maximum(x, 0)
    return x


def slow_parents(model, state, action):
    """[B, D]: what a mask is laid over: the standardised state, then agent after agent's action.

    An action that is uniform over [-1, 1] has variance 1/3.
    """
    mean, std = model.state_mean.double().numpy(), model.state_std.double().numpy()
    rows = []
    for b in range(len(state)):
        row = [(float(state[b, s]) - mean[s]) / std[s] for s in range(state.shape[1])]
        rows.append(row + [float(a) / np.sqrt(1 / 3) for acted in action[b] for a in acted])
    return np.array(rows)


def slow_edges(model, parents):
    """Eq. 3 for one row [D], edge by edge: probabilities, and the part of the logits that varies, both [N, D]."""
    own = model.edge_logits.detach().double().numpy()
    edges, varying = np.ones(own.shape), np.zeros(own.shape)
    output = perceptron(numpy_layers(*model.edge_network), parents)
    for i, d in np.ndindex(*own.shape):
        if model.graph == "dynamic":
            varying[i, d] = np.tanh(output[i * len(parents) + d])
        if model.graph != "full":
            edges[i, d] = 1 / (1 + np.exp(-own[i, d] - 5 * varying[i, d]))
    return edges, varying


def slow_slots(model, parents, masks, alive):
    """psi_r of the masked parents (Eq. 2) of one row, slot by slot: standardised rewards [N], 0 for the dead."""
    (weight, bias), *layers = numpy_layers(model.first_layer, *model.reward_network)
    identity = model.identity.detach().double().numpy()
    rewards = np.zeros(len(identity))
    for i in np.flatnonzero(alive):
        hidden = weight @ (masks[i] * parents) + bias + identity[i]
        rewards[i] = perceptron(layers, np.maximum(hidden, 0))[0]
    return rewards


def slow_hard(model, parents, alive):
    """The slots [N] of one row with the edges that count (Eq. 6)."""
    return slow_slots(model, parents, slow_edges(model, parents)[0] >= model.h, alive)


def slow_value(model, parents, alive, present):
    """v(S): the mean over references of the learned sum, with the absent agents' dimensions from the reference."""
    values = []
    for reference in model.references.double().numpy():
        mixed = parents.copy()
        for d, owner in enumerate(owners(len(model.identity)).tolist()):
            if owner >= 0 and owner not in present:
                mixed[d] = reference[d]
        values.append(slow_hard(model, mixed, alive).sum())
    return np.mean(values)


def slow_shapley(model, parents, alive, orders):
    """The agents come one after the other, in every order: what each adds when it comes, [N]."""
    shares = np.zeros(len(model.identity))
    for order in orders:
        present, before = [], slow_value(model, parents, alive, [])
        for agent in order:
            present.append(agent)
            after = slow_value(model, parents, alive, present)
            shares[agent] += (after - before) / len(orders)
            before = after
    return shares


def slow_credit(model, state, action, team, alive, orders=None):
    """Shares of the living in the team reward's units, and of what is left an even part for each of them."""
    references = model.references.double().numpy()
    usual = np.mean([slow_hard(model, row, np.ones(len(model.identity))) for row in references], axis=0)
    credit = np.zeros(alive.shape)
    for b, parents in enumerate(slow_parents(model, state, action)):
        living = np.flatnonzero(alive[b])
        shares = slow_hard(model, parents, alive[b]) - usual
        if model.share == "shapley":
            shares = slow_shapley(model, parents, alive[b].numpy(), orders)
        shares = shares * float(model.reward_std)
        for i in living:
            credit[b, i] = shares[i] + (float(team[b]) - sum(shares[j] for j in living)) / len(living)
    return credit


def slow_prices(lambda1, lambda2, anchor):
    """What an edge costs, [N, D]: more from what is another agent's."""
    prices, owner = np.zeros((N, D)), owners(N)
    for i, d in np.ndindex(N, D):
        prices[i, d] = (lambda1 if d < S else lambda2) * (1 if owner[d] in (i, -1) else anchor)
    return prices


def gates_of(model, compute):
    """Calls compute() and looks at what the reward network was given: the result, and that input [B, N, D]."""
    seen = []
    hook = model.first_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    result = compute()
    hook.remove()
    return result, *seen


# ---- masks and credit ----


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
def test_edge_probabilities(graph):
    """Eq. 3: wrong if the mask of an agent were another's, or a fixed graph varied."""
    model, (state, action, _) = make(graph), make_batch()
    state_edges, action_edges = model.probabilities(state, action)
    assert state_edges.shape == (B, N, S) and action_edges.shape == (B, N, N * A)
    expected = np.array([slow_edges(model, row)[0] for row in slow_parents(model, state, action)])
    np.testing.assert_allclose(torch.cat([state_edges, action_edges], 2).numpy(), expected, rtol=1e-4, atol=1e-6)
    assert graph != "dynamic" or expected.std(0).max() > 0.01  # or the line above would prove little


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("h", [0.1, 0.8])
@pytest.mark.parametrize("dead", [False, True])
def test_slots(graph, h, dead):
    """Eq. 6: wrong if edges below h still counted, gates were soft, or rewards came in standardised units."""
    model, (state, action, team), alive = make(graph, h=h, share="slots"), make_batch(), make_alive(dead)
    credit = model.assign(state, action, team, alive if dead else None)
    np.testing.assert_allclose(credit.numpy(), slow_credit(model, state, action, team, alive), rtol=1e-4, atol=1e-3)
    assert not credit.requires_grad
    parents = slow_parents(model, state, action)
    assert graph == "full" or 0 < np.mean([slow_edges(model, row)[0] >= h for row in parents]) < 1
    sums = np.array([slow_hard(model, *row).sum() for row in zip(parents, alive.numpy(), strict=True)])
    predicted = model.predict(state, action, alive if dead else None).numpy()  # of what has a gradient there is none
    np.testing.assert_allclose(
        predicted, sums * float(model.reward_std) + float(model.reward_mean), rtol=1e-4, atol=1e-3
    )


def orders_of(n):
    """All orders of up to four agents; of more, two that were drawn once for all, forwards and backwards."""
    if n <= 4:
        return [*itertools.permutations(range(n))]
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(n, generator=g).tolist() for _ in range(2)]
    return drawn + [order[::-1] for order in drawn]


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_shapley(n, dead):
    """What each agent adds to the learned sum, over the orders; the references are looked at one by one."""
    model, (state, action, team), alive = make(n=n, references=2), make_batch(n), make_alive(dead, n)
    credit = model.assign(state, action, team, alive if dead else None)
    expected = slow_credit(model, state, action, team, alive, orders_of(n))
    np.testing.assert_allclose(credit.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert not credit.requires_grad
    model.share = "slots"
    assert n == 1 or (model.assign(state, action, team, alive) - credit).abs().max() > 0.1  # it is not Eq. 6


def test_many_rows_at_once():
    """They are credited in parts: wrong if rows, or who is alive in them, were mixed up between these."""
    model, (state, action, team), alive = make(), make_batch(rows=700), torch.rand(700, N) < 0.7
    credit = model.assign(state, action, team, alive)
    rows = [model.assign(*(x[b : b + 1] for x in (state, action, team, alive))) for b in range(700)]
    torch.testing.assert_close(credit, torch.cat(rows), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("share", ["shapley", "slots"])
def test_credit_adds_up_to_the_recorded_team_reward(graph, share):
    """Whatever the model predicts; the dead earn nothing and take nothing away, and where nobody lives nobody earns."""
    model, (state, action, team), alive = make(graph, share=share), make_batch(), make_alive(True)
    credit, somebody = model.assign(state, action, team, alive), alive.any(1)
    torch.testing.assert_close(credit.sum(1)[somebody], team[somebody])
    assert (credit[~alive] == 0).all() and (credit[alive] != 0).all()
    assert torch.equal(model.assign(state, action, team, alive.float()), credit)
    # What the model does not explain is split evenly among the living.
    more = model.assign(state, action, team + 6, alive) - credit
    torch.testing.assert_close(more, 6 * alive / alive.sum(1, keepdim=True).clamp(min=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", ["shapley", "slots"])
def test_all_alive_is_the_default(share):
    """None and all ones are the same numbers to the last bit, in credit, loss and report."""
    found, (state, action, team), truth, model = [], make_batch(), torch.randn(B, N), make(share=share)
    for alive in (None, torch.ones(B, N, dtype=torch.bool)):
        torch.manual_seed(4)
        numbers = [model.assign(state, action, team, alive), model.predict(state, action, alive)]
        numbers += model.loss(state, action, team, alive)
        found.append([*numbers, *model.report(state, action, team, alive, paid=truth).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("share", ["shapley", "slots"])
def test_what_is_constant_is_split_evenly(share):
    """A predictor that knows nothing but whose slot it is must answer equal parts, whatever it says."""
    model, (state, action, team) = make("fixed", share=share), make_batch()
    with torch.no_grad():
        model.edge_logits.fill_(-20)
    constants = slow_hard(model, np.zeros(D), np.ones(N))
    assert np.std(constants) > 0.01
    torch.testing.assert_close(model.assign(state, action, team), (team[:, None] / N).expand(B, N))
    whole = constants.sum() * float(model.reward_std) + float(model.reward_mean)
    torch.testing.assert_close(model.predict(state, action), torch.full((B,), whole, dtype=torch.float32))
    assert abs(float(model.reward_mean) - 40) < 2 and abs(float(model.reward_std) - 10) < 1


# ---- what makes it a Shapley value ----


@pytest.mark.parametrize("n", range(1, 9))
def test_coalitions(n):
    """Efficient: the shares add up to v(all) - v(nobody). Up to four agents, the weights of the textbook's formula."""
    members, weights = coalitions(n)
    assert members.dtype == torch.bool and members.shape == weights.T.shape
    size = members.sum(1)
    assert len({tuple(row) for row in members.tolist()}) == len(members)  # each is evaluated once
    torch.testing.assert_close(weights.sum(0), (size == n).float() - (size == 0).float())
    for agent in range(n):
        within = members[:, agent]
        assert (weights[agent][within] >= 0).all() and (weights[agent][~within] <= 0).all()
        for added, mean in ((within, 1.0), (~within, -1.0)):
            torch.testing.assert_close(weights[agent][added].sum(), torch.tensor(mean))
    assert len(members) == 2**n if n <= 4 else len(members) <= 4 * n
    if n <= 4:
        for agent, number in itertools.product(range(n), range(len(members))):
            others, sign = int(size[number] - members[number, agent].int()), 1 if members[number, agent] else -1
            formula = math.factorial(others) * math.factorial(n - others - 1) / math.factorial(n)
            assert weights[agent, number].item() == pytest.approx(sign * formula)
    assert all(torch.equal(*pair) for pair in zip(coalitions(n), (members, weights), strict=True))


@pytest.mark.parametrize("n", [3, 5])
def test_an_agent_that_changes_nothing(n):
    """Where no reward depends on an agent's variables and action, it gets its even part of what is unexplained."""
    model, (state, action, team) = make("fixed", n=n), make_batch(n)
    with torch.no_grad():
        model.edge_logits[:, owners(n) == 1] = -20
    credit, everybody = model.assign(state, action, team), np.ones(n)
    for b, parents in enumerate(slow_parents(model, state, action)):
        explained = slow_value(model, parents, everybody, range(n)) - slow_value(model, parents, everybody, [])
        assert credit[b, 1].item() == pytest.approx(
            (float(team[b]) - explained * float(model.reward_std)) / n, rel=1e-4
        )
    assert (credit - credit[:, 1:2])[:, [0, *range(2, n)]].abs().mean() > 0.1  # the others get something else
    other = state + 5 * (torch.tensor(owner_of(n)) == 1), action.clone()
    other[1][:, 1] = -action[:, 1]
    torch.testing.assert_close(model.assign(*other, team), credit)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_agents_that_do_the_same(n):
    """Where the sum treats two agents alike, and they are and do the same, they get the same."""
    state, action, team = make_batch(n)
    # The same two dimensions each; the last one is nobody's.
    state, owner = torch.cat([state, torch.randn(B, 1)], dim=1), [d // 2 for d in range(2 * n)] + [-1]
    model = CausalModel(n, 2 * n + 1, A, owner, graph="full", references=5)
    first, second = (torch.tensor([0, 1, 2 * n + 1, 2 * n + 2]) + 2 * agent for agent in range(2))
    state[:, 2:4], action[:, 1] = state[:, :2], action[:, 0]
    with torch.no_grad():
        model.identity.copy_(torch.randn_like(model.identity))
        model.first_layer.weight.mul_(5)
        model.first_layer.weight[:, second] = model.first_layer.weight[:, first]
        model.references.copy_(torch.randn_like(model.references))
        model.references[:, second] = model.references[:, first]
    credit = model.assign(state, action, team)
    torch.testing.assert_close(credit[:, 0], credit[:, 1])
    assert n == 2 or (credit[:, 2] - credit[:, 0]).abs().min() > 1e-3


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_shapley_is_eq_6_where_each_slot_is_its_own_agents(n, dead):
    """What only one agent causes is that agent's, whichever way it is asked for."""
    model, (state, action, team), alive = make("fixed", n=n), make_batch(n), make_alive(dead, n)
    with torch.no_grad():
        model.edge_logits.copy_(torch.where(owners(n) == torch.arange(n)[:, None], 4.0, -20.0))
    credit = model.assign(state, action, team, alive)
    model.share = "slots"
    torch.testing.assert_close(model.assign(state, action, team, alive), credit, rtol=1e-4, atol=1e-3)
    assert credit.std(1).mean() > 0.1


# ---- loss ----


def named(model):
    return [*model.named_parameters(), *model.named_buffers()]


def scale_slots(model, factor):
    with torch.no_grad():
        for parameter in model.reward_network[-1].parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("explained", [False, True])
def test_loss(graph, dead, explained):
    """Eq. 4 and 5 with the gates that were drawn: wrong for any other error, price, owner or sum in the L1 term.

    Where more than the team reward's variance is unexplained, nothing is charged. The model stays as it is.
    """
    lambda1, lambda2, anchor = 0.03, 0.2, 4.0
    model, (state, action, team) = make(graph, lambda1=lambda1, lambda2=lambda2, anchor=anchor), make_batch()
    alive, team = make_alive(dead), 40 + (team - 40) / 5
    scale_slots(model, 0.02 if explained else 3)
    before = {name: tensor.clone() for name, tensor in named(model)}
    (loss, error), given = gates_of(model, lambda: model.loss(state, action, team, alive if dead else None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in named(model))

    parents = slow_parents(model, state, action)
    gates = given.double().numpy() / parents[:, None]
    np.testing.assert_allclose(gates, np.round(gates), atol=1e-4)
    gates = np.round(gates)
    assert {*gates.ravel()} <= {0.0, 1.0}
    mean, std = float(model.reward_mean), float(model.reward_std)
    expected_error, penalty, prices = 0.0, 0.0, slow_prices(lambda1, lambda2, anchor)
    for b in range(B):
        slots = slow_slots(model, parents[b], gates[b], alive[b])
        expected_error += (slots.sum() - (float(team[b]) - mean) / std) ** 2 / B
        edges, varying = slow_edges(model, parents[b])
        for i, d in np.ndindex(N, D):
            penalty += prices[i, d] * (edges[i, d] + abs(varying[i, d])) / B
    assert expected_error < 0.8 if explained else expected_error > 1
    assert penalty > 0.1
    penalty = 0.0 if graph == "full" else max(0.0, 1 - expected_error) * penalty
    np.testing.assert_allclose(error.item(), expected_error, rtol=1e-4)
    np.testing.assert_allclose(loss.item(), expected_error + penalty, rtol=1e-4)
    assert not error.requires_grad


@pytest.mark.parametrize("anchor", [5.0, 1.0])
def test_prices_and_where_the_edges_start(anchor):
    """What is another agent's costs `anchor` times as much, and starts half open, the others wide open."""
    model = CausalModel(N, S, A, owner_of(N), lambda1=0.5, lambda2=0.25, anchor=anchor)
    np.testing.assert_allclose(model.edge_price.numpy(), slow_prices(0.5, 0.25, anchor), rtol=1e-6)
    foreign = torch.tensor(slow_prices(1.0, 1.0, 2.0) == 2)
    assert 0 < foreign.float().mean() < 1
    assert torch.equal(model.edge_logits.detach(), torch.where(foreign, 0.0, 4.0))
    state, action, _ = make_batch()
    torch.testing.assert_close(  # and the part that depends on the state starts at zero
        torch.cat(model.probabilities(state, action), dim=2), model.edge_logits.sigmoid().expand(B, N, D)
    )


@pytest.mark.parametrize("graph", ["dynamic", "fixed"])
def test_gates_are_binary_and_drawn_with_their_probability(graph):
    """Training with soft gates would let the L1 norm shrink without an edge going away (a gate is 0 or 1, afresh)."""
    model, (state, action, team) = make(graph), make_batch()
    draws = [gates_of(model, lambda: model.loss(state, action, team))[1] for _ in range(2000)]
    parents = slow_parents(model, state, action)
    gates = torch.stack(draws) / torch.tensor(parents)[:, None]  # [2000, B, N, D]
    assert ((gates.abs() < 1e-4) | ((gates - 1).abs() < 1e-4)).all()
    expected = np.array([slow_edges(model, row)[0] for row in parents])
    np.testing.assert_allclose(gates.mean(0), expected, atol=0.06)  # > 5 sigma
    # Each slot, row and edge draws for itself.
    centred = (gates - gates.mean(0)).flatten(1)
    correlation = torch.corrcoef(centred[:, (gates.std(0) > 0.2).flatten()].T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.15


@pytest.mark.parametrize("graph", ["dynamic", "fixed", "full"])
def test_gradients_of_the_loss(graph):
    """The straight-through gates must pass the error's gradient (not only the penalty's) to the edges."""
    model, (state, action, team) = make(graph, lambda1=0.0, lambda2=0.0), make_batch()
    model.loss(state, action, team)[0].backward()
    edges = [model.edge_logits, *model.edge_network.parameters()]
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if all(p is not edge for edge in edges))
    found = model.edge_logits.grad
    assert found is None if graph == "full" else (found != 0).float().mean() > 0.5
    moves = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in edges[1:]]
    assert all(moves) if graph == "dynamic" else not any(moves)
    # The penalty alone: d/dlogit of price * sigmoid(logit), for the fixed graph without any noise.
    if graph == "fixed":
        gradients = []
        for prices in ((0.0, 0.0, 1.0), (0.1, 0.3, 2.0)):
            model = make(graph, lambda1=prices[0], lambda2=prices[1], anchor=prices[2])
            scale_slots(model, 0.02)
            torch.manual_seed(5)
            loss, error = model.loss(state, action, model.reward_mean.expand(B))
            gradients.append(torch.autograd.grad(loss, model.edge_logits)[0])
        assert error < 0.8  # what is charged is a share of the price, and gradients do not flow through that share
        open_edges = torch.sigmoid(model.edge_logits.detach())
        expected = (1 - error) * torch.tensor(slow_prices(0.1, 0.3, 2.0)).float() * open_edges * (1 - open_edges)
        torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-3, atol=1e-4)


def fit(model, state, action, team, iterations, batch):
    """As the scripts do it: the learning rate falls to 0."""
    optimizer = torch.optim.Adam(model.parameter_groups(), fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for _ in range(iterations):
        rows = torch.randint(len(state), (batch,))
        loss, _ = model.loss(state[rows], action[rows], team[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.project()


def test_a_closed_edge_can_come_back():
    """Below -3 an edge is hardly ever drawn, and what is never tried never pays: training must not leave it there."""
    model = make("fixed")
    before = {name: tensor.clone() for name, tensor in named(model)}
    assert (model.edge_logits < -3).any() and (model.edge_logits > -3).any()
    model.project()
    before["edge_logits"] = before["edge_logits"].clamp(min=-3.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named(model))
    assert torch.sigmoid(torch.tensor(-3.0)) < model.h  # there it is still closed

    torch.manual_seed(2)
    model = CausalModel(2, 2, 1, [0, 1], graph="fixed", hidden_dim=32)
    with torch.no_grad():
        model.edge_logits.fill_(-30.0)
    state, action = torch.randn(2000, 2), torch.rand(2000, 2, 1) * 2 - 1
    team = 2 * state[:, 0] - 3 * action[:, 1, 0]
    model.fit_statistics(state, action, team)
    fit(model, state, action, team, iterations=400, batch=256)
    masks = torch.cat(model.probabilities(state, action), dim=2)[0] >= model.h  # [2, 4]: both states, both actions
    assert masks[0, 0] == 1 and masks[1, 3] == 1  # what earns something is open again,
    assert (masks[:, 1:3] == 0).all()  # the rest is not


def test_parameter_groups_hold_every_parameter_once():
    """A parameter in no group would never learn; in two, Adam would step it twice."""
    model = make()
    groups = [(group["lr"], [*group["params"]]) for group in model.parameter_groups(3e-3)]
    assert sorted(id(p) for _, listed in groups for p in listed) == sorted(id(p) for p in model.parameters())
    rate = {id(p): lr for lr, listed in groups for p in listed}
    assert rate[id(model.edge_logits)] == 2e-2 and rate[id(model.identity)] == 3e-3
    assert all(rate[id(p)] == 3e-3 for p in [*model.first_layer.parameters(), *model.reward_network.parameters()])
    assert all(rate[id(p)] == 5e-4 for p in model.edge_network.parameters())


def test_statistics():
    """A constant dimension must not be divided by its zero deviation; the references are whole rows of the dataset."""
    state, action = torch.randn(100, S) * torch.arange(S) + 4, torch.randn(100, N, A)  # the first dimension is constant
    team = torch.randn(100) * 3 - 8
    model, restored = (CausalModel(N, S, A, owner_of(N), references=20) for _ in range(2))
    before = torch.get_rng_state()  # the same references whatever it is, and nothing random is used up
    model.fit_statistics(state, action, team)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    restored.fit_statistics(state, action, team)
    assert torch.equal(model.references, restored.references)
    np.testing.assert_allclose(model.state_mean, state.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.state_std[1:], state.numpy().std(0, ddof=1)[1:], rtol=1e-5)
    assert model.state_std[0] == 1
    np.testing.assert_allclose([model.reward_mean, model.reward_std], [team.mean(), team.std()], rtol=1e-5)
    rows = np.abs(slow_parents(model, state, action) - model.references.numpy()[:, None]).max(2)  # [20, 100]
    assert (rows.min(1) < 1e-4).all() and len({*rows.argmin(1)}) > 10
    # The model means nothing without them: they are stored with the weights.
    restored = CausalModel(N, S, A, owner_of(N), references=20)
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored.assign(state, action, team), model.assign(state, action, team))


# ---- report ----


def slow_errors(found, truth):
    """Mean squared and absolute error, agent by agent, of what varies."""
    errors = []
    for i in range(N):
        error = [float(found[b, i]) - float(truth[b, i]) for b in range(len(truth))]
        errors += [e - np.mean(error) for e in error]
    return np.mean([e * e for e in errors]), np.mean(np.abs(errors))


@pytest.mark.parametrize("graph", ["dynamic", "full"])
@pytest.mark.parametrize("dead", [False, True])
def test_report(graph, dead):
    """Every number by hand, for both yardsticks; a constant per agent does not count."""
    model, alive = make(graph, h=0.5, share="slots"), torch.ones(40, N, dtype=torch.bool)
    state, action, _ = make_batch(rows=40)
    if dead:
        alive = torch.rand(40, N) < 0.8
    given, team = alive if dead else None, 40 + 5 * torch.randn(40)
    one = (0.5 * model.assign(state, action, team) + 2 * torch.randn(40, N)) * alive
    other = model.assign(state, action, team, given) + torch.tensor([3.0, -8.0, 0.1]) + 0.1 * torch.randn(40, N)
    report = model.report(state, action, team, given, paid=one, cause=other)
    assert all(value.ndim == 0 for value in report.values())

    masks = np.array([slow_edges(model, row)[0] for row in slow_parents(model, state, action)]) >= 0.5
    predicted, recorded = model.predict(state, action, given).double().numpy(), team.double().numpy()
    expected = {
        "state_density": masks[..., :S].mean(),
        "action_density": masks[..., S:].mean(),
        "team_nmse": ((predicted - recorded) ** 2).mean() / recorded.var(ddof=1),
    }
    assert model.report(state, action, team, given).keys() == expected.keys()
    credit = slow_credit(model, state, action, team, alive)
    living = alive.double().numpy()
    even = recorded[:, None] * living / living.sum(1, keepdims=True).clip(1)
    for name, truth in (("paid", one), ("cause", other)):
        for who, found in (("", credit), ("even_", even)):
            expected[f"{name}_{who}mse"], expected[f"{name}_{who}mae"] = slow_errors(found, truth)
        expected[f"{name}_skill"] = 1 - expected[f"{name}_mse"] / expected[f"{name}_even_mse"]
    assert {name: float(value) for name, value in report.items()} == pytest.approx(expected, rel=1e-3)
    assert report["cause_skill"] > 0.9 and report["paid_skill"] < 0.9
    # Where the even split is exact but for rounding and constants, nothing can be better.
    alike = torch.tensor(even + np.array([3.0, -8.0, 0.1])).float()
    assert report.keys() - model.report(state, action, team, given, paid=alike, cause=other).keys() == {"paid_skill"}


def test_report_leaves_out_what_is_not_defined():
    """Where the team reward is constant, or there is one row, no number may be NaN, infinite or made up."""
    model, (state, action, team) = make(), make_batch()
    paid = team[:, None] * torch.tensor([0.5, 0.3, 0.2])
    everything = model.report(state, action, team, paid=paid)
    constant = model.report(state, action, torch.full((B,), 40.1), paid=paid)
    single = model.report(state[:1], action[:1], team[:1], paid=paid[:1])
    for report, missing in ((everything, set()), (constant, {"team_nmse"}), (single, {"team_nmse", "paid_skill"})):
        assert report.keys() == everything.keys() - missing
        assert all(value.isfinite() for value in report.values())
    assert {"team_nmse", "paid_skill"} <= everything.keys()


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


@pytest.mark.parametrize("graph", ["fixed", "dynamic"])
def test_recovers_a_known_graph_and_individual_rewards(graph):
    """From the team reward alone: who earned what and why. F1 of the edges and skill of the credit (held out)."""
    torch.manual_seed(1)
    state, action, rewards, edges = synthetic_problem(54_000)
    model = CausalModel(3, 24, 2, [i for i in range(3) for _ in range(8)], graph=graph)
    team = rewards.sum(1)
    model.fit_statistics(state[:50_000], action[:50_000], team[:50_000])
    fit(model, state[:50_000], action[:50_000], team[:50_000], iterations=1000, batch=512)

    state, action, rewards, team = state[50_000:], action[50_000:], rewards[50_000:], team[50_000:]
    counts = (torch.cat(model.probabilities(state, action), dim=2) >= model.h).float().mean(0) > 0.5  # [3, 30]
    assert 2 * (counts * edges).sum() / (counts.sum() + edges.sum()) >= 0.95
    for model.share in ("shapley", "slots"):  # each reward is one agent's doing, so both must find it
        numbers = model.report(state, action, team, paid=rewards)
        assert numbers["team_nmse"] < 0.05 and numbers["paid_skill"] > 0.95, (model.share, numbers)


def shared_cost(own):
    """The team reward [T] of three agents with own [T, 3, 2], place and action: the first two get hurt together."""
    x, action = own.unbind(2)
    alone = -(x - torch.tensor([1.0, -1.0, 0.5])).square().sum(1) / 4 - action.square().sum(1) / 2
    return alone - 4 * torch.exp(-2 * (x[:, 0] - x[:, 1]).square())


def true_shapley(own, references):
    """Of the true reward, with every order and these rows [K, 3, 2] for absent agents: [T, 3]."""
    shares = torch.zeros(len(own), 3)
    for order in itertools.permutations(range(3)):
        for reference in references:
            mixed = reference.repeat(len(own), 1, 1)
            for agent in order:
                before = shared_cost(mixed)
                mixed[:, agent] = own[:, agent]
                shares[:, agent] += (shared_cost(mixed) - before) / 6 / len(references)
    return shares


def test_what_two_agents_cause_together_is_split():
    """No slot alone can hold it: against the true Shapley value, `shapley` must be right and `slots` must not."""
    torch.manual_seed(1)
    own = torch.stack([torch.randn(22_000, 3), torch.rand(22_000, 3) * 2 - 1], dim=2)
    state, action, team, skill = own[:, :, 0], own[:, :, 1:], shared_cost(own), {}
    model = CausalModel(3, 3, 1, [0, 1, 2], references=32)
    model.fit_statistics(state[:20_000], action[:20_000], team[:20_000])
    fit(model, state[:20_000], action[:20_000], team[:20_000], iterations=1000, batch=256)
    cause = true_shapley(own[20_000:], own[torch.randint(20_000, (100,))])
    for model.share in ("shapley", "slots"):
        numbers = model.report(state[20_000:], action[20_000:], team[20_000:], cause=cause)
        skill[model.share] = float(numbers["cause_skill"])
    assert numbers["team_nmse"] < 0.05
    assert skill["shapley"] > 0.9 and skill["slots"] < skill["shapley"] - 0.1, skill


# ---- refusals ----


def test_refuses_what_torch_would_broadcast():
    """A reward of shape [B, 1] would broadcast against [B] to a wrong loss; an unknown graph would pass for another."""
    model = CausalModel(2, 4, 1, [0, 0, 1, 1])
    state, action = torch.randn(8, 4), torch.randn(8, 2, 1)
    with pytest.raises(ValueError, match=r"team_reward is \[8, 1\], expected \[8\]"):
        model.loss(state, action, torch.randn(8, 1))
    for wrong in ({"graph": "dynamc"}, {"share": "shaply"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            CausalModel(2, 4, 1, [0, 0, 1, 1], **wrong)


@pytest.mark.parametrize("wrong", [[0] * (S - 1), [0] * (S + 1), [], [N] + [0] * (S - 1), [-2] * S, [0.5] * S])
def test_refuses_owners_that_do_not_exist(wrong):
    """One owner for each state dimension: an agent's number, or -1 for nobody."""
    with pytest.raises(ValueError, match="state_owner"):
        CausalModel(N, S, A, wrong)
    for right in ([-1] * S, [N - 1] * S, owner_of(N)):
        model, (state, action, team) = CausalModel(N, S, A, right), make_batch()
        torch.testing.assert_close(model.assign(state, action, team).sum(1), team)
