"""StarCraft-like battles without StarCraft: `--env smax/2s3z`, `smax/5m_vs_6m`, `smax/6h_vs_8z`, or another map.

SMAX (https://arxiv.org/abs/2311.10090) is JaxMARL's simplified version of SMAC, the StarCraft Multi-Agent Challenge:
units of the same names with similar health, range and damage fight on a plain field. A scripted enemy shoots the
closest unit. It is another simulator than SMAC, so win rates do not compare. It needs `pip install jaxmarl==0.2.0`
(1 GB with JAX). `parallel_env` has PettingZoo's interface, as in data/smac.py:

- Actions: 0 to 3 move, 4 stands still, then one for each enemy: attack it. `infos[agent]["action_mask"]` marks the
  allowed actions. A dead agent stays in `agents` to the end of the battle and can only stand still; living agents
  always have another choice.
- Observations: SMAX's (zeros for the dead), then the agent's last action as one-hot, zeros before its first step.
- Rewards: SMAX's, times ten: 10 in all for the enemy's whole health and 10 for the victory. So a won battle is worth
  20, as in SMAC. Each of N agents gets the N-th part of the team reward. `infos[agent]["earned"]` is what the agent
  itself earned: see `Battle.step`.
- Ends: a won, lost or drawn battle is a termination. The time limit of 100 steps is a truncation.
  `infos[agent]["won"]` is true after the step that won the battle, and false after all others.
- Seeds: the same seed and the same actions repeat the same battle.

There is no MMM2: its ten units include a medivac, and no unit of SMAX heals.
"""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

try:
    import jax
    import jax.numpy as jnp
    from jaxmarl.environments.smax import HeuristicEnemySMAX
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO
except ImportError as error:
    raise ImportError(
        f"SMAX cannot be imported ({error}); pip install $(grep -o 'jaxmarl==.*' requirements.txt)"
    ) from error

REWARD_SCALE = 10  # SMAX pays 1 for the enemy's whole health and 1 for the victory, SMAC 20 for both


class View(NamedTuple):
    """What can be seen of a battle."""

    observations: Any  # [N, obs_dim], the last action included
    state: Any  # [state_dim]
    masks: Any  # [N, num_actions], bool


class Outcome(NamedTuple):
    """What came of a step."""

    reward: Any  # the team reward
    earned: Any  # [N], its parts
    terminal: Any  # won, lost or drawn
    timeout: Any  # ended by the time limit
    won: Any


class Battle:
    """A map as pure functions for `jax.jit` and `jax.vmap`: all that changes is in the `world`."""

    def __init__(self, map_name: str):
        if map_name not in MAP_NAME_TO_SCENARIO:
            known = ", ".join(MAP_NAME_TO_SCENARIO)
            hint = " (it has a medivac, and no unit of SMAX heals)" if map_name == "MMM2" else ""
            raise ValueError(f"unknown SMAX map {map_name!r}{hint}, expected one of {known}")
        self.game = HeuristicEnemySMAX(scenario=MAP_NAME_TO_SCENARIO[map_name])
        self.num_agents, self.num_enemies = self.game.num_allies, self.game.num_enemies
        self.num_actions = self.game.num_ally_actions
        self.obs_dim = self.game.obs_size + self.num_actions
        # The state lists the own features of every unit, allies first; then constants.
        features, units = len(self.game.own_features), self.num_agents + self.num_enemies
        self.state_dim = (features + 2) * units
        self.state_owner = [unit if unit < self.num_agents else -1 for unit in range(units) for _ in range(features)]
        self.state_owner += [-1] * 2 * units  # the agent of each dimension, -1 for none

    def reset(self, key):
        world = self.game.reset(key)[1]
        # The types are those that a step returns; otherwise JAX would compile the first step separately.
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), world)

    def view(self, world, last_actions) -> View:
        """`last_actions` [N]: -1 before the first step."""
        observations, masks = self.game.get_obs(world), self.game.get_avail_actions(world)
        seen = jnp.stack([observations[a] for a in self.game.agents])
        return View(
            jnp.concatenate([seen, jax.nn.one_hot(last_actions, self.num_actions)], axis=1),
            self.game.get_world_state(world),
            jnp.stack([masks[a] for a in self.game.agents]).astype(bool),
        )

    def begin(self, key):
        """The world of a new battle, and its view."""
        world = self.reset(key)
        return world, self.view(world, jnp.full(self.num_agents, -1))

    def step(self, key, world, actions) -> tuple[Any, Outcome]:
        """The world after `actions` [N], and what came of it: `HeuristicEnemySMAX.step_env`, and who earned what.

        A battle ends after 100 steps; in JaxMARL's code after 101. The reward for damage is divided in proportion to
        the damage that each agent dealt in the step: the health that its target lost, as a fraction of the target's
        whole health. If several shots hit a target at the same moment, their strength divides the loss. The victory and
        damage that nobody dealt (a unit that leaves the field dies) are divided equally among the agents that were
        alive before the step.
        """
        n = self.num_agents
        before, game = world.state, self.game._env
        key, enemy_key = jax.random.split(key)
        seen = game.get_obs_unit_list(before)
        enemy_actions, enemy_state = self.game.get_enemy_actions(
            enemy_key, world.enemy_policy_state, jnp.stack([seen[a] for a in self.game.enemy_agents])
        )
        joint = jnp.concatenate([actions, jnp.stack([enemy_actions[a] for a in self.game.enemy_agents])])
        moments = game.step_env_no_decode(key, before, game._decode_discrete_actions(joint), True)  # [8, ...]
        after = jax.tree.map(lambda x: x[-1], moments).replace(step=before.step + 1)
        after = after.replace(done=game.is_terminal(after))
        reward = REWARD_SCALE * game.compute_reward(after, before.unit_health, after.unit_health)[self.game.agents[0]]

        # A shot resets the weapon's cooldown, which otherwise only falls.
        health = jnp.concatenate([before.unit_health[None], moments.unit_health])[:, n:]
        cooldown = jnp.concatenate([before.unit_weapon_cooldowns[None], moments.unit_weapon_cooldowns])[:, :n]
        loss = (health[:-1] - health[1:]) / game.unit_type_health[before.unit_types[n:]]  # [8, enemies]
        shots = (cooldown[1:] > cooldown[:-1]) * game.unit_type_attacks[before.unit_types[:n]]  # [8, N]
        shots = shots[:, :, None] * jax.nn.one_hot(actions - game.num_movement_actions, self.num_enemies)
        damage = (loss[:, None] * shots / jnp.maximum(shots.sum(1, keepdims=True), 1e-9)).sum((0, 2))  # [N]
        living = before.unit_alive[:n].astype(jnp.float32)
        alike = living / jnp.maximum(living.sum(), 1)
        shares = jnp.where(damage.sum() > 0, damage / jnp.maximum(damage.sum(), 1e-9), alike)

        allies, enemies = after.unit_alive[:n].any(), after.unit_alive[n:].any()
        victory = REWARD_SCALE * game.won_battle_bonus * (allies & ~enemies)
        outcome = Outcome(
            reward=reward,
            earned=(reward - victory) * shares + victory * alike,
            terminal=~(allies & enemies),
            timeout=after.done & allies & enemies,
            won=allies & ~enemies,
        )
        return world.replace(state=after, enemy_policy_state=enemy_state), outcome


