"""The tables of runs that paper/runs.py runs, and the paper's settings as command lines. Data only.

TABLES: name -> (seeds, {row label: command without its seed}). The first row is what the others are compared with.
"""

TABLES: dict[str, tuple[list[int], dict[str, str]]] = {}

# Behaviour cloning, the floor under every table: with a huge beta ICQ weights all actions alike and imitates them.
CLONING = "macca_icq.py --credit uniform --beta 1e6"
# The mixer's ICQ learns from R alone.
MA_ICQ = "paper/ma_icq.py --batch-size 256"

# The paper's Tables 9 and 10, the latter by the dataset's quality. An anchor of 1: all edges cost alike.
PAPER = "--batch-size 1024 --learning-rate 3e-4 --causal-learning-rate 5e-2 --share slots --anchor 1 --h 0.1"
PAPER += " --gamma 0.95 --hidden-dim 64 --no-standardize-rewards --total-iterations 20000 --eval-interval 5000"
PAPER_ALPHA = {"expert": 5, "medium": 0.5, "medium-replay": 1, "random": 1}  # CQL and OMAR
PAPER_TAU = {"expert": 0.9, "medium": 0.7, "medium-replay": 0.7, "random": 0.99}  # OMAR
PAPER_LAMBDAS = {"expert": (7e-3, 7e-3), "medium": (5e-3, 5e-3), "medium-replay": (5e-3, 7e-3), "random": (1e-7, 1e-3)}
TABLES["paper-settings"] = ([1], {})
for quality, (lambda1, lambda2) in PAPER_LAMBDAS.items():
    common = f"--dataset {quality} {PAPER} --lambda1 {lambda1:g} --lambda2 {lambda2:g}"
    alpha, tau = f"--alpha {PAPER_ALPHA[quality]}", f"--tau {PAPER_TAU[quality]}"
    TABLES["paper-settings"][1].update(
        {
            f"MACCA-CQL, {quality}": f"macca_cql.py {common} {alpha}",
            f"MACCA-OMAR, {quality}": f"macca_omar.py {common} {alpha} {tau}",
            f"MACCA-ICQ, {quality}": f"macca_icq.py {common}",
        }
    )

# Does credit pay, and whose? (paper/credit.py) R / N is what MACCA is compared with. "Rolled": each agent is told the
# next agent's share. "Oracle": the Shapley value of the true reward function. "Paid": the recorded individual rewards,
# which in the other two tasks are equal, so R / N. "Its best setting": where R / N did better in pilots with another.
# No pilot used a table's seeds. CQL has its own, as two settings were given up after runs with 21 to 25 and 31 to 35.
# The settings of PP and WORLD were chosen on R / N's pilots.
CREDIT = {"omar": "--alpha 0.2", "cql": "--alpha 0.2", "icq": "--beta 0.01"}
OTHER = {"world-medium-omar": "--alpha 1", "world-medium-cql": "--alpha 1"}
OTHER |= {"world-medium-icq": "--beta 0.1", "pp-medium-icq": "--beta 0.1"}
OWN = {"cn-medium-replay-cql": "--alpha 0.5", "cn-medium-cql": "--alpha 0.05", "cn-medium-replay-icq": "--beta 0.1"}
OWN |= {"world-medium-omar": "--alpha 2", "world-medium-cql": "--alpha 2", "world-medium-icq": "--beta 1"}
for task, name in (("simple_spread", "cn"), ("simple_tag", "pp"), ("simple_world", "world")):
    for quality in ("medium-replay", "medium"):
        where = f"--env mpe/{task} --dataset {quality} --eval-interval 1000"
        for backbone, setting in CREDIT.items():
            train, own = f"macca_{backbone}.py {where}", OWN.get(f"{name}-{quality}-{backbone}")
            setting = OTHER.get(f"{name}-{quality}-{backbone}", setting)
            seeds = [41, 42, 43, 44, 45] if backbone == "cql" else [21, 22, 23, 24, 25]
            TABLES[f"credit-{name}-{quality}-{backbone}"] = (
                seeds,
                {
                    "R / N": f"{train} {setting} --credit uniform",
                    **({"R / N, its best setting": f"{train} {own} --credit uniform"} if own else {}),
                    "MACCA": f"{train} {setting}",
                    **({"MACCA, R / N's best setting": f"{train} {own}"} if own else {}),
                    "MACCA, rolled": f"paper/rolled.py {train} {setting}",
                    "MACCA, slots (Eq. 6)": f"{train} {setting} --share slots",
                    "oracle": f"{train} {setting} --credit oracle",
                    **({"paid": f"{train} {setting} --credit truth"} if name == "cn" else {}),
                    "R": f"{train} {setting} --credit team --no-standardize-rewards",
                    **({"MA-ICQ": f"{MA_ICQ} {where} --beta 0.03"} if backbone == "icq" else {}),
                    **({"behaviour cloning": f"{CLONING} {where}"} if backbone == "icq" else {}),
                },
            )

