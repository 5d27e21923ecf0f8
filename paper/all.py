"""Everything of the paper: record the datasets that are missing, run the tables that are not whole, fill in the pages.

    python paper/all.py               # weeks of two cores; stop it any time, it goes on where it was
    python paper/all.py --seeds 1     # the first seed of every row
    python paper/all.py --pages       # run nothing, put the tables of today's CSV files into both README.md

A page says before each table by which command it is printed: `<!-- python paper/table1.py --show -->`. What stands
between that line and `<!-- end -->` is replaced by what the command prints, so no number of a table is typed.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import tyro
from rows import ROOT, fail
from runs import dataset, run_missing
from tables import TABLES

PAGES = (ROOT / "README.md", ROOT / "paper" / "README.md")
BLOCK = re.compile(r"(<!-- python (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass
class Args:
    pages: bool = False
    """run nothing, write the tables into README.md and paper/README.md"""
    seeds: int = 1_000
    """run the first so many of each table's seeds"""
    jobs: int = 2
    """runs side by side, each on one thread"""
    engine: Literal["local", "ray"] = "local"
    """processes of this machine, or tasks of Ray"""
    address: str = ""
    """with --engine ray: the cluster to join (HOST:PORT or auto), else one is started on this machine"""


def recording(path: str) -> str:
    """The command that records a dataset, data/datasets/ENV/QUALITY.npz."""
    env, quality = path.removeprefix("data/datasets/").removesuffix(".npz").rsplit("/", 1)
    if env.startswith("smax/"):
        return f"data/collect_smax.py --env {env} --quality {quality}"
    if quality == "noisy":  # of the sparse task: an expert's, with noise so large that it seldom succeeds
        return f"data/collect_mpe.py --env {env} --quality expert --noise 1 --transitions 100000 --output {path}"
    size = {"expert": " --transitions 80000", "medium-replay": ""}.get(quality, " --transitions 300000")
    return f"data/collect_mpe.py --env {env} --quality {quality}{size}"


def filled(text: str) -> str:
    """A page in which every block holds what its command prints."""

    def block(match: re.Match) -> str:
        done = subprocess.run([sys.executable, *match[2].split()], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            fail(f"python {match[2]} ended with status {done.returncode}: {done.stderr.strip()}")
        return f"{match[1]}\n{done.stdout.strip()}\n\n{match[4]}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    missing: list[str] = []
    if not args.pages:
        paths = {name: {dataset(command) for command in commands.values()} for name, (_, commands) in TABLES.items()}
        for path in sorted(set().union(*paths.values())):
            name = str(path.relative_to(ROOT))
            if not path.is_file():
                subprocess.run([sys.executable, *recording(name).split()], cwd=ROOT)
            missing += [name] * (not path.is_file())
        tables = [name for name, needed in paths.items() if all(path.is_file() for path in needed)]
        run_missing(tables, args.jobs, engine=args.engine, address=args.address, first=args.seeds)
    for page in PAGES:
        beside = page.with_suffix(".tmp")  # replaced as a whole, so that it is never half written
        beside.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        beside.replace(page)
        print(page)
    if missing:
        fail(f"tables that need {', '.join(missing)} were left out; these could not be recorded (SMAX needs jaxmarl)")
