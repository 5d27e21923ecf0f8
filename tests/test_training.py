"""What an update may touch and what it must not, what a file says, the five kinds of credit, evaluation, learning."""

import csv
import importlib

import numpy as np
import pytest
import torch
import toy

from causal_model import CausalModel

SCRIPTS = [importlib.import_module(name) for name in toy.SCRIPTS]
N, OBS = 2, 2  # agents, observation


def make(script, discrete=False, **changes):
    """(args, networks, causal model, optimizers) as a run makes them: the same for the same seed."""
    args = script.Args(cuda=False, hidden_dim=16, **changes)
    torch.manual_seed(0)
    return args, *script.build(args, make_data(discrete), {})


def make_data(discrete=False, transitions=64):
    arrays = toy.record(toy.Matching(discrete), transitions)
    arrays["next_actions"] = np.roll(arrays["actions"], -1, axis=0)
    arrays["has_next_action"] = ~arrays["timeouts"]
    arrays["alive"] = arrays["next_alive"] = np.ones((transitions, N), bool)
    arrays["shapley_rewards"] = arrays["individual_rewards"] ** 2  # anything that no other array has
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def weights(*modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(before, after):
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def credited(script, data, args, nets, model):
    """The data with everybody's credit, as a run adds it between the two phases."""
    credit = script.assign_credit(data, args, model)
    if args.standardize_rewards:
        credit = script.standardize(credit, data["alive"], nets.center)
    return {**data, "credit": credit}


def updated(script, data, iterations=3, discrete=False, policy=True, causal=True, **changes):
    """Networks and causal model after some updates on the whole of `data`, always with the same random numbers."""
    args, nets, model, optimizers = make(script, discrete, **changes)
    for iteration in range(iterations if causal else 0):
        torch.manual_seed(iteration)
        script.update_causal_model(data, model, optimizers)
    data = credited(script, data, args, nets, model)
    for iteration in range(iterations if policy else 0):
        torch.manual_seed(iteration)
        script.update(data, nets, optimizers, args)
    return nets, model


# ---- what an update may touch ----


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_policy_and_causal_model_learn_from_their_own_losses(script, discrete):
    """The policy's losses must not move the causal model, and the causal loss must move nothing else."""
    data = make_data(discrete)
    args, nets, model, _ = make(script, discrete)
    start, causal_start = weights(nets), weights(model)
    _, both_model = updated(script, data, iterations=1, discrete=discrete)
    only_policy, frozen = updated(script, data, iterations=1, discrete=discrete, causal=False)
    untouched, only_causal = updated(script, data, iterations=1, discrete=discrete, policy=False)
    assert same(causal_start, weights(frozen)) and same(start, weights(untouched))
    assert not same(causal_start, weights(only_causal)) and not same(start, weights(only_policy))
    assert same(weights(both_model), weights(only_causal))  # the policy after it changed nothing
    # Nor is there a path in the graph: the losses that the policy is trained on do not know the causal model.
    rewards = script.assign_credit(data, args, model)
    assert not rewards.requires_grad
    for value, _ in (script.critic_loss(data, rewards, nets, args), script.actor_loss(data, nets, args)):
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in found)
    causal_loss, _ = model.loss(*script.causal_inputs(data), data["rewards"])
    found = torch.autograd.grad(causal_loss, trained(nets), allow_unused=True)
    assert all(gradient is None for gradient in found)


