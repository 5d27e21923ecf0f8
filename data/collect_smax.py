"""Train behaviour policies on SMAX (data/smax.py), and record offline datasets with them.

    python data/collect_smax.py --env smax/2s3z --quality medium      # 250,000 transitions, with the shipped weights
    python data/collect_smax.py --all                                 # every SMAX dataset of data/README.md
    python data/collect_smax.py --env smax/2s3z --train --overwrite   # train the weights again

The algorithm is PQN (Gallici et al. 2024, https://arxiv.org/abs/2407.04811): Q-learning on many battles at a time, with
Q(lambda) targets and layer normalisation, without replay buffer and target network. The team's value is the sum of the
living agents' values (VDN), so the team reward is enough. One network serves all agents. Its input is the observation,
which ends with the last action, and the agent's number. Actions that the masks forbid are never considered.

    expert         the policy that won most often in the training
    medium         the earlier policy whose win rate is closest to half of the expert's
    medium-replay  the battles of the training as they were played, until the medium policy

data/README.md describes the file format, data/smax.py who earns what (`individual_rewards`).
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package `data` is
from data import files

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
    # On one core, set before JAX is imported: on more it adds in another order, and a training ends differently.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
try:
    from data.smax import Battle
except ImportError as missing:
    files.fail(str(missing))
import jax
import jax.numpy as jnp
import optax

ALL = [
    (f"smax/{name}", quality)
    for name in ("2s3z", "5m_vs_6m", "6h_vs_8z")
    for quality in ("medium-replay", "medium", "expert")
]
SCRIPT = "collect_smax.py"
WORLDS = 256  # battles that are played at a time
STEPS = 32  # of each battle between two rounds of updates
LIMIT = 100  # steps of a battle at most


@dataclass
class Args:
    env: str = "smax/2s3z"  # smax/ and a map of SMAX
    quality: Literal["medium-replay", "medium", "expert"] = "expert"  # which policy acts in the dataset
    transitions: int = 250_000  # size of the dataset, rounded down to whole battles
    noise: float = 0.05  # medium, expert: fraction of random moves
    seed: int = 0  # the same seed, machine and package versions give the same dataset
    output: Path | None = None  # by default data/datasets/ENV/QUALITY.npz; with --train a folder, data/policies/ENV
    overwrite: bool = False  # replace the file (with --train: the policies) if it exists
    all: bool = False  # record every dataset of data/README.md that is missing; --overwrite also replaces other files
    train: bool = False  # train the behaviour policies instead of recording a dataset

    # Training (--train; medium-replay uses the settings that its medium policy was trained with)
    train_transitions: int = 4_000_000  # steps of training, over all battles
    hidden_dim: int = 128  # width of the two hidden layers
    learning_rate: float = 1e-3  # Adam's learning rate; it falls linearly to a tenth
    gamma: float = 0.99  # discount factor
    trace: float = 0.85  # lambda of the Q(lambda) targets
    exploration: float = 0.02  # fraction of random moves in training; it falls from 1 over the first tenth
    epochs: int = 2  # passes over the transitions of a round
    minibatches: int = 8  # updates in a pass
    eval_interval: int = 10  # rounds between two evaluations of 256 battles


def check_args(args: Args) -> None:
    files.check_range(args, 1, np.inf, "transitions", "hidden_dim", "epochs", "minibatches", "eval_interval")
    files.check_range(args, STEPS * WORLDS * args.eval_interval, np.inf, "train_transitions")
    files.check_range(args, 1e-9, np.inf, "learning_rate")
    files.check_range(args, 0, 1, "noise", "gamma", "trace", "exploration")
    files.check_range(args, 0, 2**31 - 1, "seed")
    if STEPS * WORLDS % args.minibatches:
        files.fail(f"--minibatches is {args.minibatches}, expected a divisor of {STEPS * WORLDS}")
    try:
        make_battle(args.env)
    except ValueError as error:
        files.fail(f"--env is {args.env}: {error}")


def make_battle(env: str) -> Battle:
    if not env.startswith("smax/"):
        raise ValueError("expected smax/ and a map")
    return Battle(env.removeprefix("smax/"))


# ---- network ----
def make_network(key, inputs: int, hidden: int, outputs: int) -> dict[str, Any]:
    """Two hidden layers, weight_0, bias_0, ..., initialised as torch.nn.Linear."""
    sizes, network = [(inputs, hidden), (hidden, hidden), (hidden, outputs)], {}
    for i, (fan_in, fan_out) in enumerate(sizes):
        key, wkey, bkey = jax.random.split(key, 3)
        bound = fan_in**-0.5
        network[f"weight_{i}"] = jax.random.uniform(wkey, (fan_in, fan_out), minval=-bound, maxval=bound)
        network[f"bias_{i}"] = jax.random.uniform(bkey, (fan_out,), minval=-bound, maxval=bound)
    return network


def q_values(network, inputs):  # [..., inputs] -> [..., num_actions]
    x = inputs
    for i in range(2):
        x = x @ network[f"weight_{i}"] + network[f"bias_{i}"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = jax.nn.relu(x)
    return x @ network["weight_2"] + network["bias_2"]


def network_inputs(observations):
    """The observations [..., N, obs_dim] and each agent's number as one-hot: [..., N, obs_dim + N]."""
    number = jnp.broadcast_to(jnp.eye(observations.shape[-2]), (*observations.shape[:-1], observations.shape[-2]))
    return jnp.concatenate([observations, number], axis=-1)