# The other two qualities, all systems in one table. Expert data want a stronger pull to the data, the defaults.
for task, name in (("simple_spread", "cn"), ("simple_tag", "pp"), ("simple_world", "world")):
    for quality in ("expert", "random"):
        where = f"--dataset {quality}" if name == "cn" else f"--env mpe/{task} --dataset {quality}"
        omar, cql, icq = ("", "", "") if quality == "expert" else (f" {CREDIT[name]}" for name in CREDIT)
        TABLES[f"credit-{name}-{quality}"] = (
            [21, 22, 23, 24, 25] if name == "cn" else [21, 22, 23],
            {
                "R / N, OMAR": f"macca_omar.py {where} --credit uniform{omar}",
                "R / N, CQL": f"macca_cql.py {where} --credit uniform{cql}",
                "R / N, ICQ": f"macca_icq.py {where} --credit uniform{icq}",
                "MACCA-OMAR": f"macca_omar.py {where}{omar}",
                "MACCA-CQL": f"macca_cql.py {where}{cql}",
                "MACCA-ICQ": f"macca_icq.py {where}{icq}",
                "R, OMAR": f"macca_omar.py {where} --credit team --no-standardize-rewards{omar}",
                "R, CQL": f"macca_cql.py {where} --credit team --no-standardize-rewards{cql}",
                "MA-ICQ": f"{MA_ICQ} {where} --beta {1 if quality == 'expert' else 0.03}",
                "behaviour cloning": f"{CLONING} {where}",
                "MACCA-OMAR, rolled": f"paper/rolled.py macca_omar.py {where}{omar}",
                "MACCA-CQL, rolled": f"paper/rolled.py macca_cql.py {where}{cql}",
                "MACCA-ICQ, rolled": f"paper/rolled.py macca_icq.py {where}{icq}",
                "oracle, CQL": f"macca_cql.py {where} --credit oracle{cql}",
            },
        )

# Ablations of MACCA-OMAR on CN (paper/ablations.py), compared with rows of credit-*: Tables 4, 11, 12, 6 and 7 on
# medium-replay, where credit decides (on expert data all of them are as good as cloning), Table 5 on both. The causal
# model of Table 7 has the same number of updates before and beside.
OMAR = {"medium-replay": "macca_omar.py --dataset medium-replay --alpha 0.2", "expert": "macca_omar.py"}
OMAR["noisy"] = "macca_omar.py --env mpe/simple_spread_sparse --dataset noisy"
REPLAY = OMAR["medium-replay"]
ABLATIONS = {
    "ablation-medium-replay": {
        **{f"lambda1 {x:g}": f"{REPLAY} --lambda1 {x:g}" for x in (0, 0.05, 0.5)},
        **{f"lambda2 {x:g}": f"{REPLAY} --lambda2 {x:g}" for x in (0, 0.5, 5)},
        **{f"h {x:g}": f"{REPLAY} --h {x:g}" for x in (0, 0.01, 0.05, 0.5)},
        "full graph": f"{REPLAY} --graph full",
        "fixed graph, learned": f"{REPLAY} --graph fixed",
        "fixed graph, averaged": f"paper/ablation.py averaged {REPLAY}",
        "without clipping": f"paper/ablation.py soft {REPLAY}",
        "first, 2,000 updates": f"{REPLAY} --causal-iterations 2000",
        "beside, 2,000 updates": f"paper/ablation.py beside {REPLAY} --causal-iterations 1",
    },
    **{
        f"ablation-truth-{quality}": {
            "OMAR, paid": f"{OMAR[quality]} --credit truth",
            "MACCA, from what is paid": f"paper/ablation.py truth {OMAR[quality]} --anchor 1",
            **({"OMAR, caused": f"{OMAR[quality]} --credit oracle"} if quality == "expert" else {}),
        }
        for quality in ("expert", "medium-replay")
    },
    "ablation-sparse": {
        "R / N": f"{OMAR['noisy']} --credit uniform",
        "MACCA": OMAR["noisy"],
        "R": f"{OMAR['noisy']} --credit team --no-standardize-rewards",
        "behaviour cloning": f"{CLONING} --env mpe/simple_spread_sparse --dataset noisy",
    },
}
TABLES |= {name: ([21, 22, 23], commands) for name, commands in ABLATIONS.items()}

# Battles on SMAX (paper/table2.py). Nothing was tuned. MACCA has the fixed graph, to be credited faster; what mixes the
# agents' values has the gamma of published code.
for map_name in ("2s3z", "5m_vs_6m", "6h_vs_8z"):
    for quality in ("expert", "medium", "medium-replay"):
        where = f"--env smax/{map_name} --dataset {quality}"
        raw, fixed = "--credit team --no-standardize-rewards", "--graph fixed"
        TABLES[f"smax-{map_name}-{quality}"] = (
            [1, 2, 3],
            {
                "behaviour cloning": f"{CLONING} {where}",
                "CQL, R": f"macca_cql.py {where} {raw}",
                "OMAR, R": f"macca_omar.py {where} {raw}",
                "MA-ICQ, R": f"{MA_ICQ} {where} --gamma 0.99",
                "CQL, R / N": f"macca_cql.py {where} --credit uniform",
                "OMAR, R / N": f"macca_omar.py {where} --credit uniform",
                "ICQ, R / N": f"macca_icq.py {where} --credit uniform",
                "MACCA-CQL": f"macca_cql.py {where} {fixed}",
                "MACCA-OMAR": f"macca_omar.py {where} {fixed}",
                "MACCA-ICQ": f"macca_icq.py {where} {fixed}",
                "SHAQ": f"paper/shaq.py {where}",
                "SQDDPG": f"paper/sqddpg.py {where}",
                "SHAQ-CQL": f"paper/shaq.py {where} --alpha 1",
                "QMIX-CQL": f"paper/qmix_cql.py {where}",
            },
        )