def trained(nets):
    return [parameter for parameter in nets.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_network_moves(script):
    """An update that forgets the critics, a target or the second twin would still run."""
    args, nets, model, _ = make(script)
    start = weights(nets)
    after, _ = updated(script, make_data(), iterations=2)
    for before, (name, parameter) in zip(start, after.named_parameters(), strict=True):
        assert all(not torch.equal(*pair) for pair in zip(before, parameter, strict=True)), name
    for name in ("actor", "critic"):  # after one update from equality, a target has gone 1 % of the way
        args, nets, model, optimizers = make(script, target_rate=0.01)
        old = weights(getattr(nets, name))
        script.update(credited(script, make_data(), args, nets, model), nets, optimizers, args)
        moved = zip(old, weights(getattr(nets, name)), weights(getattr(nets, f"{name}_target")), strict=True)
        for before, new, target in moved:
            torch.testing.assert_close(target, before + 0.01 * (new - before), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_recorded_individual_rewards_are_never_used(script, discrete):
    """Under macca, team and uniform, training on other recorded individual rewards ends in the same weights."""
    data, names = make_data(discrete), ("individual_rewards", "shapley_rewards")
    lies = {name: {**data, name: torch.randn_like(data[name])} for name in names}
    without = {name: value for name, value in data.items() if name not in names}
    for credit in ("macca", "team", "uniform"):
        nets, model = updated(script, data, discrete=discrete, credit=credit)
        for other in (*lies.values(), without):
            other_nets, other_model = updated(script, other, discrete=discrete, credit=credit)
            assert same(weights(nets, model), weights(other_nets, other_model))
    for credit, used in (("truth", "individual_rewards"), ("oracle", "shapley_rewards")):  # each uses its own
        nets, _ = updated(script, data, discrete=discrete, credit=credit)
        for name, other in lies.items():
            assert same(weights(nets), weights(updated(script, other, discrete=discrete, credit=credit)[0])) == (
                name != used
            )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_agents_learn_independently(script, discrete):
    """Other observations, actions and rewards of the second agent must leave the first one's networks bit-identical."""
    data = make_data(discrete)
    other = {name: value.clone() for name, value in data.items()}
    for name in ("observations", "next_observations", "individual_rewards"):
        other[name][:, 1] = 1000 * torch.randn_like(other[name][:, 1])  # gradients of a wholly different size
    for name in ("actions", "next_actions"):
        other[name][:, 1] = other[name][:, 1].flip(0) if discrete else -other[name][:, 1]
    if discrete:
        other["action_masks"][:, 1] = other["next_action_masks"][:, 1] = True
    changes = {"credit": "truth", "standardize_rewards": False}  # one scale for all agents would couple them
    nets, _ = updated(script, data, discrete=discrete, causal=False, **changes)
    other_nets, _ = updated(script, other, discrete=discrete, causal=False, **changes)
    for (name, one), two in zip(nets.named_parameters(), other_nets.parameters(), strict=True):
        assert torch.equal(one[0::N], two[0::N]), name  # agent 0: the first actor, the first critic of each twin
        if "weight" in name:  # Adam's first steps of a bias depend on the gradient's sign only
            assert not torch.equal(one[1::N], two[1::N]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_recorded_state_is_used(script):
    """Where a dataset brings a joint state, the causal model must see that and not the observations."""
    data = make_data()
    action = data["actions"]
    state, joint = script.causal_inputs(data)
    assert torch.equal(state, data["observations"].flatten(1)) and torch.equal(joint, action)
    states = torch.randn(64, 7)
    assert torch.equal(script.causal_inputs({**data, "states": states})[0], states)
    discrete = make_data(True)
    state, joint = script.causal_inputs(discrete)
    assert joint.shape == (64, 2, 5) and joint.dtype == torch.float32
    for row in range(64):
        for agent in range(2):
            expected = [float(choice == discrete["actions"][row, agent]) for choice in range(5)]
            assert joint[row, agent].tolist() == expected


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("recorded", [False, True])
def test_build(script, recorded):
    """The causal model, the networks and their optimizers are made as the arguments and the dataset say."""
    data, metadata = make_data(), {"state_owner": [1, 0, -1]}
    if recorded:
        data["states"] = torch.randn(64, 3)
    changes = {"share": "slots", "graph": "fixed", "anchor": 3.0, "lambda1": 0.5, "lambda2": 0.25, "h": 0.3}
    changes |= {"references": 5, "hidden_dim": 8, "learning_rate": 0.02, "causal_learning_rate": 0.03}
    nets, model, optimizers = script.build(script.Args(cuda=False, **changes), data, metadata)
    owner = metadata["state_owner"] if recorded else [0, 0, 1, 1]  # whatever an agent observes is its own
    inputs = data["states"] if recorded else data["observations"].flatten(1), data["actions"]
    expected = CausalModel(N, len(owner), 2, owner, "slots", "fixed", 3.0, 0.5, 0.25, 0.3, 5)
    expected.fit_statistics(*inputs, data["rewards"])
    assert (model.share, model.graph, model.h) == ("slots", "fixed", 0.3)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(expected.named_buffers()).keys()
    assert all(torch.equal(buffers[name], x) for name, x in expected.named_buffers())
    assert nets.critic.layer2.weight.shape == (2 * N, 8, 8) and nets.actor[2].weight.shape == (N, 8, 8)
    for name, parameters, rate in (("actor", nets.actor, 0.02), ("critic", nets.critic, 0.02), ("causal", model, 0.03)):
        groups = optimizers[name].param_groups
        assert {p for group in groups for p in group["params"]} == {*parameters.parameters()}
        assert groups[0]["lr"] == rate


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_causal_step(script):
    """Eq. 4 of the minibatch and of those alive in it; edges stay above their floor, the schedule's rate falls to 0."""
    data = make_data()
    data["alive"] = torch.rand(64, N) < 0.7
    _, _, model, optimizers = make(script, causal_iterations=4, causal_learning_rate=0.04)
    _, _, by_hand, _ = make(script)
    for one in (model, by_hand):
        with torch.no_grad():
            one.edge_logits[:, 0] = -2.99
    groups = by_hand.parameter_groups(0.04)
    rates, floor = [group["lr"] for group in groups], False
    optimizer = torch.optim.Adam(groups, fused=True)
    for iteration in range(4):
        torch.manual_seed(iteration)
        logs = script.update_causal_model(data, model, optimizers)
        optimizers["schedule"].step()
        torch.manual_seed(iteration)
        loss, error = by_hand.loss(data["observations"].flatten(1), data["actions"], data["rewards"], data["alive"])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - iteration / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        floor |= bool((by_hand.edge_logits < -3).any())
        with torch.no_grad():
            by_hand.edge_logits.clamp_(min=-3)
        assert {name: x.item() for name, x in logs.items()} == pytest.approx(
            {"causal_loss": loss.item(), "team_error": error.item()}
        )
    for one, other in zip(weights(model), weights(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert floor
    assert [group["lr"] for group in optimizers["causal"].param_groups] == pytest.approx([0, 0, 0], abs=1e-9)


# ---- what a file says ----


def load(script, path, discrete=False):
    args = script.Args(env=f"toy:matching{'_discrete' if discrete else ''}", cuda=False)
    return script.load_dataset(path, args, toy.Matching(discrete))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("discrete", [False, True])
def test_what_follows_a_row(script, discrete, tmp_path):
    """Next observations, masks and actions are of the same episode, and the same however the file stores them."""
    transitions = 40
    arrays = toy.record(toy.Matching(discrete), transitions)
    arrays["terminals"][4::10], arrays["timeouts"][4::10] = True, False  # every other episode ends by a terminal
    loaded = []
    for final in (False, True):
        path = toy.write(tmp_path / f"{final}.npz", discrete, transitions, final=final, **arrays)
        with np.load(path) as file:
            assert ("final_observations" in file) == final == ("next_observations" not in file)
        data, metadata = load(script, path, discrete)
        assert metadata["quality"] == "random"
        assert data["alive"].all() and data["next_alive"].all()
        for name, array in arrays.items():
            assert torch.equal(data[name], torch.from_numpy(array)), name  # nothing is lost, reordered or rounded
            assert data[name].dtype == torch.from_numpy(array).dtype
        if script.__name__ == "macca_icq":
            for row in range(transitions):
                inside = not arrays["terminals"][row] and not arrays["timeouts"][row]
                assert data["has_next_action"][row] == inside
                if inside:
                    assert data["next_actions"][row].tolist() == arrays["actions"][row + 1].tolist()
        loaded.append(data)
    assert loaded[0].keys() == loaded[1].keys()
    for name, value in loaded[0].items():
        assert torch.equal(value, loaded[1][name]) and value.dtype == loaded[1][name].dtype, name


def make_deaths(transitions):
    """Episodes of 5 steps that end by a terminal; the second agent dies in the third step, the first in the last row.

    The dead can do one thing only, and earn nothing.
    """
    arrays = toy.record(toy.Matching(True), transitions)
    for row in range(transitions):
        for agent, last in ((0, transitions - 1), (1, row // 5 * 5 + 2)):
            if row > last:
                arrays["actions"][row, agent], arrays["action_masks"][row, agent] = 0, np.arange(5) == 0
                arrays["individual_rewards"][row, agent] = 0
            if row >= last:
                arrays["next_action_masks"][row, agent] = np.arange(5) == 0
    arrays["rewards"] = arrays["individual_rewards"].sum(1)
    arrays["terminals"], arrays["timeouts"] = arrays["timeouts"], arrays["terminals"]
    return arrays


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("final", [False, True])
def test_who_is_alive(script, final, tmp_path):
    """The dead are those that can do one thing only, however the file says what could be done next."""
    path = toy.write(tmp_path / "data.npz", True, 40, final=final, **make_deaths(40))
    data, _ = load(script, path, True)
    assert data["alive"].dtype == data["next_alive"].dtype == torch.bool
    for row in range(40):
        assert data["alive"][row].tolist() == [True, row % 5 <= 2]
        assert data["next_alive"][row].tolist() == [row < 39, row % 5 < 2]


def write_faulty(path, fault, final):
    """A file with this fault (None: with nothing but a rounding error), and whether it is of discrete actions."""
    arrays, discrete = toy.record(toy.Matching(), 40), fault and "mask" in fault
    if discrete:
        arrays = toy.record(toy.Matching(True), 40)
    if fault is None:
        arrays["next_observations"] += np.float32(1e-7)
    elif fault == "next_observations are not":
        arrays["next_observations"][1, 0, 0] += 0.001
    elif fault == "next_action_masks are not":
        arrays["next_action_masks"][1, 0, 0] ^= True
    elif fault == "both terminal and timeout":
        arrays["terminals"][9] = True
    elif fault == "the last row is neither":  # an episode whose end was not recorded
        arrays = {name: value[:38] for name, value in arrays.items()}
    drop = ["final_action_masks", "next_action_masks"] if fault == "lacks final_action_masks" else []
    return toy.write(path, discrete, final=final, drop=drop, **arrays)


FAULTS = [("next_observations are not", False), ("next_action_masks are not", False)]
FAULTS += [(fault, final) for fault in ("both terminal and timeout", "the last row is neither") for final in (0, 1)]
FAULTS += [("lacks final_action_masks", final) for final in (0, 1)]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("fault", "final"), FAULTS)
def test_refused_datasets(script, fault, final, tmp_path, capsys):
    """Any of these would bootstrap from the wrong row."""
    path = write_faulty(tmp_path / "data.npz", fault, final)
    with pytest.raises(SystemExit) as stop:
        load(script, path, "mask" in fault)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"{script.__name__}.py: {path}") and fault in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_rounded_next_observations(script, tmp_path):
    """Next observations that differ from the next row's by rounding alone are accepted."""
    data, _ = load(script, write_faulty(tmp_path / "data.npz", None, False))
    assert len(data["rewards"]) == 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_states_are_used_only_with_their_owners(script, tmp_path):
    """Without `state_owner` nobody knows whose a dimension is: then the causal model sees the observations."""
    states = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    for metadata in ({}, {"state_owner": [1, 0, -1]}):
        path = toy.write(tmp_path / "data.npz", transitions=40, states=states, metadata=metadata, final=True)
        data, found = load(script, path)
        _, model, _ = script.build(script.Args(cuda=False), data, found)
        assert len(model.state_mean) == (3 if metadata else N * OBS) and ("states" in data) == bool(metadata)
        expected = torch.from_numpy(states) if metadata else data["observations"].flatten(1)
        assert torch.equal(script.causal_inputs(data)[0], expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_minibatches(script):
    """All arrays of a minibatch are of the same rows, drawn with replacement from all of them."""
    data = {"rewards": torch.arange(50.0), "observations": torch.arange(50.0)[:, None, None].expand(-1, 2, 3)}
    batch = script.sample(data, 5000)
    assert batch["observations"].shape == (5000, 2, 3)
    assert (batch["observations"] == batch["rewards"][:, None, None]).all()
    counts = torch.bincount(batch["rewards"].long(), minlength=50)
    assert counts.min() > 50 and counts.max() < 150  # 100 each, standard deviation 10


# ---- what is held out ----


def make_episodes(lengths):
    """Rows that know their own number and their episode's; every other episode ends by a terminal."""
    episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ends = torch.cat([episode[1:] != episode[:-1], torch.tensor([True])])
    rows = torch.arange(len(episode))
    data = {"terminals": ends & (episode % 2 == 0), "timeouts": ends & (episode % 2 == 1), "episode": episode}
    return data | {"rewards": rows.float(), "observations": rows[:, None, None].repeat(1, 2, 3).float()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_held_out_episodes(script):
    """Whole episodes, about a tenth of the rows: a credit measured on what was trained on would flatter."""
    lengths = np.random.default_rng(0).integers(1, 40, 300).tolist()
    data = make_episodes(lengths)
    torch.manual_seed(1)
    given = {name: x.clone() for name, x in data.items()}
    kept, held = script.hold_out(given)
    assert all(kept[name].data_ptr() == x.data_ptr() for name, x in given.items())  # there was no second copy
    drawn = torch.rand(1)
    for name, value in data.items():  # every row is in one of both, whole and in the order that it had
        pairs = zip((kept, held), (kept["rewards"].long(), held["rewards"].long()), strict=True)
        assert all(torch.equal(part[name], value[rows]) for part, rows in pairs), name
    assert sorted(torch.cat([kept["rewards"], held["rewards"]]).tolist()) == data["rewards"].tolist()
    assert kept["rewards"].diff().min() > 0 and held["rewards"].diff().min() > 0
    assert not set(kept["episode"].tolist()) & set(held["episode"].tolist())
    assert 0 <= len(held["rewards"]) - sum(lengths) / 10 < max(lengths)
    episodes = held["episode"].unique().float()
    assert episodes.min() < 100 and episodes.max() > 200  # from all over the dataset, which may be sorted by quality
    # The same ones whatever the seed, and nothing random is used up: the run is that of its seed.
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(script.hold_out({name: x.clone() for name, x in data.items()})[1]["rewards"], held["rewards"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_held_out_of_large_and_single_episodes(script):
    """More than 10,000 rows measure nothing better; what is one episode cannot be split."""
    _, held = script.hold_out(make_episodes([25] * 5000))
    assert len(held["rewards"]) == 10_000
    data = make_episodes([50])
    for part in script.hold_out({name: x.clone() for name, x in data.items()}):
        assert part.keys() == data.keys() and all(torch.equal(part[name], data[name]) for name in data)


# ---- credit ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_credit(script):
    """The five answers of --credit, in the team reward's units; more rows than are credited at a time."""
    few, rows = make_data(), torch.randint(64, (2100,))
    data = {name: x[rows] for name, x in few.items()}
    for credit in ("team", "uniform", "truth", "oracle", "macca"):
        args, _, model, _ = make(script, credit=credit)
        rewards = script.assign_credit(data, args, model)
        assert rewards.shape == (2100, N) and not rewards.requires_grad
        team = data["rewards"][:, None].expand(-1, N)
        if credit == "macca":
            expected = model.assign(few["observations"].flatten(1), few["actions"], few["rewards"])[rows]
            torch.testing.assert_close(rewards, expected)
            torch.testing.assert_close(rewards.sum(1), data["rewards"])  # nothing of it is lost
            assert (rewards[:, 0] - rewards[:, 1]).abs().mean() > 1e-3
        else:
            same_as = {"team": team, "uniform": team / N, "truth": data["individual_rewards"]}
            assert torch.equal(rewards, (same_as | {"oracle": data["shapley_rewards"]})[credit])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_dead_earn_nothing(script):
    """Nor do they take anything away: a share is one of the living's, and all the shares are the team reward."""
    data = make_data(True)
    data["alive"] = torch.rand(64, N) < 0.6
    living = [int(alive.sum()) for alive in data["alive"]]
    assert {*living} == {0, 1, 2}
    inputs = script.causal_inputs(data)
    for credit in ("macca", "team", "uniform"):
        args, _, model, _ = make(script, True, credit=credit)
        rewards = script.assign_credit(data, args, model)
        assert rewards.shape == (64, N)
        for row in range(64):
            team, found = data["rewards"][row].item(), rewards[row].tolist()
            for agent in range(N):
                if not data["alive"][row, agent]:
                    assert found[agent] == 0
                elif credit == "team":
                    assert found[agent] == team
                elif credit == "uniform" or living[row] == 1:
                    assert found[agent] == pytest.approx(team / living[row], abs=1e-5)
            if credit != "team":
                assert sum(found) == pytest.approx(team if living[row] else 0, abs=1e-5)
        if credit == "macca":
            torch.testing.assert_close(rewards, model.assign(*inputs, data["rewards"], data["alive"]))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("center", [False, True])
def test_one_scale_for_all_agents(script, center):
    """Mean and deviation are those of all the living; one of its own would blow up an agent that earns nothing.

    Subtracting the mean would pay or fine those that live long.
    """
    torch.manual_seed(2)
    rewards, alive = torch.randn(64, 4) * torch.tensor([0.02, 1.0, 10.0, 1.0]), torch.rand(64, 4) < 0.7
    alive[:, 0], alive[:, 3] = True, False
    for shift in (3.0, 1000.0):  # with the second one, a tenth of the mean is more than the deviation
        found = script.standardize(rewards + shift, alive, torch.tensor(center))
        own = np.array([float(rewards[row, i]) + shift for row, i in alive.nonzero().tolist()])
        scale = own.std(ddof=1) if center else max(own.std(ddof=1), 0.1 * abs(own.mean()))
        expected = ((rewards.double().numpy() + shift) - center * own.mean()) / scale * alive.numpy()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
        # What the dead are said to have earned changes nothing.
        assert torch.equal(script.standardize(rewards + shift + 9 * ~alive, alive, torch.tensor(center)), found)
    # A cost that is always the same stays in bounds.
    few = script.standardize(torch.full((64, 4), -3.0), alive, torch.tensor(center))
    torch.testing.assert_close(few, torch.zeros(64, 4) if center else -10 * alive.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("credit, standardize", [("macca", True), ("macca", False), ("oracle", True), ("team", True)])
def test_a_run_by_hand(script, credit, standardize, tmp_path, monkeypatch):
    """Algorithm 1: the causal model first, then every transition is credited once and by one scale, then the policies.

    The same steps by hand end in the same weights, to the last bit: with credit by an earlier or later model, or
    standardised by the minibatch, or with random numbers used up elsewhere, they would not.
    """
    extra = {"shapley_rewards": toy.record(toy.Matching(), 100)["rewards"][:, None] * np.float32([0.25, 0.75])}
    path = toy.write(tmp_path / "data.npz", final=True, **extra)
    flags = ["--env", "toy:matching", "--dataset", path, "--no-cuda", "--hidden-dim", 8, "--batch-size", 16]
    flags += ["--credit", credit, f"--{'' if standardize else 'no-'}standardize-rewards", "--seed", 3]
    flags += ["--causal-iterations", 5, "--total-iterations", 7]
    flags += ["--eval-interval", 3, "--eval-episodes", 1, "--final-episodes", 1]
    calls, genuine = [], CausalModel.assign
    with monkeypatch.context() as patch:
        patch.setattr(CausalModel, "assign", lambda *inputs: calls.append(len(inputs[1])) or genuine(*inputs))
        status, _, stderr = toy.run(script.__name__, tmp_path, *flags, monkeypatch=patch)
    assert status == 0, stderr
    checkpoint = torch.load(toy.run_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    args = script.Args(**checkpoint["args"])
    torch.manual_seed(3)
    data, metadata = load(script, path)
    data, held_out = script.hold_out(data)
    nets, model, optimizers = script.build(args, data, metadata)
    for _ in range(5 if credit == "macca" else 0):
        script.update_causal_model(script.sample(data, 16), model, optimizers)
        optimizers["schedule"].step()
    data = credited(script, data, args, nets, model)
    if standardize:
        assert data["credit"].std() == pytest.approx(1, abs=1e-4) and data["credit"].mean().abs() < 1e-5
    for _ in range(7):
        script.update(script.sample(data, 16), nets, optimizers, args)
    for name, module in (("nets", nets), ("causal_model", model)):
        found, expected = checkpoint[name], module.state_dict()
        assert found.keys() == expected.keys() and same(found.values(), expected.values()), name
    assert calls == ([len(data["rewards"]), len(held_out["rewards"])] if credit == "macca" else [])


# ---- evaluation ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation(script):
    """The return is the mean over agents, summed over the episode, of episodes with the seeds that the run names."""
    _, nets, *_ = make(script)
    by_hand = []
    for episode in range(3):
        env, total = toy.Matching(), 0.0
        observations, _ = env.reset(seed=1000 + episode)
        while env.agents:
            joint = torch.tensor(np.array([observations[agent] for agent in toy.AGENTS]))[:, None]  # [N, 1, O]
            actions = nets.actor((joint - nets.mean) / nets.std).tanh()[:, 0].detach().numpy()
            observations, rewards, *_ = env.step(dict(zip(toy.AGENTS, actions, strict=True)))
            total += (rewards["a"] + rewards["b"]) / 2
        by_hand.append(total)
    expected = {"return": np.mean(by_hand), "return_std": np.std(by_hand)}
    assert expected["return_std"] > 0.1
    both = {"random_return": -6.0, "expert_return": 2.0}
    for known in ({}, {"random_return": -6.0}, {"expert_return": 2.0}, {"random_return": 2.0, "expert_return": 2.0}):
        assert script.evaluate(toy.Matching(), nets, known, 3, 1000) == pytest.approx(expected, rel=1e-5)
    expected["score"] = 100 * (expected["return"] + 6) / 8
    assert script.evaluate(toy.Matching(), nets, both, 3, 1000) == pytest.approx(expected, rel=1e-5)


class Leaving(toy.Matching):
    """The second agent is gone after its third step: nothing is said of it any more, and nothing asked for."""

    def _present(self, *parts):
        self.shown = [{agent: part[agent] for agent in self.agents} for part in parts]
        return self.shown

    def reset(self, seed=None, options=None):
        return self._present(*super().reset(seed))

    def step(self, actions):
        assert list(actions) == self.agents
        known = self.agents
        both = {"b": np.flatnonzero(self.masks[1])[0], **actions}
        observations, rewards, terminations, truncations, infos = super().step(both)
        terminations["b"] = self.steps == 3
        self.agents = [agent for agent in self.agents if self.steps < 3 or agent == "a"]
        observations, infos = self._present(observations, infos)
        ends = [{agent: part[agent] for agent in known} for part in (rewards, terminations, truncations)]
        return observations, *ends, infos


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_actors_see(script, monkeypatch):
    """Each agent sees its own observation and mask, and does what its actor says; who is gone sees zeros."""
    _, nets, *_ = make(script, True)
    env, seen, played, total = Leaving(True), [], [], []
    genuine, genuine_step = nets.act, env.step

    def act(observations, masks):
        assert observations.shape == (1, N, OBS) and observations.dtype == torch.float32
        assert masks.shape == (1, N, 5) and masks.dtype == torch.bool
        actions = genuine(observations, masks)
        seen.append((*env.shown, observations[0].numpy(), masks[0].numpy(), actions[0].tolist()))
        return actions

    def step(actions):
        played.append(actions)
        result = genuine_step(actions)
        total.append(sum(result[1].values()) / 2)
        return result

    monkeypatch.setattr(nets, "act", act)
    monkeypatch.setattr(env, "step", step)
    found = script.evaluate(env, nets, {}, 3, 0)
    assert len(seen) == len(played) == 3 * toy.EPISODE_STEPS
    assert found["return"] == pytest.approx(sum(total) / 3)
    for number, (observed, infos, observations, masks, actions) in enumerate(seen):
        here = toy.AGENTS if number % toy.EPISODE_STEPS < 3 else ["a"]
        assert [*observed] == here == [*played[number]]
        for i, agent in enumerate(toy.AGENTS):
            np.testing.assert_array_equal(observations[i], observed.get(agent, np.zeros(OBS)))
            np.testing.assert_array_equal(masks[i], infos[agent]["action_mask"] if agent in here else np.ones(5))
            assert agent not in here or played[number][agent] == actions[i]
    assert len({action for actions in played for action in actions.values()}) > 2


class Staying(toy.Matching):
    """It never removes its agents, and says once that an agent's episode is over: by a terminal, by a time limit."""

    def step(self, actions):
        observations, rewards, _, _, infos = super().step(actions)
        assert self.steps <= toy.EPISODE_STEPS, "the episode is over"
        self.agents = toy.AGENTS[:]
        over = self.steps == toy.EPISODE_STEPS
        return observations, rewards, {"a": self.steps == 2, "b": False}, {"a": False, "b": over}, infos


@pytest.mark.parametrize("script", SCRIPTS)
def test_agents_that_are_never_removed(script):
    """An episode is over when each agent has been terminated or truncated, not before and not later."""
    _, nets, *_ = make(script)
    expected = script.evaluate(toy.Matching(), nets, {}, 3, 0)
    assert script.evaluate(Staying(), nets, {}, 3, 0) == expected


class Battle(toy.Matching):
    """The second of every four episodes is won. Reported: never, if won, or always (at the end, by one agent)."""

    def __init__(self, reported):
        super().__init__()
        self.reported, self.episode = reported, 0

    def step(self, actions):
        *rest, infos = super().step(actions)
        if not self.agents:
            won, self.episode = self.episode % 4 == 1, self.episode + 1
            if self.reported == "always" or (won and self.reported == "if won"):
                infos["b"]["won"] = won
        return *rest, infos


@pytest.mark.parametrize("script", SCRIPTS)
def test_win_rate(script):
    """The share of episodes that were won; an episode that does not report it counts as lost."""
    _, nets, *_ = make(script)
    for reported in ("always", "if won"):
        assert script.evaluate(Battle(reported), nets, {}, 4, 0)["won"] == 0.25
    assert "won" not in script.evaluate(Battle("never"), nets, {}, 4, 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_of_a_run(script, tmp_path, monkeypatch):
    """The last row of metrics.csv by hand: the saved policy's return, and the saved model's credit of held-out rows."""
    metadata, arrays = {"random_return": 1.25, "expert_return": 5.0}, make_deaths(200)
    arrays["shapley_rewards"] = arrays["rewards"][:, None] * np.float32([0.25, 0.75])
    path = toy.write(tmp_path / "data.npz", True, 200, metadata=metadata, final=True, **arrays)
    flags = ["--env", "toy:matching_discrete", "--dataset", path, "--no-cuda", "--hidden-dim", 8, "--batch-size", 32]
    flags += ["--causal-learning-rate", 1e-2, "--h", 0.95, "--seed", 3, "--total-iterations", 60]
    flags += ["--causal-iterations", 60]
    flags += ["--eval-interval", 20, "--eval-episodes", 2, "--final-episodes", 4]
    status, _, stderr = toy.run(script.__name__, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    with open(toy.run_folder(tmp_path) / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["iteration"], row["episodes"]) for row in rows] == [(20, 2), (40, 2), (60, 4)]

    checkpoint = torch.load(toy.run_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    args, (data, metadata) = script.Args(**checkpoint["args"]), load(script, path, True)
    data, held_out = script.hold_out(data)
    nets, model, _ = script.build(args, data, metadata)
    nets.load_state_dict(checkpoint["nets"])
    model.load_state_dict(checkpoint["causal_model"])
    inputs = held_out["observations"].flatten(1), torch.eye(5)[held_out["actions"]]
    team, alive = (held_out[name].numpy() for name in ("rewards", "alive"))
    assert not alive.all()
    predicted = model.predict(*inputs, held_out["alive"]).numpy()
    edges = [(edges >= 0.95).float().mean().item() for edges in model.probabilities(*inputs)]
    expected = script.evaluate(toy.Matching(True), nets, metadata, 4, 3000) | {
        "iteration": 60,
        "episodes": 4,
        "state_density": edges[0],
        "action_density": edges[1],
        "team_nmse": ((predicted - team) ** 2).mean() / team.var(ddof=1),
    }
    credit = model.assign(*inputs, held_out["rewards"], held_out["alive"]).numpy()
    shares = {"": credit, "even_": team[:, None] * alive / alive.sum(1, keepdims=True).clip(1)}
    for name, truth in (("paid", "individual_rewards"), ("cause", "shapley_rewards")):
        for who, share in shares.items():
            error = share - held_out[truth].numpy()
            error -= error.mean(0)  # a constant of an agent's
            expected |= {f"{name}_{who}mse": (error**2).mean(), f"{name}_{who}mae": np.abs(error).mean()}
        expected[f"{name}_skill"] = 1 - expected[f"{name}_mse"] / expected[f"{name}_even_mse"]
    assert rows[-1] == pytest.approx(expected, rel=1e-3)
    assert 0 < rows[-1]["state_density"] < 1 and abs(rows[-1]["paid_skill"]) > 0.1 and "score" in rows[-1]
    names = ["state_density", "paid_skill", "cause_mae"]  # the causal model is trained no more
    assert all(row[name] == rows[-1][name] for row in rows for name in names)


# ---- learning ----

# Returns of an episode of 5 steps, mean over agents. Continuous: random actions -6.7, the mean action (behaviour
# cloning on this data) -3.3, the best 0. Discrete: random actions and behaviour cloning 1.25, the best 5.
MARGIN = {False: -0.5, True: 4.6}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return {d: toy.write(folder / f"discrete{d}.npz", d, transitions=5000, final=True) for d in (False, True)}


@pytest.mark.parametrize("credit", ["truth", "uniform", "macca"])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("script", toy.SCRIPTS)
def test_learns_a_tiny_task(script, discrete, credit, datasets, tmp_path, monkeypatch):
    """From random actions to nearly the best policy within a few hundred iterations, through the command line."""
    flags = ["--env", f"toy:matching{'_discrete' if discrete else ''}", "--dataset", datasets[discrete], "--no-cuda"]
    flags += ["--credit", credit, "--learning-rate", 3e-3, "--batch-size", 128, "--gamma", 0.5, "--hidden-dim", 32]
    flags += ["--total-iterations", 300, "--causal-iterations", 300, "--final-episodes", 50]
    flags += ["--beta", 0.1] if script == "macca_icq" else []
    status, _, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 0, stderr
    with open(toy.run_folder(tmp_path) / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["return"]) > MARGIN[discrete]
    if credit == "macca":  # the uniform split has skill 0, the recorded individual rewards have 1
        assert float(last["paid_skill"]) > 0.8 and float(last["team_nmse"]) < 0.2
