"""SMAX behind PettingZoo's interface, against JaxMARL's own steps and a slow account of who did what; its collector.

What needs JaxMARL asks for the fixture `smax`, which skips where it is not installed. Compiling takes most of the time:
environments and policies are made once for the whole file.
"""

import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy
import tyro
from gymnasium import spaces
from pettingzoo.test import parallel_api_test

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import convert, files  # noqa: E402

STILL = 4  # the action; 0 to 3 move, to the north, east, south and west, and those from 5 on attack
MOMENTS = 8  # in a step


# ---- where it is not installed ----


@pytest.mark.parametrize("missing", [("jaxmarl",), ("jaxmarl", "jax", "jaxlib", "optax")])
@pytest.mark.parametrize("script", [*toy.SCRIPTS, "data/collect_smax"])
def test_no_package(tmp_path, monkeypatch, script, missing):
    """Each way to it says what to install."""
    for name in list(sys.modules):
        if name.split(".")[0] in missing or name in ("data.smax", "data.collect_smax"):
            monkeypatch.delitem(sys.modules, name)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # Python's way to say that there is none
    monkeypatch.setattr(sys, "path", sys.path[:])  # make_env appends to it
    flags = ["--env", "smax/2s3z", *([] if script.startswith("data") else ["--no-cuda"])]
    status, _, stderr = toy.run(script, tmp_path, *flags, monkeypatch=monkeypatch)
    assert status == 2 and stderr.count("\n") == 1 and "pip install $(grep -o 'jaxmarl==" in stderr, stderr
    assert not list(tmp_path.iterdir())


# ---- made once ----


@pytest.fixture(scope="module")
def smax(tmp_path_factory):
    """The module. What was compiled once is read again, and is not optimised, which would take longer than it saves."""
    pytest.importorskip("jaxmarl")
    import jax

    from data import smax

    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield smax
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def env(smax):
    return smax.parallel_env("3m")


class Game:
    """A map's Battle and JaxMARL's own step, compiled together: numpy in, numpy out."""

    def __init__(self, smax, map_name):
        import jax

        self.jax, self.battle = jax, smax.Battle(map_name)
        self.num_agents, self.num_enemies = self.battle.num_agents, self.battle.num_enemies
        self.rules, names = self.battle.game, self.battle.game.agents

        def both(key, world, actions):
            joint = dict(zip(names, actions, strict=True))
            observations, after, rewards, ends, _ = self.rules.step_env(key, world, joint)
            mine, outcome = self.battle.step(key, world, actions)
            return {
                "theirs": after,
                "observations": observations,
                "reward": rewards[names[0]],
                "over": ends["__all__"],
                "moments": self.rules.step_env(key, world, joint, True),  # the states after each
                "mine": mine,
                "outcome": outcome,
                "view": self.battle.view(mine, actions),
            }

        none = np.full(self.num_agents, -1)
        self._both, self._view = jax.jit(both), jax.jit(lambda world: self.battle.view(world, none))

    def key(self, number):
        return self.jax.random.PRNGKey(number)

    def reset(self, key):
        return self.jax.device_get(self.battle.reset(key))

    def view(self, world):
        return self.jax.device_get(self._view(world))

    def step(self, key, world, actions):
        """One step by both, from the same world."""
        return SimpleNamespace(**self.jax.device_get(self._both(key, world, np.asarray(actions, np.int32))))

    def play(self, seed):
        """A battle: [(world, actions, what `step` returns)]."""
        rng, world, rows = np.random.default_rng(seed), self.reset(self.key(seed)), []
        masks = self.view(world).masks
        while not rows or not rows[-1][2].over:
            actions = [reckless(rng, mask) for mask in masks]
            rows.append((world, np.array(actions), self.step(self.key(1000 * seed + len(rows) + 1), world, actions)))
            world, masks = rows[-1][2].mine, rows[-1][2].view.masks
        return rows

    def scene(self, units):
        """A world with these units in it, {number: (x, y, health, cooldown)}, enemies last, and no other alive."""
        world = self.reset(self.key(0))
        state = world.state.replace(
            unit_positions=world.state.unit_positions.copy(),
            unit_health=np.zeros_like(world.state.unit_health),
            unit_weapon_cooldowns=np.zeros_like(world.state.unit_weapon_cooldowns),
        )
        for unit, (x, y, health, cooldown) in units.items():
            state.unit_positions[unit], state.unit_health[unit] = (x, y), health
            state.unit_weapon_cooldowns[unit] = cooldown
        return world.replace(state=state.replace(unit_alive=state.unit_health > 0))


def reckless(rng, mask):
    """A random allowed action, mostly an attack or a step towards the enemy, or there would be hardly any fighting."""
    attacks = np.flatnonzero(mask[STILL + 1 :]) + STILL + 1
    if len(attacks) and rng.random() < 0.9:
        return attacks[0] if rng.random() < 0.5 else rng.choice(attacks)
    return 1 if mask[1] and rng.random() < 0.4 else rng.choice(np.flatnonzero(mask))


@pytest.fixture(scope="module")
def game(smax):
    return Game(smax, "2s3z")


MAPS = ["2s3z", "5m_vs_6m", "6h_vs_8z"]


@pytest.fixture(scope="module", params=MAPS)
def battles(smax, request):
    """(the game, some battles of it)"""
    game = request.getfixturevalue("game") if request.param == "2s3z" else Game(smax, request.param)
    return game, [game.play(seed) for seed in range(8)]


# ---- the battle ----


