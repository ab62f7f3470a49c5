from pipelines.config.benchmarks import OF_EPISODES


# The frozen backbone is evaluated as strategy "frozen", seed 0; like baselines without training it has no adapter.
def evaluated_adapter(wildcards):
    if not parts.needs_adapter(CONFIG, wildcards.strategy):
        return []
    return LAYOUT.adapter_weights(wildcards.backbone, wildcards.strategy, wildcards.seed)


def evaluation_episodes(wildcards):
    """Some benchmarks ask what the data section holds for evaluation; the others have their own files."""
    if CONFIG.benchmarks[wildcards.benchmark].kind not in OF_EPISODES:
        return []
    return LAYOUT.data_manifest(wildcards.backbone, "eval")


rule evaluate:
    message:
        "Evaluating {wildcards.strategy} on {wildcards.backbone}, seed {wildcards.seed}: {wildcards.benchmark}"
    input:
        adapter=evaluated_adapter,
        backbone=LAYOUT.backbone_record("{backbone}"),
        episodes=evaluation_episodes,
    output:
        result=LAYOUT.evaluation("{backbone}", "{strategy}", "{seed}", "{benchmark}"),
        records=LAYOUT.records("{backbone}", "{strategy}", "{seed}", "{benchmark}"),
    log:
        LAYOUT.log("evaluate", "{backbone}", "{strategy}", "seed{seed}", "{benchmark}"),
    params:
        part=lambda wildcards: part(parts.evaluate(CONFIG, wildcards.strategy, wildcards.benchmark)),
    resources:
        gpu_thousandths=EVALUATION_SHARES,
        gpu=EVALUATION_WHOLE_GPUS,
    shell:
        # in the shell's place, so that the job is Snakemake's own child and ends with it
        "exec {PYTHON} -m pipelines.run.{EVALUATION_PLACE}"
        " {PYTHON} -m pipelines.evaluate --config {RESOLVED} --backbone {wildcards.backbone}"
        " --strategy {wildcards.strategy} --seed {wildcards.seed} --benchmark {wildcards.benchmark} > {log} 2>&1"
