"""Networks, losses and steps of the three scripts against slow NumPy loops that say the equations once more."""

import dataclasses

import numpy as np
import pytest
import torch

import macca_cql
import macca_icq
import macca_omar

SCRIPTS = [macca_cql, macca_omar, macca_icq]
CONSERVATIVE = [macca_cql, macca_omar]
N, B, OBS, A = 3, 6, 4, 2  # agents, batch, observation, action
CHOICES = 5  # discrete actions


def make_args(script, **changes):
    known = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(cuda=False, **{name: value for name, value in changes.items() if name in known})


def make_data(discrete, rows=100):
    """What networks need to know of a dataset; all episodes end by time limit."""
    data = {"observations": 2 + 3 * torch.randn(rows, N, OBS), "terminals": torch.zeros(rows, dtype=torch.bool)}
    data["next_alive"] = torch.ones(rows, N, dtype=torch.bool)
    if discrete:
        return data | {"action_masks": torch.ones(rows, N, CHOICES, dtype=torch.bool)}
    return data | {"actions": torch.rand(rows, N, A) * 2 - 1}


def make_nets(script, discrete):
    """Networks whose targets differ from them, with weights large enough for the Q-values to matter."""
    torch.manual_seed(0)
    args = make_args(script, hidden_dim=8)
    nets = script.Networks(make_data(discrete), args)
    with torch.no_grad():
        for parameter in nets.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    return nets


def make_batch(discrete, batch=B):
    """Some agents are dead in some rows, or die there; what they see and do then is as random as anything else."""
    torch.manual_seed(1)
    rows = {
        "observations": 2 + 3 * torch.randn(batch, N, OBS),
        "next_observations": 2 + 3 * torch.randn(batch, N, OBS),
        "actions": torch.rand(batch, N, A) * 2 - 1,
        "next_actions": torch.rand(batch, N, A) * 2 - 1,
        "rewards": torch.randn(batch),
        "individual_rewards": torch.randn(batch, N),
        "terminals": torch.arange(batch) % 3 == 1,  # rows 1 and 4
        "timeouts": torch.arange(batch) % 3 == 2,  # rows 2 and 5: these bootstrap
        "has_next_action": torch.arange(batch) % 3 == 0,  # neither after a terminal nor after a timeout
        "alive": torch.ones(batch, N, dtype=torch.bool),
    }
    rows["alive"][[1, 2, 3, 5], [2, 2, 0, 1]] = False
    rows["next_alive"] = rows["alive"].clone()
    rows["next_alive"][[0, 2, 3], [2, 1, 1]] = False  # dies in this step
    if discrete:
        rows["action_masks"], rows["next_action_masks"] = torch.rand(2, batch, N, CHOICES) < 0.5
        rows["actions"] = torch.randint(CHOICES, (batch, N))
        rows["next_actions"] = torch.randint(CHOICES, (batch, N))
        for mask, action in (("action_masks", "actions"), ("next_action_masks", "next_actions")):
            rows[mask].scatter_(2, rows[action][..., None], True)  # what was done was allowed
        assert not rows["action_masks"].all() and not rows["next_action_masks"].all()
    return rows


def array(tensor):
    return tensor.detach().double().numpy()


def standardized(nets, agent, observation):
    return (array(observation) - array(nets.mean[agent, 0])) / array(nets.std[agent, 0])


def slow_q(nets, name, twin, agent, observation, action=None):
    """Q of one agent's twin: a number for one action [A], or a vector of all discrete actions."""
    critic, k = getattr(nets, name), twin * N + agent
    x = standardized(nets, agent, observation)
    x = x @ array(critic.layer1.weight[k]) + array(critic.layer1.bias[k, 0])
    if action is not None:
        x = x + array(action) @ array(critic.action_weight[k])
    x = np.maximum(x, 0) @ array(critic.layer2.weight[k]) + array(critic.layer2.bias[k, 0])
    x = np.maximum(x, 0) @ array(critic.layer3.weight[k]) + array(critic.layer3.bias[k, 0])
    return x if action is None else x[0]