def test_battles_are_those_of_jaxmarl(battles):
    game, played = battles
    lengths = []
    for battle in played:
        lengths.append(len(battle))
        for i, (_, _, after) in enumerate(battle):
            leaves = game.jax.tree.leaves(after.mine), game.jax.tree.leaves(after.theirs)
            for mine, theirs in zip(*leaves, strict=True):
                assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
                np.testing.assert_allclose(mine, theirs, atol=1e-5)
            outcome, alive = after.outcome, after.theirs.state.unit_alive
            allies, enemies = alive[: game.num_agents].any(), alive[game.num_agents :].any()
            assert outcome.reward == pytest.approx(10 * after.reward, abs=1e-5)
            assert (outcome.terminal | outcome.timeout) == after.over == (i + 1 == len(battle))
            assert outcome.terminal == (not (allies and enemies)) and not (outcome.terminal and outcome.timeout)
            assert outcome.won == (allies and not enemies)
            masks = game.rules.get_avail_actions(after.theirs)
            last = np.eye(game.battle.num_actions)[battle[i][1]]
            for j, name in enumerate(game.rules.agents):
                expected = np.concatenate([after.observations[name], last[j]])
                np.testing.assert_allclose(after.view.observations[j], expected, atol=1e-5)
                np.testing.assert_array_equal(after.view.masks[j], masks[name])
            np.testing.assert_allclose(after.view.state, after.observations["world_state"], atol=1e-5)
    assert len(set(lengths)) > 1  # not the same battle again and again


def slow_earned(game, world, actions, moments, reward):
    """What each agent earned, one sentence of the definition per line, and how often several hit one at once."""
    n, rules, before, together = game.num_agents, game.rules, world.state, 0
    kind, damage = before.unit_types, np.zeros(game.num_agents)
    whole, strength, reach = (
        np.array(table) for table in (rules.unit_type_health, rules.unit_type_attacks, rules.unit_type_attack_ranges)
    )
    earlier = before
    for moment in range(MOMENTS):
        later, shooters = game.jax.tree.map(lambda x, moment=moment: x[moment], moments), {}
        for agent, action in enumerate(actions):
            if action <= STILL or not earlier.unit_alive[agent]:
                continue
            target = n + action - STILL - 1
            distance = np.linalg.norm(earlier.unit_positions[target] - earlier.unit_positions[agent])
            ready = earlier.unit_weapon_cooldowns[agent] <= 0
            if ready and earlier.unit_alive[target] and distance < reach[kind[agent]]:
                shooters.setdefault(target, []).append(agent)
        for target, group in shooters.items():
            lost = (earlier.unit_health[target] - later.unit_health[target]) / whole[kind[target]]
            together += len(group) > 1
            for agent in group:
                damage[agent] += lost * strength[kind[agent]] / sum(strength[kind[other]] for other in group)
        earlier = later
    alike = before.unit_alive[:n] / max(before.unit_alive[:n].sum(), 1)
    victory = 10 * (earlier.unit_alive[:n].any() and not earlier.unit_alive[n:].any())
    hits = damage / damage.sum() if damage.any() else alike
    return (reward - victory) * hits + victory * alike, together


def test_earned_is_what_a_slow_account_says(battles):
    game, played = battles
    rewarded = shared = useless = 0
    for world, actions, after in itertools.chain(*played):
        outcome = after.outcome
        expected, together = slow_earned(game, world, actions, after.moments, outcome.reward)
        np.testing.assert_allclose(outcome.earned, expected, atol=2e-5)
        assert outcome.earned.sum() == pytest.approx(outcome.reward, abs=1e-4)
        alive = world.state.unit_alive[: game.num_agents]
        assert not outcome.earned[~alive].any()
        rewarded += outcome.reward > 0
        shared += together
        useless += outcome.reward > 0 and not outcome.won and (alive & (outcome.earned == 0)).any()
    assert rewarded > 40 and shared > 3 and useless > 20  # the cases that this test is about did occur


