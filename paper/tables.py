"""The tables of runs that paper/runs.py runs, and the paper's settings as command lines. Data only.

TABLES: name -> (seeds, {row label: command without its seed}). The first row is what the others are compared with.
"""

TABLES: dict[str, tuple[list[int], dict[str, str]]] = {}

# Behaviour cloning, the floor under every table: with a huge beta ICQ weights all actions alike and imitates them.
CLONING = "macca_icq.py --credit uniform --beta 1e6"

# The paper's Tables 9 and 10, the latter by the dataset's quality. An anchor of 1: all edges cost alike.
PAPER = "--batch-size 1024 --learning-rate 3e-4 --causal-learning-rate 5e-2 --anchor 1 --h 0.1 --gamma 0.95"
PAPER += " --hidden-dim 64 --no-standardize-rewards --no-layer-norm"
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

# MACCA-ICQ; the other two scripts are in the scale tables below.
TABLES["cn-expert-icq"] = ([1, 2, 3, 4, 5], {"MACCA-ICQ": "macca_icq.py --dataset expert"})

# The backbones alone, with the true individual rewards, where the data leave room above behaviour cloning.
for quality in ("medium", "medium-replay"):
    TABLES[f"cn-{quality}"] = (
        [1, 2, 3],
        {
            "behaviour cloning": f"{CLONING} --dataset {quality}",
            "CQL": f"macca_cql.py --credit truth --alpha 0.2 --dataset {quality}",
            "OMAR": f"macca_omar.py --credit truth --alpha 0.2 --dataset {quality}",
            "ICQ": f"macca_icq.py --credit truth --dataset {quality}",
        },
    )

# The settings that were tried for it, without layer normalisation in the critics and with it. One seed each.
TUNING = {
    "bc": CLONING,
    "icq expectile 0.7 beta 1": "macca_icq.py --credit truth --expectile 0.7 --beta 1 --no-layer-norm",
    "icq expectile 0.7 beta 0.3": "macca_icq.py --credit truth --expectile 0.7 --beta 0.3 --no-layer-norm",
    "icq expectile 0.9 beta 0.3": "macca_icq.py --credit truth --expectile 0.9 --beta 0.3 --no-layer-norm",
    "icq expectile 0.9 beta 0.1": "macca_icq.py --credit truth --expectile 0.9 --beta 0.1 --no-layer-norm",
    "cql alpha 0.2": "macca_cql.py --credit truth --alpha 0.2 --no-layer-norm",
    "cql alpha 1": "macca_cql.py --credit truth --alpha 1 --no-layer-norm",
    "cql alpha 5": "macca_cql.py --credit truth --alpha 5 --no-layer-norm",
    "omar alpha 1 tau 0.9": "macca_omar.py --credit truth --alpha 1 --tau 0.9 --no-layer-norm",
    "omar alpha 5 tau 0.5": "macca_omar.py --credit truth --alpha 5 --tau 0.5 --no-layer-norm",
    "cql alpha 1, layer norm": "macca_cql.py --credit truth --alpha 1",
    "omar alpha 1 tau 0.9, layer norm": "macca_omar.py --credit truth --alpha 1 --tau 0.9",
}
for quality in ("medium-replay", "medium"):
    commands = {label: f"{command} --dataset {quality}" for label, command in TUNING.items()}
    TABLES[f"cn-tuning-{quality}"] = ([1], commands)

# How long the runs of paper/scale_or_credit.py must be: the backbone's learning curves with true rewards. One seed.
pilot = "macca_cql.py --credit truth --total-iterations 6000 --eval-interval 500 --eval-episodes 40"
TABLES["cn-pilot-length"] = (
    [1],
    {
        "medium, alpha 0.2": f"{pilot} --dataset medium --alpha 0.2",
        "medium-replay, alpha 0.2": f"{pilot} --dataset medium-replay --alpha 0.2",
        "random, alpha 0.2": f"{pilot} --dataset random --alpha 0.2",
        "random, alpha 1": f"{pilot} --dataset random --alpha 1",
        "expert, alpha 1": f"{pilot} --dataset expert --alpha 1",
        "expert, alpha 0.2": f"{pilot} --dataset expert --alpha 0.2",
    },
)

# How much of the gain is credit, how much is scale? (paper/scale_or_credit.py) With standardised rewards, `team` and
# `uniform` are the same run; "raw" rewards are not standardised.
for script, quality, alpha in [
    ("macca_cql", "expert", 1),
    ("macca_cql", "medium", 0.2),
    ("macca_cql", "medium-replay", 0.2),
    ("macca_cql", "random", 0.2),
    ("macca_omar", "expert", 1),
]:
    train = f"{script}.py --dataset {quality} --alpha {alpha} --credit"
    TABLES[f"scale-{script[6:]}-{quality}"] = (
        [1, 2, 3] if quality == "random" else [1, 2, 3, 4, 5],
        {
            "behaviour cloning": f"{CLONING} --dataset {quality}",
            "team": f"{train} team",
            "macca": f"{train} macca",
            "truth": f"{train} truth",
            "team, raw": f"{train} team --no-standardize-rewards",
            "uniform, raw": f"{train} uniform --no-standardize-rewards",
            "macca, raw": f"{train} macca --no-standardize-rewards",
        },
    )

# Proposition 4.1 does not say whose a share is: the same data and the same sum under other conventions, and fitted to
# the true rewards. The causal model alone: 3,000 steps of it, and one of the policy.
alone = "macca_icq.py --causal-pretrain-iterations 3000 --total-iterations 1 --final-episodes 1"
TABLES["cn-conventions"] = (
    [1, 2, 3],
    {
        "own things to the owner, the rest evenly": f"{alone} --dataset medium",
        "no convention (anchor 1)": f"{alone} --dataset medium --anchor 1",
        "no graph": f"{alone} --dataset medium --graph full",
        "fitted to the true rewards": f"{alone} --dataset medium --causal-target truth",
        "fitted to the true rewards, no graph": f"{alone} --dataset medium --causal-target truth --graph full",
    },
)

