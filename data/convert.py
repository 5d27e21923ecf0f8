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
    Minari     the folder of a dataset in HDF5, or its main_data.hdf5: a group per episode, a group or index per agent

Each becomes a `Source`: rows in the order of time, some of which are transitions. Arrays are read and written in
pieces, so a source may be larger than memory. Only flags, rewards and hashes stay in memory, some 100 bytes a row.
"""

import hashlib
import json
import math
import re
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the package `data` is
from data import files
from data.check import (
    KINDS,
    LAYOUT,
    Archive,
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
    pieces,
    previous,
)
from data.files import fail, need

MINARI = "main_data.hdf5"
EPISODE, DIGITS = re.compile("episode_([0-9]+)"), re.compile("([0-9]+)")
IN_INFOS = ("action_masks", "states", "individual_rewards", "shapley_rewards")  # arrays that Minari has in infos
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
SYNONYMS = {  # what others call our arrays
    "observations": ("obs", "observation"),
    "next_observations": ("next_obs",),
    "actions": ("actions_onehot",),
    "rewards": ("reward",),
    "terminals": ("terminations", "terminated", "terminal"),
    "timeouts": ("truncations", "truncated", "timeout"),
    "dones": ("done",),
    "states": ("state", "infos.state"),
    "shapley_rewards": ("infos.shapley_rewards",),
    "action_masks": ("action_mask", "avail_actions", "available_actions", "legals", "infos.legals"),
}


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
    clip_actions: bool = False  # clip actions to [-1, 1], for policies that overshoot and environments that clip
    agents: int | None = None  # OMAR, OG-MARL, Minari: the first so many; by default all that observe as the first one
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
    """Somebody's dataset as R rows. The columns have our names, but actions and rewards are still the source's.

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

    @property
    def agents(self) -> int:
        return self.columns["observations"](0, 1).shape[1]

    def after(self, rows: np.ndarray) -> np.ndarray:
        """[R]: how often each row is what followed one of the given transitions, [R] bool."""
        stay = rows & self.terminals & self.ends_stay
        counts = stay.astype(np.uint8)
        counts[1:] += (rows & ~stay)[:-1]
        return counts


# ---- names and shapes ----
def translate(source: Path, present: Iterable[str], notes: list[str], needed: str, optional: str) -> dict[str, str]:
    """Our names for the arrays of a source: {ours: theirs}. What has another name, and what nobody reads, is noted.

    One of the names in a|b is needed, and both are read.
    """
    present, found = [*present], {}
    for ours in f"{needed} {optional}".replace("|", " ").split():
        if theirs := [name for name in (ours, *SYNONYMS.get(ours, ())) if name in present]:
            found[ours] = theirs[0]
    if missing := [names.split("|")[0] for names in needed.split() if not {*names.split("|")} & found.keys()]:
        fail(f"{source} lacks {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'}")
    if others := [f"{theirs} as {ours}" for ours, theirs in found.items() if ours != theirs]:
        notes.append(f"read: {', '.join(others)}")
    if unread := [name for name in present if name not in found.values() and name != "metadata"]:
        notes.append(f"not read: {', '.join(unread)}")
    return found