# Scenes on 2s3z: units 0 and 1 are stalkers (range 6, strength 13, health 160), 2 to 4 zealots (2, 8, 150), enemies are
# the same, 5 to 9. Unit 5 stands in reach of 0 and 2; 9 is far away and keeps the battle going. Enemies stay where they
# are if they have somebody to shoot at, at the wall, too.
STALKER, ZEALOT, BYSTANDER = (15, 16, 160, 0), (18.4, 16, 150, 0), (8, 8, 150, 0)
SLOW = (18.4, 16, 150, 0.2)  # a zealot that strikes some moments later
FAR = {9: (28, 28, 150, 0)}
SCENES = {  # units, actions, what everyone earns: health of the enemy, of five of them in all, and of the victory
    "two at the same moment": (
        {0: STALKER, 2: ZEALOT, 5: (20, 16, 160, 0), **FAR},
        {0: 5, 2: 5},
        {0: (13 / 160, 0), 2: (8 / 160, 0)},
    ),
    "two at the same moment, more than it takes": (
        {0: STALKER, 2: ZEALOT, 5: (20, 16, 5, 0), **FAR},
        {0: 5, 2: 5},
        {0: (5 / 160 * 13 / 21, 0), 2: (5 / 160 * 8 / 21, 0)},
    ),
    "one takes what the other left": (
        {0: STALKER, 2: SLOW, 5: (20, 16, 15, 0), **FAR},
        {0: 5, 2: 5},
        {0: (13 / 160, 0), 2: (2 / 160, 0)},
    ),
    "too late": (
        {0: STALKER, 2: SLOW, 5: (20, 16, 10, 0), **FAR},
        {0: 5, 2: 5},
        {0: (10 / 160, 0)},
    ),
    "one target each": (
        {0: STALKER, 3: (15, 8, 150, 0), 5: (20, 16, 160, 0), 8: (16.5, 8, 150, 0), **FAR},
        {0: 5, 3: 8},
        {0: (13 / 160, 0), 3: (8 / 150, 0)},
    ),
    "out of reach, not ready, moving": (
        {0: STALKER, 1: (15, 20, 160, 5), 2: (12, 16, 150, 0), 4: (14, 12, 150, 0), 5: (20, 16, 160, 0), **FAR},
        {0: 5, 1: 5, 2: 5, 4: 1},
        {0: (13 / 160, 0)},
    ),
    "an enemy at the wall": (
        {0: (27, 16, 160, 0), 2: ZEALOT, 4: BYSTANDER, 5: (32, 16, 160, 0), **FAR},
        {2: 1},
        {0: (1 / 3, 0), 2: (1 / 3, 0), 4: (1 / 3, 0)},
    ),
    "one at the wall, one hit": (
        {0: STALKER, 4: (28, 30.5, 150, 0), 5: (20, 16, 160, 0), 9: (28, 32, 150, 0)},
        {0: 5},
        {0: (1 + 13 / 160, 0)},
    ),
    "victory": (
        {0: STALKER, 2: SLOW, 4: BYSTANDER, 5: (20, 16, 10, 0)},
        {0: 5, 2: 5},
        {0: (10 / 160, 1 / 3), 2: (0, 1 / 3), 4: (0, 1 / 3)},
    ),
    "victory by two blows": (
        {0: STALKER, 2: ZEALOT, 5: (20, 16, 5, 0)},
        {0: 5, 2: 5},
        {0: (5 / 160 * 13 / 21, 1 / 2), 2: (5 / 160 * 8 / 21, 1 / 2)},
    ),
    "victory in which one dies": (
        {0: (15, 16, 5, 0), 4: BYSTANDER, 5: (20, 16, 10, 0)},
        {0: 5},
        {0: (10 / 160, 1 / 2), 4: (0, 1 / 2)},
    ),
    "victory by the wall": (
        {0: (27, 16, 160, 0), 4: BYSTANDER, 5: (32, 16, 80, 0)},
        {},
        {0: (1 / 4, 1 / 2), 4: (1 / 4, 1 / 2)},
    ),
    "the last two kill each other": (
        {0: (15, 16, 5, 0), 5: (20, 16, 5, 0)},
        {0: 5},
        {0: (5 / 160, 0)},
    ),
    "defeat": ({0: (15, 16, 5, 5), 5: (20, 16, 160, 0)}, {0: 5}, {}),
}


@pytest.mark.parametrize("name", SCENES)
def test_earned_by_hand(game, name):
    units, orders, parts = SCENES[name]
    world, actions = game.scene(units), [orders.get(agent, STILL) for agent in range(5)]
    after = game.step(game.key(1), world, actions)
    health, victory = np.array([parts.get(agent, (0, 0)) for agent in range(5)]).T
    expected = 10 * health / 5 + 10 * victory
    np.testing.assert_allclose(after.outcome.earned, expected, atol=1e-5)
    assert after.outcome.reward == pytest.approx(expected.sum(), abs=1e-5)
    assert after.outcome.reward == pytest.approx(10 * after.reward, abs=1e-5)
    slow, _ = slow_earned(game, world, actions, after.moments, after.outcome.reward)
    np.testing.assert_allclose(slow, expected, atol=1e-5)
    over, won = name in ("the last two kill each other", "defeat") or victory.any(), victory.any()
    assert (after.outcome.terminal, after.outcome.won, after.outcome.timeout) == (over, won, False)


def test_the_hundredth_step(game):
    """Cut short if the battle goes on; won or lost if that was decided in this very step.

    JaxMARL looks at its clock before it puts it forward, and would let a battle of 100 steps go on for one more.
    """
    for name, over, won in (("too late", False, False), ("victory", True, True), ("defeat", True, False)):
        units, orders, _ = SCENES[name]
        for step in (98, 99):
            world = game.scene(units)
            world = world.replace(state=world.state.replace(step=np.asarray(step, np.int32)))
            after = game.step(game.key(1), world, [orders.get(agent, STILL) for agent in range(5)])
            expected = (step == 99 and not over, over, won)
            assert (after.outcome.timeout, after.outcome.terminal, after.outcome.won) == expected
            assert after.over == over


def test_whose_the_states_dimensions_are(game):
    """Whatever happens to a unit shows in its own dimensions: an ally's, or nobody's if it is an enemy."""
    owner = np.array(game.battle.state_owner)
    assert owner.shape == game.view(game.scene({0: STALKER})).state.shape == (game.battle.state_dim,)
    assert [(owner == agent).sum() for agent in range(5)] == [10] * 5 and set(owner) == {-1, 0, 1, 2, 3, 4}
    units = {unit: (3 + 2 * unit, 5 + unit, 40 + unit, 0.1) for unit in range(10)}
    before = game.view(game.scene(units)).state
    for unit, (x, y, health, cooldown) in units.items():
        shown = set()
        for changed in ((x + 1, y, health, cooldown), (x, y - 1, health, cooldown), (x, y, 7, cooldown)):
            state = game.view(game.scene({**units, unit: changed})).state
            (dimension,) = np.flatnonzero(state != before)
            assert owner[dimension] == (unit if unit < 5 else -1)
            shown.add(dimension)
        assert len(shown) == 3
        dead = np.flatnonzero(game.view(game.scene({**units, unit: (x, y, 0, 0)})).state != before)
        assert shown < set(dead) and len(dead) == 5  # its type is not shown either
        assert set(owner[dead]) == {unit if unit < 5 else -1}


