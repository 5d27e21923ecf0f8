"""Our .npz file: its arrays, read in pieces, and the check of all that stands in it (data/README.md).

    python data/convert.py --check FILE

Arrays are read in pieces, so a file may be larger than memory. Only flags, rewards and hashes stay in memory, some 100
bytes a row.
"""

import bisect
import itertools
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import files
from data.files import fail

PIECE = 16 * 2**20  # bytes that are read at a time
KINDS = {"float": ("f", np.float32), "int": ("iu", np.int64), "bool": ("b", np.bool_)}
# Our arrays: kind and axes. T transitions, N agents, O numbers observed, A actions; * is any size.
LAYOUT = {
    "observations": ("float", "TNO"),
    "next_observations": ("float", "TNO"),
    "final_observations": ("float", "*NO"),
    "actions": ("float", "TN*"),  # or ("int", "TN")
    "rewards": ("float", "T"),
    "individual_rewards": ("float", "TN"),
    "shapley_rewards": ("float", "TN"),
    "states": ("float", "T*"),
    "terminals": ("bool", "T"),
    "timeouts": ("bool", "T"),
    "action_masks": ("bool", "TNA"),
    "next_action_masks": ("bool", "TNA"),
    "final_action_masks": ("bool", "*NA"),
}
Column = Callable[[int, int], np.ndarray]  # the rows from start to stop of an array: [stop - start, ...]


def is_battle(env: object) -> bool:
    """Whether the environment's observations end with the last actions."""
    return str(env).startswith(("smac/", "smax/"))


# ---- arrays in pieces ----
class Rows:
    """Arrays, one after the other along their first axis, read in slices as one."""

    def __init__(self, *parts):
        self.parts, self.shape = parts, parts[0].shape[1:]
        self.starts = [0, *itertools.accumulate(part.shape[0] for part in parts)]
        self.length = self.starts[-1]

    def __call__(self, start: int, stop: int) -> np.ndarray:
        blocks = []
        for i in range(bisect.bisect_right(self.starts, start) - 1, bisect.bisect_left(self.starts, stop)):
            first, last = max(start, self.starts[i]), min(stop, self.starts[i + 1])
            if first < last:
                blocks.append(np.asarray(self.parts[i][first - self.starts[i] : last - self.starts[i]]))
        return np.concatenate(blocks)