def slow_pi(nets, name, agent, observation, mask=None):
    """The action [A] of one agent, or its logits, minus infinity where an action is not allowed."""
    layer1, _, layer2, _, layer3 = getattr(nets, name)
    x = standardized(nets, agent, observation)
    x = np.maximum(x @ array(layer1.weight[agent]) + array(layer1.bias[agent, 0]), 0)
    x = np.maximum(x @ array(layer2.weight[agent]) + array(layer2.bias[agent, 0]), 0)
    x = x @ array(layer3.weight[agent]) + array(layer3.bias[agent, 0])
    return np.tanh(x) if mask is None else np.where(mask, x, -np.inf)


def log_sum_exp(values):
    return np.log(np.exp(values).sum())


def softmax(values):
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


def close(tensor, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(array(tensor), expected, rtol=rtol, atol=atol)


# ---- networks ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_networks(script):
    """Every agent's actor and both of its critics are separate networks; K actions in one call are K calls."""
    nets, batch = make_nets(script, False), make_batch(False)
    observations, candidates = batch["observations"].transpose(0, 1), torch.rand(N, B, 4, A) * 2 - 1
    x = nets.inputs(batch["observations"])
    q, played = nets.critic(x, candidates), nets.act(batch["observations"], torch.ones(B, N, A, dtype=torch.bool))
    expected_q, expected_policy = np.zeros((2, N, B, 4)), np.zeros((N, B, A))
    for i in range(N):
        for b in range(B):
            expected_policy[i, b] = slow_pi(nets, "actor", i, observations[i, b])
            for twin in range(2):
                for k in range(4):
                    expected_q[twin, i, b, k] = slow_q(nets, "critic", twin, i, observations[i, b], candidates[i, b, k])
    close(q, expected_q)
    close(nets.actor(x).tanh(), expected_policy)
    close(played.transpose(0, 1), expected_policy)
    close(nets.critic(x, candidates, twins=1), expected_q[:1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_discrete_networks(script):
    """One Q and one logit per action; an action that is not allowed is never played, whatever its logit."""
    nets, batch = make_nets(script, True), make_batch(True)
    observations, masks = batch["observations"].transpose(0, 1), batch["action_masks"].transpose(0, 1)
    q = nets.critic(nets.inputs(batch["observations"]))
    played = nets.act(batch["observations"], batch["action_masks"]).T
    unrestricted = 0
    for i in range(N):
        for b in range(B):
            for twin in range(2):
                close(q[twin, i, b], slow_q(nets, "critic", twin, i, observations[i, b]))
            logits = slow_pi(nets, "actor", i, observations[i, b], masks[i, b].numpy())
            assert played[i, b] == logits.argmax()
            free = slow_pi(nets, "actor", i, observations[i, b], np.ones(CHOICES, bool))
            unrestricted += free.argmax() != logits.argmax()
    assert unrestricted > 0  # a mask did decide somewhere


@pytest.mark.parametrize("script", SCRIPTS)
def test_input_statistics(script):
    """Inputs are standardized by each agent's own mean and standard deviation; a constant one keeps its scale."""
    data = make_data(False, 200)
    x = torch.randn(200, N, OBS) * (1 + torch.arange(N)[:, None]) + 10 * torch.arange(N)[:, None]
    x[:, :, 2] = 7.0
    data["observations"] = x
    nets = script.Networks(data, make_args(script))
    inputs = nets.inputs(x)
    assert inputs.shape == (N, 200, OBS)
    for i in range(N):
        mean, std = x[:, i].numpy().mean(0), x[:, i].numpy().std(0, ddof=1)
        close(nets.mean[i, 0], mean, rtol=1e-4)
        close(nets.std[i, 0, :2], std[:2], rtol=1e-4)
        assert nets.std[i, 0, 2] == 1
        close(inputs[i, :, :2], (x[:, i].numpy() - mean)[:, :2] / std[:2], atol=1e-4)
        close(inputs[i, :, 2], np.zeros(200), atol=1e-4)
    assert nets.center  # all episodes end by time limit: a constant in every reward decides nothing
    for name, where in (("terminals", 7), ("next_alive", (7, 1))):
        other = {key: value.clone() for key, value in data.items()}
        other[name][where] ^= True  # an episode, or a life, that ended before the time limit
        nets = script.Networks(other, make_args(script))
        assert not nets.center and {"mean", "std", "center"} <= nets.state_dict().keys()  # a resumed run knows


# ---- critics ----


def slow_target(nets, batch, rewards, gamma, b, i):
    """y = r + gamma min over twins of the target critics at the target actor's action; y = r after an end or death."""
    following, discrete = batch["next_observations"][b, i], nets.discrete
    if batch["terminals"][b] or not batch["next_alive"][b, i]:
        return float(rewards[b, i])
    if discrete:
        action = slow_pi(nets, "actor_target", i, following, batch["next_action_masks"][b, i].numpy()).argmax()
        twins = [slow_q(nets, "critic_target", twin, i, following)[action] for twin in range(2)]
    else:
        action = torch.tensor(slow_pi(nets, "actor_target", i, following))
        twins = [slow_q(nets, "critic_target", twin, i, following, action) for twin in range(2)]
    return float(rewards[b, i]) + gamma * min(twins)


@pytest.mark.parametrize("script", CONSERVATIVE)
@pytest.mark.parametrize("discrete", [False, True])
def test_conservative_critic_loss(script, discrete):
    """Eq. 7, both twins: squared error to y plus alpha (log-sum-exp of Q minus Q of the data's action)."""
    args = make_args(script, alpha=1.7, gamma=0.8, cql_samples=3)
    nets, batch = make_nets(script, discrete), make_batch(discrete)
    rewards = batch["individual_rewards"]
    observations = batch["observations"].transpose(0, 1)
    torch.manual_seed(7)
    loss, logs = script.critic_loss(batch, rewards, nets, args)
    if not discrete:
        torch.manual_seed(7)  # the same actions once more
        policy = nets.actor(nets.inputs(batch["observations"])).tanh()
        candidates, log_density = script.penalty_actions(policy, args.cql_samples)
    expected, q_data = 0.0, []
    for i in range(N):
        for b in range(B):
            y = slow_target(nets, batch, rewards, args.gamma, b, i)
            for twin in range(2):
                if discrete:
                    q_all = slow_q(nets, "critic", twin, i, observations[i, b])
                    q = q_all[batch["actions"][b, i]]
                    soft = log_sum_exp(q_all[batch["action_masks"][b, i].numpy()])
                else:
                    q = slow_q(nets, "critic", twin, i, observations[i, b], batch["actions"][b, i])
                    terms = [
                        slow_q(nets, "critic", twin, i, observations[i, b], candidates[i, b, k])
                        - log_density[i, b, k].item()
                        for k in range(candidates.shape[2])
                    ]
                    soft = log_sum_exp(np.array(terms))
                expected += batch["alive"][b, i].item() * ((q - y) ** 2 + args.alpha * (soft - q)) / B
                q_data.append(q)
    close(loss, expected)
    close(logs["q_data"], np.mean(q_data))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_only_terminals_and_death_stop_the_bootstrap(script, discrete):
    """What follows these must not matter, what follows a time limit must, and no gradient goes into y."""
    args = make_args(script)
    nets, batch = make_nets(script, discrete), make_batch(discrete)
    batch["has_next_action"] = ~batch["terminals"]  # so that ICQ uses every row

    def loss_of(batch):
        torch.manual_seed(3)
        return script.critic_loss(batch, batch["individual_rewards"], nets, args)[0].item()

    for row in range(B):
        for agent in range(N):
            other = dict(batch, next_observations=batch["next_observations"].clone())
            other["next_observations"][row, agent] += 1.0
            over = batch["terminals"][row] or not batch["next_alive"][row, agent]
            assert (loss_of(other) == loss_of(batch)) == bool(over)
    for parameter in (*nets.actor_target.parameters(), *nets.critic_target.parameters()):
        parameter.requires_grad_(True)
    loss, _ = script.critic_loss(batch, batch["individual_rewards"], nets, args)
    inputs = [*nets.actor.parameters(), *nets.actor_target.parameters(), *nets.critic_target.parameters()]
    assert all(gradient is None for gradient in torch.autograd.grad(loss, inputs, allow_unused=True))


@pytest.mark.parametrize("script", CONSERVATIVE)
def test_penalty_actions_and_their_density(script):
    """Half of the actions are uniform over [-1, 1]^A, half over a box around the policy's, each with its density."""
    policy = torch.tensor([[[0.0, 0.95], [-1.0, 0.3]]])  # [1, 2, 2]: two observations of one agent
    torch.manual_seed(0)
    actions, log_density = script.penalty_actions(policy, 20_000)
    assert actions.shape == (1, 2, 40_000, 2) and log_density.shape == (1, 2, 40_000)
    boxes = [[(-0.2, 0.2), (0.75, 1.0)], [(-1.0, -0.8), (0.1, 0.5)]]  # clipped to [-1, 1]
    for b in range(2):
        for half, sides in [(slice(0, 20_000), [(-1.0, 1.0)] * 2), (slice(20_000, None), boxes[b])]:
            close(log_density[0, b, half], np.full(20_000, -sum(np.log(high - low) for low, high in sides)))
            for dimension, (low, high) in enumerate(sides):
                drawn = actions[0, b, half, dimension]
                assert drawn.min() >= low - 1e-6 and drawn.max() <= high + 1e-6
                quartiles = torch.quantile(drawn, torch.tensor([0.25, 0.5, 0.75]))
                assert np.allclose(quartiles, np.linspace(low, high, 5)[1:-1], atol=0.02 * (high - low))


@pytest.mark.parametrize("script", CONSERVATIVE)
def test_soft_maximum_is_the_integral(script):
    """With many samples the log-sum-exp must approach log of the integral of exp(Q) over all actions and the box."""
    observations = torch.zeros(1, 3, 1)  # [N, B, O]
    policy = torch.tensor([[[0.0, 0.0], [0.9, -0.4], [-1.0, 1.0]]])  # [1, 3, 2]
    slope = torch.tensor([1.5, -2.0])

    class Nets:
        """Q(o, a) = slope a - 3 in both twins, whose integral is known; the targets say the same."""

        discrete = False

        @staticmethod
        def inputs(observations):
            return observations.transpose(0, 1)

        @staticmethod
        def critic(x, actions, twins=2):
            return ((actions * slope).sum(3) - 3).expand(twins, -1, -1, -1)

        critic_target = critic

        @staticmethod
        def actor(x):
            return torch.atanh(policy)

        actor_target = actor

    samples = 20_000
    torch.manual_seed(0)
    batch = {
        "observations": observations.transpose(0, 1),
        "next_observations": observations.transpose(0, 1),
        "actions": torch.zeros(3, 1, 2),
        "terminals": torch.ones(3, dtype=torch.bool),
        "alive": torch.ones(3, 1, dtype=torch.bool),
        "next_alive": torch.ones(3, 1, dtype=torch.bool),
    }
    args = make_args(script, alpha=1.0, cql_samples=samples)
    rewards = torch.full((3, 1), -3.0)  # y = r = Q at the data's action 0: the squared error vanishes
    loss, _ = script.critic_loss(batch, rewards, Nets, args)

    def integral(sides):
        """Of exp(slope a - 3) over a box."""
        parts = [(np.exp(k * high) - np.exp(k * low)) / k for k, (low, high) in zip([1.5, -2.0], sides, strict=True)]
        return np.prod(parts) * np.exp(-3)

    boxes = [[(-0.2, 0.2), (-0.2, 0.2)], [(0.7, 1.0), (-0.6, -0.2)], [(-1.0, -0.8), (0.8, 1.0)]]
    both = [integral([(-1, 1)] * 2) + integral(box) for box in boxes]
    soft_maximum = loss.item() / 2 - 3  # two twins; Q at the data's action is -3
    assert abs(soft_maximum - np.log(both).mean() - np.log(samples)) < 0.01


def test_expectile_loss():
    """L_2^tau(u) = |tau - 1(u < 0)| u^2; its minimiser over a constant is the tau-expectile, 0.5 the mean."""
    errors = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0])
    expected = [abs(0.7 - (u < 0)) * u**2 for u in errors.tolist()]
    close(macca_icq.expectile_loss(errors, 0.7), expected)
    samples, grid = torch.randn(2000).exp(), torch.linspace(0.2, 6, 2000)
    found = {}
    for tau in (0.5, 0.9):
        losses = macca_icq.expectile_loss(samples - grid[:, None], tau).mean(1)  # [grid]
        found[tau] = grid[losses.argmin()].item()
    assert abs(found[0.5] - samples.mean().item()) < 0.005 and found[0.9] > found[0.5] + 0.5


@pytest.mark.parametrize("discrete", [False, True])
def test_expectile_critic_loss(discrete):
    """Eq. 9 with the dataset's own next action; rows without one are left out, terminal rows are not."""
    args = make_args(macca_icq, expectile=0.8, gamma=0.8)
    nets, batch = make_nets(macca_icq, discrete), make_batch(discrete)
    rewards, expected, used = batch["individual_rewards"], 0.0, 0
    for b in range(B):
        if not (batch["terminals"][b] or batch["has_next_action"][b]):
            continue
        used += 1
        for i in np.flatnonzero(batch["alive"][b]):
            now, following = batch["observations"][b, i], batch["next_observations"][b, i]
            action, next_action = batch["actions"][b, i], batch["next_actions"][b, i]
            twins, next_twins = [], []
            for twin in range(2):
                if discrete:
                    twins.append(slow_q(nets, "critic", twin, i, now)[action])
                    next_twins.append(slow_q(nets, "critic_target", twin, i, following)[next_action])
                else:
                    twins.append(slow_q(nets, "critic", twin, i, now, action))
                    next_twins.append(slow_q(nets, "critic_target", twin, i, following, next_action))
            over = batch["terminals"][b] or not batch["next_alive"][b, i]
            y = float(rewards[b, i]) + (0.0 if over else args.gamma * min(next_twins))
            for q in twins:
                expected += (args.expectile if y > q else 1 - args.expectile) * (y - q) ** 2
    assert used == 4
    loss, _ = macca_icq.critic_loss(batch, rewards, nets, args)
    close(loss, expected / used)
    # A minibatch may hold no usable row at all: no loss, no division by zero.
    nothing = dict(batch, terminals=torch.zeros(B, dtype=torch.bool), has_next_action=torch.zeros(B, dtype=torch.bool))
    assert macca_icq.critic_loss(nothing, rewards, nets, args)[0] == 0


# ---- actors ----


def test_zeroth_order_actions():
    """OMAR's candidates and choice, with the same noise, number by number."""
    args = make_args(macca_omar, omar_rounds=3, omar_samples=4)
    nets, batch = make_nets(macca_omar, False), make_batch(False)
    observations = batch["observations"].transpose(0, 1)
    x = nets.inputs(batch["observations"])
    policy = nets.actor(x).tanh().detach()
    torch.manual_seed(11)
    chosen = macca_omar.zeroth_order_actions(x, policy, nets.critic, args)
    torch.manual_seed(11)
    noise = [array(torch.randn(N, B, 4, A)) for _ in range(3)]
    own = 0
    for i in range(N):
        for b in range(B):
            mean, std = np.zeros(A), np.full(A, 2.0)
            for count in range(3):
                samples = [np.clip(mean + std * noise[count][i, b, k], -1, 1) for k in range(4)]
                q = [slow_q(nets, "critic", 0, i, observations[i, b], torch.tensor(sample)) for sample in samples]
                weights = softmax(np.array(q))
                mean = sum(weights[k] * samples[k] for k in range(4))
                std = np.sqrt(sum(weights[k] * (samples[k] - mean) ** 2 for k in range(4)))
            samples.append(array(policy[i, b]))
            q.append(slow_q(nets, "critic", 0, i, observations[i, b], policy[i, b]))
            close(chosen[i, b], samples[int(np.argmax(q))], rtol=1e-3, atol=1e-4)
            own += int(np.argmax(q)) == 4
    assert 0 < own < N * B  # both the policy's own action and a sample won somewhere


def test_zeroth_order_actions_find_a_known_maximum():
    """On Q = -10 |a - best|^2 the optimiser must arrive, also at the rim, and never be worse than the policy."""
    torch.manual_seed(0)
    best = torch.rand(N, B, A) * 2 - 1
    best[0] = torch.sign(best[0])  # corners

    def critic(observations, candidates, twins):
        assert twins == 1 and candidates.abs().max() <= 1
        return -10 * (candidates - best[:, :, None]).square().sum(3)[None]  # [1, N, B, K]

    args = make_args(macca_omar, omar_rounds=5, omar_samples=300)
    policy = torch.rand(N, B, A) * 2 - 1
    observations = torch.zeros(N, B, OBS)
    found = macca_omar.zeroth_order_actions(observations, policy, critic, args)
    assert (found - best).abs().max() < 0.1
    few = make_args(macca_omar, omar_rounds=1, omar_samples=1)
    found = macca_omar.zeroth_order_actions(observations, policy, critic, few)
    assert ((found - best).square().sum(2) <= (policy - best).square().sum(2)).all()
    assert (found == policy).all(2).any()
    torch.testing.assert_close(macca_omar.zeroth_order_actions(observations, best, critic, few), best)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_actor_loss(script, discrete):
    """CQL: 0.3 mean(atanh(pi)^2) - Q (discrete: the distance to the best action).

    OMAR, Eq. 8: tau distance - (1 - tau) Q. ICQ: distance to the data times softmax(advantage / beta).
    """
    args = make_args(script, tau=0.6, beta=0.5, omar_rounds=2, omar_samples=5, actor_penalty=0.3)
    nets, batch = make_nets(script, discrete), make_batch(discrete)
    observations = batch["observations"].transpose(0, 1)
    torch.manual_seed(5)
    loss, logs = script.actor_loss(batch, nets, args)
    if script is macca_omar and not discrete:
        torch.manual_seed(5)
        x = nets.inputs(batch["observations"])
        a_hat = macca_omar.zeroth_order_actions(x, nets.actor(x).tanh().detach(), nets.critic, args)
    expected, q_policies = 0.0, []
    for i in range(N):
        terms = []  # of each row: Q of the policy, advantage, distance
        for b in range(B):
            now, action = observations[i, b], batch["actions"][b, i]
            if discrete:
                mask = batch["action_masks"][b, i].numpy()
                probabilities = softmax(slow_pi(nets, "actor", i, now, mask))
                first, second = (slow_q(nets, "critic", twin, i, now) for twin in range(2))
                smaller = np.minimum(first, second)
                best = np.where(mask, first, -np.inf).argmax()
                q_policy = probabilities @ (smaller if script is macca_icq else first)
                advantage = smaller[action] - q_policy
                distance = -np.log(probabilities[action if script is macca_icq else best])
            else:
                pi = torch.tensor(slow_pi(nets, "actor", i, now))
                twins = [slow_q(nets, "critic", twin, i, now, pi) for twin in range(2)]
                q_policy = min(twins) if script is macca_icq else twins[0]
                advantage = min(slow_q(nets, "critic", twin, i, now, action) for twin in range(2)) - q_policy
                goal = a_hat[i, b] if script is macca_omar else action
                distance = float((pi - goal).square().sum())
                distance = 0.3 * float(pi.atanh().square().mean()) if script is macca_cql else distance
            terms.append((q_policy, advantage, distance))
        q, advantages, distance = np.array(terms).T  # [B] each
        q_policies.append(q)
        q, advantages, distance = (x[batch["alive"][:, i].numpy()] for x in (q, advantages, distance))  # the living
        if script is macca_cql:
            expected += (distance if discrete else distance - q).sum() / B
        elif script is macca_omar:
            expected += (0.6 * distance - 0.4 * q).sum() / B
        else:
            weights = softmax(advantages / 0.5) * len(q)
            assert abs(weights.mean() - 1) < 1e-9
            expected += (weights * distance).sum() / B
    close(loss, expected, rtol=1e-3)
    close(logs["q_policy"], np.mean(q_policies), rtol=1e-3)


@pytest.mark.parametrize("discrete", [False, True])
def test_icq_weights_carry_no_gradient(discrete):
    """The weights judge the data's actions; a gradient through them would move the policy to make them large."""
    nets, batch = make_nets(macca_icq, discrete), make_batch(discrete)
    loss, _ = macca_icq.actor_loss(batch, nets, make_args(macca_icq))
    gradients = torch.autograd.grad(loss, list(nets.critic.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("beta", [1e6, 1e9])
def test_behavior_cloning(discrete, beta):
    """With a huge temperature ICQ clones: squared distance, or minus the log-probability; the dead do not count."""
    nets, batch = make_nets(macca_icq, discrete), make_batch(discrete)
    expected = 0.0
    for b in range(B):
        for i in np.flatnonzero(batch["alive"][b]):
            now, action = batch["observations"][b, i], batch["actions"][b, i]
            if discrete:
                probabilities = softmax(slow_pi(nets, "actor", i, now, batch["action_masks"][b, i].numpy()))
                expected += -np.log(probabilities[action]) / B
            else:
                expected += np.square(slow_pi(nets, "actor", i, now) - array(action)).sum() / B
    found, _ = macca_icq.actor_loss(batch, nets, make_args(macca_icq, beta=beta))
    close(found, expected)
    x, actions = nets.inputs(batch["observations"]), batch["actions"].transpose(0, 1)
    if discrete:
        logits = nets.actor(x).masked_fill(~batch["action_masks"].transpose(0, 1), -1e9)
        cloning = -logits.log_softmax(2).gather(2, actions[..., None]).squeeze(2)
    else:
        cloning = (nets.actor(x).tanh() - actions).square().sum(2)
    cloning = (cloning * batch["alive"].T).mean(1).sum()
    parameters = list(nets.actor.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(cloning, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_actors_never_prefer_what_is_not_allowed():
    """Discrete OMAR and CQL: a forbidden action of enormous Q must leave loss and gradient as they were."""
    for script in CONSERVATIVE:
        nets, batch = make_nets(script, True), make_batch(True)
        batch["action_masks"][:, :, 0] = False  # action 0 is never allowed ...
        batch["action_masks"][:, :, 1] = True
        batch["actions"].clamp_(min=1)
        args, gradients = make_args(script), []
        for lure in (0.0, 30.0):
            with torch.no_grad():
                nets.critic.layer3.bias[:, :, 0] += lure  # ... and promises more and more
            loss, _ = script.actor_loss(batch, nets, args)
            gradients.append(torch.autograd.grad(loss, list(nets.actor.parameters())))
            critic = script.critic_loss(batch, batch["individual_rewards"], nets, args)[0]
            gradients[-1] += (loss.detach(), torch.autograd.grad(critic, nets.critic.layer3.bias)[0][:, :, 1:])
        for before, after in zip(*gradients, strict=True):
            torch.testing.assert_close(before, after)


# ---- the dead ----


def both_losses(script, batch, rewards, nets):
    """Critic's and actor's loss with the gradient of each: always with the same random numbers."""
    torch.manual_seed(3)
    args, found = make_args(script, beta=1.0), []  # a lower temperature leaves some rows no weight at all
    critic, actor = script.critic_loss(batch, rewards, nets, args)[0], script.actor_loss(batch, nets, args)[0]
    for loss, network in ((critic, nets.critic), (actor, nets.actor)):
        found += [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]
    return found


def altered(batch, rewards, where):
    """The batch and rewards with everything that was seen, done, allowed and earned changed `where` [B, N]."""
    batch, rewards = {name: value.clone() for name, value in batch.items()}, rewards.clone()
    rewards[where] += 9
    for name in ("observations", "next_observations"):
        batch[name][where] += 5
    for name in ("actions", "next_actions"):
        old = batch[name][where]
        batch[name][where] = -old if old.is_floating_point() else (old + 1) % CHOICES
    for name in batch.keys() & {"action_masks", "next_action_masks"}:
        batch[name][where] = True
    return batch, rewards


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_what_the_dead_see_and_earn_changes_nothing(script, discrete):
    """No loss and no gradient, to the last bit; the same change of a living agent's row changes them."""
    nets, batch = make_nets(script, discrete), make_batch(discrete)
    batch["has_next_action"] = ~batch["terminals"]  # so that ICQ uses every row
    rewards = batch["individual_rewards"]
    before = both_losses(script, batch, rewards, nets)
    for one, other in zip(before, both_losses(script, *altered(batch, rewards, ~batch["alive"]), nets), strict=True):
        assert torch.equal(one, other)
    parameters = len(list(nets.critic.parameters()))
    for row, agent in batch["alive"].nonzero().tolist():
        where = torch.zeros(B, N, dtype=torch.bool)
        where[row, agent] = True
        after = both_losses(script, *altered(batch, rewards, where), nets)
        assert all(before[loss] != after[loss] for loss in (0, 1 + parameters)), (row, agent)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_an_agent_that_is_dead_throughout(script, discrete):
    """Its networks get no gradient at all, and no division by the number of its rows makes it NaN."""
    nets, batch = make_nets(script, discrete), make_batch(discrete)
    batch["alive"][:, 1] = batch["next_alive"][:, 1] = False
    for found in both_losses(script, batch, batch["individual_rewards"], nets):
        assert found.isfinite().all()
        if found.ndim:
            assert (found[1::N] == 0).all() and (found[0::N] != 0).any()


# ---- steps ----


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_step_clips_each_agent_by_itself(script, name):
    """One norm over all agents would let a huge gradient of one agent stop the others."""
    nets = make_nets(script, False)
    network, scales = getattr(nets, name), torch.tensor([1e-4, 1.0, 1e4])
    parameters = list(network.parameters())
    torch.manual_seed(2)
    wanted = []
    for parameter in parameters:  # a loss whose gradient is this, small for agent 0 and huge for agent 2
        owner = torch.arange(len(parameter)) % N
        wanted.append(torch.randn_like(parameter) * scales[owner].view(-1, 1, 1))
    loss = sum((parameter * gradient).sum() for parameter, gradient in zip(parameters, wanted, strict=True))
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    script.optimize(loss, nets, name, optimizer, make_args(script, max_grad_norm=0.5))
    moved = [(old - new).detach() for old, new in zip(before, parameters, strict=True)]
    for i in range(N):
        given = torch.cat([gradient[i::N].flatten() for gradient in wanted])  # both twins of agent i
        expected = given * min(1.0, 0.5 / given.norm().item())
        found = torch.cat([difference[i::N].flatten() for difference in moved])
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-5)
        assert found.norm() <= 0.5 + 1e-3


@pytest.mark.parametrize("script", SCRIPTS)
def test_step_moves_one_network_and_its_target(script):
    """The critic's step must not leave gradients or changes anywhere else, nor the actor's."""
    for name in ("critic", "actor"):
        nets, batch, args = make_nets(script, False), make_batch(False), make_args(script)
        before = {key: value.clone() for key, value in nets.state_dict().items()}
        if name == "critic":
            loss, _ = script.critic_loss(batch, batch["individual_rewards"], nets, args)
        else:
            loss, _ = script.actor_loss(batch, nets, args)
        network = getattr(nets, name)
        script.optimize(loss, nets, name, torch.optim.Adam(network.parameters(), lr=1e-2), args)
        for key, value in nets.state_dict().items():
            weight = key.startswith((f"{name}.", f"{name}_target."))
            assert torch.equal(value, before[key]) != weight, key
        others = [p for other, module in nets.named_children() if other != name for p in module.parameters()]
        assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("script", SCRIPTS)
def test_targets_move_in_place(script):
    """target + rate (network - target), after the network's step and in the same storage."""
    nets, args = make_nets(script, False), make_args(script, target_rate=0.25)
    for name in ("critic", "actor"):
        network, target = getattr(nets, name), getattr(nets, f"{name}_target")
        old = [(parameter, parameter.data_ptr(), array(parameter).copy()) for parameter in target.parameters()]
        before = [array(parameter).copy() for parameter in network.parameters()]
        loss = sum((parameter * torch.randn_like(parameter)).sum() for parameter in network.parameters())
        script.optimize(loss, nets, name, torch.optim.SGD(network.parameters(), lr=10.0), args)
        for (parameter, pointer, value), was, now in zip(old, before, network.parameters(), strict=True):
            assert parameter.data_ptr() == pointer and not parameter.requires_grad
            assert np.abs(array(now) - was).mean() > 0.01
            close(parameter, value + 0.25 * (array(now) - value))


@pytest.mark.parametrize("script", SCRIPTS)
def test_targets_start_as_copies(script):
    """A target of other random weights would bootstrap from noise for the first hundreds of iterations."""
    nets = script.Networks(make_data(False), make_args(script))
    for target, network in ((nets.critic_target, nets.critic), (nets.actor_target, nets.actor)):
        for ours, theirs in zip(target.parameters(), network.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    # Twins and agents start apart, or they would stay the same for ever.
    layer = nets.critic.layer2.weight
    assert all(not torch.equal(layer[i], layer[j]) for i in range(2 * N) for j in range(i))