@pytest.mark.parametrize("name, words", [("MMM2", "medivac"), ("nosuchmap", "unknown SMAX map 'nosuchmap'")])
def test_unknown_maps(smax, monkeypatch, capsys, name, words):
    import macca_cql

    for make in (smax.Battle, smax.parallel_env):
        with pytest.raises(ValueError, match=rf"unknown SMAX map '{name}'.*, expected one of 3m, 2s3z") as error:
            make(name)
        assert words in str(error.value)
    monkeypatch.setattr(sys, "path", sys.path[:])  # make_env appends to it
    with pytest.raises(SystemExit) as stop:
        macca_cql.make_env(f"smax/{name}")
    assert stop.value.code == 2 and words in capsys.readouterr().err


# ---- the interface ----

# Policies: the actions that a mask [A] allows to one action. For the dead, all of them are to stand still.


def idle(mask):
    return STILL


def brave(mask):
    """Goes east, where the enemy is, and attacks the first within reach: wins about half of the battles of 3m."""
    return STILL + 1 + np.argmax(mask[STILL + 1 :]) if mask[STILL + 1 :].any() else 1 if mask[1] else STILL


def hide(env):
    """Puts the agents of 3m into a corner from where they never see the enemy, nor it them."""
    state = env.world.state
    positions = np.array(state.unit_positions)
    positions[:3] = [[1.5, 1.5], [3, 1.5], [1.5, 3]]
    env.world = env.world.replace(state=state.replace(unit_positions=positions))


def health(env):
    """Of the three agents and the three enemies of 3m, whole: 1."""
    return env.state()[:60:10]


def play(env, policy, seed=None, prepare=None):
    """A battle: [(observations, rewards, terminations, truncations, infos)], one for each step."""
    _, infos = env.reset(seed=seed)
    if prepare:
        prepare(env)
    steps = []
    while env.agents:
        steps.append(env.step({agent: policy(infos[agent]["action_mask"]) for agent in env.agents}))
        infos = steps[-1][-1]
    return steps


class Legal(spaces.Discrete):
    """The actions of one agent; draws those that it can take."""

    def __init__(self, env, index):
        super().__init__(env.battle.num_actions)
        self.env, self.index = env, index

    def sample(self, mask=None, probability=None):
        return super().sample(mask=self.env.seen.masks[self.index].astype(np.int8))


@pytest.mark.filterwarnings("error")
def test_pettingzoo_api(env, monkeypatch, capsys):
    legal = {agent: Legal(env, i) for i, agent in enumerate(env.possible_agents)}
    monkeypatch.setattr(env, "action_spaces", legal)
    parallel_api_test(env, num_cycles=200)
    assert "Passed" in capsys.readouterr().out


def test_everybody_sees_what_the_battle_shows(env):
    import jax

    look, (observations, infos), seen = jax.jit(env.battle.view), env.reset(seed=0), set()
    last, actions = np.full(3, -1), np.zeros(env.battle.num_actions)
    assert not np.stack(list(observations.values()))[:, -len(actions) :].any()  # no action yet
    while env.agents:
        view = look(env.world, last)
        assert list(observations) == list(infos) == env.possible_agents
        for i, agent in enumerate(env.possible_agents):
            assert observations[agent].dtype == np.float32
            assert observations[agent].shape == env.observation_space(agent).shape
            np.testing.assert_allclose(observations[agent], view.observations[i], atol=1e-5)
            np.testing.assert_array_equal(infos[agent]["action_mask"], view.masks[i])
            assert infos[agent]["action_mask"].shape == (env.action_space(agent).n,)
        assert env.state().dtype == np.float32 and env.state().shape == env.state_space.shape
        np.testing.assert_allclose(env.state(), view.state, atol=1e-5)
        seen.add(env.state().tobytes())
        state, masks = env.state(), [info["action_mask"].copy() for info in infos.values()]
        for agent, info in infos.items():
            info["action_mask"][:] = 1  # what others do with what they were given is no business of the environment's
            observations[agent][:] = 9
        state[:] = 9
        np.testing.assert_array_equal(env.seen.masks, masks)
        assert (env.state() != 9).any() and (env.seen.observations != 9).any()
        last = np.array([brave(mask) for mask in masks])
        observations, *_, infos = env.step(dict(zip(env.agents, last, strict=True)))
        for agent, action in zip(env.possible_agents, last, strict=True):
            assert np.flatnonzero(observations[agent][-len(actions) :]).tolist() == [action]
    assert len(seen) > 3


def test_the_dead_stay_and_can_only_stand_still(env):
    dead, waited = set(), 0
    for observations, rewards, _, _, infos in play(env, idle, seed=0):
        assert list(infos) == list(rewards) == env.possible_agents
        for agent, info in infos.items():
            if info["action_mask"].sum() == 1:
                assert info["action_mask"][STILL] == 1 and not observations[agent][: -env.battle.num_actions].any()
                dead.add(agent)
            else:
                assert agent not in dead and info["action_mask"][: STILL + 1].all()
                assert observations[agent][: -env.battle.num_actions].any()
        waited += 0 < len(dead) < len(infos)
    assert len(dead) == len(env.possible_agents) and waited  # or nothing was tested


def test_the_team_reward_is_shared_and_said_who_earned_it(env):
    apart = victories = 0
    for seed in range(6):
        total = 0.0
        for _, rewards, _, _, infos in play(env, brave, seed):
            assert len(set(rewards.values())) == 1 and all(type(reward) is float for reward in rewards.values())
            earned = [info["earned"] for info in infos.values()]
            assert sum(earned) == pytest.approx(sum(rewards.values()), abs=1e-4) and min(earned) >= 0
            apart += len(set(earned)) > 1
            total += sum(rewards.values())
        won = infos["agent_0"]["won"]
        assert total == pytest.approx(10 * (3 - health(env)[3:].sum()) / 3 + 10 * won, abs=1e-3)
        victories += won
    assert apart > 5 and 0 < victories < 6
    assert all(info["earned"] == 0 and not info["won"] for info in env.reset(seed=0)[1].values())


