rule replies:
    message:
        "Asking {wildcards.backbone} for its own replies: {wildcards.source}"
    input:
        backbone=LAYOUT.backbone_record("{backbone}"),
        asked=lambda wildcards: [asked.file for asked in CONFIG.data.replies[wildcards.source].asked],
    output:
        LAYOUT.replies_record("{backbone}", "{source}"),
    log:
        LAYOUT.log("replies", "{backbone}", "{source}"),
    params:
        part=lambda wildcards: part(parts.replies(CONFIG, wildcards.source)),
    resources:
        gpu_thousandths=EVALUATION_SHARES,
        gpu=EVALUATION_WHOLE_GPUS,
    shell:
        "exec {PYTHON} -m pipelines.run.{EVALUATION_PLACE}"
        " {PYTHON} -m pipelines.replies --config {RESOLVED} --backbone {wildcards.backbone}"
        " --source {wildcards.source} > {log} 2>&1"
