"""Turns other people's offline datasets into our .npz file (data/README.md), and checks such files.

    python data/convert.py SOURCE --env mpe/simple_tag --quality expert    # data/datasets/mpe/simple_tag/expert.npz
    python data/convert.py --check FILE                                    # everything that is wrong with one of ours

What SOURCE is, is seen from SOURCE itself:

    OMAR       a folder with obs_0.npy, next_obs_0.npy, acs_0.npy, ..., or the folder around its seed_0_data, ...
    PyMARL     the episode batches of CFCQL, ICQ, offpymarl and ODIS: an .h5 file, a folder of them (part_0.h5, ...),
               or a folder with obs.npy, actions.npy, reward.npy, terminated.npy, filled.npy, ...
    OG-MARL    a flashbax vault, NAME.vlt, or one of the folders in it
    D4RL       an .npz or .hdf5 file with its names or ours: observations, actions, rewards, terminals, timeouts, ...
    OMIGA      an .hdf5 file with s, o, a, r, d

Each becomes a `Source`: flat rows in the order of time, of which some are transitions. The arrays are read and written
piece by piece, so a source may be larger than memory; only flags, rewards and hashes are held, some 100 bytes a row.
"""

import hashlib
import importlib
import json
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PIECE = 16 * 2**20  # bytes that are read at once
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
UNREADABLE = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
Column = Callable[[int, int], np.ndarray]  # the rows from start to stop of an array: [stop - start, ...]


@dataclass
class Args:
    source: tyro.conf.Positional[Path | None] = None
    """the dataset to convert: a file or a folder"""
    check: Path | None = None
    """instead of converting, say what is wrong with this file"""
    env: str | None = None
    """the environment that the data are from, as the scripts' --env names it"""
    quality: str | None = None
    """what the data are called: random, medium-replay, medium, expert, or any other word"""
    output: Path | None = None
    """the file to write, by default data/datasets/<env>/<quality>.npz"""
    overwrite: bool = False
    """replace the file if it exists"""
    rewards: Literal["team", "individual"] | None = None
    """what a reward per agent is: the team's, repeated for each, or the agent's own, so that the team's is the sum. By
    default individual, but team where all agents have the same in every step (never in OMAR's files and mpe/ tasks)"""
    agents: int | None = None
    """OMAR, OG-MARL: take the first so many agents; by default those that observe as many numbers as the first one"""
    seeds: tuple[int, ...] = ()
    """OMAR: the seed_k_data folders to take; by default all of them"""
    episode_length: int | None = None
    """the time limit. An episode of this length was ended by it; OMAR's rows are cut there. By default 25 (OMAR), the
    padded length - 1 (PyMARL), 1000 (OMIGA), elsewhere whatever the source says"""
    random_return: float | None = None
    """what a random policy returns over an episode, mean over agents: with the next, what scores are normalised with"""
    expert_return: float | None = None
    """what an expert returns"""


@dataclass
class Source:
    """Somebody's dataset as R rows. The columns carry our names, only `rewards` may still have one for every agent.

    The final observations are in `final_observations` [E, ...], or in `next_observations`, or else they are the
    observations of the row that follows. A source may lack that row after a terminal (`ends_stay`): nothing is
    bootstrapped from there, so the terminal row itself stands in for it.
    """

    format: str
    columns: dict[str, Column]
    keep: np.ndarray  # [R] bool: this row is a transition
    terminals: np.ndarray  # [R] bool, like timeouts true at the last transition of an episode
    timeouts: np.ndarray  # [R] bool
    notes: list[str]
    ends_stay: bool = False
    equal_is_team: bool = True  # rewards that never differ between the agents are the team's

    @property
    def ends(self) -> np.ndarray:
        return self.terminals | self.timeouts

    def after(self, rows: np.ndarray) -> np.ndarray:
        """[R]: how often each row is what came after one of the given transitions, [R] bool."""
        stay = rows & self.terminals & self.ends_stay
        counts = stay.astype(np.uint8)
        counts[1:] += (rows & ~stay)[:-1]
        return counts


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"this format needs the package {package}, which is not installed: pip install {package}")


# ---- arrays in pieces ----


class Rows:
    """Arrays one behind the other along their first axis, read in slices as one."""

    def __init__(self, *parts):
        self.parts, self.length, self.shape = parts, sum(part.shape[0] for part in parts), parts[0].shape[1:]

    def __call__(self, start: int, stop: int) -> np.ndarray:
        blocks = []
        for part in self.parts:
            length = part.shape[0]
            if start < length and stop > 0:
                blocks.append(np.asarray(part[max(start, 0) : min(stop, length)]))
            start, stop = start - length, stop - length
        return np.concatenate(blocks)


