"""Turn other people's offline datasets into our .npz file (data/README.md), and check such files.

    python data/convert.py SOURCE --env mpe/simple_tag --quality expert    # data/datasets/mpe/simple_tag/expert.npz
    python data/convert.py --check FILE                                    # name every fault of a file of ours

The format of SOURCE is recognised:

    OMAR       a folder with obs_0.npy, next_obs_0.npy, acs_0.npy, ..., or the folder around its seed_0_data, ...
    PyMARL     the episode batches of CFCQL, ICQ, offpymarl and ODIS: an .h5 file, a folder of them (part_0.h5, ...),
               or a folder with obs.npy, actions.npy, reward.npy, terminated.npy, filled.npy, ...
    OG-MARL    a flashbax vault, NAME.vlt, or one of the folders in it
    D4RL       an .npz or .hdf5 file with D4RL's names or ours (also older files of ours): observations, actions, ...
    OMIGA      an .hdf5 file with s, o, a, r, d

Each becomes a `Source`: rows in the order of time, some of which are transitions. Arrays are read and written in
pieces, so a source may be larger than memory. Only flags, rewards and hashes stay in memory, some 100 bytes a row.
"""

import hashlib
import importlib
import json
import math
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package `data` is
from data import files
from data.check import (
    KINDS,
    LAYOUT,
    Column,
    Rows,
    breaks,
    check,
    each_row,
    flags,
    has_last_actions,
    inspect,
    is_battle,
    one_hot,
    open_npz,
    pieces,
    previous,
)
from data.files import fail

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")


@dataclass
class Args:
    source: tyro.conf.Positional[Path | None] = None  # the dataset to convert: a file or a folder
    check: Path | None = None  # do not convert, but name the faults of this file
    env: str | None = None  # the environment that the data are from, as in the scripts' --env
    quality: str | None = None  # a name for the data: random, medium-replay, medium, expert, or any other word
    output: Path | None = None  # the file to write, by default data/datasets/ENV/QUALITY.npz
    overwrite: bool = False  # replace the file if it exists
    # What a reward per agent means: the team's, repeated for each agent, or the agent's own, so that the team's is the
    # sum. By default individual, but team where all agents always have the same (never for OMAR's files and mpe/).
    rewards: Literal["team", "individual"] | None = None
    last_action: bool = False  # append the last action to observations; by default for --env smac/ and smax/ only
    agents: int | None = None  # OMAR, OG-MARL: take the first so many; by default all that observe as the first one
    seeds: tuple[int, ...] = ()  # OMAR: the seed_k_data folders to take; by default all
    # The time limit: it ended the episodes of this length. OMAR's rows are cut there. By default 25 (OMAR), the padded
    # length - 1 (PyMARL), 1000 (OMIGA), else what the source says.
    episode_length: int | None = None
    random_return: float | None = None  # a random policy's return per episode, mean over agents, to normalise scores
    expert_return: float | None = None  # an expert's return; give both or none


def parse(flags: list[str] | None = None) -> Args:
    env = tyro.cli(Args, args=flags, description=__doc__).env
    return tyro.cli(Args, args=flags, default=Args(last_action=is_battle(env)))


@dataclass
class Source:
    """Somebody's dataset as R rows. The columns have our names; `rewards` may still have a number per agent.

    What follows the last row of an episode is in `final_observations` [E, ...], or in `next_observations`, or it is the
    next row. Some sources lack that row after a terminal (`ends_stay`). Nothing is bootstrapped there, so the terminal
    row stands in for it.
    """

    format: str
    columns: dict[str, Column]
    keep: np.ndarray  # [R] bool: this row is a transition
    terminals: np.ndarray  # [R] bool, as timeouts true at the last transition of an episode
    timeouts: np.ndarray  # [R] bool
    notes: list[str]
    ends_stay: bool = False
    metadata: dict = field(default_factory=dict)

    @property
    def ends(self) -> np.ndarray:
        return self.terminals | self.timeouts

    def after(self, rows: np.ndarray) -> np.ndarray:
        """[R]: how often each row is what followed one of the given transitions, [R] bool."""
        stay = rows & self.terminals & self.ends_stay
        counts = stay.astype(np.uint8)
        counts[1:] += (rows & ~stay)[:-1]
        return counts


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"this format needs the package {package}, which is not installed; pip install {package}")