def choose(key, network, view, noise):
    """The best allowed action of each agent [N], or any allowed action with probability `noise`."""
    noise_key, action_key = jax.random.split(key)
    best = jnp.where(view.masks, q_values(network, network_inputs(view.observations)), -jnp.inf).argmax(1)
    any_allowed = jax.random.categorical(action_key, jnp.where(view.masks, 0.0, -jnp.inf))
    return jnp.where(jax.random.uniform(noise_key, best.shape) < noise, any_allowed, best)


# ---- playing ----
def one_step(battle: Battle, network, noise, key, world, view):
    """One step of a battle: the next world, its view, and the row to record."""
    act_key, step_key = jax.random.split(key)
    actions = choose(act_key, network, view, noise)
    world, outcome = battle.step(step_key, world, actions)
    after = battle.view(world, actions)
    row = {"observations": view.observations, "states": view.state, "actions": actions, "action_masks": view.masks}
    row |= {"next_observations": after.observations, "next_action_masks": after.masks, "won": outcome.won}
    row |= {"individual_rewards": outcome.earned, "rewards": outcome.reward}
    return world, after, row | {"terminals": outcome.terminal, "timeouts": outcome.timeout}


def make_player(battle: Battle):
    """play(network, key, noise): a whole battle in each of WORLDS worlds, as transitions, one battle after another."""

    def one(network, noise, key):
        key, reset_key = jax.random.split(key)

        def step(carry, key):
            over, now = carry
            *now, row = one_step(battle, network, noise, key, *now)
            return (over | row["terminals"] | row["timeouts"], tuple(now)), row | {"counts": ~over}

        carry = (jnp.zeros((), bool), battle.begin(reset_key))
        return jax.lax.scan(step, carry, jax.random.split(key, LIMIT))[1]

    run = jax.jit(jax.vmap(one, in_axes=(None, None, 0)))

    def play(network, key, noise: float) -> dict[str, np.ndarray]:
        rows = jax.device_get(run(network, noise, jax.random.split(key, WORLDS)))  # [W, T, ...]
        counts = rows.pop("counts")
        return {name: column[counts] for name, column in rows.items()}

    return play