class Member:
    """An array inside an .npz, of which only slices are in memory; cheap as long as they are taken in order."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self.file = archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(self.file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = header(self.file)
        if self.dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are never loaded: they can run code")
        self.begin, self.whole = self.file.tell(), None
        if fortran:  # column by column: the rows of a slice do not lie side by side
            self.whole = self.read(0, math.prod(self.shape)).reshape(self.shape, order="F")

    def read(self, start: int, count: int) -> np.ndarray:
        self.file.seek(self.begin + start * self.dtype.itemsize)
        return np.frombuffer(self.file.read(count * self.dtype.itemsize), self.dtype, count)

    def __getitem__(self, rows: slice) -> np.ndarray:
        size = math.prod(self.shape[1:])
        if self.whole is not None:
            return self.whole[rows]
        return self.read(rows.start * size, (rows.stop - rows.start) * size).reshape(-1, *self.shape[1:])


def pieces(length: int, *columns: Column) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of rows that fill PIECE bytes in all these columns together."""
    if length:
        step = max(1, PIECE // max(1, sum(column(0, 1).nbytes for column in columns)))
        for start in range(0, length, step):
            yield start, min(start + step, length)


def each_row(function: Callable[..., Any], length: int, *columns: Column) -> np.ndarray:
    """[length, ...]: a function of columns that gives one value per row."""
    parts = [function(*(column(a, b) for column in columns)) for a, b in pieces(length, *columns)]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def flags(column: Column, length: int) -> np.ndarray:
    """[R] bool: whether any number of a row is not zero."""
    return each_row(lambda x: (x != 0).reshape(len(x), -1).any(axis=1), length, column)


def breaks(after: Column, now: Column, length: int) -> np.ndarray:
    """[R] bool: something else came after this row than what the next row holds; False for the last row."""

    def differs(x: np.ndarray, y: np.ndarray):
        same = np.asarray(np.isclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True))
        return (~same).reshape(len(x), -1).any(axis=1)

    return np.append(each_row(differs, length - 1, after, lambda a, b: now(a + 1, b + 1)), False)