def test_ends(env):
    """Won, lost and cut short: said in the last step, for all alike, and not before."""
    seen = set()
    for policy, prepare, seeds in ((brave, None, range(8)), (idle, None, [0]), (idle, hide, [0])):
        for seed in seeds:
            *before, (_, _, terminations, truncations, infos) = play(env, policy, seed, prepare)
            for _, _, early, late, told in before:
                assert not any(early.values()) and not any(late.values())
                assert not any(info["won"] for info in told.values())
            assert len({*terminations.values()}) == len({*truncations.values()}) == 1
            assert len({info["won"] for info in infos.values()}) == 1
            told = {"won": infos["agent_0"]["won"], "cut": truncations["agent_0"]}
            assert all(type(value) is bool for value in told.values())
            assert terminations["agent_0"] != told["cut"] and (len(before) == 99) >= told["cut"]
            assert told["won"] == (health(env)[:3].any() and not health(env)[3:].any())
            assert not (told["won"] and told["cut"])
            assert policy is brave or told == {"won": False, "cut": prepare is hide}
            assert env.agents == [] and env.step({}) == ({}, {}, {}, {}, {})
            seen.add(tuple(told.values()))
    assert seen == {(True, False), (False, False), (False, True)}


def test_seeds(smax, env):
    def battle(env, seed=None):
        steps = play(env, brave, seed)
        return [np.concatenate([*observations.values()]) for observations, *_ in steps] + [env.state()]

    def same(one, other):
        return len(one) == len(other) and all(map(np.array_equal, one, other))

    first, following = battle(env, 7), battle(env)
    assert same(first, battle(env, 7)) and same(following, battle(env))  # the second follows from the first one's seed
    assert not same(first, following) and not same(first, battle(env, 8))
    assert same(first, battle(smax.parallel_env("3m"), 7))
    assert not np.array_equal(*[smax.parallel_env("3m").key for _ in range(2)])


@pytest.mark.parametrize("action", [5, 8, -1, 1.5, [1, 1], "stop", None])
def test_an_action_that_cannot_be_taken(env, action):
    env.reset(seed=0)
    before = env.state()
    with pytest.raises(ValueError, match=r"the action of agent_0 is .*, its mask allows \[0, 1, 2, 3, 4\]"):
        env.step({"agent_0": action, "agent_1": 1, "agent_2": 1})
    with pytest.raises(ValueError, match="no action for agent_2"):
        env.step({"agent_0": 1, "agent_1": 1})
    np.testing.assert_array_equal(env.state(), before)
    assert env.world.state.step == 0


# ---- the collector ----


@pytest.fixture(scope="module")
def collect(smax, tmp_path_factory):
    """The module, with fewer battles side by side and a folder of its own, and what a map is played with made once."""
    from data import collect_smax

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_smax, "WORLDS", 16)
        patch.setattr(collect_smax, "Battle", functools.cache(collect_smax.Battle))
        patch.setattr(collect_smax, "make_player", functools.cache(collect_smax.make_player))
        patch.setattr(files, "ROOT", tmp_path_factory.mktemp("root"))
        yield collect_smax


HIDDEN, TRANSITIONS = 64, 32_768  # of the training below


@pytest.fixture(scope="module")
def trained(collect):
    """Policies that a short training on 3m wrote: the root of their folder."""
    flags = [
        "--env",
        "smax/3m",
        "--train",
        "--train-transitions",
        TRANSITIONS,
        "--hidden-dim",
        HIDDEN,
        "--minibatches",
        4,
    ]
    status, stderr = run_collect(collect, *flags, "--eval-interval", 16)
    assert status == 0, stderr
    return files.ROOT


@pytest.fixture(scope="module")
def by_hand(collect, tmp_path_factory):
    """Policies that do as `brave`: those of a network that was not trained, but prefers some actions by far."""
    import jax

    root, battle = tmp_path_factory.mktemp("by_hand"), collect.Battle("3m")
    sizes = (battle.obs_dim + battle.num_agents, HIDDEN, battle.num_actions)
    network = {name: np.array(x) for name, x in collect.make_network(jax.random.PRNGKey(0), *sizes).items()}
    network["bias_2"] += [0, 10, 0, 0, 5, 40, 30, 20]
    folder = root / "data" / "policies" / "smax" / "3m"
    for quality in ("medium", "expert"):
        files.save(folder / f"{quality}.npz", network, {"env": "smax/3m", "seed": 0, "training_transitions": 0})
    references = {"random_return": 0.6, "expert_return": 6.5, "random_return_standard_error": 0.1, "medium_return": 3.0}
    (folder / "references.json").write_text(json.dumps(references))
    return root


