"""Trains behaviour policies on SMAX (data/smax.py) and records offline datasets with them.

    python data/collect_smax.py --map 2s3z --quality medium      # 250,000 transitions, with the shipped weights
    python data/collect_smax.py --all                            # every SMAX dataset of data/README.md
    python data/collect_smax.py --map 2s3z --train --overwrite   # makes the weights anew

The algorithm is PQN (Gallici et al. 2024, https://arxiv.org/abs/2407.04811): Q-learning on many battles at once, with
Q(lambda) targets, layer normalisation and neither replay buffer nor target network; the team's value is the sum of the
living agents' (VDN), so the team reward is all it needs. One network serves all agents, on what the agent sees, its
last action and its number; actions that the masks forbid are never taken nor looked at. The qualities:

    expert         the policy of the training that won most often
    medium         the policy before it whose win rate came closest to half of the expert's
    medium-replay  battles of the training, as they were played, until the medium policy was reached

The file format is described in data/README.md. `individual_rewards`: data/smax.py says who earns what.
"""

import csv
import dataclasses
import json
import os
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python data/collect_smax.py` finds the package `data`
from data.collect import episode_returns, fail, save  # noqa: E402

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
    # On one core, before JAX is imported: with more it takes sums in another order, and a training ends elsewhere.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
try:
    from data.smax import Battle
except ImportError as missing:
    fail(str(missing))
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

MAPS = ("2s3z", "5m_vs_6m", "6h_vs_8z")
QUALITIES = ("medium-replay", "medium", "expert")
WORLDS = 256  # battles that are played side by side
STEPS = 32  # of each battle between two rounds of updates
LIMIT = 100  # steps after which SMAX cuts a battle short


@dataclass
class Args:
    map: str = "2s3z"
    """the SMAX map"""
    quality: Literal["medium-replay", "medium", "expert"] = "expert"
    """which policy acts in the dataset"""
    transitions: int = 250_000
    """size of the dataset, rounded down to whole battles"""
    noise: float = 0.05
    """share of random moves of medium and expert"""
    seed: int = 0
    """the same seed, machine and package versions give the same dataset"""
    output: Path | None = None
    """the file to write, by default data/datasets/smax/<map>/<quality>.npz; with --train a folder, data/policies/..."""
    overwrite: bool = False
    """replace the file (or, with --train, the policies) if it exists"""
    all: bool = False
    """record the three datasets of the three maps that are not there, whatever --map, --quality and --output say"""
    train: bool = False
    """train the behaviour policies and write data/policies/smax/<map>/ instead of recording a dataset"""

    # Training (used by --train; medium-replay takes the settings with which its medium policy was trained)
    train_transitions: int = 4_000_000
    """steps of training, over all battles"""
    hidden_dim: int = 128
    """width of the two hidden layers"""
    learning_rate: float = 1e-3
    """Adam's, falling linearly to a tenth at the end of training"""
    gamma: float = 0.99
    """discount"""
    trace: float = 0.85
    """lambda of the Q(lambda) targets"""
    exploration: float = 0.02
    """share of random moves in training, after it fell from 1 over the first tenth"""
    epochs: int = 2
    """passes over what a round recorded"""
    minibatches: int = 8
    """updates in a pass"""
    eval_interval: int = 10
    """rounds between two evaluations of 256 battles"""


# ---- network ----


def make_network(key, inputs: int, hidden: int, outputs: int) -> dict[str, Any]:
    """Two hidden layers, as weight_0, bias_0, ...: torch.nn.Linear's initialisation."""
    sizes, network = [(inputs, hidden), (hidden, hidden), (hidden, outputs)], {}
    for i, (fan_in, fan_out) in enumerate(sizes):
        key, wkey, bkey = jax.random.split(key, 3)
        bound = fan_in**-0.5
        network[f"weight_{i}"] = jax.random.uniform(wkey, (fan_in, fan_out), minval=-bound, maxval=bound)
        network[f"bias_{i}"] = jax.random.uniform(bkey, (fan_out,), minval=-bound, maxval=bound)
    return network


def q_values(network, inputs):  # [..., inputs] to [..., num_actions]
    x = inputs
    for i in range(2):
        x = x @ network[f"weight_{i}"] + network[f"bias_{i}"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = jax.nn.relu(x)
    return x @ network["weight_2"] + network["bias_2"]


def network_inputs(observations, last_actions, num_actions: int):
    """What an agent sees, its last action (none at first: -1) and its number: [..., N, obs_dim + num_actions + N]."""
    number = jnp.broadcast_to(jnp.eye(observations.shape[-2]), (*observations.shape[:-1], observations.shape[-2]))
    return jnp.concatenate([observations, jax.nn.one_hot(last_actions, num_actions), number], axis=-1)


def choose(key, network, view, last_actions, noise):
    """The best allowed action of each agent [N], or now and then any allowed one."""
    noise_key, action_key = jax.random.split(key)
    inputs = network_inputs(view.observations, last_actions, view.masks.shape[1])
    best = jnp.where(view.masks, q_values(network, inputs), -jnp.inf).argmax(1)
    any_allowed = jax.random.categorical(action_key, jnp.where(view.masks, 0.0, -jnp.inf))
    return jnp.where(jax.random.uniform(noise_key, best.shape) < noise, any_allowed, best)


# ---- playing ----


def one_step(battle: Battle, network, noise, key, world, view, last_actions):
    """A battle a step on: world, view, actions, and what is recorded of it."""
    act_key, step_key = jax.random.split(key)
    actions = choose(act_key, network, view, last_actions, noise)
    world, outcome = battle.step(step_key, world, actions)
    after = battle.view(world)
    row = {"observations": view.observations, "states": view.state, "actions": actions, "action_masks": view.masks}
    row |= {"next_observations": after.observations, "next_action_masks": after.masks, "last_actions": last_actions}
    row |= {"individual_rewards": outcome.earned, "rewards": outcome.reward, "won": outcome.won}
    return world, after, actions, row | {"terminals": outcome.terminal, "timeouts": outcome.timeout}


def begin(battle: Battle, key):
    """A battle at its beginning: world, view, and last actions that are none."""
    world = battle.reset(key)
    return world, battle.view(world), jnp.full(battle.num_agents, -1, jnp.int32)


def make_player(battle: Battle):
    """play(network, key, noise): one whole battle in each of WORLDS worlds, as flat transitions, one after another."""

    def one(network, noise, key):
        key, reset_key = jax.random.split(key)

        def step(carry, key):
            over, now = carry
            *now, row = one_step(battle, network, noise, key, *now)
            return (over | row["terminals"] | row["timeouts"], tuple(now)), row | {"counts": ~over}

        carry = (jnp.zeros((), bool), begin(battle, reset_key))
        return jax.lax.scan(step, carry, jax.random.split(key, LIMIT))[1]

    run = jax.jit(jax.vmap(one, in_axes=(None, None, 0)))

    def play(network, key, noise: float) -> dict[str, np.ndarray]:
        rows = jax.device_get(run(network, noise, jax.random.split(key, WORLDS)))  # [W, T, ...]
        counts = rows.pop("counts")
        return {name: column[counts] for name, column in rows.items()}

    return play


def whole_battles(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Streams [T, W, ...] as flat transitions, world after world, without the battles that were still going on."""
    ends = (rows["terminals"] | rows["timeouts"]).T  # [W, T]
    before_last_end = ends[:, ::-1].cumsum(1)[:, ::-1] > 0
    return {name: column.swapaxes(0, 1)[before_last_end] for name, column in rows.items()}


def battle_totals(rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each battle its return (mean over agents, so the team's divided by their number) and whether it was won."""
    return episode_returns(rows), rows["won"][rows["terminals"] | rows["timeouts"]]


# ---- training ----


def make_trainer(battle: Battle, args: Args):
    """train_round(state, key): STEPS steps in every world, then the updates on them; and the state to begin with."""
    updates = args.epochs * args.minibatches * (args.train_transitions // (STEPS * WORLDS))
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.radam(optax.linear_schedule(args.learning_rate, args.learning_rate / 10, updates)),
    )

    def team_value(network, inputs, masks, actions=None):  # -> [...]: the sum over the living (VDN)
        q = q_values(network, inputs)
        of_each = (
            jnp.where(masks, q, -jnp.inf).max(-1) if actions is None else jnp.take_along_axis(q, actions, -1)[..., 0]
        )
        return jnp.where(masks.sum(-1) > 1, of_each, 0.0).sum(-1)  # the dead have one action, the living more

    def loss(network, batch):
        return jnp.square(team_value(network, batch["inputs"], batch["masks"], batch["actions"]) - batch["y"]).mean()

    @jax.jit
    def train_round(state, key):
        keys = jax.random.split(key, STEPS + args.epochs)

        def step(now, key):
            step_key, reset_key = jax.random.split(key)
            *after, row = one_step(battle, state["network"], state["noise"], step_key, *now)
            over = row["terminals"] | row["timeouts"]
            fresh = begin(battle, reset_key)
            return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, tuple(after)), row

        worlds_keys = jax.vmap(lambda key: jax.random.split(key, WORLDS))(keys[:STEPS])  # [T, W]
        now, rows = jax.lax.scan(lambda now, keys: jax.vmap(step)(now, keys), state["now"], worlds_keys)

        # Q(lambda) backwards in time, as in PQN: y = r + gamma [lambda y' + (1 - lambda) max Q'], random moves or not.
        after = network_inputs(rows["next_observations"], rows["actions"], battle.num_actions)
        best_after = team_value(state["network"], after, rows["next_action_masks"])  # [T, W]

        def back(y_after, row):
            follow, reward, terminal, timeout = row
            y_after = jnp.where(timeout, follow, args.trace * y_after + (1 - args.trace) * follow)
            y = reward + args.gamma * jnp.where(terminal, 0.0, y_after)
            return y, y

        columns = (best_after, rows["rewards"], rows["terminals"], rows["timeouts"])
        y = jax.lax.scan(back, best_after[-1], columns, reverse=True)[1]

        data = {"inputs": network_inputs(rows["observations"], rows["last_actions"], battle.num_actions)}
        data |= {"masks": rows["action_masks"], "actions": rows["actions"][..., None], "y": y}
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
    inputs = battle.obs_dim + battle.num_actions + battle.num_agents
    network = make_network(network_key, inputs, args.hidden_dim, battle.num_actions)
    now = jax.vmap(lambda key: begin(battle, key))(jax.random.split(reset_key, WORLDS))
    state = {"network": network, "optimizer": optimizer.init(network), "now": now}
    return train_round, state | {"noise": jnp.ones(()), "transitions": jnp.zeros((), jnp.int32)}


def train(args: Args, folder: Path) -> None:
    """Writes the medium and the expert policy, the learning curve and the reference returns to `folder`."""
    battle = Battle(args.map)
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
        origin = {"env": f"smax/{args.map}", "seed": args.seed, "training_transitions": transitions}
        save(folder / f"{quality}.npz", network, origin | {"training": settings(args)})
    with open(folder / "training.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("transitions", "won", "eval_return"))
        table.writerows((steps, round(float(won), 4), round(float(score), 3)) for steps, won, score, _ in snapshots)
    (folder / "references.json").write_text(json.dumps(references, indent=1) + "\n")


def settings(args: Args) -> dict:
    """The arguments that a training depends on."""
    first = [field.name for field in dataclasses.fields(Args)].index("train_transitions")
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(Args)[first:]}


# ---- recording ----


def load_policy(path: Path) -> tuple[dict[str, Any], dict]:
    if not path.exists():
        fail(f"{path} is missing: make the behaviour policies with --train.")
    try:
        with np.load(path, allow_pickle=False) as file:
            network = {name: jnp.asarray(file[name]) for name in file.files if name != "metadata"}
            return network, json.loads(str(file["metadata"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fail(f"{path} is not a policy that --train wrote ({error}): make it anew with --train --overwrite.")


def record(args: Args, folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Flat transitions, at least as many as asked for (medium-replay: as there are), and where their policy is from."""
    battle = Battle(args.map)
    network, origin = load_policy(folder / ("expert.npz" if args.quality == "expert" else "medium.npz"))
    parts: list[dict[str, np.ndarray]] = []
    if args.quality == "medium-replay":  # the same training again, of which some of the worlds are kept
        again = dataclasses.replace(args, **origin["training"], seed=origin["seed"])
        train_round, state = make_trainer(battle, again)
        rounds = origin["training_transitions"] // (STEPS * WORLDS)
        kept = min(WORLDS, -(-args.transitions // (rounds * STEPS)) + 1)
        for number in tqdm(range(1, rounds + 1), desc="training again", unit="round", mininterval=1):
            state, rows = train_round(state, jax.random.fold_in(jax.random.PRNGKey(again.seed + 1), number))
            parts.append({name: np.asarray(x[:, :kept]) for name, x in rows.items()})
        return whole_battles({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}), origin
    play, key, recorded = make_player(battle), jax.random.PRNGKey(1000 + args.seed), 0
    with tqdm(total=args.transitions, unit="step", unit_scale=True, desc="recording", mininterval=1) as progress:
        while recorded < args.transitions:
            parts.append(play(network, jax.random.fold_in(key, len(parts)), args.noise))
            recorded += len(parts[-1]["rewards"])
            progress.update(len(parts[-1]["rewards"]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, origin


def command(args: Args) -> str:
    """What makes a dataset again."""
    always, never = ("map", "quality", "transitions", "seed"), ("output", "overwrite", "all")
    flags = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in vars(args).items()
        if key in always or (key not in never and value != getattr(Args, key))
    ]
    return " ".join(["python data/collect_smax.py", *flags])


def write_dataset(args: Args, path: Path) -> None:
    """Records what `args` ask for and writes it to `path`."""
    folder = ROOT / "data" / "policies" / "smax" / args.map
    data, origin = record(args, folder)
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    battles = int((ends <= args.transitions).sum())
    if not battles:
        fail(f"--transitions {args.transitions} is less than one battle.")
    data = {name: column[: ends[battles - 1]] for name, column in data.items()}
    returns, won = battle_totals(data)
    # Inside a battle the next observation is the next row's.
    data["final_observations"] = data.pop("next_observations")[ends[:battles] - 1]
    data["actions"] = data["actions"].astype(np.int64)
    data["rewards"] = data["individual_rewards"].sum(axis=1)
    del data["won"], data["last_actions"]
    references = json.loads((folder / "references.json").read_text())
    metadata = {
        "schema_version": "1",
        "env": f"smax/{args.map}",
        "quality": args.quality,
        "seed": args.seed,
        "noise": args.noise if args.quality != "medium-replay" else origin["training"]["exploration"],
        "command": command(args),
        "transitions": len(data["rewards"]),
        "episodes": battles,
        "win_rate": float(won.mean()),
        "episode_return_mean": float(returns.mean()),
        "episode_return_std": float(returns.std()),
        "episode_return_min": float(returns.min()),
        "episode_return_max": float(returns.max()),
        **{key: references[key] for key in references if key.startswith(("random_return", "expert_return"))},
        "state_owner": Battle(args.map).state_owner,
        "policy": origin,
        "versions": {package: version(package) for package in ("numpy", "jax", "jaxmarl")},
    }
    save(path, data, metadata)
    size = path.stat().st_size / 1e6
    tqdm.write(f"{path}: {len(data['rewards'])} transitions, {battles} battles, {won.mean():.1%} won, {size:.1f} MB")


def default_path(args: Args) -> Path:
    return ROOT / "data" / "datasets" / "smax" / args.map / f"{args.quality}.npz"


def main(args: Args) -> None:
    for flag in (
        "transitions",
        "train_transitions",
        "hidden_dim",
        "learning_rate",
        "epochs",
        "minibatches",
        "eval_interval",
    ):
        if not 0 < getattr(args, flag) < np.inf:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a positive number.")
    for flag in ("noise", "gamma", "trace", "exploration"):
        if not 0 <= getattr(args, flag) <= 1:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a number from 0 to 1.")
    if STEPS * WORLDS % args.minibatches:
        fail(f"--minibatches {args.minibatches}: expected a divisor of {STEPS * WORLDS}.")
    if args.train_transitions < STEPS * WORLDS * args.eval_interval:
        fail(f"--train-transitions {args.train_transitions}: expected {STEPS * WORLDS * args.eval_interval} or more.")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed {args.seed}: expected a number from 0 to {2**31 - 1}.")
    try:
        Battle(args.map)
    except ValueError as error:
        fail(f"--map: {error}")
    if args.all:
        for name in MAPS:
            for quality in QUALITIES:
                one = dataclasses.replace(args, all=False, map=name, quality=quality)
                if args.overwrite or not default_path(one).exists():
                    write_dataset(one, default_path(one))
    elif args.train:
        folder = args.output or ROOT / "data" / "policies" / "smax" / args.map
        if folder.is_file():
            fail(f"--output {folder}: with --train, expected the name of a folder.")
        if (folder / "references.json").exists() and not args.overwrite:
            fail(f"{folder} has policies already: add --overwrite to replace them, or choose another --output.")
        train(args, folder)
    else:
        path = args.output or default_path(args)
        if path.suffix != ".npz" or path.is_dir():
            fail(f"--output {path}: expected the name of a file that ends in .npz.")
        if path.exists() and not args.overwrite:
            fail(f"{path} exists already: add --overwrite to replace it, or choose another --output.")
        write_dataset(args, path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:
        fail(f"{error.filename or 'file'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        fail("interrupted; no file is left half written, and --all goes on where it stopped.")