# Does credit pay if all that an agent observes is its own (--own-share 0), at the published learning rate? The control
# is the shares rolled by one agent: as large and as noisy, but somebody else's. Seeds that no pilot used.
for quality in ("medium-replay", "medium"):
    where = f"--dataset {quality} --learning-rate 1e-2 --total-iterations 2000 --eval-interval 1000"
    for name, more in (("omar", " --alpha 0.2"), ("icq", ""), ("cql", " --alpha 0.2")):
        train = f"macca_{name}.py {where}{more}"
        TABLES[f"credit-{name}-{quality}"] = (
            [11, 12, 13, 14, 15],
            {
                "R / N": f"{train} --credit uniform",
                "MACCA, what it observes is its own": f"{train} --own-share 0",
                "the same, rolled": f"paper/rolled.py {train} --own-share 0",
                "MACCA, default": train,
                "true rewards": f"{train} --credit truth",
                **({"behaviour cloning": f"{CLONING} {where}"} if name == "icq" else {}),
            },
        )

# How long the runs of the paper's Table 1 must be, and alpha: learning curves on Predator-Prey and WORLD. One seed.
pilot = "macca_omar.py --credit uniform --total-iterations 4000 --eval-interval 500 --eval-episodes 40"
TABLES["pilot-simple_tag"] = (
    [1],
    {
        "expert, alpha 1": f"{pilot} --env mpe/simple_tag --dataset expert --alpha 1",
        "medium, alpha 1": f"{pilot} --env mpe/simple_tag --dataset medium --alpha 1",
        "medium, alpha 0.2": f"{pilot} --env mpe/simple_tag --dataset medium --alpha 0.2",
    },
)
TABLES["pilot-simple_world"] = ([1], {"expert, alpha 1": f"{pilot} --env mpe/simple_world --dataset expert --alpha 1"})

# The paper's Table 1 (paper/table1.py), and the tasks in which a predator is rewarded for what it does itself (its
# --local). OMAR with `team` gets the rewards as they are, as the paper's does; the others are standardised.
LENGTH = 1_500
for task in ("simple_spread", "simple_tag", "simple_world", "simple_tag_local", "simple_world_local"):
    for quality in ("expert",) if task.endswith("local") else ("expert", "medium", "medium-replay", "random"):
        where = f"--env mpe/{task} --dataset {quality} --total-iterations {LENGTH} --eval-interval 500"
        train = f"macca_omar.py {where} --credit"
        local = {
            "OMAR, truth": f"{train} truth",
            "MACCA-OMAR, causal model first": f"{train} macca --own-share 0 --causal-pretrain-iterations 5000",
        }
        TABLES[f"table1-{task}-{quality}"] = (
            [1, 2, 3],
            {
                "BC": f"{CLONING} {where}",
                "OMAR, team": f"{train} team --no-standardize-rewards",
                "OMAR, uniform": f"{train} uniform",
                "MACCA-OMAR": f"{train} macca" + (" --own-share 0" if task.endswith("local") else ""),
                **(local if task.endswith("local") else {}),
            },
        )

# Is it credit? MACCA-OMAR's shares, each given to another agent, where MACCA gained most in Table 1.
where = f"--env mpe/simple_world --dataset medium-replay --total-iterations {LENGTH} --eval-interval 500"
TABLES["rolled"] = ([1, 2, 3], {"the next agent's share": f"paper/rolled.py macca_omar.py {where}"})

# Battles on SMAX (paper/table2.py): first how long the runs must be, one seed.
TABLES["pilot-smax"] = (
    [1],
    {
        f"{label}, 2s3z {quality}": f"{script} --env smax/2s3z --dataset {quality}"
        " --total-iterations 2000 --eval-interval 250 --eval-episodes 64"
        for quality in ("medium", "expert")
        for label, script in (("BC", CLONING), ("OMAR", "macca_omar.py --credit uniform"))
    },
)
# Then alpha and beta, where the defaults stayed below cloning, on a seed that the tables do not use.
where = "--env smax/5m_vs_6m --dataset expert --total-iterations 1000 --eval-interval 1000"
TABLES["pilot-smax-settings"] = (
    [4],
    {
        "ICQ, beta 0.3": f"macca_icq.py {where} --credit uniform",
        "ICQ, beta 1": f"macca_icq.py {where} --credit uniform --beta 1",
        "ICQ, beta 3": f"macca_icq.py {where} --credit uniform --beta 3",
        "OMAR, alpha 1": f"macca_omar.py {where} --credit uniform",
        "OMAR, alpha 5": f"macca_omar.py {where} --credit uniform --alpha 5",
    },
)
for map_name in ("2s3z", "5m_vs_6m", "6h_vs_8z"):
    for quality in ("expert", "medium"):
        where = f"--env smax/{map_name} --dataset {quality} --total-iterations 1000 --eval-interval 500"
        more = " --alpha 5" if quality == "expert" else ""  # the paper's for expert data
        TABLES[f"smax-{map_name}-{quality}"] = (
            [1, 2, 3],
            {
                "BC": f"{CLONING} {where}",
                "MACCA-CQL": f"macca_cql.py {where}{more}",
                "MACCA-OMAR": f"macca_omar.py {where}{more}",
                "MACCA-ICQ": f"macca_icq.py {where}",
                "ICQ, team": f"macca_icq.py {where} --credit team --no-standardize-rewards",
                "ICQ, uniform": f"macca_icq.py {where} --credit uniform",
            },
        )