@pytest.fixture(scope="module")
def dataset(collect, by_hand):
    """A small one that the policy made by hand recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ROOT", by_hand)
        path = by_hand / "expert.npz"
        status, stderr = run_collect(collect, *RECORD, "--output", path)
        assert status == 0, stderr
    return path


RECORD = ["--env", "smax/3m", "--transitions", 2000, "--noise", 0.2]


def run_collect(collect, *arguments):
    """The command in this process, which saves the seconds that importing torch and JAX takes: (status, stderr)."""
    status, stderr = 0, io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            collect.main(tyro.cli(collect.Args, args=[str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
    return status, stderr.getvalue()


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def check_file(data):
    """What data/README.md promises of a file, and that its battles are such as SMAX's are; returns the metadata."""
    transitions, num_agents, _ = data["observations"].shape
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    assert ends[-1] == transitions - 1 and not (data["terminals"] & data["timeouts"]).any()
    kinds = {
        "observations": ("float32", (transitions, num_agents, data["observations"].shape[2])),
        "final_observations": ("float32", (len(ends), *data["observations"].shape[1:])),
        "states": ("float32", (transitions, data["states"].shape[1])),
        "rewards": ("float32", (transitions,)),
        "individual_rewards": ("float32", (transitions, num_agents)),
        "actions": ("int64", (transitions, num_agents)),
        "action_masks": ("bool", (transitions, num_agents, data["action_masks"].shape[2])),
        "final_action_masks": ("bool", (len(ends), *data["action_masks"].shape[1:])),
        "terminals": ("bool", (transitions,)),
        "timeouts": ("bool", (transitions,)),
        "metadata": (data["metadata"].dtype, ()),
    }
    assert data.keys() == kinds.keys()
    for name, (dtype, shape) in kinds.items():
        assert data[name].dtype == dtype and data[name].shape == shape, name
        assert dtype != "float32" or np.isfinite(data[name]).all()
    np.testing.assert_allclose(data["rewards"], data["individual_rewards"].sum(1), rtol=1e-5, atol=1e-5)
    assert np.take_along_axis(data["action_masks"], data["actions"][..., None], 2).all()

    inside = np.delete(np.arange(transitions), ends)
    starts = np.concatenate([[0], ends[:-1] + 1])
    choices = data["action_masks"].shape[2]
    taken = np.eye(choices)[data["actions"]]
    np.testing.assert_array_equal(data["observations"][inside + 1, :, -choices:], taken[inside])
    np.testing.assert_array_equal(data["final_observations"][:, :, -choices:], taken[ends])
    assert not data["observations"][starts, :, -choices:].any()
    lengths, health = ends - starts + 1, data["states"][:, :60:10]  # of 3m's six units
    assert lengths.max() <= 100 and (health[starts] == 1).all()  # every battle from its beginning
    assert (lengths[data["timeouts"][ends]] == 100).all()
    loss = (health[inside] - health[inside + 1])[:, 3:].sum(1)
    np.testing.assert_allclose(data["rewards"][inside], 10 * loss / 3, atol=1e-4)
    # The observer's own part of a final observation says whether it lives, as the final masks do.
    alive = data["final_action_masks"].sum(2) > 1
    np.testing.assert_array_equal(data["final_observations"][:, :, :-choices].any(2), alive)

    metadata = json.loads(str(data["metadata"]))
    assert metadata["schema_version"] == "1" and metadata["env"] == "smax/3m"
    assert (metadata["transitions"], metadata["episodes"]) == (transitions, len(ends))
    returns = np.add.reduceat(data["rewards"].astype(np.float64), starts) / num_agents
    stated = [metadata[f"episode_return_{name}"] for name in ("mean", "std", "min", "max")]
    np.testing.assert_allclose(stated, [returns.mean(), returns.std(), returns.min(), returns.max()], rtol=1e-4)
    won = data["terminals"][ends] & alive.any(1)  # a battle that ended with somebody alive
    assert metadata["win_rate"] == pytest.approx(won.mean()) and (data["rewards"][ends][won] > 10).all()
    assert metadata["state_owner"] == [*np.repeat([0, 1, 2, -1, -1, -1], 10), *[-1] * 12]
    assert metadata["versions"].keys() == {"numpy", "jax", "jaxmarl"}
    return metadata


def test_recording(collect, by_hand, dataset, monkeypatch, tmp_path):
    """A whole dataset; the same seed gives the same bytes, and the command in it is how it was made."""
    monkeypatch.setattr(files, "ROOT", by_hand)
    data = load(dataset)
    metadata = check_file(data)
    assert 1900 < metadata["transitions"] <= 2000 and 0.05 < metadata["win_rate"] < 0.95
    assert metadata["noise"] == 0.2 and metadata["quality"] == "expert" and metadata["policy"]["env"] == "smax/3m"
    references = {name for name in metadata if name.startswith(("random_", "expert_"))}
    assert references == {"random_return", "random_return_standard_error", "expert_return"}
    attacks, reachable = data["actions"] > STILL, data["action_masks"][:, :, STILL + 1 :].any(2)
    share = attacks[reachable].mean()
    assert 0.8 < share < 0.95  # the noise: one move in five is random, and a part of those attack as well

    program, script, *flags = metadata["command"].split()
    assert (program, script) == ("python", "data/collect_smax.py")
    for name, seed in (("again", []), ("other", ["--seed", 1])):
        status, stderr = run_collect(collect, *flags, *seed, "--output", tmp_path / f"{name}.npz")
        assert status == 0, stderr
    assert (tmp_path / "again.npz").read_bytes() == dataset.read_bytes()
    assert not np.array_equal(load(tmp_path / "other.npz")["observations"][:9], data["observations"][:9])


@pytest.mark.parametrize("name", toy.SCRIPTS)
def test_the_scripts_accept_the_file(env, dataset, name):
    script, arrays = importlib.import_module(name), load(dataset)
    data, metadata = script.load_dataset(dataset, script.Args(env="smax/3m", credit="truth", cuda=False), env)
    assert len(metadata["state_owner"]) == data["states"].shape[1]
    assert data["observations"].shape[2] == env.battle.obs_dim
    np.testing.assert_array_equal(data["alive"], arrays["action_masks"].sum(2) > 1)
    ends = arrays["terminals"] | arrays["timeouts"]
    np.testing.assert_array_equal(data["next_observations"][ends], arrays["final_observations"])
    np.testing.assert_array_equal(data["next_action_masks"][ends], arrays["final_action_masks"])


def test_the_check_finds_nothing(dataset):
    report = convert.inspect(dataset)
    assert not report.wrong and [doubt[:17] for doubt in report.doubtful] in ([], ["quality is expert"])