def whole_battles(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Streams [T, W, ...] as transitions, world after world, without the unfinished battles at the end."""
    ends = (rows["terminals"] | rows["timeouts"]).T  # [W, T]
    before_last_end = ends[:, ::-1].cumsum(1)[:, ::-1] > 0
    return {name: column.swapaxes(0, 1)[before_last_end] for name, column in rows.items()}


def battle_totals(rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each battle the return (mean over agents) and whether it was won."""
    ends = rows["terminals"] | rows["timeouts"]
    return files.episode_returns(rows["individual_rewards"].mean(axis=1, dtype=np.float64), ends), rows["won"][ends]


# ---- training ----
def make_trainer(battle: Battle, args: Args):
    """(train_round, state): `train_round(state, key)` plays STEPS steps in every world and trains on them."""
    updates = args.epochs * args.minibatches * (args.train_transitions // (STEPS * WORLDS))
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.radam(optax.linear_schedule(args.learning_rate, args.learning_rate / 10, updates)),
    )

    def team_value(network, inputs, masks, actions=None):  # -> [...]: the sum over living agents (VDN)
        q = q_values(network, inputs)
        of_each = (
            jnp.where(masks, q, -jnp.inf).max(-1) if actions is None else jnp.take_along_axis(q, actions, -1)[..., 0]
        )
        return jnp.where(masks.sum(-1) > 1, of_each, 0.0).sum(-1)  # dead agents have one action, living ones more

    def loss(network, batch):
        return jnp.square(team_value(network, batch["inputs"], batch["masks"], batch["actions"]) - batch["y"]).mean()

    @jax.jit
    def train_round(state, key):
        keys = jax.random.split(key, STEPS + args.epochs)

        def step(now, key):
            step_key, reset_key = jax.random.split(key)
            *after, row = one_step(battle, state["network"], state["noise"], step_key, *now)
            over = row["terminals"] | row["timeouts"]
            fresh = battle.begin(reset_key)
            return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, tuple(after)), row

        worlds_keys = jax.vmap(lambda key: jax.random.split(key, WORLDS))(keys[:STEPS])  # [T, W]
        now, rows = jax.lax.scan(lambda now, keys: jax.vmap(step)(now, keys), state["now"], worlds_keys)

        # Q(lambda) backwards in time, as in PQN: y = r + gamma [lambda y' + (1 - lambda) max Q'], also at random moves.
        after = network_inputs(rows["next_observations"])
        best_after = team_value(state["network"], after, rows["next_action_masks"])  # [T, W]

        def back(y_after, row):
            follow, reward, terminal, timeout = row
            y_after = jnp.where(timeout, follow, args.trace * y_after + (1 - args.trace) * follow)
            y = reward + args.gamma * jnp.where(terminal, 0.0, y_after)
            return y, y

        columns = (best_after, rows["rewards"], rows["terminals"], rows["timeouts"])
        y = jax.lax.scan(back, best_after[-1], columns, reverse=True)[1]

        data = {"inputs": network_inputs(rows["observations"]), "masks": rows["action_masks"]}
        data |= {"actions": rows["actions"][..., None], "y": y}
        data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)

        def update(carry, chosen):
            network, optimizer_state = carry
            gradient = jax.grad(loss)(network, jax.tree.map(lambda x: x[chosen], data))
            change, optimizer_state = optimizer.update(gradient, optimizer_state)
            return (optax.apply_updates(network, change), optimizer_state), None

        shuffled = jax.vmap(lambda k: jax.random.permutation(k, STEPS * WORLDS))(keys[STEPS:])
        carry = (state["network"], state["optimizer"])
        network, optimizer_state = jax.lax.scan(update, carry, shuffled.reshape(args.epochs * args.minibatches, -1))[0]
        done = state["transitions"] + STEPS * WORLDS
        noise = jnp.maximum(1 - done / (0.1 * args.train_transitions), args.exploration).astype(jnp.float32)
        return {"network": network, "optimizer": optimizer_state, "noise": noise, "transitions": done, "now": now}, rows

    network_key, reset_key = jax.random.split(jax.random.PRNGKey(args.seed))
    network = make_network(network_key, battle.obs_dim + battle.num_agents, args.hidden_dim, battle.num_actions)
    now = jax.vmap(battle.begin)(jax.random.split(reset_key, WORLDS))
    state = {"network": network, "optimizer": optimizer.init(network), "now": now}
    return train_round, state | {"noise": jnp.ones(()), "transitions": jnp.zeros((), jnp.int32)}