def table(source: Path, arrays: dict[str, list]) -> tuple[dict[str, Rows], int]:
    """Join every name's arrays; all names must have equally many rows."""
    for name, parts in arrays.items():
        if not all(hasattr(part, "shape") for part in parts):
            fail(f"{source}: {name} is a group, expected an array")
        if len({part.shape[1:] for part in parts}) > 1 or not parts[0].shape:
            fail(f"{source}: the parts of {name} do not fit together: {[list(part.shape) for part in parts]}")
    joined = {name: Rows(*parts) for name, parts in arrays.items()}
    lengths = {name: rows.length for name, rows in joined.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        fail(f"{source} has arrays of {lengths} rows, expected equally many rows")
    return joined, max(lengths.values())


def require(source: Path, present: Iterable[str], *names: str) -> None:
    if missing := [name for name in names if name not in present]:
        fail(f"{source} lacks {', '.join(missing)}; it has {', '.join(sorted({*present})) or 'nothing'}")


# ---- last actions ----
def append_last_actions(path: Path, source: Source) -> None:
    """Append each agent's last action as one-hot, as the observations of data/smac.py and data/smax.py have it."""
    columns, actions, keep = source.columns, source.columns["actions"], source.keep
    if "action_masks" not in columns or actions(0, 1).ndim != 2:
        fail(f"{path} has no discrete actions with action_masks, which --last-action needs; add --no-last-action")
    width = columns["action_masks"](0, 1).shape[2]
    last = previous(actions, keep & ~np.append(False, (keep & ~source.ends)[:-1]))
    if has_last_actions(columns["observations"], last, width, keep):
        source.notes.append("observations end with the last actions already")
        return
    final = each_row(lambda taken, end: taken[end], len(keep), actions, Rows(source.ends))  # [E, N]
    for name, taken in {"observations": last, "next_observations": actions, "final_observations": Rows(final)}.items():
        if name in columns:
            seen = columns[name]
            columns[name] = lambda a, b, seen=seen, taken=taken: np.concatenate(
                [seen(a, b), one_hot(taken(a, b), width)], axis=2, dtype=np.float32
            )
    source.notes.append(f"appended to observations: the last action, {width} numbers")


# ---- which agents, and where episodes end ----
def team(source: Path, widths: list[int], args: Args, notes: list[str]) -> int:
    """How many agents are ours: the first ones. Others, such as prey, observe more or fewer numbers."""
    alike = next((i for i, width in enumerate(widths) if width != widths[0]), len(widths))
    clear = len(widths) == 1 or (alike > 1 and widths[0] not in widths[alike:])
    if (args.agents is None and not clear) or (args.agents or 1) > alike:
        fail(f"{source}: the agents observe {widths} numbers, expected the same for the first ones; give --agents")
    kept = args.agents or alike
    if kept < len(widths):
        notes.append(f"left out: the agents {list(range(kept, len(widths)))}, which observe {widths[kept:]} numbers")
    return kept


def split(terminals: np.ndarray, timeouts: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which ends [R] are terminals and which timeouts: those after `limit` steps, else what the source says."""
    ends = np.flatnonzero(terminals | timeouts)
    timeouts = timeouts & ~terminals
    timeouts[ends[np.diff(ends, prepend=-1) == limit]] = True
    return terminals & ~timeouts, timeouts


def whole_episodes(ends: np.ndarray, notes: list[str]) -> np.ndarray:
    """The rows of sequences [B, T] up to the last end of each."""
    whole = np.logical_or.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    if not whole.all():
        notes.append(f"left out: {(~whole).sum():,} rows at the end, which are no whole episode")
    return whole


def without_final(kind: str, columns: dict, terminals: np.ndarray, timeouts: np.ndarray, notes: list[str]) -> Source:
    """A source of sequences, flags [B, T], that does not store what followed the last step of an episode.

    After a timeout the bootstrap needs that. So the last row of such an episode becomes the final observation of the
    transition before it, and is no transition itself.
    """
    whole = whole_episodes(terminals | timeouts, notes)
    begins = np.ones_like(whole)
    begins[:, 1:] = (terminals | timeouts)[:, :-1]
    moved = np.zeros_like(whole)
    moved[:, :-1] = (timeouts & ~begins)[:, 1:]
    if timeouts.any():
        notes.append(
            f"left out: the last step of the {timeouts.sum():,} episodes that a time limit ended, because the source "
            "lacks the observation after it (so returns lack its reward)"
        )
    flat = ((whole & ~timeouts).ravel(), terminals.ravel(), moved.ravel())
    return Source(kind, columns, *flat, notes, ends_stay=True)


# ---- the formats ----
def read_omar(source: Path, args: Args) -> Source:
    """Arrays [M, ...] per agent. Nothing marks where episodes end: they are cut every --episode-length rows."""
    folders = [source] if (source / "obs_0.npy").exists() else sorted(source.glob("seed_*_data"))
    folders = [source / f"seed_{seed}_data" for seed in args.seeds] or folders
    agents = range(len(list(folders[0].glob("obs_*.npy"))) or 1)
    names = [f"{kind}_{i}" for kind in ("obs", "next_obs", "acs", "rews", "dones") for i in agents]
    for folder in folders:
        require(folder, {path.stem for path in folder.glob("*.npy")}, *names)
    found = {name: [np.lib.format.open_memmap(f / f"{name}.npy", "r") for f in folders] for name in names}
    notes, lengths, limit = [], [part.shape[0] for part in found["obs_0"]], args.episode_length or 25
    kept = team(source, [found[f"obs_{i}"][0].shape[-1] for i in agents], args, notes)
    arrays, length = table(source, {name: parts for name, parts in found.items() if int(name.split("_")[-1]) < kept})
    if len({arrays[f"acs_{i}"].shape for i in range(kept)}) > 1:
        fail(f"{source}: the agents' actions differ in size, expected the same size for all")

    def stack(kind: str) -> Column:
        return lambda a, b: np.stack([arrays[f"{kind}_{i}"](a, b) for i in range(kept)], axis=1)

    whole = np.concatenate([np.arange(n) < n // limit * limit for n in lengths])
    ends = np.concatenate([np.arange(n) % limit == limit - 1 for n in lengths])
    if len(done := np.flatnonzero(flags(stack("dones"), length) & ~ends)):
        fail(f"{source}: row {done[0]:,} is done, inside an episode of {limit} rows; give the true --episode-length")
    if not whole.all():
        notes.append(f"left out: {(~whole).sum():,} rows at the end, which are no whole episode")
    ours = {"observations": "obs", "next_observations": "next_obs", "actions": "acs", "rewards": "rews"}
    columns = {name: stack(kind) for name, kind in ours.items()}
    dataset = Source("OMAR", columns, whole, np.zeros(length, bool), ends, notes)
    if (ends & ~in_order(source, dataset))[:-1].sum() > ends[:-1].sum() / 2:
        fail(f"{source}: episodes go on after {limit} rows; give the true --episode-length")
    return dataset


def in_order(source: Path, dataset: Source) -> np.ndarray:
    """Refuse an episode whose rows do not follow each other. Returns `breaks` [R] of the observations."""
    columns, ends, broken = dataset.columns, dataset.ends | ~dataset.keep, np.zeros(len(dataset.keep), bool)
    for name in [name for name in ("action_masks", "observations") if f"next_{name}" in columns]:
        broken = breaks(columns[f"next_{name}"], columns[name], len(ends))
        if (broken & ~ends).any():
            row = np.argmax(broken & ~ends)
            fail(
                f"{source}: next_{name} of row {row:,} are not the next row's {name}, inside an episode; "
                "give the true --episode-length, or put the rows in order and leave out NaN"
            )
    return broken


def read_pymarl(source: Path, args: Args, parts: list) -> Source:
    """Episodes [E, T, ...] padded with zeros. L transitions fill L + 1 rows; the last row holds what followed them."""
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
    length = filled.sum(axis=1, keepdims=True) - 1  # [E, 1] = L; -1 for an empty episode
    row, limit = np.arange(steps), args.episode_length or steps - 1
    last = row == length - 1
    odd = (filled != (row <= length)).any(axis=1) | (terminated & ~last).any(axis=1)
    if odd.any():
        fail(f"{source}: in episode {odd.argmax()} `filled` does not end one row after the last step")
    timeouts = last & (~terminated | (length == limit))
    columns = {name: flat(theirs) for name, theirs in [("observations", "obs"), ("rewards", "reward")]}
    columns["actions"] = lambda a, b: flat("actions")(a, b)[..., 0].astype(np.int64)
    if "state" in names:
        columns["states"] = flat("state")
    if "avail_actions" in names:
        columns["action_masks"] = lambda a, b: flat("avail_actions")(a, b) != 0
    notes = [f"read as timeouts: the {timeouts.sum():,} episodes of {limit} steps or without `terminated`"]
    return Source("PyMARL", columns, (row < length).ravel(), (last & ~timeouts).ravel(), timeouts.ravel(), notes)


def read_vault(source: Path, args: Args) -> Source:
    """B sequences of episodes [B, T, ...]. The arrays claim 10^13 steps, but only `vault_index` of them exist."""
    ts = need("tensorstore")
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{source.resolve()}/"}}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**28}})  # a vault's pieces are larger than ours
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
    # Sequence by sequence, because an unfinished episode does not go on in the next sequence.
    marks = [split(terminal, timeout, args.episode_length) for terminal, timeout in zip(*marks, strict=True)]
    terminals, timeouts = map(np.stack, zip(*marks, strict=True))
    # Narrower observations of other agents are padded with -inf.
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


def read_d4rl(source: Path, args: Args, arrays: Any, unread: list[str]) -> Source:
    """Rows [R, N, ...] under D4RL's names or ours."""
    require(source, [*arrays, *unread], "observations", "actions", "rewards", "terminals")
    finals = {name: Rows(arrays[name]) for name in ("final_observations", "final_action_masks") if name in arrays}
    rows, length = table(source, {name: [arrays[name]] for name in LAYOUT if name in arrays and name not in finals})
    if len(rows["observations"].shape) != 2:
        shape = list(arrays["observations"].shape)
        fail(f"{source}: observations are {shape}, expected [rows, agents, numbers], also for a single agent")
    limits = flags(rows.pop("timeouts"), length) if "timeouts" in rows else np.zeros(length, bool)
    terminals = flags(rows.pop("terminals"), length)
    if args.episode_length and not (terminals | limits).any():  # nothing marks an end: cut after so many rows
        limits = np.arange(1, length + 1) % args.episode_length == 0
    terminals, timeouts = split(terminals, limits, args.episode_length)
    columns: dict[str, Column] = {**rows, **finals}
    notes = [f"not read: {', '.join(unread)}"] if unread else []
    if "next_observations" not in columns and "final_observations" not in columns:
        return without_final("D4RL", {**rows}, terminals[None], timeouts[None], notes)
    whole = whole_episodes((terminals | timeouts)[None], notes)[0]
    dataset = Source("D4RL", columns, whole, terminals, timeouts, notes)
    for name, final in finals.items():
        if final.length != dataset.ends.sum():
            fail(f"{source} has {final.length:,} {name}, but {dataset.ends.sum():,} episodes end")
    in_order(source, dataset)
    if "action_masks" in columns and not {"next_action_masks", "final_action_masks"} & columns.keys():
        if not each_row(lambda mask: (mask != 0).all(axis=(1, 2)), length, columns["action_masks"]).all():
            fail(f"{source} has action_masks; add final_action_masks, those after the last row of each episode")
        del columns["action_masks"]
        notes.append("left out: action_masks, because they allow every action")
    return dataset


def read_omiga(source: Path, args: Args, arrays: Any) -> Source:
    """Rows [R, N, ...]. A row with d holds the final observation of an episode. `s` is the same for all agents."""
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
    """Recognise the format from names."""
    if not source.exists():
        fail(f"{source} does not exist")
    if source.is_dir():
        found = sorted(source.iterdir(), key=lambda path: (len(path.name), path.name))  # part_10 after part_9
        batches = [path for path in found if path.suffix in (".h5", ".hdf5")]
        vaults = [path.parent for path in sorted([*source.glob("manifest.ocdbt"), *source.glob("*/manifest.ocdbt")])]
        if (source / "obs_0.npy").exists() or any(source.glob("seed_*_data")):
            return read_omar(source, args)
        if (source / "filled.npy").exists():
            arrays = {path.stem: np.lib.format.open_memmap(path, "r") for path in found if path.suffix == ".npy"}
            return read_pymarl(source, args, [arrays])
        if len(vaults) == 1:
            return read_vault(vaults[0], args)
        if vaults:
            fail(f"{source} holds several datasets; give one of {', '.join(path.name for path in vaults)}")
        if batches:
            return read_pymarl(source, args, [need("h5py").File(path, "r") for path in batches])
    elif source.suffix == ".npz":
        dataset = read_d4rl(source, args, *open_npz(source))
        dataset.metadata = files.read_metadata(source)
        return dataset
    elif source.suffix in (".h5", ".hdf5"):
        file = need("h5py").File(source, "r")
        if "filled" in file:
            return read_pymarl(source, args, [file])
        if set("soard") <= set(file):
            return read_omiga(source, args, file)
        return read_d4rl(source, args, file, [name for name in file if name not in LAYOUT])
    if any(path.suffix in PICKLES for path in ([source] if source.is_file() else source.iterdir())):
        fail(f"{source}: pickles are never loaded because they can run code; ask for the data in another format")
    fail(f"{source} has none of the formats that python data/convert.py --help names")


# ---- writing ----
def settle_rewards(path: Path, source: Source, asked: str | None, env: str) -> str:
    """Make `rewards` [R] the team's, `individual_rewards` [R, N] the agents' own if there are any; say what it took."""
    given, agents = source.columns["rewards"], source.columns["observations"](0, 1).shape[1]
    own = source.columns.pop("individual_rewards", None)

    def rewards(a: int, b: int) -> np.ndarray:
        return given(a, b).reshape(b - a, -1).astype(np.float32)

    width = rewards(0, 1).shape[1]
    if width not in (1, agents):
        fail(f"{path}: a step has {width} rewards, expected one, or one for each of {agents} agents")
    differ = each_row(lambda r: (r != r[:, :1]).any(axis=1), len(source.keep), rewards) & source.keep
    # Particle tasks, ours and OMAR's, pay every agent, in some all the same. Elsewhere equal rewards are the team's.
    repeated = width > 1 and not (differ.any() or env.startswith("mpe/") or source.format == "OMAR")
    own = rewards if width > 1 else own
    if asked == "individual" and own is None:
        fail(f"{path} has only the team's reward; leave out --rewards individual")
    if asked == "team" and differ.any():
        fail(f"{path}: in {differ.sum():,} steps the agents' rewards differ; leave out --rewards team")
    source.columns["rewards"] = lambda a, b: rewards(a, b)[:, 0]
    if own is None or asked == "team" or (asked is None and repeated):
        return "the team's only" + ", which every agent has (or --rewards individual)" * (width > 1)
    source.columns |= {"rewards": lambda a, b: own(a, b).sum(axis=1)} if width > 1 else {}
    source.columns["individual_rewards"] = own
    return "individual; the team's is their sum"


def plan(source: Source) -> dict[str, tuple[Column, np.ndarray, type]]:
    """The arrays of the file: how each is read, how often [R] each row is taken, and the type."""
    columns, keep, ends = source.columns, source.keep, source.ends
    columns |= {"terminals": Rows(source.terminals), "timeouts": Rows(source.timeouts)}
    types = {name: KINDS[kind][1] for name, (kind, _) in LAYOUT.items()}
    if columns["actions"](0, 1).dtype.kind in "iu":
        types["actions"] = np.int64
    rows = [name for name in LAYOUT if name in columns and not name.startswith(("next_", "final_"))]
    arrays = {name: (columns[name], keep, types[name]) for name in rows}
    for name in [name for name in ("observations", "action_masks") if name in columns]:
        final = (columns[name], source.after(ends), types[name])
        if f"next_{name}" in columns:
            final = (columns[f"next_{name}"], ends, types[name])
        elif f"final_{name}" in columns:
            final = (columns[f"final_{name}"], np.ones(ends.sum(), bool), types[name])
        arrays[f"final_{name}"] = final
    return arrays


def write(path: Path, arrays: dict, metadata: dict) -> None:
    """One array after the other, in pieces, and the metadata."""
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


# ---- the command ----
def convert(args: Args) -> None:
    if args.source is None or not args.env or not args.quality:
        fail("give SOURCE, --env and --quality to convert, or --check FILE")
    if Path(args.quality).name != args.quality:
        fail(f"--quality is {args.quality}, expected a word; --output names another place")
    if (args.random_return is None) != (args.expert_return is None):
        fail("--random-return and --expert-return are used together; give both or none")
    for flag in [flag for flag in ("agents", "episode_length") if getattr(args, flag) is not None]:
        files.check_range(args, 1, math.inf, flag)
    path = files.output_file(args)
    try:
        source = recognise(args.source, args)
        for flag, formats in {"agents": ("OMAR", "OG-MARL"), "seeds": ("OMAR",)}.items():
            if getattr(args, flag) and source.format not in formats:
                fail(f"--{flag} is for {' and '.join(formats)}, but {args.source} is {source.format}")
        if not source.keep.any():
            fail(f"{args.source} ({source.format}) holds no whole episode; if it marks no ends, give --episode-length")
        reading = settle_rewards(args.source, source, args.rewards, args.env)
        if args.last_action:
            append_last_actions(args.source, source)
        arrays = plan(source)
        metadata = describe(args, source, reading, arrays)
        with files.replacing(path) as temporary:
            write(temporary, arrays, metadata)
            report = inspect(temporary)
            if report.wrong:
                fail(f"{args.source} ({source.format}) cannot be used: {'; '.join(report.wrong)}")
    except Exception as error:  # libraries and damaged bytes raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        fail(f"{args.source} could not be converted: {reason}")

    with open(path, "rb") as file:
        report.card["SHA-256"] = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB from {metadata['source']} ({source.format})")
    for name, line in {"rewards read as": reading, **report.card}.items():
        print(f"    {name:<19} {line}")
    print(f"    {'to train on it':<19} --env {args.env} --dataset {path}")
    for line in [*source.notes, *(f"doubtful: {finding}" for finding in report.doubtful)]:
        print(f"    {line}")


def describe(args: Args, source: Source, reading: str, arrays: dict) -> dict:
    """The metadata. They name only the end of the source's path, because the rest is about this machine."""
    rewards = each_row(np.copy, len(source.keep), arrays["rewards"][0])[source.keep]
    agents = arrays["observations"][0](0, 1).shape[1]
    name = "/".join(Path(args.source or "").resolve().parts[-2:])
    notes = [f"rewards read as {reading}", *source.notes]
    if "command" in source.metadata:
        notes.append(f"the source was made by: {source.metadata['command']}")
    return {
        **source.metadata,
        "schema_version": "1",
        "env": args.env,
        "quality": args.quality,
        "source": name,
        "source_format": source.format,
        "source_notes": notes,
        "command": files.command(f"convert.py {name}", args),
        **files.statistics(rewards, source.ends[source.keep], agents),
        **{k: v for k in ("random_return", "expert_return") if (v := getattr(args, k)) is not None},
        "versions": {"numpy": np.__version__},
    }


def main(args: Args) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # the check finds the infinity or NaN that comes of it
        if args.check is not None:
            check(args.check)
        else:
            convert(args)


if __name__ == "__main__":
    files.run(lambda: main(parse()))