def table(source: Path, arrays: dict[str, list]) -> tuple[dict[str, Rows], int]:
    """Join every name's arrays; all names must have equally many rows."""
    for name, parts in arrays.items():
        if not all(hasattr(part, "shape") for part in parts):
            fail(f"{source}: {name} is a group, expected an array")
        if len({part.shape[1:] for part in parts}) > 1 or not parts[0].shape:
            fail(f"{source}: the parts of {name} do not fit together: {[list(part.shape) for part in parts][:9]}")
        kinds = {np.dtype(getattr(part.dtype, "numpy_dtype", part.dtype)) for part in parts}
        if strange := [kind for kind in kinds if kind.kind not in "biuf"]:
            fail(f"{source}: {name} holds {strange[0]}, expected numbers")
    joined = {name: Rows(*parts) for name, parts in arrays.items()}
    lengths = {name: rows.length for name, rows in joined.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        fail(f"{source} has arrays of {lengths} rows, expected equally many rows")
    return joined, max(lengths.values())


def team_size(source: Path, observations: Column) -> int:
    """N of observations [R, N, O]."""
    shape = observations(0, 1).shape[1:]
    if len(shape) != 2:
        found = ", ".join(map(str, shape))
        fail(f"{source}: a row of observations is [{found}], expected [agents, numbers], also for a single agent")
    return shape[0]


def zero_or_one(source: Path, name: str, column: Column, length: int, every: bool = False) -> np.ndarray:
    """[R, ...] bool of flags that may be stored as numbers; if `every`, [R], whether all of a row are true."""

    def read(x: np.ndarray):
        if not ((x == 0) | (x == 1)).all():
            fail(f"{source}: {name} holds {x[(x != 0) & (x != 1)][0]:g}, expected 0 or 1")
        found = x.reshape(len(x), -1) != 0
        return found.all(axis=1) if every else found

    return each_row(read, length, column)


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


def of_first(column: Column, agents: int, kept: int) -> Column:
    """What a column of all agents holds for the first so many."""
    return column if column(0, 1).shape[1:2] != (agents,) else lambda a, b: column(a, b)[:, :kept]


def read_ends(
    source: Path, rows: Any, shape: tuple[int, int, int], notes: list[str], kept: int | None = None, cut: Any = False
) -> tuple[np.ndarray, np.ndarray]:
    """The team's terminals and timeouts in sequences, [B, T] bool, from columns for one or `shape` [B, T, N] agents.

    `dones`, if there are any, mark both alike. At the rows `cut` whoever has not ended by then is stopped.
    """
    found, nothing = {}, np.zeros(shape, bool)[..., :kept]
    for name in ("terminals", "timeouts", "dones"):
        if name in rows:
            marks = zero_or_one(source, name, rows[name], shape[0] * shape[1])
            if marks.shape[1] not in (1, shape[2]):
                fail(f"{source}: a row has {marks.shape[1]} {name}, expected one, or one for each of {shape[2]} agents")
            found[name] = np.broadcast_to(marks.reshape(*shape[:2], -1), shape)[..., :kept]
    dones, timeouts = found.get("dones", nothing), found.get("timeouts", nothing)
    terminals = found.get("terminals", dones & ~timeouts)
    return ends_of_team(terminals, (timeouts | dones | np.asarray(cut)[..., None]) & ~terminals, notes)


def ends_of_team(terminals: np.ndarray, timeouts: np.ndarray, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """From each agent's flags in sequences, [B, T, N], to the team's, [B, T]: an episode ends when all have ended.

    It ends as those agents do that end last: by time limit if that stopped one of them. An agent that ended before may
    go on saying so, or not.
    """
    any_ends, all_end = (np.asarray(which(terminals | timeouts, axis=2)) for which in (np.any, np.all))
    limited = np.asarray(timeouts.any(axis=2))
    team_terminals, team_timeouts = all_end & ~limited, all_end & limited
    early = 0
    for sequence in np.flatnonzero((any_ends != all_end).any(axis=1)):
        ended = np.zeros(terminals.shape[2], bool)
        for row in np.flatnonzero(any_ends[sequence]):
            stopped = (timeouts[sequence, row] & ~ended).any()
            late, ended = ended.any(), ended | terminals[sequence, row] | timeouts[sequence, row]
            team_timeouts[sequence, row] = ended.all() and stopped
            team_terminals[sequence, row] = ended.all() and not stopped
            if ended.all():
                early, ended = early + late, np.zeros_like(ended)
        early += ended.any()
    if early:
        notes.append(
            f"agents ended before their team in {early:,} episodes: an episode ends when all have ended; where one "
            "agent's end is the team's, the source must mark it for all"
        )
    return team_terminals, team_timeouts


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


def without_final(
    kind: str, columns: dict, whole: np.ndarray, terminals: np.ndarray, timeouts: np.ndarray, notes: list[str]
) -> Source:
    """A source of sequences, flags [B, T], that does not store what followed the last step of an episode.

    After a timeout the bootstrap needs that. So the last row of such an episode becomes the final observation of the
    transition before it, and is no transition itself. `whole`: the rows of whole episodes.
    """
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


# ---- the formats ----
def read_omar(source: Path, args: Args, folders: list[Path]) -> Source:
    """Arrays [M, ...] per agent. Nothing marks where episodes end: they are cut every --episode-length rows."""
    agents, notes = range(len(list(folders[0].glob("obs_*.npy"))) or 1), []
    kinds = {"observations": "obs", "next_observations": "next_obs", "actions": "acs", "rewards": "rews"}
    kinds["dones"] = "dones"
    names = [f"{kind}_{i}" for kind in kinds.values() for i in agents]
    for folder in folders:
        present = {path.stem for path in folder.glob("[!.]*.npy")}
        if missing := [name for name in names if name not in present]:
            fail(f"{folder} lacks {', '.join(missing)}; it has {', '.join(sorted(present)) or 'nothing'}")
        if unread := sorted(present - {*names}):
            notes.append(f"not read in {folder.name}: {', '.join(unread)}")
    found = {name: [np.lib.format.open_memmap(f / f"{name}.npy", "r") for f in folders] for name in names}
    lengths, limit = [part.shape[0] for part in found["obs_0"]], args.episode_length or 25
    kept = team(source, [found[f"obs_{i}"][0].shape[-1] for i in agents], args, notes)
    arrays, length = table(source, {name: parts for name, parts in found.items() if int(name.split("_")[-1]) < kept})
    for kind in kinds.values():
        if len(shapes := {arrays[f"{kind}_{i}"].shape for i in range(kept)}) > 1:
            fail(f"{source}: the agents' {kind} differ in size ({sorted(shapes)}), expected the same size for all")

    def stack(kind: str) -> Column:
        return lambda a, b: np.stack([arrays[f"{kind}_{i}"](a, b) for i in range(kept)], axis=1)

    whole = np.concatenate([np.arange(n) < n // limit * limit for n in lengths])
    ends = np.concatenate([np.arange(n) % limit == limit - 1 for n in lengths])
    if len(done := np.flatnonzero(flags(stack("dones"), length) & ~ends)):
        fail(f"{source}: row {done[0]:,} is done, inside an episode of {limit} rows; give the true --episode-length")
    if not whole.all():
        notes.append(f"left out: {(~whole).sum():,} rows at the end, which are no whole episode")
    columns = {name: stack(kind) for name, kind in kinds.items() if name != "dones"}
    dataset = Source("OMAR", columns, whole, np.zeros(length, bool), ends, notes)
    if (ends & ~in_order(source, dataset))[:-1].sum() > ends[:-1].sum() / 2:
        fail(f"{source}: episodes go on after {limit} rows; give the true --episode-length")
    return dataset


def read_pymarl(source: Path, args: Args, parts: list) -> Source:
    """Episodes [E, T, ...] padded with zeros. L transitions fill L + 1 rows; the last row holds what followed them.

    Conversions of vaults fill only L rows, the last of which is `terminated`: they lack what followed.
    """
    notes: list[str] = []
    needed, optional = "observations actions rewards terminals|dones filled", "timeouts states action_masks"
    names = [translate(source, part, notes, needed, optional) for part in parts]
    notes = [*dict.fromkeys(notes)]
    if odd := [part for part, found in zip(parts, names, strict=True) if found.keys() != names[0].keys()]:
        fail(f"{source}: one part holds {', '.join(sorted(parts[0]))}, another {', '.join(sorted(odd[0]))}")
    found = {ours: [part[own[ours]] for part, own in zip(parts, names, strict=True)] for ours in names[0]}
    arrays, episodes = table(source, found)
    if len({rows.shape[:1] for rows in arrays.values()}) > 1 or not arrays["filled"].shape:
        shapes = ", ".join(f"{name} {[episodes, *rows.shape]}" for name, rows in arrays.items())
        fail(f"{source}: expected arrays [episodes, steps, ...] with equally many steps, found {shapes}")
    steps = arrays["filled"].shape[0]  # T

    def flat(rows: Rows) -> Column:
        def read(a: int, b: int) -> np.ndarray:
            first = a // steps  # episode
            block = rows(first, -(-b // steps))
            return block.reshape(-1, *block.shape[2:])[a - first * steps : b - first * steps]

        return read

    columns = {name: flat(rows) for name, rows in arrays.items()}
    agents, length = team_size(source, columns["observations"]), episodes * steps
    filled = zero_or_one(source, "filled", columns.pop("filled"), length)
    if filled.shape[1] != 1:
        fail(f"{source}: a step has {filled.shape[1]} numbers `filled`, expected one")
    filled = filled.reshape(episodes, steps)
    terminals, timeouts = read_ends(source, columns, (episodes, steps, agents), notes)
    count, row = filled.sum(axis=1, keepdims=True), np.arange(steps)  # [E, 1], [T]
    ends, behind = terminals | timeouts, count - row - 1  # [E, T]: how many filled rows are behind this one
    after = int((ends & (behind == 1)).sum() >= (ends & (behind == 0)).sum())
    odd = (filled != (row < count)).any(axis=1) | (ends & (behind != after)).any(axis=1)
    if odd.any():
        fail(
            f"{source}: in episode {odd.argmax()} `filled` does not end one row after the last step, as PyMARL has it, "
            "nor do all episodes end with their last step"
        )
    last = behind == after
    # By default an episode of limit length is a timeout, unless the source tells them or steps are all it has.
    limit = args.episode_length or (steps - 1 if steps > 2 and "timeouts" not in columns else 0)
    timeouts = last & (~terminals | (row == limit - 1))
    reason = f"of {limit} steps or without `terminated`" if limit else "without `terminated`"
    notes.append(f"read as timeouts: the {timeouts.sum():,} episodes {reason}")
    if not after:
        return without_final("PyMARL", columns, filled, last & ~timeouts, timeouts, notes)
    return Source("PyMARL", columns, (behind > 0).ravel(), (last & ~timeouts).ravel(), timeouts.ravel(), notes)


def read_vault(source: Path, args: Args) -> Source:
    """B sequences of episodes [B, T, ...]. The arrays claim 10^13 steps, but only `vault_index` of them exist."""
    ts = need("tensorstore")
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{source.resolve()}/"}}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**28}})  # a vault's pieces are larger than ours
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    paths = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
    leaves = {path.removesuffix("."): path for path in paths}
    notes: list[str] = []
    needed = "observations actions rewards terminals|dones vault_index"
    optional = "timeouts states action_masks shapley_rewards"
    names = translate(source, leaves, notes, needed, optional)

    def load(name: str):
        return ts.open({"driver": "zarr", "kvstore": {**store, "path": leaves[name]}}, context=context).result()

    steps, stored = int(np.max(load(names.pop("vault_index")))), {ours: load(name) for ours, name in names.items()}
    rows, length = table(source, {name: [x[b, :steps] for b in range(x.shape[0])] for name, x in stored.items()})
    agents = team_size(source, rows["observations"])
    # Narrower observations of other agents are padded with -inf.
    widths = [int(n) for n in (rows["observations"](0, 1)[0] != -np.inf).sum(axis=-1)]
    kept = team(source, widths, args, notes)
    # Sequence by sequence, because an unfinished episode does not go on in the next sequence.
    marks = zip(*read_ends(source, rows, (length // steps, steps, agents), notes, kept), strict=True)
    ends = [split(terminals, timeouts, args.episode_length) for terminals, timeouts in marks]
    terminals, timeouts = map(np.stack, zip(*ends, strict=True))

    columns = {name: column if name == "states" else of_first(column, agents, kept) for name, column in rows.items()}
    columns["observations"] = lambda a, b: rows["observations"](a, b)[:, :kept, : widths[0]]
    whole = whole_episodes(terminals | timeouts, notes)
    return without_final("OG-MARL", columns, whole, terminals, timeouts, notes)


def read_d4rl(source: Path, args: Args, arrays: Any, present: list[str]) -> Source:
    """Rows [R, N, ...] under D4RL's names or ours."""
    notes: list[str] = []
    needed, optional = "observations actions rewards terminals|timeouts|dones", " ".join(LAYOUT)
    names = translate(source, present, notes, needed, optional)
    finals = {name: Rows(arrays[name]) for name in ("final_observations", "final_action_masks") if name in names}
    rows, length = table(source, {name: [arrays[names[name]]] for name in names if name not in finals})
    agents = team_size(source, rows["observations"])
    terminals, timeouts = (marks[0] for marks in read_ends(source, rows, (1, length, agents), notes))
    if args.episode_length and not (terminals | timeouts).any():  # nothing marks an end: cut after so many rows
        timeouts = np.arange(1, length + 1) % args.episode_length == 0
    terminals, timeouts = split(terminals, timeouts, args.episode_length)
    columns: dict[str, Column] = {**rows, **finals}
    whole = whole_episodes((terminals | timeouts)[None], notes)
    if "next_observations" not in columns and "final_observations" not in columns:
        return without_final("D4RL", columns, whole, terminals[None], timeouts[None], notes)
    dataset = Source("D4RL", columns, whole[0], terminals, timeouts, notes)
    for name, final in finals.items():
        if final.length != dataset.ends.sum():
            fail(f"{source} has {final.length:,} {name}, but {dataset.ends.sum():,} episodes end")
    in_order(source, dataset)
    return dataset


def read_omiga(source: Path, args: Args, arrays: Any) -> Source:
    """Rows [R, N, ...]. A row with d holds the final observation of an episode. `s` is the same for all agents."""
    notes = [f"not read: {', '.join(unread)}"] if (unread := sorted({*arrays} - {*"soard"})) else []
    rows, length = table(source, {name: [arrays[name]] for name in "soard"})
    agents = team_size(source, rows["o"])
    final = read_ends(source, {"terminals": rows["d"]}, (1, length, agents), notes)[0][0]
    last = np.append(final[1:], False) & ~final
    limited = split(final, np.zeros(length, bool), (args.episode_length or 1000) + 1)[1]
    timeouts = last & np.append(limited[1:], False)
    columns: dict[str, Column] = {"observations": rows["o"], "actions": rows["a"], "rewards": rows["r"]}

    def states(a: int, b: int) -> np.ndarray:
        return rows["s"](a, b).reshape(b - a, -1, rows["s"].shape[-1])

    if not rows["s"].shape or each_row(lambda s: (s != s[:, :1]).any(axis=(1, 2)), length, states).any():
        notes.append("not read: s, because it is not one state for all agents")
    else:
        columns["states"] = lambda a, b: states(a, b)[:, 0]
    keep = whole_episodes(final[None], notes)[0] & ~final
    return Source("OMIGA", columns, keep, last & ~timeouts, timeouts, notes)


def open_hdf5(path: Path) -> Any:
    path.open("rb").close()  # a file that nobody may read is another matter
    try:
        return need("h5py").File(path, "r")
    except OSError:
        fail(f"{path} is not an HDF5 file, or only the beginning of one")


class Slice:
    """Some rows of an array in an HDF5 file. There may be very many, so each is opened only to be read."""

    def __init__(self, file: Any, name: str, start: int, stop: int):
        self.file, self.name, self.start = file, name, start
        self.shape, self.dtype = (stop - start, *file[name].shape[1:]), file[name].dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.file[self.name][self.start + rows.start : self.start + rows.stop]


def sizes(source: Path, episode: Any) -> dict[str, int]:
    """How many rows each array in a group has, {path: rows}."""
    if not hasattr(episode, "visititems"):
        fail(f"{source}: {episode.name} is an array, expected a group")
    found: dict[str, int] = {}
    episode.visititems(lambda path, x: found.update({path: x.shape[0]} if getattr(x, "shape", ()) else {}))
    return found


def minari_paths(source: Path, paths: list[str], notes: list[str]) -> dict[str, dict[str, str]]:
    """Which array of an episode is what and whose: {our name: {agent: path}}, the agent is "" in an array of all."""
    known = {theirs: ours for ours in LAYOUT for theirs in (ours, *SYNONYMS.get(ours, ()))}
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        words = path.split("/")
        ours = next((known[word] for word in reversed(words) if word in known), "")
        agent = "/".join(word for word in words if word not in known and word != "infos")
        if not ours or (words[0] == "infos" and ours not in IN_INFOS):
            notes.append(f"not read: {path}")
        else:
            found.setdefault(ours, {})[agent] = path
    if missing := [name for name in ("observations", "actions", "rewards", "terminals") if name not in found]:
        fail(f"{source} lacks {', '.join(missing)}; an episode has {', '.join(paths) or 'nothing'}")
    for ours, agents in found.items():
        if {*agents} not in ({""}, {*found["observations"]}):
            fail(f"{source}: {ours} are of {sorted(agents)}, but observations of {sorted(found['observations'])}")
    return found


def read_minari(source: Path, args: Args, file: Any) -> Source:
    """A group per episode with L + 1 observations and L actions. Agents are groups in these, or an axis of arrays."""
    episodes = sorted(filter(EPISODE.fullmatch, file), key=lambda name: int(name[8:]))
    notes = [f"not read: {', '.join(unread)}"] if (unread := [name for name in file if name not in episodes]) else []
    found = [sizes(source, file[episode]) for episode in episodes]
    if odd := [i for i, arrays in enumerate(found) if arrays.keys() != found[0].keys()]:
        differ = ", ".join(sorted(found[odd[0]].keys() ^ found[0].keys()))
        fail(f"{source}: not every episode has {differ}, for example not both {episodes[0]} and {episodes[odd[0]]}")
    paths = minari_paths(source, [*found[0]], notes)
    steps = [arrays[next(iter(paths["actions"].values()))] for arrays in found]  # L of each episode
    if 0 in steps:
        fail(f"{source}: {episodes[steps.index(0)]} has no actions")
    now: dict[str, list] = {}
    final: dict[str, list] = {}
    for ours, agent, path in [(name, *item) for name, agents in paths.items() for item in agents.items()]:
        more = {arrays[path] - length for arrays, length in zip(found, steps, strict=True)}
        fits = {1} if ours == "observations" else {0, 1} if ours in ("action_masks", "states") else {0}
        if len(more) > 1 or not more <= fits:
            rows = " or ".join(f"{n} rows more" for n in sorted(fits))
            fail(f"{source}: {path} has {sorted(more)} rows more than there are actions, expected {rows}")
        ranges = [(f"{episode}/{path}", length) for episode, length in zip(episodes, steps, strict=True)]
        now[f"{ours} {agent}"] = [Slice(file, name, 0, length) for name, length in ranges]
        if more == {1} and ours != "states":
            final[f"{ours} {agent}"] = [Slice(file, name, length, length + 1) for name, length in ranges]
    (rows, length), last = table(source, now), np.zeros(sum(steps), bool)
    last[np.cumsum(steps) - 1] = True
    names = sorted(paths["observations"], key=lambda name: [int(x) if x.isdigit() else x for x in DIGITS.split(name)])
    kept = len(names)
    if names != [""]:
        kept = team(source, [math.prod(rows[f"observations {name}"].shape) for name in names], args, notes)
        notes.append(f"the agents are {', '.join(names[:kept])}")
    elif args.agents:
        fail(f"{source} has one array for all agents; leave out --agents")

    def stack(arrays: dict[str, Rows], ours: str) -> Column:
        if "" in paths[ours]:
            array = arrays[f"{ours} "]
            return array if ours == "states" else of_first(array, len(names), kept)
        own = [arrays[f"{ours} {name}"] for name in names[:kept]]
        if len({array.shape for array in own}) > 1:
            fail(f"{source}: the agents' {ours} differ in size, expected the same size for all")
        return lambda a, b: np.stack([array(a, b) for array in own], axis=1)

    columns = {ours: stack(rows, ours) for ours in paths}
    marks = {name: columns.pop(name) for name in ("terminals", "timeouts") if name in columns}
    shape = (1, length, team_size(source, columns["observations"]))
    terminals, timeouts = (x[0] for x in read_ends(source, marks, shape, notes, cut=last))
    if (inside := (terminals | timeouts) & ~last).any():
        fail(f"{source}: {episodes[last[: inside.argmax()].sum()]} goes on after all agents have ended")
    if silent := int((last & ~np.any([flags(mark, length) for mark in marks.values()], axis=0)).sum()):
        notes.append(f"read as timeouts: the {silent:,} episodes without `terminations` and `truncations`")
    terminals, timeouts = split(terminals, timeouts, args.episode_length)
    finals = table(source, final)[0]
    for ours in {name.split(" ")[0] for name in finals}:
        columns[f"final_{ours}"] = stack(finals, ours)
    return Source("Minari", columns, np.ones(length, bool), terminals, timeouts, notes)


def recognise(source: Path, args: Args) -> Source:
    """Recognise the format from names."""
    if not source.exists():
        fail(f"{source} does not exist")
    if source.is_file():
        dataset = read_file(source, args)
    else:
        dataset = read_folder(source, args)
    if dataset is not None:
        return dataset
    if any(path.suffix in PICKLES for path in ([source] if source.is_file() else source.iterdir())):
        fail(f"{source}: pickles are never loaded because they can run code; ask for the data in another format")
    fail(f"{source} has none of the formats that python data/convert.py --help names")


def read_file(source: Path, args: Args) -> Source | None:
    if source.suffix == ".npz":
        arrays = Archive(source)
        dataset = read_d4rl(source, args, arrays, [*arrays, *arrays.others])
        dataset.metadata = files.read_metadata(source)
        return dataset
    if source.suffix not in (".h5", ".hdf5"):
        return None
    file = open_hdf5(source)
    if any(map(EPISODE.fullmatch, file)):
        return read_minari(source, args, file)
    if "filled" in file:
        return read_pymarl(source, args, [file])
    if set("soard") <= set(file):
        return read_omiga(source, args, file)
    return read_d4rl(source, args, file, [*file])


def read_folder(source: Path, args: Args) -> Source | None:
    """Hidden files, such as macOS leaves in archives, are no data. They and other files that nobody reads are noted."""
    everything = sorted(source.iterdir(), key=lambda path: (len(path.name), path.name))  # part_10 after part_9
    found = [path for path in everything if not path.name.startswith(".")]
    batches = [path for path in found if path.suffix in (".h5", ".hdf5")]
    vaults = [path.parent for path in sorted([*source.glob("manifest.ocdbt"), *source.glob("*/manifest.ocdbt")])]
    seeds = [path for path in found if path.match("seed_*_data")]
    arrays = [path for path in found if path.suffix == ".npy"]
    minari = [path for path in (source, source / "data") if (path / MINARI).exists()]
    if minari:
        used = [path for path in found if path.name in (MINARI, "data", "metadata.json")]
        dataset = read_file(minari[0] / MINARI, args)
    elif (source / "obs_0.npy").exists():
        used, dataset = arrays, read_omar(source, args, [source])
    elif seeds:
        used = [source / f"seed_{seed}_data" for seed in args.seeds] or seeds
        dataset = read_omar(source, args, used)
    elif (source / "filled.npy").exists():
        loaded = {path.stem: np.lib.format.open_memmap(path, "r") for path in arrays}
        used, dataset = arrays, read_pymarl(source, args, [loaded])
    elif len(vaults) > 1:
        fail(f"{source} holds several datasets; give one of {', '.join(path.name for path in vaults)}")
    elif vaults:
        used, dataset = (everything if vaults[0] == source else vaults), read_vault(vaults[0], args)
    elif batches:
        used, dataset = batches, read_pymarl(source, args, [open_hdf5(path) for path in batches])
    elif any((path / "metadata.json").exists() for path in (source, source / "data")):
        fail(f"{source} is Minari's, but not in HDF5; write it again with data_format='hdf5'")
    else:
        return None
    if dataset and (unread := [path.name for path in everything if path not in used]):
        dataset.notes.append(f"not read in {source.name}: {', '.join(unread)}")
    return dataset


# ---- actions and rewards ----
def settle_masks(path: Path, source: Source) -> tuple[int, bool]:
    """How many actions the masks are about, 0 if there are no masks, and whether they allow everything."""
    columns, width, everything = source.columns, 0, True
    for name in [name for name in columns if name.endswith("action_masks")]:
        mask, used = columns[name], np.ones(source.ends.sum(), bool) if "final" in name else source.keep
        shape = mask(0, 1).shape[1:]
        if len(shape) != 2 or shape[0] != source.agents:
            fail(f"{path}: a row of {name} is {list(shape)}, expected [{source.agents} agents, actions]")
        width, allowed = shape[1], zero_or_one(path, name, mask, len(used), every=True)
        everything = everything and bool(allowed[used].all())
        columns[name] = lambda a, b, mask=mask: mask(a, b) != 0
    unknown = not {"next_action_masks", "final_action_masks"} & columns.keys()
    if width and unknown and {"next_observations", "final_observations"} & columns.keys():
        if not everything:
            fail(f"{path} has action_masks; add final_action_masks, those after the last row of each episode")
        del columns["action_masks"]
        source.notes.append("left out: action_masks, because they allow every action")
    return width, everything


def settle_actions(path: Path, source: Source, clip: bool) -> None:
    """Make `actions` [R, N] whole numbers or [R, N, A] numbers in [-1, 1]. What can be read in two ways is refused."""
    columns, given, agents, notes = source.columns, source.columns["actions"], source.agents, source.notes
    choices, everything = settle_masks(path, source)
    sample = given(0, 1)[0]
    width = math.prod(sample.shape[1:])

    def wrong(expected: str) -> NoReturn:
        fail(f"{path}: the actions of a row are {sample.dtype} {list(sample.shape)}, expected {expected}")

    if sample.ndim not in (1, 2) or len(sample) != agents or not width:
        wrong(f"[{agents} agents] or [{agents} agents, numbers]")

    def facts(x: np.ndarray):
        """Of each row: whether it is one-hot, whether its numbers are whole, the lowest, the highest."""
        x = x.reshape(len(x), agents, width).astype(np.float32 if x.dtype.kind == "f" else np.float64)
        hot = ((x == 0) | (x == 1)).all(axis=(1, 2)) & (x.sum(axis=2) == 1).all(axis=1)
        whole = (np.isfinite(x) & (x == np.floor(x))).all(axis=(1, 2))
        return np.stack([hot, whole, x.min(axis=(1, 2)), x.max(axis=(1, 2))], axis=1)

    hot, whole, low, high = each_row(facts, len(source.keep), given)[source.keep].T
    natural = width == 1 and whole.all() and low.min() >= 0
    if width > 1 and hot.all():
        if choices not in (0, width):
            wrong(f"one-hot over {choices} actions, as action_masks have")
        columns["actions"] = lambda a, b: given(a, b).argmax(axis=2)
        notes.append(f"actions read as one-hot over {width} actions")
    elif natural and (sample.dtype.kind != "f" or choices or high.max() > 1):
        columns["actions"] = lambda a, b: given(a, b).reshape(b - a, agents).astype(np.int64)
        if sample.dtype.kind == "f":
            notes.append(f"actions read as indices, though they are {sample.dtype}")
    elif sample.dtype.kind != "f":
        wrong("an index from 0 for each agent, or one-hot; what is continuous is stored as float")
    elif natural or sample.ndim == 1:
        wrong("integers if they are indices, or numbers other than 0 and 1 and [agents, numbers] if they are not")
    elif choices and not everything:
        wrong("indices, because action_masks forbid some of them")
    else:
        for name in [name for name in columns if name.endswith("action_masks")]:
            del columns[name]
            notes.append(f"left out: {name}, because actions are continuous")
        beyond, reach = (low < -1) | (high > 1), np.abs([low, high]).max()
        if beyond.any() and clip and np.isfinite(reach):
            columns["actions"] = lambda a, b: given(a, b).clip(-1, 1)
            notes.append(f"clipped: actions outside [-1, 1] in {beyond.sum():,} rows, up to {reach:g}")
        elif beyond.any() and np.isfinite(reach):
            fail(
                f"{path}: actions are outside [-1, 1] in {beyond.sum():,} rows, up to {reach:g}; add --clip-actions if "
                "the environment clips them, or divide them by its largest action"
            )
        return
    if clip:
        fail(f"{path} has discrete actions; leave out --clip-actions")


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


# ---- the joint state ----
def factor_states(source: Source, env: str) -> None:
    """For a particle task without a joint state: the one in data/mpe.py. Where the source has that one, its owners."""
    name, columns = env.removeprefix("mpe/"), source.columns
    if not env.startswith("mpe/") or ("states" in columns and "state_owner" in source.metadata):
        return
    from data import mpe  # here, because battles are converted where mpe2 is not installed

    seen = columns["observations"]
    task = mpe.TASKS[name]() if name in mpe.TASKS else None
    if task is None or seen(0, 1).shape[1:] != (task.num_agents, task.obs_dim):
        return

    def states(a: int, b: int) -> np.ndarray:
        return mpe.factored_states(name, seen(a, b))[0]

    if "states" not in columns:
        columns["states"] = states
        source.notes.append("added: states, from the observations")
    elif columns["states"](0, 1).shape != states(0, 1).shape:
        return
    elif each_row(lambda x, y: (x != y).any(axis=1), len(source.keep), columns["states"], states)[source.keep].any():
        return
    source.metadata["state_owner"] = mpe.factored_states(name, seen(0, 1))[1]


# ---- writing ----
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
        for flag, formats in {"agents": ("OMAR", "OG-MARL", "Minari"), "seeds": ("OMAR",)}.items():
            if getattr(args, flag) and source.format not in formats:
                fail(f"--{flag} is for {' and '.join(formats)}, but {args.source} is {source.format}")
        if not source.keep.any():
            fail(f"{args.source} ({source.format}) holds no whole episode; if it marks no ends, give --episode-length")
        settle_actions(args.source, source, args.clip_actions)
        reading = settle_rewards(args.source, source, args.rewards, args.env)
        factor_states(source, args.env)
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