def parallel_env(map_name: str) -> "SmaxEnv":
    """The battle on the SMAX map of this name."""
    return SmaxEnv(map_name)


class SmaxEnv(ParallelEnv):
    """One battle behind PettingZoo's Parallel API. Observations and states are float32."""

    def __init__(self, map_name: str):
        self.battle = battle = Battle(map_name)
        self.metadata = {"name": f"smax/{map_name}", "render_modes": [], "is_parallelizable": True}
        self.possible_agents = [f"agent_{i}" for i in range(battle.num_agents)]
        self.agents = []
        # A space carries its own random generator, so every agent has its own.
        self.observation_spaces = {a: spaces.Box(-np.inf, np.inf, (battle.obs_dim,)) for a in self.possible_agents}
        self.action_spaces = {a: spaces.Discrete(battle.num_actions) for a in self.possible_agents}
        self.state_space = spaces.Box(-np.inf, np.inf, (battle.state_dim,))
        self.key = jax.random.PRNGKey(int(np.random.default_rng().integers(2**31)))
        self.world: Any = None
        self.seen: Any = None

        @jax.jit
        def begin(key):
            key, reset_key = jax.random.split(key)
            return key, *battle.begin(reset_key)

        @jax.jit
        def advance(key, world, actions):
            key, step_key = jax.random.split(key)
            world, outcome = battle.step(step_key, world, actions)
            return key, world, battle.view(world, actions), outcome

        self.begin, self.advance = begin, advance

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        """Start a battle; returns ({agent: [obs_dim]}, {agent: info})."""
        if seed is not None:
            self.key = jax.random.PRNGKey(seed)
        self.key, self.world, self.seen = self.begin(self.key)
        self.seen = jax.device_get(self.seen)
        self.agents = self.possible_agents[:]
        return self._observe(), self._infos(False, np.zeros(len(self.agents)))

    def step(self, actions):
        """Takes {agent: action} of all agents, also the dead; returns PettingZoo's five dicts."""
        if not self.agents:  # PettingZoo's convention after the end of an episode
            return {}, {}, {}, {}, {}
        joint = np.array([self._action(i, actions) for i in range(len(self.agents))], np.int32)
        self.key, self.world, seen, outcome = self.advance(self.key, self.world, joint)
        self.seen, outcome = jax.device_get((seen, outcome))
        agents = self.agents
        observations, infos = self._observe(), self._infos(bool(outcome.won), outcome.earned)
        rewards = dict.fromkeys(agents, float(outcome.reward) / len(agents))
        terminations = dict.fromkeys(agents, bool(outcome.terminal))
        truncations = dict.fromkeys(agents, bool(outcome.timeout))
        if outcome.terminal or outcome.timeout:
            self.agents = []
        return observations, rewards, terminations, truncations, infos

    def state(self) -> np.ndarray:
        """[state_dim]: health, position, cooldown and type of all units of both sides, seen or not."""
        return np.array(self.seen.state)

    def _observe(self):
        return dict(zip(self.agents, np.array(self.seen.observations), strict=True))

    def _infos(self, won: bool, earned):
        rows = zip(self.agents, self.seen.masks, earned, strict=True)
        return {agent: {"action_mask": m.astype(np.int8), "won": won, "earned": float(e)} for agent, m, e in rows}

    def _action(self, index: int, actions) -> int:
        name = self.agents[index]
        if name not in actions:
            raise ValueError(f"no action for {name}; step() needs one for each of {', '.join(self.agents)}")
        action, allowed = np.asarray(actions[name]), np.flatnonzero(self.seen.masks[index])
        if action.shape != () or action not in allowed:
            raise ValueError(f"the action of {name} is {action.tolist()}, its mask allows {allowed.tolist()}")
        return int(action)