def table(source: Path, arrays: dict[str, list]) -> tuple[dict[str, Rows], int]:
    """Every name's arrays, one behind the other, as one; all names must have equally many rows."""
    for name, parts in arrays.items():
        if len({part.shape[1:] for part in parts}) > 1 or not parts[0].shape:
            fail(f"{source}: the parts of {name} do not fit together: {[list(part.shape) for part in parts]}")
    joined = {name: Rows(*parts) for name, parts in arrays.items()}
    lengths = {name: rows.length for name, rows in joined.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        fail(f"{source}: all arrays must have equally many rows, not {lengths}")
    return joined, max(lengths.values())


def require(source: Path, present, *names: str) -> None:
    if missing := [name for name in names if name not in present]:
        fail(f"{source} lacks {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'}")


# ---- whose rows they are, and where episodes end ----


def team(source: Path, widths: list[int], args: Args, notes: list[str]) -> int:
    """How many agents, from the first on, are ours; the others, for example the prey, observe more or fewer numbers."""
    alike = next((i for i, width in enumerate(widths) if width != widths[0]), len(widths))
    clear = len(widths) == 1 or (alike > 1 and widths[0] not in widths[alike:])
    if (args.agents is None and not clear) or (args.agents or 1) > alike:
        fail(
            f"{source}: the agents observe {widths} numbers; ours must be the first and alike: give a fitting --agents"
        )
    kept = args.agents or alike
    if kept < len(widths):
        notes.append(f"left out: the agents {list(range(kept, len(widths)))}, which observe {widths[kept:]} numbers")
    return kept


def split(terminals: np.ndarray, timeouts: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which ends [R] are terminal and which timeouts: those after `limit` steps, otherwise what the source says."""
    ends = np.flatnonzero(terminals | timeouts)
    timeouts = timeouts & ~terminals
    timeouts[ends[np.diff(ends, prepend=-1) == limit]] = True
    return terminals & ~timeouts, timeouts


def whole_episodes(ends: np.ndarray, notes: list[str]) -> np.ndarray:
    """Of sequences [B, T] the rows that are not behind the last end."""
    whole = np.logical_or.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    if not whole.all():
        notes.append(f"left out: {(~whole).sum():,} rows at the end that are no whole episode")
    return whole


def without_final(kind: str, columns: dict, terminals: np.ndarray, timeouts: np.ndarray, notes: list[str]) -> Source:
    """A source of sequences, flags [B, T], that does not keep what came after the last step of an episode.

    After a timeout that is needed to bootstrap from. So the last row of such an episode is not a transition of ours
    but the final observation of the transition before it.
    """
    whole = whole_episodes(terminals | timeouts, notes)
    begins = np.ones_like(whole)
    begins[:, 1:] = (terminals | timeouts)[:, :-1]
    moved = np.zeros_like(whole)
    moved[:, :-1] = (timeouts & ~begins)[:, 1:]
    if timeouts.any():
        notes.append(
            f"left out: the last step of the {timeouts.sum():,} episodes that a time limit ended, because the source "
            "does not have the observation after it (returns lack its reward)"
        )
    flat = ((whole & ~timeouts).ravel(), terminals.ravel(), moved.ravel())
    return Source(kind, columns, *flat, notes, ends_stay=True)


# ---- the formats ----


def read_omar(source: Path, args: Args) -> Source:
    """Arrays [M, ...] per agent, one episode after the other without a mark: they are cut every so many rows."""
    folders = [source] if (source / "obs_0.npy").exists() else sorted(source.glob("seed_*_data"))
    folders = [source / f"seed_{seed}_data" for seed in args.seeds] or folders
    agents = range(len(list(folders[0].glob("obs_*.npy"))) or 1)
    names = [f"{kind}_{i}" for kind in ("obs", "next_obs", "acs", "rews", "dones") for i in agents]
    for folder in folders:
        require(folder, {path.stem for path in folder.glob("*.npy")}, *names)
    files = {name: [np.load(f / f"{name}.npy", mmap_mode="r", allow_pickle=False) for f in folders] for name in names}
    notes, lengths, limit = [], [part.shape[0] for part in files["obs_0"]], args.episode_length or 25
    kept = team(source, [files[f"obs_{i}"][0].shape[-1] for i in agents], args, notes)
    arrays, length = table(source, {name: parts for name, parts in files.items() if int(name.split("_")[-1]) < kept})
    if len({arrays[f"acs_{i}"].shape for i in range(kept)}) > 1:
        fail(f"{source}: the agents' actions differ in size; all agents must have actions of the same size")

    def stack(kind: str) -> Column:
        return lambda a, b: np.stack([arrays[f"{kind}_{i}"](a, b) for i in range(kept)], axis=1)

    whole = np.concatenate([np.arange(n) < n // limit * limit for n in lengths])
    ends = np.concatenate([np.arange(n) % limit == limit - 1 for n in lengths])
    if len(done := np.flatnonzero(flags(stack("dones"), length) & ~ends)):
        fail(f"{source}: row {done[0]:,} is done, inside of an episode of {limit} rows; give the true --episode-length")
    if not whole.all():
        notes.append(f"left out: {(~whole).sum():,} rows at the end that are no whole episode")
    ours = {"observations": "obs", "next_observations": "next_obs", "actions": "acs", "rewards": "rews"}
    columns = {name: stack(kind) for name, kind in ours.items()}
    dataset = Source("OMAR", columns, whole, np.zeros(length, bool), ends, notes, equal_is_team=False)
    if (ends & ~in_order(source, dataset))[:-1].sum() > ends[:-1].sum() / 2:
        fail(f"{source}: the episodes go on after {limit} rows; give the true --episode-length")
    return dataset


def in_order(source: Path, dataset: Source) -> np.ndarray:
    """Refuses rows of an episode that do not follow each other. [R] bool: the next row is not what came after this."""
    columns, ends = dataset.columns, dataset.ends | ~dataset.keep
    broken = breaks(columns["next_observations"], columns["observations"], len(ends))
    if (broken & ~ends).any():
        row = np.argmax(broken & ~ends)
        fail(
            f"{source}: after row {row:,} comes another observation than the next row's, inside of an episode; "
            "either --episode-length is not the true one, or the rows are out of order, or there is NaN among them"
        )
    return broken


def read_pymarl(source: Path, args: Args, parts: list) -> Source:
    """Episodes [E, T, ...] padded with zeros; one of L transitions fills L + 1 rows, the last with what it led to."""
    for part in parts:
        require(source, part, "obs", "actions", "reward", "terminated", "filled")
    names = [n for n in ("obs", "actions", "reward", "terminated", "filled", "state", "avail_actions") if n in parts[0]]
    arrays, episodes = table(source, {name: [part[name] for part in parts] for name in names})
    steps = arrays["filled"].shape[0]  # T

    def flat(name: str) -> Column:
        def read(a: int, b: int) -> np.ndarray:
            first = a // steps  # episode
            block = arrays[name](first, -(-b // steps))
            return block.reshape(-1, *block.shape[2:])[a - first * steps : b - first * steps]

        return read

    filled = flags(flat("filled"), episodes * steps).reshape(episodes, steps)
    terminated = flags(flat("terminated"), episodes * steps).reshape(episodes, steps)
    length = filled.sum(axis=1, keepdims=True) - 1  # [E, 1] = L; -1 where the buffer was not full
    row, limit = np.arange(steps), args.episode_length or steps - 1
    last = row == length - 1
    odd = (filled != (row <= length)).any(axis=1) | (terminated & ~last).any(axis=1)
    if odd.any():
        fail(f"{source}: in episode {odd.argmax()} the rows are not filled up to the one after the last step")
    timeouts = last & (~terminated | (length == limit))
    columns = {name: flat(theirs) for name, theirs in [("observations", "obs"), ("rewards", "reward")]}
    columns["actions"] = lambda a, b: flat("actions")(a, b)[..., 0].astype(np.int64)
    if "state" in names:
        columns["states"] = flat("state")
    if "avail_actions" in names:
        columns["action_masks"] = lambda a, b: flat("avail_actions")(a, b) != 0
    notes = [f"read as timeouts: the {timeouts.sum():,} episodes of {limit} steps or without a terminated"]
    return Source("PyMARL", columns, (row < length).ravel(), (last & ~timeouts).ravel(), timeouts.ravel(), notes)


def read_vault(source: Path, args: Args) -> Source:
    """B sequences of episodes [B, T, ...]; the arrays are declared with 10^13 steps, of which `vault_index` exist."""
    ts = need("tensorstore")
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{source.resolve()}/"}}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**28}})  # a vault's own pieces are larger than ours
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    leaves = {key.removesuffix("/.zarray"): key for key in keys if key.endswith("/.zarray")}
    names = ["observations.", "actions.", "rewards.", "terminals.", "truncations."]
    require(source, leaves, "vault_index", *names)
    names += [name for name in ("infos.legals.", "infos.state.") if name in leaves]

    def load(name: str):
        return ts.open({"driver": "zarr", "kvstore": {**store, "path": name}}, context=context).result()

    steps, stored = int(np.max(load("vault_index"))), {name: load(name) for name in names}
    arrays = {name: [array[b, :steps] for b in range(array.shape[0])] for name, array in stored.items()}
    rows, length = table(source, arrays)
    marks = [flags(rows[name], length).reshape(-1, steps) for name in names[3:5]]
    # Sequence by sequence: the steps behind the last end of one do not go on in the next.
    marks = [split(terminal, timeout, args.episode_length) for terminal, timeout in zip(*marks, strict=True)]
    terminals, timeouts = np.stack([mark[0] for mark in marks]), np.stack([mark[1] for mark in marks])
    # The other agents' narrower observations are padded with -inf.
    widths, notes = [int(n) for n in (rows["observations."](0, 1)[0] != -np.inf).sum(axis=-1)], []
    kept = team(source, widths, args, notes)
    columns: dict[str, Column] = {
        "observations": lambda a, b: rows["observations."](a, b)[:, :kept, : widths[0]],
        "actions": lambda a, b: rows["actions."](a, b)[:, :kept],
        "rewards": lambda a, b: rows["rewards."](a, b)[:, :kept],
    }
    if "infos.legals." in names:
        columns["action_masks"] = lambda a, b: rows["infos.legals."](a, b)[:, :kept] != 0
    if "infos.state." in names:
        columns["states"] = rows["infos.state."]
    return without_final("OG-MARL", columns, terminals, timeouts, notes)


def read_d4rl(source: Path, args: Args, arrays: Any) -> Source:
    """Flat rows [R, N, ...] under D4RL's names or ours."""
    names = ["observations", "actions", "rewards", "terminals"]
    require(source, arrays, *names)
    more = ("timeouts", "next_observations", "individual_rewards", "states", "action_masks", "next_action_masks")
    rows, length = table(source, {name: [arrays[name]] for name in (*names, *more) if name in arrays})
    if len(rows["observations"].shape) != 2:
        shape = list(arrays["observations"].shape)
        fail(f"{source}: observations are {shape}, expected [rows, agents, numbers], also for a single agent")
    limits = flags(rows.pop("timeouts"), length) if "timeouts" in rows else np.zeros(length, bool)
    terminals = flags(rows.pop("terminals"), length)
    if args.episode_length and not (terminals | limits).any():  # ends that nothing marks: after so many rows each
        limits = np.arange(1, length + 1) % args.episode_length == 0
    terminals, timeouts = split(terminals, limits, args.episode_length)
    columns: dict[str, Column] = {**rows}
    notes: list[str] = []
    if "next_observations" not in columns and "final_observations" not in arrays:
        return without_final("D4RL", columns, terminals[None], timeouts[None], notes)
    whole = whole_episodes((terminals | timeouts)[None], notes)[0]
    dataset = Source("D4RL", columns, whole, terminals, timeouts, notes)
    if "next_observations" in columns:
        in_order(source, dataset)
    else:
        columns["final_observations"] = final = Rows(arrays["final_observations"])
        if final.length != dataset.ends.sum():
            fail(f"{source} has {final.length:,} final_observations, but {dataset.ends.sum():,} episodes end")
    return dataset


def read_omiga(source: Path, args: Args, arrays: Any) -> Source:
    """Rows [R, N, ...]; those with d hold the final observation of an episode. `s` is the same for all agents."""
    rows, length = table(source, {name: [arrays[name]] for name in "soard"})
    final, notes = flags(rows["d"], length), []
    last = np.append(final[1:], False) & ~final
    limited = split(final, np.zeros(length, bool), (args.episode_length or 1000) + 1)[1]
    timeouts = last & np.append(limited[1:], False)
    columns: dict[str, Column] = {"observations": rows["o"], "actions": rows["a"], "rewards": rows["r"]}
    columns["states"] = lambda a, b: rows["s"](a, b).reshape(b - a, -1, rows["s"].shape[-1])[:, 0]
    keep = whole_episodes(final[None], notes)[0] & ~final
    return Source("OMIGA", columns, keep, last & ~timeouts, timeouts, notes)


def recognise(source: Path, args: Args) -> Source:
    """Which of the formats this is, from names alone."""
    if not source.exists():
        fail(f"{source} does not exist")
    if source.is_dir():
        files = sorted(source.iterdir(), key=lambda path: (len(path.name), path.name))  # part_10 behind part_9
        batches = [path for path in files if path.suffix in (".h5", ".hdf5")]
        vaults = [path.parent for path in sorted([*source.glob("manifest.ocdbt"), *source.glob("*/manifest.ocdbt")])]
        if (source / "obs_0.npy").exists() or any(source.glob("seed_*_data")):
            return read_omar(source, args)
        if (source / "filled.npy").exists():
            loaded = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in files if p.suffix == ".npy"}
            return read_pymarl(source, args, [loaded])
        if len(vaults) == 1:
            return read_vault(vaults[0], args)
        if vaults:
            fail(f"{source} holds several datasets; give one of them: {', '.join(path.name for path in vaults)}")
        if batches:
            return read_pymarl(source, args, [need("h5py").File(path, "r") for path in batches])
    elif source.suffix == ".npz":
        archive = zipfile.ZipFile(source)
        names = [name.removesuffix(".npy") for name in archive.namelist() if name != "metadata.npy"]
        return read_d4rl(source, args, {name: Member(archive, name) for name in names})
    elif source.suffix in (".h5", ".hdf5"):
        file = need("h5py").File(source, "r")
        if "filled" in file:
            return read_pymarl(source, args, [file])
        return (read_omiga if set("soard") <= set(file) else read_d4rl)(source, args, file)
    if any(path.suffix in PICKLES for path in ([source] if source.is_file() else source.iterdir())):
        fail(f"{source}: pickles are never loaded, because they can run code; ask for the data in another format")
    fail(f"{source} is none of the formats known here; python data/convert.py --help names them")


# ---- writing ----


def settle_rewards(path: Path, source: Source, asked: str | None, env: str) -> str:
    """Makes `rewards` [R] the team's and adds `individual_rewards` [R, N] if the source has them; says what it took."""
    if env.startswith("mpe/"):  # our particle tasks pay every agent, some all alike
        source.equal_is_team = False
    given, agents = source.columns["rewards"], source.columns["observations"](0, 1).shape[1]

    def rewards(a: int, b: int) -> np.ndarray:
        return given(a, b).reshape(b - a, -1).astype(np.float32)

    width = rewards(0, 1).shape[1]
    if width not in (1, agents):
        fail(f"{path}: a step has {width} rewards, expected one, or one for each of {agents} agents")
    if width == 1:
        source.columns["rewards"] = lambda a, b: rewards(a, b)[:, 0]
        if asked == "individual" and "individual_rewards" not in source.columns:
            fail(f"{path} has only the team's reward: there are no --rewards individual in it")
        if asked != "team" and "individual_rewards" in source.columns:
            return "individual, beside the team's"
        source.columns.pop("individual_rewards", None)
        return "the team's only"
    differ = each_row(lambda r: (r != r[:, :1]).any(axis=1), len(source.keep), rewards) & source.keep
    if asked == "individual" or (asked is None and (differ.any() or not source.equal_is_team)):
        source.columns |= {"rewards": lambda a, b: rewards(a, b).sum(axis=1), "individual_rewards": rewards}
        return "individual; the team's is their sum"
    if differ.any():
        fail(f"{path}: --rewards team, but in {differ.sum():,} steps the agents' rewards differ")
    source.columns["rewards"] = lambda a, b: rewards(a, b)[:, 0]
    return "the team's only, which every agent has (--rewards individual reads it as each agent's own)"


def plan(source: Source) -> dict[str, tuple[Column, np.ndarray, type]]:
    """The arrays of the file: how each is read, how often [R] each row is taken, and the type."""
    columns, keep, ends = source.columns, source.keep, source.ends
    discrete = columns["actions"](0, 1).dtype.kind in "iu"
    types = {"observations": np.float32, "actions": np.int64 if discrete else np.float32, "rewards": np.float32}
    types |= {"individual_rewards": np.float32, "states": np.float32}
    types |= {"action_masks": np.bool_, "next_action_masks": np.bool_}
    arrays = {name: (columns[name], keep, kind) for name, kind in types.items() if name in columns}
    arrays |= {
        "terminals": (Rows(source.terminals), keep, np.bool_),
        "timeouts": (Rows(source.timeouts), keep, np.bool_),
    }
    if "next_observations" in columns:
        return arrays | {"final_observations": (columns["next_observations"], ends, np.float32)}
    if "final_observations" in columns:
        return arrays | {"final_observations": (columns["final_observations"], np.ones(ends.sum(), bool), np.float32)}
    if "action_masks" in columns:
        arrays["next_action_masks"] = (columns["action_masks"], source.after(keep), np.bool_)
    return arrays | {"final_observations": (columns["observations"], source.after(ends), np.float32)}


def write(path: Path, arrays: dict, metadata: dict) -> None:
    """One array after the other, piece by piece, and the metadata."""
    shapes = {name: (int(counts.sum()), *column(0, 1).shape[1:]) for name, (column, counts, _) in arrays.items()}
    total = sum(math.prod(shapes[name]) * np.dtype(kind).itemsize for name, (_, _, kind) in arrays.items())
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        tqdm(total=total, unit="B", unit_scale=True, desc="converting", mininterval=1) as progress,
    ):
        for name, (column, counts, kind) in arrays.items():
            header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shapes[name]}
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for a, b in pieces(len(counts), column):
                    block = column(a, b).repeat(counts[a:b], axis=0).astype(kind)
                    member.write(block.tobytes())
                    progress.update(block.nbytes)
        with file.open("metadata.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(metadata, indent=1)), allow_pickle=False)


def statistics(rewards: np.ndarray, ends: np.ndarray, agents: int) -> dict[str, float]:
    """Of team rewards [T] and ends [T]; a return is the sum over an episode, mean over the agents."""
    starts = np.append(0, np.flatnonzero(ends)[:-1] + 1)
    returns = np.add.reduceat(rewards.astype(np.float64), starts) / agents
    found = {f"episode_return_{name}": float(getattr(returns, name)()) for name in ("mean", "std", "min", "max")}
    return {"transitions": len(rewards), "episodes": len(returns), **found}


# ---- checking ----


@dataclass
class Report:
    """What the scripts would refuse or learn wrongly from, what only makes one doubt, and the card of a file."""

    wrong: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    card: dict[str, str] = field(default_factory=dict)


def inspect(path: Path) -> Report:
    report = Report()
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {name: Member(archive, name) for name in names}
            metadata = arrays.pop("metadata", None)
            text = str(metadata.read(0, 1)[0]) if metadata is not None else None
            examine(arrays, text, report)
    except UNREADABLE as error:
        report.wrong.append(f"the file cannot be read: {error}")
    return report


def sound(arrays: dict[str, Member], wrong: list[str]) -> tuple[dict[str, Rows], int, int, int]:
    """The arrays of the right shape, kind and finite numbers; how many rows, agents and discrete actions they have."""
    required = ("observations", "actions", "rewards", "terminals", "timeouts")
    wrong += [f"{name} is missing" for name in required if name not in arrays]
    if not {"next_observations", "final_observations"} & arrays.keys():
        wrong.append("next_observations is missing, or final_observations in its place")

    def most(axis: int, *names: str) -> int:
        """The size that most of these arrays have: then of one that does not fit the others only itself is named."""
        sizes = [arrays[name].shape[axis] for name in names if name in arrays and len(arrays[name].shape) > axis]
        return max(sizes, key=sizes.count, default=0)

    steps = most(0, *required, "individual_rewards")
    agents = most(1, "observations", "actions", "final_observations", "next_observations", "individual_rewards")
    seen = most(2, "observations", "next_observations", "final_observations")
    choices = most(2, "action_masks", "next_action_masks")
    discrete = "actions" in arrays and arrays["actions"].dtype.kind in "iu"
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "observations": ("float", (steps, agents, seen)),
        "next_observations": ("float", (steps, agents, seen)),
        "final_observations": ("float", (None, agents, seen)),
        "actions": ("int", (steps, agents)) if discrete else ("float", (steps, agents, None)),
        "rewards": ("float", (steps,)),
        "individual_rewards": ("float", (steps, agents)),
        "states": ("float", (steps, None)),
        "terminals": ("bool", (steps,)),
        "timeouts": ("bool", (steps,)),
        "action_masks": ("bool", (steps, agents, choices)),
        "next_action_masks": ("bool", (steps, agents, choices)),
    }

    def broken(x: np.ndarray):
        return (~np.isfinite(x.astype(np.float32))).reshape(len(x), -1).any(axis=1)

    good: dict[str, Rows] = {}
    for name, (kind, shape) in expected.items():
        if (array := arrays.get(name)) is None:
            continue
        fits = len(array.shape) == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        if not fits or array.dtype.kind not in {"float": "f", "int": "iu", "bool": "b"}[kind]:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            wrong.append(f"{name} is {array.dtype} {list(array.shape)}, expected {kind} [{sizes}]")
        elif kind == "float" and (bad := int(each_row(broken, array.shape[0], Rows(array)).sum())):
            wrong.append(f"{name} holds NaN or infinity, in {bad:,} rows")
        else:
            good[name] = Rows(array)
    if not steps:
        wrong.append("there are no transitions")
    return good, steps, agents, choices


