"""The paper's Tables 4 to 8, 11 and 12 on particle tasks, from paper/results/ablation-*.csv.

    python paper/ablations.py            # run what these files and those they are compared with lack, then print
    python paper/ablations.py --show     # print what is there

MACCA-OMAR, one thing changed at a time (paper/ablation.py); MACCA, R and R / N are those of credit-*. The paper's
Tables 6, 7 and 12 are win rates on StarCraft's 5m_vs_6m (expert, expert, medium); its Tables 5 and, as their last
numbers say, 4 and 11 are scores on CN's expert data, there after its 200,000 steps.
"""

import tyro
from rows import by_label, mean_interval, mean_std, numbers, paired, print_table
from runs import Printing, run_missing
from tables import ABLATIONS

PAPER = {
    "Table 4: the price of state edges, lambda1": {
        "lambda1 0": "69.0 ± 19.7, density 0.72",
        "MACCA (0.003)": "111.7 ± 4.3, density 0.13 (0.007)",
        "lambda1 0.05": "75.8 ± 34.5, density 0.10",
        "lambda1 0.5": "59.2 ± 35.3, density 0.01",
    },
    "Table 11: the price of action edges, lambda2": {
        "lambda2 0": "107.7 ± 10.2, density 1.0",
        "MACCA (0.003)": "111.7 ± 4.3, density 1.0 (0.007)",
        "lambda2 0.5": "108.4 ± 6.4, density 0.98",
        "lambda2 5": "100.1 ± 7.4, density 0.75",
    },
    "Table 12: the threshold h": {
        "h 0": "0.12 ± 0.02, densities 1.0, 1.0",
        "h 0.01": "0.14 ± 0.03, densities 0.96, 0.72",
        "h 0.05": "0.16 ± 0.02, densities 0.81, 0.66",
        "MACCA (0.1)": "0.20 ± 0.04, densities 0.73, 0.54",
        "h 0.5": "0.17 ± 0.01, densities 0.52, 0.43",
    },
    "Table 6: graphs": {
        "full graph": "0.38 ± 0.02",
        "fixed graph, averaged": "0.50 ± 0.01",
        "fixed graph, learned": "",
        "without clipping": "0.66 ± 0.01",
        "MACCA (dynamic, clipped)": "0.73 ± 0.04",
    },
    "Table 7: when the causal model learns": {
        "first, 2,000 updates": "0.62 ± 0.08",
        "beside, 2,000 updates": "0.73 ± 0.04",
        "MACCA (first, 3,000 updates)": "",
    },
}
COLUMNS = {"state_density": "state density", "action_density": "action density", "team_nmse": "team NMSE"}
COLUMNS |= {"cause_skill": "cause skill"}
UNKNOWN = ("fixed graph, averaged", "without clipping")  # a report's densities are those of the plain masks

if __name__ == "__main__":
    args = tyro.cli(Printing, description=__doc__)
    if not args.show:
        run_missing([*ABLATIONS, "credit-cn-medium-replay-omar", "credit-cn-expert"], args.jobs)
    replay, expert = by_label("credit-cn-medium-replay-omar"), by_label("credit-cn-expert")
    changed, macca = by_label("ablation-medium-replay"), replay.get("MACCA", {})
    for title, rows in PAPER.items():
        print(f"{title} (CN, medium-replay)\n")
        body = []
        for label, printed in rows.items():
            seeds = macca if label.startswith("MACCA") else changed.get(label, {})
            gap = "" if seeds is macca else mean_interval(paired(seeds, macca, "score"))
            cells = ["" if label in UNKNOWN and "density" in x else mean_std(numbers(seeds, x), 2) for x in COLUMNS]
            body.append([label, str(len(seeds)), mean_std(numbers(seeds, "score")), gap, *cells, printed])
        print_table(["", "seeds", "score", "minus MACCA, paired", *COLUMNS.values(), "the paper's"], body)
        print()

    print("Table 5: true rewards (CN)\n")
    truth = [by_label(f"ablation-truth-{quality}") for quality in ("expert", "medium-replay")]
    body = [
        [name, *(mean_std(numbers(seeds, "score")) for seeds in cells), printed]
        for name, printed, *cells in (
            ("OMAR, R", "43.7 ± 46.6", expert.get("R, OMAR", {}), replay.get("R", {})),
            ("OMAR, R / N", "", expert.get("R / N, OMAR", {}), replay.get("R / N", {})),
            ("MACCA-OMAR", "111.7 ± 4.3", expert.get("MACCA-OMAR", {}), macca),
            ("OMAR, what is paid", "114.9 ± 2.4", *(runs.get("OMAR, paid", {}) for runs in truth)),
            ("OMAR, what is caused", "", truth[0].get("OMAR, caused", {}), replay.get("oracle", {})),
            ("MACCA-OMAR, from what is paid", "113.7 ± 2.3", *(x.get("MACCA, from what is paid", {}) for x in truth)),
        )
    ]
    print_table(["", "expert", "medium-replay", "the paper's, expert"], body)

    print("\nTable 8: sparse rewards (CN; all landmarks covered, or nothing; data of an expert with noise 1)\n")
    sparse, body = by_label("ablation-sparse"), []
    for label, printed in {"R": "0.18 ± 0.07", "R / N": "", "MACCA": "0.42 ± 0.13", "behaviour cloning": ""}.items():
        seeds = sparse.get(label, {})
        solved = [3 * x for x in numbers(seeds, "return")]  # a return is the mean over the three agents
        body.append([label, mean_std(solved, 2), mean_std(numbers(seeds, "team_nmse"), 2), printed])
    print_table(["OMAR", "steps, of 25, with all landmarks covered", "team NMSE", "the paper's"], body)
