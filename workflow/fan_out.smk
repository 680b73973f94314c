"""On a cluster: jobs that train, side by side, what notebooks 02 and 03 would make one after another.

Each part makes the files that its notebook would make, under the same names; the notebook then finds them and gathers.
Included by the Snakefile with ``--config fan_out=true``.
"""

P02, P03 = PARAMETERS["02_train_dictionaries"], PARAMETERS["03_baselines"]
GROUPS = ["tied", "rivals", "sizes", *(["seeds"] if len(P02["seeds"]) > 1 else [])]
PARTS = {
    "02_train_dictionaries": [f"{P02['main_hook']}-{group}" for group in GROUPS]
    + [f"{hook}-{group}" for hook in P02["other_hooks"] for group in ("tied", "sizes")]
    + [f"{P02['mlp_hook']}-mlp_{kind}" for kind in ("tied", "untied")],
    "03_baselines": [f"{hook}-ica" for hook in (P03["main_hook"], *P03["other_hooks"])],
}

for stem in PARTS:

    rule:
        name:
            f"{stem}_part"
        input:
            f"{PROFILE}/metrics/01_collect_activations.json",
        output:
            f"{PROFILE}/parts/{stem}/{{hook}}-{{group}}.json",
        params:
            parameters=PARAMETERS[stem],
            source=source_hash(stem),
        threads: THREADS
        script:
            "run_part.py"