def train(args: Args, folder: Path) -> None:
    """Write the medium policy, the expert policy, the learning curve and the reference returns to `folder`."""
    battle = make_battle(args.env)
    (train_round, state), play = make_trainer(battle, args), make_player(battle)
    key, judge_key = jax.random.PRNGKey(args.seed + 1), jax.random.PRNGKey(args.seed + 2)
    snapshots = []  # (transitions, win rate, return, network)
    rounds = args.train_transitions // (STEPS * WORLDS)
    with tqdm(total=rounds * STEPS * WORLDS, unit="step", unit_scale=True, desc="training", mininterval=2) as progress:
        for number in range(1, rounds + 1):
            state, _ = train_round(state, jax.random.fold_in(key, number))
            progress.update(STEPS * WORLDS)
            if number % args.eval_interval == 0 or number == rounds:
                returns, won = battle_totals(play(state["network"], judge_key, 0.0))
                snapshots.append(
                    (int(state["transitions"]), won.mean(), returns.mean(), jax.device_get(state["network"]))
                )
                progress.set_postfix(won=f"{won.mean():.2f}", best=f"{max(s[1] for s in snapshots):.2f}")

    expert = max(snapshots, key=lambda s: (s[1], s[2]))
    medium = min((s for s in snapshots if s[0] <= expert[0]), key=lambda s: abs(s[1] - expert[1] / 2))
    references: dict[str, float] = {"reference_battles": 4 * WORLDS}
    played = {"random": (state["network"], 1.0), "medium": (medium[3], 0.0), "expert": (expert[3], 0.0)}
    for quality, (network, noise) in played.items():
        rounds_played = [battle_totals(play(network, jax.random.fold_in(judge_key, i), noise)) for i in range(1, 5)]
        returns, won = (np.concatenate(column) for column in zip(*rounds_played, strict=True))
        references[f"{quality}_won"] = round(float(won.mean()), 4)
        references[f"{quality}_return"] = round(float(returns.mean()), 4)
        references[f"{quality}_return_standard_error"] = round(float(returns.std(ddof=1) / len(returns) ** 0.5), 4)
        print(f"{quality:>6}: won {won.mean():.2f}, return {returns.mean():.2f} ({len(won)} battles)")
    for quality, (transitions, _, _, network) in {"medium": medium, "expert": expert}.items():
        origin = {"env": args.env, "seed": args.seed, "training_transitions": transitions}
        files.save(folder / f"{quality}.npz", network, origin | {"training": files.settings(args, "train_transitions")})
    curve = [(steps, round(float(won), 4), round(float(score), 3)) for steps, won, score, _ in snapshots]
    files.write_csv(folder / "training.csv", ("transitions", "won", "eval_return"), curve)
    files.write_json(folder / "references.json", references)


# ---- recording ----
def record(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a dataset, with at least as many rows as asked for if there are, and the collector's metadata."""
    battle = make_battle(args.env)
    quality = "expert" if args.quality == "expert" else "medium"
    network, policy = files.load_policy(files.ROOT / "data" / "policies" / args.env / f"{quality}.npz")
    if args.quality == "medium-replay":
        data, noise = train_again(args, battle, policy), policy["training"]["exploration"]
    else:
        data, noise = play_rounds(args, battle, network), args.noise
    ends = data["terminals"] | data["timeouts"]
    recorded = np.flatnonzero(ends) < args.transitions  # the battles that will be in the file
    about = {"noise": noise, "win_rate": float(data.pop("won")[ends][recorded].mean()) if recorded.any() else 0.0}
    for name in ("observations", "action_masks"):
        data[f"final_{name}"] = data.pop(f"next_{name}")[ends]  # within a battle they are the next row's
    data["actions"] = data["actions"].astype(np.int64)
    data["rewards"] = data["individual_rewards"].sum(axis=1)
    return data, about | {"state_owner": battle.state_owner, "policy": policy}


def play_rounds(args: Args, battle: Battle, network) -> dict[str, np.ndarray]:
    """Battles of one policy, until there are enough transitions."""
    parts, play, key, rows = [], make_player(battle), jax.random.PRNGKey(1000 + args.seed), 0
    with tqdm(total=args.transitions, unit="step", unit_scale=True, desc="recording", mininterval=1) as progress:
        while rows < args.transitions:
            parts.append(play(network, jax.random.fold_in(key, len(parts)), args.noise))
            rows += len(parts[-1]["rewards"])
            progress.update(len(parts[-1]["rewards"]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def train_again(args: Args, battle: Battle, policy: dict) -> dict[str, np.ndarray]:
    """The battles of the training up to the medium policy, in as many worlds as are needed."""
    training = dataclasses.replace(args, **policy["training"], seed=policy["seed"])
    train_round, state = make_trainer(battle, training)
    rounds = policy["training_transitions"] // (STEPS * WORLDS)
    kept, parts = min(WORLDS, -(-args.transitions // (rounds * STEPS)) + 1), []
    for number in tqdm(range(1, rounds + 1), desc="training again", unit="round", mininterval=1):
        state, rows = train_round(state, jax.random.fold_in(jax.random.PRNGKey(training.seed + 1), number))
        parts.append({name: np.asarray(x[:, :kept]) for name, x in rows.items()})
    return whole_battles({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def main(args: Args) -> None:
    check_args(args)
    if args.train:
        train(args, files.output_folder(args))
        return
    for one, path in files.outputs(args, SCRIPT, ALL):
        data, about = record(one)
        files.write_dataset(path, one, SCRIPT, data, about, ("numpy", "jax", "jaxmarl"))


if __name__ == "__main__":
    files.run(lambda: main(tyro.cli(Args, description=__doc__)))