class Member:
    """An array inside an .npz, of which only slices are in memory; fast as long as they are read in order."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        self.file = archive.open(f"{name}.npy")
        try:
            version = np.lib.format.read_magic(self.file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, self.dtype = header(self.file)
        except Exception as error:  # damaged bytes raise anything
            raise ValueError(f"{name} has a damaged header") from error
        if self.dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are never loaded because they can run code")
        self.begin, self.whole = self.file.tell(), None
        size = archive.getinfo(f"{name}.npy").file_size - self.begin
        if min(self.shape, default=0) < 0 or math.prod(self.shape) * self.dtype.itemsize != size:
            raise ValueError(f"{name} holds {size} bytes, which do not make {self.dtype} {list(self.shape)}")
        if fortran:  # stored by columns: a slice of rows is not contiguous
            self.whole = self.read(0, math.prod(self.shape)).reshape(self.shape, order="F")

    def read(self, start: int, count: int) -> np.ndarray:
        self.file.seek(self.begin + start * self.dtype.itemsize)
        return np.frombuffer(self.file.read(count * self.dtype.itemsize), self.dtype, count)

    def __getitem__(self, rows: slice) -> np.ndarray:
        size = math.prod(self.shape[1:])
        if self.whole is not None:
            return self.whole[rows]
        return self.read(rows.start * size, (rows.stop - rows.start) * size).reshape(-1, *self.shape[1:])


class Archive(Mapping):
    """The arrays of an .npz file by name, each of which is opened when it is asked for."""

    def __init__(self, path: Path):
        try:
            self.archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise ValueError("it is not an .npz file, or only the beginning of one") from None
        members = dict.fromkeys(self.archive.namelist())
        self.names = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
        self.others = [name for name in members if not name.endswith(".npy")]

    def __getitem__(self, name: str) -> Member:
        return Member(self.archive, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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
    """[R] bool: whether a row has a number other than zero."""
    return each_row(lambda x: (x != 0).reshape(len(x), -1).any(axis=1), length, column)


def breaks(after: Column, now: Column, length: int) -> np.ndarray:
    """[R] bool: what followed this row is not the next row; False for the last row."""

    def differs(x: np.ndarray, y: np.ndarray):
        same = np.asarray(np.isclose(x, y, rtol=1e-5, atol=1e-6, equal_nan=True))
        return (~same).reshape(len(x), -1).any(axis=1)

    return np.append(each_row(differs, length - 1, after, lambda a, b: now(a + 1, b + 1)), False)


# ---- last actions ----
def previous(actions: Column, begins: np.ndarray) -> Column:
    """[R, N]: the actions of the row before, -1 where an episode begins (as in row 0)."""

    def read(a: int, b: int) -> np.ndarray:
        taken = actions(max(a - 1, 0), b)
        return np.where(begins[a:b, None], -1, taken[:-1] if a else np.roll(taken, 1, axis=0))

    return read


def one_hot(actions: np.ndarray, width: int) -> np.ndarray:
    """[..., width]; zeros for -1."""
    return np.eye(width + 1, width, dtype=np.float32)[np.clip(actions, -1, width - 1)]


def has_last_actions(observations: Column, last: Column, width: int, rows: np.ndarray) -> bool:
    """Whether in all these rows [R] bool the observations end with the last actions."""

    def differs(seen: np.ndarray, taken: np.ndarray):
        return (seen[..., -width:] != one_hot(taken, width)).any(axis=(1, 2))

    return observations(0, 1).shape[2] > width and not each_row(differs, len(rows), observations, last)[rows].any()


# ---- checking ----
@dataclass
class Report:
    """What scripts refuse or learn wrongly from, what is only doubtful, and the card of a file."""

    wrong: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    card: dict[str, str] = field(default_factory=dict)


def inspect(path: Path) -> Report:
    report = Report()
    try:
        archive = Archive(path)
        arrays = {name: archive[name] for name in LAYOUT if name in archive.names}
        if unread := [name for name in [*archive, *archive.others] if name not in (*arrays, "metadata")]:
            report.card["not read"] = ", ".join(unread)
        examine(arrays, files.read_metadata(path), report)
    except Exception as error:  # damaged bytes raise anything
        report.wrong.append(f"the file cannot be read: {error or type(error).__name__}")
    return report


def sound(arrays: dict[str, Member], wrong: list[str]) -> tuple[dict[str, Rows], dict[str, int]]:
    """The arrays of the right shape and kind with usable numbers, and the sizes of the axes."""
    needed = ("observations", "actions", "rewards", "terminals", "timeouts")
    wrong += [f"{name} is missing" for name in needed if name not in arrays]
    for name in [name for name in ("observations", "action_masks") if name in arrays]:
        if not {f"next_{name}", f"final_{name}"} & arrays.keys():
            wrong.append(f"final_{name} is missing (or next_{name})")
    layout = dict(LAYOUT)
    if "actions" in arrays and arrays["actions"].dtype.kind in "iu":
        layout["actions"] = ("int", "TN")
    elif "actions" in arrays and "action_masks" in arrays:
        wrong.append("action_masks are given, but actions are not whole numbers")
    sizes = {}
    for axis in "TNOA":  # the size that most arrays have, so that only an array that does not fit is named
        found = [
            arrays[name].shape[axes.index(axis)]
            for name, (_, axes) in layout.items()
            if axis in axes and name in arrays and len(arrays[name].shape) > axes.index(axis)
        ]
        sizes[axis] = max(found, key=found.count, default=0)

    def unusable(x: np.ndarray):
        return (~(np.abs(x) < np.float32(1e9))).reshape(len(x), -1).any(axis=1)

    good: dict[str, Rows] = {}
    for name, (kind, axes) in layout.items():
        if (array := arrays.get(name)) is None:
            continue
        shape = [sizes.get(axis) for axis in axes]
        fits = len(array.shape) == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
        if not fits or array.dtype.kind not in KINDS[kind][0]:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            wrong.append(f"{name} is {array.dtype} {list(array.shape)}, expected {kind} [{expected}]")
        elif kind == "float" and (bad := int(each_row(unusable, array.shape[0], Rows(array)).sum())):
            wrong.append(f"{name} holds NaN, infinity or numbers from 1e9, in {bad:,} rows")
        else:
            good[name] = Rows(array)
    if sizes["T"] < 2:
        wrong.append(f"there are {sizes['T']} transitions, expected 2 or more")
    return good, sizes


def examine(arrays: dict[str, Member], metadata: dict, report: Report) -> None:
    wrong, doubtful, card = report.wrong, report.doubtful, report.card
    good, sizes = sound(arrays, wrong)
    steps, agents, choices = sizes["T"], sizes["N"], sizes["A"]
    discrete = "actions" in good and arrays["actions"].dtype.kind in "iu"
    if not steps:
        return

    def count(what: str, function: Callable[..., Any], *names: str) -> int:
        if not all(name in good for name in names):
            return 0
        if rows := int(each_row(function, good[names[0]].length, *(good[name] for name in names)).sum()):
            wrong.append(f"{what}, in {rows:,} rows")
        return rows

    def outside(actions: np.ndarray):
        low, high = (0, choices - 1 if choices else np.inf) if discrete else (-1, 1)
        return ((actions < low) | (actions > high)).reshape(len(actions), -1).any(axis=1)

    def forbidden(actions: np.ndarray, masks: np.ndarray):
        chosen = np.clip(actions, 0, choices - 1).astype(np.int64)[..., None]
        return (~np.take_along_axis(masks, chosen, axis=2)).any(axis=(1, 2)) & ~outside(actions)

    def unequal(team: np.ndarray, own: np.ndarray):
        return np.abs(team - own.sum(axis=1)) > 1e-3 + 1e-3 * np.abs(own.sum(axis=1))

    count(f"actions are outside {f'0 to {choices - 1}' if discrete else '[-1, 1]'}", outside, "actions")
    if discrete and choices:
        count("action_masks forbid an action that was taken", forbidden, "actions", "action_masks")
    for name in ("action_masks", "next_action_masks", "final_action_masks"):
        count(f"{name} allow an agent nothing", lambda mask: ~mask.any(axis=2).all(axis=1), name)
    unlike = count("rewards are not the sum of individual_rewards", unequal, "rewards", "individual_rewards")
    count("rewards are not the sum of shapley_rewards", unequal, "rewards", "shapley_rewards")
    rewards = each_row(np.copy, steps, good["rewards"]) if "rewards" in good else None
    if rewards is not None and steps > 1 and (rewards == rewards[0]).all():
        wrong.append(f"rewards are all {rewards[0]:g}, expected different ones")
    for name in ("observations", "states"):
        if name in good and (found := outliers(good[name], steps)):
            doubtful.append(f"{name} hold {found}; they hide the other values of their input")

    returns = None
    if {"terminals", "timeouts"} <= good.keys():
        terminals, timeouts = (flags(good[name], steps) for name in ("terminals", "timeouts"))
        ends = terminals | timeouts
        if not ends[-1]:
            wrong.append("the last row is not the end of an episode: neither terminal nor timeout")
        if both := int((terminals & timeouts).sum()):
            wrong.append(f"terminals and timeouts are both true, in {both:,} rows")
        for name in ("observations", "action_masks"):
            if (final := good.get(f"final_{name}")) and final.length != ends.sum():
                wrong.append(f"final_{name} has {final.length:,} rows, but {ends.sum():,} episodes end")
            if {name, f"next_{name}"} <= good.keys():
                broken = breaks(good[f"next_{name}"], good[name], steps)
                if rows := int((broken & ~ends).sum()):
                    wrong.append(f"next_{name} inside an episode are not the next row's {name}, in {rows:,} rows")
                shifted = (timeouts & ~broken)[:-1]
                if name == "observations" and shifted.sum() > 1 and (shifted == timeouts[:-1]).all():
                    doubtful.append(
                        f"next_observations after a time limit are another episode's, in {shifted.sum():,} rows"
                    )
        if "action_masks" in good:
            alive = each_row(lambda mask: mask.sum(axis=2) > 1, steps, good["action_masks"])  # [T, N]
            if back := int((alive[1:] & ~alive[:-1] & ~ends[:-1, None]).any(axis=1).sum()):
                doubtful.append(f"agents with one allowed action count as dead, but act again later, in {back:,} rows")
        if {"observations", "actions"} <= good.keys():
            if copies := repeated(good, ends, discrete):
                what = "in whole episodes" if discrete else "in another episode"
                doubtful.append(f"{copies:,} rows ({copies / steps:.1%}) repeat earlier ones {what}")
            last = previous(good["actions"], np.append(True, ends[:-1]))
            if (
                choices
                and is_battle(metadata.get("env"))
                and not has_last_actions(good["observations"], last, choices, np.ones(steps, bool))
            ):
                wrong.append("observations do not end with the last actions; convert this file to append them")
        lengths = np.diff(np.flatnonzero(ends), prepend=-1)
        if len(lengths):
            size = f"{lengths.min()} to {lengths.max()} steps, mean {lengths.mean():.1f}"
            card["transitions"] = f"{steps:,} in {len(lengths):,} episodes of {size}"
            card["ends"] = f"{terminals.sum():,} terminal, {timeouts.sum():,} by time limit"
        if ends[-1] and rewards is not None and not unlike:
            returns = files.statistics(rewards, ends, agents)
            mean, std, low, high = (returns[f"episode_return_{name}"] for name in ("mean", "std", "min", "max"))
            spread = f"standard deviation {std:.2f}, {low:.2f} to {high:.2f}; of the team {mean * agents:.2f}"
            card["return"] = f"{mean:.2f} per agent and episode, {spread}"
    if "individual_rewards" in good:
        share = each_row(lambda own: (own != own[:, :1]).any(axis=1), steps, good["individual_rewards"]).mean()
        card["own rewards"] = f"different between agents in {share:.1%} of the steps"
    card |= {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    check_metadata(metadata, returns, agents, good["states"].shape[0] if "states" in good else None, report)


def outliers(column: Column, length: int) -> str:
    """Describe values that are 1,000 times as far from the median of their input as 90 % of the others; "" if none are.

    Values within 1e-6 of the median do not count (scripts call them constant), so an input that is mostly zero is
    judged by its other values. If fewer than 10 of them are among some 1,000 rows, it is not judged.
    """
    every = -(-length // 1000)
    sample = np.concatenate([column(a, b)[-a % every :: every].copy() for a, b in pieces(length, column)])
    median, usual = np.median(sample, axis=0), np.full(sample.shape[1:], np.inf)
    for index in np.ndindex(*median.shape):
        distance = np.abs(sample[:, *index] - median[index])
        if (distance > 1e-6).sum() >= 10:
            usual[index] = np.quantile(distance[distance > 1e-6], 0.9, method="lower")
    far, largest = np.zeros(median.shape, int), np.zeros(median.shape)
    for a, b in pieces(length, column):
        ratio = np.abs(column(a, b) - median) / usual
        far, largest = far + (ratio > 1000).sum(axis=0), np.maximum(largest, ratio.max(axis=0))
    largest[far > max(1, length / 100)] = 0  # what is common is no outlier
    worst = np.unravel_index(largest.argmax(), largest.shape) if largest.size else ()
    if not largest.size or largest[worst] <= 1000:
        return ""
    times = f"in input {[int(i) for i in worst]} {largest[worst]:,.0f} times as far from the median as usual"
    return f"{far[largest > 1000].sum():,} outliers, for example {times}"


def repeated(good: dict[str, Rows], ends: np.ndarray, discrete: bool) -> int:
    """How many rows have the observations and actions of a row in an earlier episode.

    Real numbers do not repeat by chance. With discrete actions single rows do (the same start, a dead team), so only
    whole episodes count. Repetition inside one episode (an agent at rest) never counts.
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


