# The checkpoints lie outside the declared outputs, which Snakemake deletes when a job is interrupted: the next
# run goes on from the last one.
def training(wildcards):
    return CONFIG.cell(wildcards.backbone, wildcards.strategy, int(wildcards.seed)).train


def initial_adapter(wildcards):
    """The weights that training starts from, where they lie here or are made here."""
    address = training(wildcards).init_adapter
    if address is None or address.startswith("models:/"):
        return []
    weights = Path(address) / "adapter_model.safetensors"
    return [weights] if weights.is_file() or weights.is_relative_to(LAYOUT.root) else []


def local_workers(wildcards):
    """Workers on this machine: a cluster counts its own."""
    return 0 if training(wildcards).ray_address else training(wildcards).num_workers


def local_gpus(wildcards):
    train = training(wildcards)
    return gpu_shares(train.gpus_per_worker, local_workers(wildcards)) if train.use_gpu else 0


def whole_gpus(wildcards):
    """What another scheduler is asked for; it doesn't know shares."""
    train = training(wildcards)
    return math.ceil(local_workers(wildcards) * train.gpus_per_worker) if train.use_gpu else 0


rule train:
    message:
        "Training {wildcards.strategy} on {wildcards.backbone}, seed {wildcards.seed}; follow it in {log}"
    input:
        backbone=LAYOUT.backbone_record("{backbone}"),
        episodes=LAYOUT.data_manifest("{backbone}", "train"),
        start=initial_adapter,
    output:
        weights=LAYOUT.adapter_weights("{backbone}", "{strategy}", "{seed}"),
        record=LAYOUT.training_record("{backbone}", "{strategy}", "{seed}"),
    log:
        LAYOUT.log("train", "{backbone}", "{strategy}", "seed{seed}"),
    params:
        part=lambda wildcards: part(
            parts.train(CONFIG, wildcards.backbone, wildcards.strategy, int(wildcards.seed))
        ),
    threads: lambda wildcards: max(1, local_workers(wildcards) * training(wildcards).cpus_per_worker)
    resources:
        gpu_thousandths=local_gpus,
        gpu=whole_gpus,
    shell:
        # in the shell's place, so that the job is Snakemake's own child and ends with it
        "exec {PYTHON} -m pipelines.run.gpu_slots {resources.gpu_thousandths}"
        " {PYTHON} -m pipelines.train --config {RESOLVED} --backbone {wildcards.backbone}"
        " --strategy {wildcards.strategy} --seed {wildcards.seed} > {log} 2>&1"
