"""The paper's Tables 4 to 8, 11 and 12 on particle tasks, from paper/results/ablation-*.csv.

    python paper/ablations.py            # run what these files lack (an hour of two cores), then print
    python paper/ablations.py --show     # print what is there

MACCA-OMAR, one thing changed at a time (paper/ablation.py). The paper's Tables 6, 7 and 12 are win rates on StarCraft's
5m_vs_6m, its Tables 4, 5 and 11 scores on CN's expert data, Table 8 a return.
"""

import statistics

import tyro
from rows import by_label, mean_interval, mean_std, numbers, paired, print_table
from runs import Printing, run_missing
from tables import ABLATIONS

PAPER = {  # as printed; scores of Tables 4 and 11 after its 200,000 steps
    "Table 4: the price of state edges": {
        "lambda1 0": "69.0 ± 19.7",
        "MACCA": "111.7 ± 4.3 (0.007)",
        "lambda1 0.05": "75.8 ± 34.5",
        "lambda1 0.5": "59.2 ± 35.3",
    },
    "Table 11: the price of action edges": {
        "lambda2 0": "107.7 ± 10.2",
        "MACCA": "111.7 ± 4.3 (0.007)",
        "lambda2 0.5": "108.4 ± 6.4",
        "lambda2 5": "100.1 ± 7.4",
    },
    "Table 12: the threshold": {
        "h 0": "0.12 ± 0.02",
        "h 0.01": "0.14 ± 0.03",
        "h 0.05": "0.16 ± 0.02",
        "MACCA": "0.20 ± 0.04 (0.1)",
        "h 0.5": "0.17 ± 0.01",
    },
    "Table 6: graphs": {
        "full graph": "0.38 ± 0.02",
        "fixed graph, averaged": "0.50 ± 0.01",
        "fixed graph, learned": "",
        "without clipping": "0.66 ± 0.01",
        "MACCA": "0.73 ± 0.04",
    },
    "Table 7: when the causal model learns": {
        "first, 2,000 updates": "0.62 ± 0.08",
        "beside, 2,000 updates": "0.73 ± 0.04",
        "MACCA": "",
    },
}
COLUMNS = {"state_density": "state density", "action_density": "action density", "team_nmse": "team NMSE"}
COLUMNS |= {"cause_skill": "cause skill"}

if __name__ == "__main__":
    args = tyro.cli(Printing, description=__doc__)
    if not args.show:
        run_missing([*ABLATIONS], args.jobs)
    replay = by_label("credit-cn-medium-replay-omar")
    runs = by_label("ablation-medium-replay") | {"MACCA": replay.get("MACCA", {})}
    for title, paper in PAPER.items():
        print(f"{title} (CN, medium-replay)\n")
        body = []
        for label, printed in paper.items():
            seeds = runs.get(label, {})
            gap = "" if label == "MACCA" else mean_interval(paired(seeds, runs.get("MACCA", {}), "score"))
            cells = [mean_std(numbers(seeds, column), 2) for column in COLUMNS]
            body.append([label, mean_std(numbers(seeds, "score")), gap, *cells, printed])
        print_table(["", "score", "minus MACCA", *COLUMNS.values(), "the paper's"], body)
        print()

    print("Table 5: true rewards (CN)\n")
    expert = by_label("credit-cn-expert")
    truth = [by_label(f"ablation-truth-{quality}") for quality in ("expert", "medium-replay")]
    body = [
        [name, *(mean_std(numbers(seeds, "score")) for seeds in cells), printed]
        for name, printed, *cells in (
            ("OMAR, R", "43.7 ± 46.6", expert.get("R, OMAR", {}), replay.get("R", {})),
            ("OMAR, R / N", "", expert.get("R / N, OMAR", {}), replay.get("R / N", {})),
            ("MACCA-OMAR", "111.7 ± 4.3", expert.get("MACCA-OMAR", {}), replay.get("MACCA", {})),
            ("OMAR, what is paid", "114.9 ± 2.4", *(runs.get("OMAR, paid", {}) for runs in truth)),
            ("OMAR, what is caused", "", truth[0].get("OMAR, caused", {}), replay.get("oracle", {})),
            (
                "MACCA-OMAR, from what is paid",
                "113.7 ± 2.3",
                *(runs.get("MACCA, from what is paid", {}) for runs in truth),
            ),
        )
    ]
    print_table(["", "expert", "medium-replay", "the paper's, expert"], body)

    print("\nTable 8: sparse rewards (CN, all three landmarks covered or nothing; an expert with noise 1)\n")
    runs, body = by_label("ablation-sparse"), []
    paper = {"R": "0.18 ± 0.07 (OMAR)", "MACCA": "0.42 ± 0.13"}
    for label in ABLATIONS["ablation-sparse"]:
        seeds = runs.get(label, {})
        team = [3 * x for x in numbers(seeds, "return")]  # a return is the mean over the three agents
        skill = numbers(seeds, "team_nmse")
        cells = [mean_std(team, 2), f"{statistics.mean(skill):.2f}" if skill else ""]
        body.append([label, *cells, paper.get(label, "")])
    print_table(["OMAR", "team return (steps of 25)", "team NMSE", "the paper's"], body)