@pytest.mark.parametrize("name", toy.SCRIPTS)
def test_the_scripts_run(smax, dataset, monkeypatch, tmp_path, name):
    monkeypatch.setattr(sys, "path", sys.path[:])  # make_env appends to it
    flags = ["--env", "smax/3m", "--dataset", dataset, "--no-cuda", "--total-iterations", 4, "--eval-interval", 2]
    small = ["--hidden-dim", 16, "--batch-size", 32, "--eval-episodes", 2, "--final-episodes", 2]
    small += ["--causal-iterations", 2]
    status, stdout, stderr = toy.run(name, tmp_path, *flags, *small, monkeypatch=monkeypatch)
    assert status == 0, stderr
    with open(toy.run_folder(tmp_path) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in rows] == [2, 4] and "won" in stdout + stderr
    for row in rows:
        assert float(row["won"]) in (0, 0.5, 1) and np.isfinite(float(row["score"]))
        assert 0 <= float(row["return"]) <= 20 / 3 + 1e-3 and np.isfinite(float(row["paid_skill"]))


def test_recording_loads_no_torch(smax, by_hand, dataset, tmp_path):
    """A battle is recorded without torch and without mpe2, which are for particle tasks."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data import collect_smax, files
collect_smax.WORLDS, files.ROOT = 16, files.Path({str(by_hand)!r})
collect_smax.main(collect_smax.tyro.cli(collect_smax.Args))
print({{"torch", "mpe2"}} & {{*sys.modules}})"""
    flags = [str(flag) for flag in [*RECORD, "--output", tmp_path / "data.npz"]]
    result = subprocess.run([sys.executable, "-c", code, *flags], text=True, capture_output=True, timeout=300)
    assert result.returncode == 0 and result.stdout.endswith("set()\n"), result.stdout + result.stderr
    assert load(tmp_path / "data.npz")["rewards"].shape == load(dataset)["rewards"].shape


def test_training(collect, trained):
    """It learns, and writes what recording needs."""
    folder = trained / "data" / "policies" / "smax" / "3m"
    assert {path.name for path in folder.iterdir()} == {"expert.npz", "medium.npz", "references.json", "training.csv"}
    references = json.loads((folder / "references.json").read_text())
    assert references["reference_battles"] == 4 * collect.WORLDS
    error = references["random_return_standard_error"] + references["expert_return_standard_error"]
    assert references["expert_return"] > 2 * references["random_return"] > 0.5
    assert references["expert_return"] - references["random_return"] > 5 * error > 0
    with open(folder / "training.csv") as file:
        rows = list(csv.DictReader(file))
    curve = {int(row["transitions"]): (float(row["won"]), float(row["eval_return"])) for row in rows}
    assert list(curve) == [TRANSITIONS * i // 4 for i in range(1, 5)]
    best, origin = files.load_policy(folder / "expert.npz")
    assert curve[origin["training_transitions"]] == max(curve.values()) and origin["env"] == "smax/3m"
    assert origin["training"]["train_transitions"] == TRANSITIONS and "seed" not in origin["training"]
    assert best["weight_1"].shape == (HIDDEN, HIDDEN)
    earlier = files.load_policy(folder / "medium.npz")[1]["training_transitions"]
    half, allowed = max(curve.values())[0] / 2, [t for t in curve if t <= origin["training_transitions"]]
    assert abs(curve[earlier][0] - half) == min(abs(curve[t][0] - half) for t in allowed)
    # Policies that are there stay.
    before = (folder / "expert.npz").stat().st_mtime_ns
    status, stderr = run_collect(collect, "--env", "smax/3m", "--train")
    assert status == 2 and "--overwrite" in stderr and (folder / "expert.npz").stat().st_mtime_ns == before


def test_medium_replay_is_the_training(collect, trained, monkeypatch, tmp_path):
    """Up to the medium policy, battle after battle of the first worlds."""
    import jax

    made, genuine = [], collect.make_trainer
    monkeypatch.setattr(collect, "make_trainer", lambda *given: made.append(genuine(*given)) or made[-1])
    monkeypatch.setattr(files, "ROOT", trained)
    network, origin = files.load_policy(trained / "data" / "policies" / "smax" / "3m" / "medium.npz")
    rounds = origin["training_transitions"] // (collect.STEPS * collect.WORLDS)
    size = rounds * collect.STEPS + 200  # one world and a bit
    path = tmp_path / "replay.npz"
    flags = ["--env", "smax/3m", "--quality", "medium-replay", "--transitions", size, "--output", path]
    status, stderr = run_collect(collect, *flags)
    assert status == 0, stderr
    data = load(path)
    metadata = check_file(data)
    assert metadata["noise"] == collect.Args.exploration and size - 100 <= metadata["transitions"] <= size
    assert metadata["policy"] == origin

    ((train_round, state),), parts = made, []  # its beginning
    columns = ("observations", "states", "actions", "action_masks", "individual_rewards", "terminals", "timeouts")
    for number in range(1, rounds + 1):
        state, rows = train_round(state, jax.random.fold_in(jax.random.PRNGKey(origin["seed"] + 1), number))
        parts.append({name: np.array(rows[name][:, 0]) for name in columns})
    for name, weight in network.items():
        np.testing.assert_array_equal(state["network"][name], weight)
    first = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole = np.flatnonzero(first["terminals"] | first["timeouts"])[-1] + 1
    for name, column in first.items():
        np.testing.assert_array_equal(data[name][:whole], column[:whole])
    assert (data["states"][whole, :60:10] == 1).all()  # then comes the first battle of the second world


def test_whole_battles(collect):
    """Two worlds of six steps: the first ends battles after steps 1 and 3, the second never, or in the last step."""
    rows = {
        "number": np.arange(12).reshape(6, 2),
        "wide": np.arange(24).reshape(6, 2, 2),
        "terminals": np.zeros((6, 2), bool),
        "timeouts": np.zeros((6, 2), bool),
    }
    rows["terminals"][1, 0] = rows["timeouts"][3, 0] = True
    flat = collect.whole_battles(rows)
    np.testing.assert_array_equal(flat["number"], [0, 2, 4, 6])
    np.testing.assert_array_equal(flat["wide"], [[0, 1], [4, 5], [8, 9], [12, 13]])
    np.testing.assert_array_equal(flat["terminals"], [False, True, False, False])
    np.testing.assert_array_equal(flat["timeouts"], [False, False, False, True])
    rows["terminals"][5, 1] = True
    np.testing.assert_array_equal(collect.whole_battles(rows)["number"], [0, 2, 4, 6, 1, 3, 5, 7, 9, 11])
    rows["terminals"][:] = rows["timeouts"][:] = False
    assert len(collect.whole_battles(rows)["number"]) == 0


def test_battle_totals(collect):
    rows = {
        "individual_rewards": np.array([[1, 2], [0, 0], [3, 0], [0, 8], [5, 5]], np.float32),
        "terminals": np.array([False, True, False, False, True]),
        "timeouts": np.array([False, False, True, False, False]),
        "won": np.array([False, True, False, False, False]),
    }
    returns, won = collect.battle_totals(rows)
    np.testing.assert_array_equal(returns, [1.5, 1.5, 9])
    np.testing.assert_array_equal(won, [True, False, False])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--env", "smax/nosuchmap"], "--env is smax/nosuchmap: unknown SMAX map 'nosuchmap'"),
        (["--env", "smax/MMM2"], "medivac"),
        (["--env", "smac/3m"], "--env is smac/3m: expected smax/ and a map"),
        (["--env", "smax/8m"], "8m/expert.npz is missing; train the behaviour policies with --train"),
        (["--quality", "random"], "random"),
        (["--transitions", "0"], "--transitions is 0, expected a number from 1"),
        (["--transitions", "5"], "--transitions is 5, less than one episode"),
        (["--noise", "1.5"], "--noise is 1.5, expected a number from 0 to 1"),
        (["--noise", "nan"], "--noise is nan"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(2**31)], "--seed is 2147483648, expected a number from 0 to 2147483647"),
        (["--train", "--train-transitions", "5000"], "--train-transitions is 5000, expected a number from 5120"),
        (["--train", "--minibatches", "3"], "--minibatches is 3, expected a divisor of 512"),
        (["--train", "--hidden-dim", "0"], "--hidden-dim is 0"),
        (["--train", "--learning-rate", "inf"], "--learning-rate is inf"),
        (["--train", "--gamma", "-0.1"], "--gamma is -0.1"),
        (["--train", "--trace", "2"], "--trace is 2.0"),
    ],
)
def test_bad_input_ends_in_one_sentence(collect, by_hand, monkeypatch, tmp_path, flags, sentence):
    monkeypatch.setattr(files, "ROOT", by_hand)
    output = tmp_path / ("policies" if "--train" in flags else "data.npz")
    status, stderr = run_collect(collect, "--env", "smax/3m", *flags, "--output", output)
    assert status == 2 and sentence in stderr, stderr
    assert not list(tmp_path.iterdir())