def examine(arrays: dict[str, Member], metadata: str | None, report: Report) -> None:
    wrong = report.wrong
    good, steps, agents, choices = sound(arrays, wrong)
    discrete = "actions" in good and arrays["actions"].dtype.kind in "iu"
    if not steps:
        return

    def count(what: str, function: Callable[..., Any], *names: str) -> int:
        if not all(name in good for name in names):
            return 0
        if rows := int(each_row(function, steps, *(good[name] for name in names)).sum()):
            wrong.append(f"{what}, in {rows:,} rows")
        return rows

    def outside(actions: np.ndarray):
        low, high = (0, choices - 1 if choices else np.inf) if discrete else (-1, 1)
        return ((actions < low) | (actions > high)).reshape(len(actions), -1).any(axis=1)

    def forbidden(actions: np.ndarray, masks: np.ndarray):
        chosen = np.clip(actions, 0, choices - 1).astype(np.int64)[..., None]
        return (~np.take_along_axis(masks, chosen, axis=2)).any(axis=(1, 2)) & ~outside(actions)

    def unequal(team: np.ndarray, own: np.ndarray):
        return np.abs(team - own.sum(axis=1)) > 1e-3 + 1e-3 * np.abs(team)

    count(f"actions leave {f'0 to {choices - 1}' if discrete else '[-1, 1]'}", outside, "actions")
    if discrete and choices:
        count("actions are taken that action_masks forbid", forbidden, "actions", "action_masks")
    for name in ("action_masks", "next_action_masks"):
        count(f"{name} allow an agent nothing", lambda mask: ~mask.any(axis=2).all(axis=1), name)
    unlike = count("rewards are not the sum of individual_rewards", unequal, "rewards", "individual_rewards")
    returns = None
    if {"terminals", "timeouts"} <= good.keys():
        terminals, timeouts = (flags(good[name], steps) for name in ("terminals", "timeouts"))
        ends = terminals | timeouts
        if not ends[-1]:
            wrong.append("the last row is not the end of an episode: neither terminal nor timeout")
        if both := int((terminals & timeouts).sum()):
            wrong.append(f"terminals and timeouts are both true, in {both:,} rows")
        if "final_observations" in good and good["final_observations"].length != ends.sum():
            rows = good["final_observations"].length
            wrong.append(f"final_observations has {rows:,} rows, but {ends.sum():,} episodes end")
        for name in ("observations", "action_masks"):
            if {name, f"next_{name}"} <= good.keys():
                if rows := int((breaks(good[f"next_{name}"], good[name], steps) & ~ends).sum()):
                    wrong.append(f"next_{name} inside an episode are not the next row's {name}, in {rows:,} rows")
        if "action_masks" in good and "next_action_masks" not in arrays and timeouts.any():
            if not each_row(lambda mask: mask.all(axis=(1, 2)), steps, good["action_masks"]).all():
                wrong.append("next_action_masks is missing: after a timeout the next row's are another episode's")
        if {"observations", "actions"} <= good.keys() and (copies := repeated(good, ends, discrete)):
            what = "in whole episodes" if discrete else "in another episode"
            report.doubtful.append(f"{copies:,} rows ({copies / steps:.1%}) repeat earlier ones {what}")
        lengths = np.diff(np.flatnonzero(ends), prepend=-1)
        if len(lengths):
            size = f"{lengths.min()} to {lengths.max()} steps, mean {lengths.mean():.1f}"
            report.card["transitions"] = f"{steps:,} in {len(lengths):,} episodes of {size}"
            report.card["ends"] = f"{terminals.sum():,} terminal, {timeouts.sum():,} by time limit"
        if ends[-1] and "rewards" in good and not unlike:
            returns = statistics(each_row(np.copy, steps, good["rewards"]), ends, agents)
            mean, std, low, high = (returns[f"episode_return_{name}"] for name in ("mean", "std", "min", "max"))
            spread = f"deviation {std:.2f}, {low:.2f} to {high:.2f}; of the team {mean * agents:.2f}"
            report.card["return"] = f"{mean:.2f} per agent and episode, {spread}"
    if "individual_rewards" in good:

        def sums(own: np.ndarray) -> np.ndarray:
            own = own.astype(np.float64)
            return np.stack([own.mean(axis=1), (own**2).mean(axis=1), (own != own[:, :1]).any(axis=1)], axis=1)

        mean, square, differ = each_row(sums, steps, good["individual_rewards"]).mean(axis=0)
        spread = f"deviation {max(square - mean**2, 0) ** 0.5:.3f}"
        report.card["own rewards"] = f"mean {mean:.3f}, {spread}, different between agents in {differ:.1%} of the steps"
    report.card |= {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    check_metadata(metadata, returns, report)


def repeated(good: dict[str, Rows], ends: np.ndarray, discrete: bool) -> int:
    """How many rows have the observations and actions of one in an earlier episode.

    Real numbers do not come again by chance. Where actions are discrete single rows do (the same start, a team that is
    dead), so only whole episodes count. What repeats inside of one episode (an agent at rest) never counts.
    """

    def hashes(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        rows = zip(observations, actions, strict=True)
        return np.array([hash(seen.tobytes() + done.tobytes()) for seen, done in rows], np.int64)

    keys, episode = each_row(hashes, len(ends), good["observations"], good["actions"]), np.cumsum(ends) - ends
    weight = np.ones(len(ends), np.int64)
    if discrete:
        parts = np.split(keys, np.flatnonzero(ends)[: -1 if ends[-1] else None] + 1)
        keys, weight = np.array([hash(part.tobytes()) for part in parts]), np.array([len(part) for part in parts])
        episode = np.arange(len(parts))
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return int(weight[episode != episode[first][which]].sum())


def check_metadata(text: str | None, found: dict[str, float] | None, report: Report) -> None:
    """`found`: the statistics of the file; None where its rewards or ends are broken."""
    if text is None:
        report.wrong.append("metadata is missing")
        return
    try:
        metadata = dict(json.loads(text))
    except (ValueError, TypeError):
        report.wrong.append("metadata is not the text of a JSON object")
        return
    if metadata.get("schema_version") != "1":
        report.wrong.append(f"metadata: schema_version is {metadata.get('schema_version')!r}, expected '1'")
    if not isinstance(metadata.get("env"), str):
        report.wrong.append(f"metadata: env is {metadata.get('env')!r}, expected the name of the environment")
    references = ("random_return", "expert_return", "paper_random_return", "paper_expert_return")
    numbers = {key: metadata[key] for key in (*references, *(found or ())) if key in metadata}
    for key, value in list(numbers.items()):
        if not isinstance(value, int | float) or not math.isfinite(value):
            report.wrong.append(f"metadata: {key} is {numbers.pop(key)!r}, expected a number")
        elif found and key in found and not math.isclose(value, found[key], rel_tol=1e-3, abs_tol=1e-3):
            report.wrong.append(f"metadata: {key} is {value:g}, but in the file it is {found[key]:g}")
    low, high = (numbers.get(key, numbers.get(f"paper_{key}")) for key in references[:2])
    if low is None or high is None or not found:
        return
    if high <= low:
        report.wrong.append(f"metadata: expert_return {high:g} is not above random_return {low:g}")
        return
    quality, mean = metadata.get("quality"), found["episode_return_mean"]
    share = (mean - low) / (high - low)
    belied = {"random": share > 0.25, "medium-replay": share >= 1, "medium": not 0 < share < 1, "expert": share < 0.5}
    if isinstance(quality, str) and belied.get(quality):
        where = f"{share:.0%} of the way from random_return {low:g} to expert_return {high:g}"
        report.doubtful.append(f"quality is {quality}, but the mean return {mean:.2f} is {where}")


# ---- the command ----


def convert(args: Args) -> None:
    if args.source is None or not args.env or not args.quality:
        fail("give a SOURCE, --env and --quality to convert, or --check FILE")
    path = args.output or ROOT / "data" / "datasets" / args.env / f"{args.quality}.npz"
    if Path(args.quality).name != args.quality:
        fail(f"--quality {args.quality}: expected a word, not a path; --output names another place")
    if (args.random_return is None) != (args.expert_return is None):
        fail("--random-return and --expert-return are of use together only: give both or none")
    if path.suffix != ".npz" or path.is_dir():
        fail(f"--output {path}: expected the name of a file that ends in .npz")
    if path.exists() and not args.overwrite:
        fail(f"{path} exists already: add --overwrite to replace it, or choose another --output")
    for flag in ("agents", "episode_length"):
        if (value := getattr(args, flag)) is not None and value < 1:
            fail(f"--{flag.replace('_', '-')} {value}: expected a positive number")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        source = recognise(args.source, args)
        for flag, formats in {"agents": ("OMAR", "OG-MARL"), "seeds": ("OMAR",)}.items():
            if getattr(args, flag) and source.format not in formats:
                fail(f"--{flag} is for {' and '.join(formats)}, but {args.source} is {source.format}")
        if not source.keep.any():
            fail(f"{args.source} ({source.format}) holds no whole episode; for unmarked limits give --episode-length")
        reading = settle_rewards(args.source, source, args.rewards, args.env)
        arrays = plan(source)
        metadata = describe(args, source, reading, arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary, arrays, metadata)
        report = inspect(temporary)
        if report.wrong:
            fail(f"{args.source} ({source.format}) cannot be used: {'; '.join(report.wrong)}")
        os.replace(temporary, path)
    except UNREADABLE as error:
        fail(f"{args.source} could not be converted: {error}")
    finally:
        if temporary.exists():
            temporary.unlink()

    with open(path, "rb") as file:
        report.card["SHA-256"] = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB from {metadata['source']} ({source.format})")
    for name, line in {"rewards read as": reading, **report.card}.items():
        print(f"    {name:<19} {line}")
    print(f"    {'to train on it':<19} --env {args.env} --dataset {path}")
    for line in [*source.notes, *(f"doubtful: {finding}" for finding in report.doubtful)]:
        print(f"    {line}")


def describe(args: Args, source: Source, reading: str, arrays: dict) -> dict:
    """The metadata. Of the source's path only the end is told: the rest is about this machine."""
    rewards = each_row(np.copy, len(source.keep), arrays["rewards"][0])[source.keep]
    agents = arrays["observations"][0](0, 1).shape[1]
    words = ["python data/convert.py", name := "/".join(Path(args.source or "").resolve().parts[-2:])]
    for key, value in vars(args).items():
        if key not in ("source", "check", "output", "overwrite") and value not in (None, ()):
            words.append(f"--{key.replace('_', '-')} {' '.join(map(str, value)) if key == 'seeds' else value}")
    return {
        "schema_version": "1",
        "env": args.env,
        "quality": args.quality,
        "source": name,
        "source_format": source.format,
        "source_notes": [f"rewards read as {reading}", *source.notes],
        "command": " ".join(words),
        **statistics(rewards, source.ends[source.keep], agents),
        **{k: v for k in ("random_return", "expert_return") if (v := getattr(args, k)) is not None},
        "versions": {"numpy": np.__version__},
    }


def check(path: Path) -> None:
    if not path.is_file():
        fail(f"{path} is not a file")
    report = inspect(path)
    for finding in [*report.wrong, *(f"doubtful: {finding}" for finding in report.doubtful)]:
        print(f"{path}: {finding}")
    if report.wrong or report.doubtful:
        sys.exit(2)
    print(f"{path}: nothing wrong")


def main(args: Args) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is infinity or NaN, which the check finds
        if args.check is not None:
            check(args.check)
        else:
            convert(args)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        fail("interrupted; nothing was written.")
