"""Change other people's files at random, convert them, and compare every value of the result with the source.

    python tests/fuzz_convert.py                       # 200 files of each format, some minutes on one core
    python tests/fuzz_convert.py --cases 20 --seed 7

A changed file is refused in one sentence and nothing is written, or it is converted. Then every row must be a row of
the source, in order and without a gap inside an episode. Its values must be the source's, an episode must end only
where the source says so, and what is missing must be told.
"""

import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tensorstore
import test_convert
import tqdm
import tyro
from test_convert import leaf, vault

Tree = dict[str, np.ndarray]  # {"FILE|ARRAY": its values}


@dataclass
class Args:
    cases: int = 200  # changed files of each format
    seed: int = 0


# ---- sources as trees of arrays ----
def load(source: Path) -> Tree:
    tree = {}
    if source.parent.suffix == ".vlt":
        keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{source}/"}).result().list().result()
        names = [key.decode().removesuffix("./.zarray") for key in keys if key.endswith(b"./.zarray")]
        steps, place = int(np.max(leaf(source, "vault_index"))), f"{source.parent.name}/{source.name}"
        return {f"{place}|{name}": np.asarray(leaf(source, f"{name}.")[:, :steps]) for name in names}
    for path in [source] if source.is_file() else sorted(source.rglob("*.*")):
        place = path.relative_to(source.parent)
        if path.suffix == ".npy":
            tree[f"{place}|"] = np.load(path)
        elif path.suffix == ".npz":
            with np.load(path) as file:
                tree |= {f"{place}|{name}": file[name] for name in file.files}
        elif path.suffix in (".h5", ".hdf5"):
            with h5py.File(path) as file:
                names: list[str] = []
                file.visit(names.append)
                tree |= {f"{place}|{name}": file[name][()] for name in names if hasattr(file[name], "shape")}
    return tree


def save(folder: Path, tree: Tree) -> None:
    files: dict[str, Tree] = {}
    for key, array in tree.items():
        place, name = key.split("|")
        files.setdefault(place, {})[name] = array
    for place, arrays in files.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, arrays[""])
        elif path.suffix == ".npz":
            np.savez(path, **arrays)
        elif path.parent.suffix == ".vlt":
            vault(path, {name: x for name, x in arrays.items() if x.ndim > 1 and x.size and x.dtype.kind in "biuf"})
        else:
            with h5py.File(path, "w") as file:
                for name, array in arrays.items():
                    file[name] = array.astype("S") if array.dtype.kind == "U" else array


# ---- what a source says, row by row ----
@dataclass
class View:
    """Rows that are transitions: [R, ...], and what followed each of them, None where nobody knows."""

    seen: np.ndarray
    taken: np.ndarray
    paid: np.ndarray
    ends: np.ndarray  # [R, 1 or N] bool, of all kinds
    after: list
    masks: np.ndarray | None = None
    states: np.ndarray | None = None


def last(name: str) -> str:
    return name.split("|")[1]


def rest_of(tree: Tree) -> dict[str, np.ndarray]:
    return {key.split("|")[1]: array for key, array in tree.items()}