def test_a_damaged_policy(collect, by_hand, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    path = tmp_path / "data" / "policies" / "smax" / "3m" / "expert.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes((by_hand / path.relative_to(tmp_path)).read_bytes()[:1000])
    status, stderr = run_collect(collect, "--env", "smax/3m", "--output", tmp_path / "data.npz")
    assert status == 2 and "expert.npz" in stderr, stderr


def test_existing_files_are_kept(collect, by_hand, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "ROOT", by_hand)
    path = tmp_path / "data.npz"
    path.write_text("precious")
    status, stderr = run_collect(collect, *RECORD, "--output", path)
    assert status == 2 and "--overwrite" in stderr and path.read_text() == "precious"
    status, stderr = run_collect(collect, *RECORD, "--output", tmp_path / "data.txt")
    assert status == 2 and ".npz" in stderr
    status, stderr = run_collect(collect, *RECORD, "--train", "--output", path)
    assert status == 2 and "expected a folder" in stderr and path.read_text() == "precious"
    status, stderr = run_collect(collect, *RECORD, "--overwrite", "--output", path)
    assert status == 0 and check_file(load(path)), stderr


def test_all_datasets(collect, by_hand, monkeypatch):
    """Those that are there are left alone, somebody's own file too, unless --overwrite; the rest is recorded."""
    monkeypatch.setattr(files, "ROOT", by_hand)
    monkeypatch.setattr(collect, "ALL", [("smax/3m", "medium"), ("smax/3m", "expert")])
    folder = by_hand / "data" / "datasets" / "smax" / "3m"
    folder.mkdir(parents=True)
    (folder / "expert.npz").write_text("precious")
    assert run_collect(collect, "--all", "--transitions", 500)[0] == 0
    assert (folder / "expert.npz").read_text() == "precious"
    metadata = check_file(load(folder / "medium.npz"))
    assert metadata["quality"] == "medium" and "--env smax/3m --quality medium --transitions 500" in metadata["command"]
    assert run_collect(collect, "--all", "--transitions", 500, "--overwrite")[0] == 0
    assert check_file(load(folder / "expert.npz"))["quality"] == "expert"


def test_the_command_itself(smax, monkeypatch, tmp_path):
    """From another folder: one line and no traceback."""
    status, stdout, stderr = toy.run("data/collect_smax", tmp_path, "--env", "smax/MMM2", monkeypatch=monkeypatch)
    assert status == 2 and stdout == "" and stderr.count("\n") == 1 and "medivac" in stderr