def check_metadata(metadata: dict, found: dict | None, agents: int, state_dim: int | None, report: Report) -> None:
    """`found`: the statistics of the file; None where its rewards or ends are wrong."""
    if not metadata:
        report.wrong.append("metadata is missing, or not the text of a JSON object")
        return

    def wrong(key: str, expected: str) -> None:
        value = metadata.get(key)
        shown = repr(value)[:40] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
        report.wrong.append(f"metadata: {key} is {shown}, expected {expected}")

    if metadata.get("schema_version") != "1":
        wrong("schema_version", "'1'")
    if not isinstance(metadata.get("env"), str):
        wrong("env", "the name of the environment")
    if state_dim is None and "state_owner" in metadata:
        wrong("state_owner", "none, as there are no good states")
    elif "state_owner" in metadata:
        owner = metadata["state_owner"]
        known = isinstance(owner, list) and all(type(agent) is int and -1 <= agent < agents for agent in owner)
        if not known or len(owner) != state_dim:
            wrong("state_owner", f"a list of {state_dim} agents from 0 to {agents - 1}, or -1 for none")
    references = ("random_return", "expert_return", "paper_random_return", "paper_expert_return")
    numbers = {key: metadata[key] for key in (*references, *(found or ())) if key in metadata}
    for key, value in list(numbers.items()):
        if type(value) not in (int, float) or not -1e9 < value < 1e9:
            wrong(key, "a number")
            del numbers[key]
        elif found and key in found and not math.isclose(value, found[key], rel_tol=1e-3, abs_tol=1e-3):
            wrong(key, f"{found[key]:g} as in the arrays")
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


def check(path: Path) -> None:
    if not path.is_file():
        fail(f"{path} is not a file")
    report = inspect(path)
    found = [*report.wrong, *(f"doubtful: {finding}" for finding in report.doubtful)]
    unread = [f"not read: {report.card['not read']}"] if "not read" in report.card else []
    for line in [*unread, *(found or ["nothing wrong"])]:
        print(f"{path}: {line}")
    if found:
        sys.exit(2)
