rule register:
    message:
        "Registering {wildcards.strategy} on {wildcards.backbone}, seed {wildcards.seed}"
    input:
        weights=LAYOUT.adapter_weights("{backbone}", "{strategy}", "{seed}"),
        record=LAYOUT.training_record("{backbone}", "{strategy}", "{seed}"),
        evaluations=[
            LAYOUT.evaluation("{backbone}", "{strategy}", "{seed}", benchmark)
            for benchmark in CONFIG.benchmarks
        ],
    output:
        LAYOUT.registration("{backbone}", "{strategy}", "{seed}"),
    log:
        LAYOUT.log("register", "{backbone}", "{strategy}", "seed{seed}"),
    params:
        part=part(parts.register(CONFIG)),
    shell:
        "{PYTHON} -m pipelines.register cell --config {RESOLVED} --backbone {wildcards.backbone}"
        " --strategy {wildcards.strategy} --seed {wildcards.seed} > {log} 2>&1"


rule champion:
    message:
        "Choosing the best adapter of {wildcards.backbone}"
    input:
        lambda wildcards: [LAYOUT.registration(*cell) for cell in parts.cells(CONFIG, wildcards.backbone)],
    output:
        LAYOUT.champion("{backbone}"),
    log:
        LAYOUT.log("register", "{backbone}", "champion"),
    params:
        part=part(parts.register(CONFIG)),
    shell:
        "{PYTHON} -m pipelines.register champion --config {RESOLVED} --backbone {wildcards.backbone} > {log} 2>&1"