def view_flat(tree: Tree) -> View:
    """D4RL's names, ours, and a vault's sequences [B, T, ...]."""
    a = rest_of(tree)
    if "truncations" in a:  # a vault
        sequences = a["observations"].shape[0]
        a = {name: x.reshape(-1, *x.shape[2:]) for name, x in a.items()}
        widths = (a["observations"][0] != -np.inf).sum(axis=1)
        ours = 2 if widths[2] != widths[0] else 3
        for name in a.keys() - {"states"}:
            a[name] = a[name][:, :ours, : widths[0]] if name == "observations" else a[name][:, :ours]
        cut = np.arange(1, len(a["observations"]) + 1) % (len(a["observations"]) // sequences) == 0
    else:
        cut = np.zeros(len(a["observations"]), bool)
    flags = [a[name].reshape(len(cut), -1) != 0 for name in ("terminals", "timeouts", "truncations") if name in a]
    ends = np.logical_or.reduce(np.broadcast_arrays(*flags)) if len(flags) > 1 else flags[0]
    seen, over = a["observations"], ends.any(axis=1)
    after = [None if over[i] or cut[i] else seen[i + 1] for i in range(len(seen) - 1)] + [None]
    if "next_observations" in a:
        after = list(a["next_observations"])
    elif "final_observations" in a:
        for e, i in enumerate(np.flatnonzero(over)[: len(a["final_observations"])]):
            after[i] = a["final_observations"][e]
    return View(seen, a["actions"], a["rewards"], ends, after, a.get("action_masks"), a.get("states"))


def by_episode(episodes: list[dict]) -> View:
    """From episodes that know their last observation: `seen` [L + 1, ...], the others [L, ...] or more."""
    rows = {name: [] for name in ("taken", "paid", "masks", "states")}
    seen, after, ends = [], [], []
    for episode in episodes:
        steps = len(episode["seen"]) - 1
        seen += [*episode["seen"][:steps]]
        after += [*episode["seen"][1 : steps + 1]]
        ends += [i == steps - 1 for i in range(steps)]
        for name in rows:
            rows[name] += [*episode[name][:steps]] if episode.get(name) is not None else []
    found = {name: np.array(x) if len(x) == len(seen) else None for name, x in rows.items()}
    return View(np.array(seen), found.pop("taken"), found.pop("paid"), np.array(ends)[:, None], after, **found)


def number(key: str) -> list:
    return [int(x) if x.isdigit() else x for x in test_convert.convert.DIGITS.split(key)]


def view_pymarl(tree: Tree) -> View:
    places, episodes = {key if key.endswith("y|") else key.split("|")[0] for key in tree}, []
    folders = [place for place in places if place.endswith(".h5")] or [""]
    for place in sorted(folders, key=number):
        a = {key.split("|")[-1] or Path(key[:-1]).stem: x for key, x in tree.items() if key.startswith(place)}
        names = {"seen": "obs", "taken": "actions", "paid": "reward", "masks": "avail_actions", "states": "state"}
        for e, filled in enumerate(a["filled"]):
            count = int((filled != 0).sum())
            over = np.flatnonzero(a["terminated"][e].reshape(len(filled), -1).any(axis=1))
            episode = {ours: a[name][e][:count] for ours, name in names.items() if name in a}
            if len(over) and over[0] == count - 1:  # nothing is known about what followed
                episode = {name: [*x, x[-1]] for name, x in episode.items()}
            if count:
                episodes.append(episode)
    return by_episode(episodes)


def view_omiga(tree: Tree) -> View:
    a = rest_of(tree)
    done, cuts = False, []
    for row, marks in enumerate(a["d"]):
        done = (marks != 0) | done
        if np.all(done):  # all agents have ended, now or before
            done, cuts = False, [*cuts, row + 1]
    states = a["s"].reshape(len(a["s"]), -1, a["s"].shape[-1])[:, 0]
    columns = {"seen": a["o"], "taken": a["a"], "paid": a["r"], "states": states}
    parts = {name: np.split(x, cuts)[: len(cuts)] for name, x in columns.items()}
    return by_episode([{name: parts[name][e] for name in parts} for e in range(len(cuts))])


def view_omar(tree: Tree) -> View:
    names = {"seen": "obs", "taken": "acs", "paid": "rews", "after": "next_obs"}
    seeds = sorted({key.split("/")[1] for key in tree})
    a = {
        ours: np.concatenate([np.stack([tree[f"expert/{seed}/{x}_{i}.npy|"] for i in range(2)], 1) for seed in seeds])
        for ours, x in names.items()
    }
    lengths = [len(tree[f"expert/{seed}/obs_0.npy|"]) for seed in seeds]
    ends = np.concatenate([np.arange(n) % 5 == 4 for n in lengths])[:, None]
    return View(a["seen"], a["taken"], a["paid"], ends, list(a["after"]))


def view_minari(tree: Tree) -> View:
    a, episodes = rest_of(tree), []
    for place in sorted({name.split("/")[0] for name in a if name.startswith("episode_")}, key=number):
        own = {name.removeprefix(f"{place}/"): x for name, x in a.items() if name.startswith(f"{place}/")}

        def find(*patterns: str, own: dict = own) -> np.ndarray | None:
            for pattern in patterns:
                head, _, tail = pattern.partition("*")
                found = [n for n in own if n.startswith(head) and n.endswith(tail) and (tail or n.count("/") == 1)]
                if pattern in own or found:
                    parts = sorted(found, key=number)
                    return own[pattern] if pattern in own else np.stack([own[name] for name in parts], axis=1)
            return None

        episodes.append(
            {
                "seen": find("observations", "observations/*/observation", "observations/*"),
                "taken": find("actions", "actions/*"),
                "paid": own["rewards"],
                "masks": find("infos/action_mask", "observations/*/action_mask"),
                "states": find("infos/state"),
            }
        )
    return by_episode(episodes)


# ---- the comparison ----
def differs(source: View, arrays: Tree, stdout: str) -> str:
    """What was changed without a word; "" if nothing was."""
    seen, rows, at = np.asarray(source.seen, np.float32), [], 0
    paid = np.asarray(source.paid).reshape(len(seen), -1).astype(np.float32)
    ends, own = arrays["terminals"] | arrays["timeouts"], arrays.get("individual_rewards", arrays["rewards"][:, None])

    def same(row: int, t: int) -> bool:
        """Whether row t has the observations and the rewards, team's or individual, of a row of the source."""
        reward = arrays["rewards"][t] == paid[row] if paid.shape[1] == 1 else own[t] == paid[row]
        return bool(reward.all()) and np.array_equal(seen[row], arrays["observations"][t])

    for t in range(len(ends)):
        while at < len(seen) and not same(at, t):
            if t and not ends[t - 1]:
                return f"row {t} is not the source's next row"
            at += 1
        if at == len(seen):
            return f"row {t} is not in the source"
        rows.append(at)
        at += 1
    if len(rows) < len(seen) and "left out" not in stdout:
        return f"{len(seen) - len(rows)} rows are missing"
    taken = source.taken[rows]
    if arrays["actions"].dtype.kind == "f":
        alike = np.array_equal(arrays["actions"], taken.astype(np.float32))
    else:
        hot = taken.ndim == 3 and taken.shape[2] > 1
        alike = np.array_equal(arrays["actions"], taken.argmax(axis=2) if hot else taken.reshape(len(rows), -1))
        alike = alike and (not hot or ((taken != 0).sum(axis=2) == 1).all())
    if not alike:
        return "actions differ"
    for name, theirs in (("action_masks", source.masks), ("states", source.states)):
        if name in arrays and not np.array_equal(arrays[name], theirs[rows].astype(arrays[name].dtype)):
            return f"{name} differ"
    kept, episode, ended = {*rows}, 0, np.zeros(source.ends.shape[1], bool)
    for t, row in enumerate(rows):
        ended = ended | source.ends[row]
        dropped = row + 1 < len(seen) and row + 1 not in kept  # the last step of an episode, whose end nobody saw
        moved = bool(dropped and not ended.all() and (ended | source.ends[row + 1]).all())
        if ends[t] != (moved or ended.all()):
            return f"row {t} {'ends an episode that goes on' if ends[t] else 'does not end its episode'}"
        if ends[t]:
            known = seen[row + 1] if moved else source.after[row]
            known = seen[row] if known is None else np.asarray(known, np.float32)
            if not np.array_equal(arrays["final_observations"][episode], known):
                return f"the observation after row {t} differs"
            episode, ended = episode + 1, np.zeros_like(ended)
    return ""


# ---- changes ----
NUMBERS = [np.nan, np.inf, -np.inf, 1e300, -1e20, 1e9, 1e5, 255, 3, 2, 1.02, 1, 0.5, 0, -0.0, -1, -1.5]
TYPES = ["f8", "f4", "f2", "i8", "i4", "i1", "u1", "u8", "?", "c16", "U6"]
RENAMED = {
    "timeouts": "truncations",
    "terminals": "dones",
    "avail_actions": "legals",
    "state": "states",
    "obs": "observations",
}


def put(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    array = array.astype(array.dtype if rng.random() < 0.5 else np.float64)
    array.flat[rng.integers(max(array.size, 1), size=rng.integers(1, 4)) % max(array.size, 1)] = rng.choice(NUMBERS)
    return array


SHAPES: list[Callable] = [
    lambda rng, x: x[:-1],
    lambda rng, x: x[1:],
    lambda rng, x: x[:0],
    lambda rng, x: x[:1],
    lambda rng, x: x.repeat(2, axis=0),
    lambda rng, x: rng.permutation(x),
    lambda rng, x: x[..., None],
    lambda rng, x: x[None],
    lambda rng, x: x[..., 0],
    lambda rng, x: x.ravel(),
    lambda rng, x: x.swapaxes(0, -1),
    lambda rng, x: x.swapaxes(-2, -1),
    lambda rng, x: np.repeat(x[..., None], 2, axis=-1),
    lambda rng, x: x.reshape(*x.shape[:2], -1),
    lambda rng, x: x.reshape(()),
]
VALUES: list[Callable] = [
    put,
    lambda rng, x: x.astype(rng.choice(TYPES)),
    lambda rng, x: x * 2,
    lambda rng, x: np.zeros_like(x),
    lambda rng, x: np.ones_like(x),
    lambda rng, x: np.where(rng.random(x.shape) < 0.1, 1 - x, x),
    lambda rng, x: np.eye(5)[x.astype(int) % 5].reshape(*x.shape, 5),
]


def change(rng: np.random.Generator, tree: Tree) -> tuple[Tree, dict[str, str]]:
    """A changed copy, and which names were given to arrays that are still to be read: {new: old}."""
    tree, renamed = dict(tree), {}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        key = rng.choice([*tree])
        name, kind = last(key), rng.integers(10)
        if kind == 0:
            del tree[key]
        elif kind == 1:
            place, new = key.split("|")[0], RENAMED.get(name, "junk")
            if not place.endswith(".npy"):
                tree[f"{place}|{new}"] = tree.pop(key)
                renamed = {f"{place}|{new}": key if new != "junk" else ""}
        elif kind == 2:
            tree[f"{key.split('|')[0]}|junk" if name else f"{key[:-5]}_junk.npy|"] = tree[key]
        elif kind == 3:  # a few flags, per agent where the source has them so
            flags = [key for key in tree if last(key).split("/")[-1][:4] in ("d", "term", "time", "trun", "fill")]
            key = rng.choice(flags or [key])
            tree[key] = np.where(rng.random(tree[key].shape) < 0.03, 1 - tree[key], tree[key])
        else:
            for _ in range(rng.integers(1, 3)):
                options = SHAPES if kind < 6 else VALUES
                try:
                    tree[key] = np.asarray(options[rng.integers(len(options))](rng, tree[key]))
                except (ValueError, IndexError, TypeError, np.exceptions.AxisError):
                    continue  # there is no such change of this array
                if kind == 9:
                    key = rng.choice([*tree])
    return tree, renamed


def damage(rng: np.random.Generator, source: Path) -> None:
    """Cut a file, or change a few of its bytes."""
    path = rng.choice(
        [source] if source.is_file() else [path for path in sorted(source.rglob("*.*")) if path.is_file()]
    )
    content = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        content = content[: rng.integers(len(content))]
    else:
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


# ---- the campaign ----
FORMATS: dict[str, tuple[Callable, Callable]] = {
    "OMAR": (test_convert.write_omar, view_omar),
    "PyMARL .h5": (test_convert.write_pymarl_h5, view_pymarl),
    "PyMARL .npy": (test_convert.write_pymarl_npy, view_pymarl),
    "D4RL .npz": (test_convert.write_d4rl_npz, view_flat),
    "D4RL .hdf5": (test_convert.write_d4rl_hdf5, view_flat),
    "ours": (test_convert.write_ours, view_flat),
    "OMIGA": (test_convert.write_omiga, view_omiga),
    "vault": (test_convert.write_vault_of_omar, view_flat),
    "Minari": (test_convert.write_minari, view_minari),
    "Minari, stacked": (test_convert.write_minari_stacked, view_minari),
}


def case(rng: np.random.Generator, folder: Path, write: Callable, view: Callable) -> tuple[str, str]:
    """What became of a changed source, and what is wrong with that."""
    original, flags, _ = write(folder / "original")
    tree, renamed = change(rng, load(original)) if rng.random() < 0.9 else (load(original), {})
    save(folder / "changed", tree)
    source = folder / "changed" / original.relative_to(folder / "original")
    if rng.random() < 0.15 and source.exists() and source.parent.suffix != ".vlt":
        damage(rng, source)
    output = folder / "out" / "ours.npz"
    output.parent.mkdir()
    status, stdout, stderr = test_convert.run(source, *flags, "--env", "x", "--quality", "y", "--output", output)
    left = [path.name for path in output.parent.iterdir()]
    if status == 2:
        told = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and "B/s]" not in line]
        fine = len(told) == 1 and told[0].startswith("convert.py: ") and not left and not stdout
        return "refused", "" if fine else f"said {told} and left {left}"
    if status or left != ["ours.npz"]:
        return "converted", f"ended with status {status} and left {left}"
    tree = {renamed.get(key, key): array for key, array in load(source).items() if renamed.get(key, key)}
    return "converted", differs(view(tree), test_convert.load(output)[0], stdout)


def main(args: Args) -> int:
    outcomes, failures = Counter(), []
    for name, (write, view) in FORMATS.items():
        for number in tqdm.trange(args.cases, desc=name):
            rng = np.random.default_rng([args.seed, number, len(name)])
            with tempfile.TemporaryDirectory() as place:
                (Path(place) / "original").mkdir()
                try:
                    outcome, fault = case(rng, Path(place), write, view)
                except (
                    Exception
                ):  # a traceback of the converter's, or a comparison that such a source should never reach
                    outcome, fault = "failed", traceback.format_exc()
            outcomes[name, outcome] += 1
            failures += [f"{name}, case {number} ({outcome}): {fault}"] if fault else []
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name}: {count} {outcome}")
    print(*failures, sep="\n")
    return len(failures) > 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
