rule backbone:
    message:
        "Fetching backbone {wildcards.backbone}"
    output:
        LAYOUT.backbone_record("{backbone}"),
    log:
        LAYOUT.log("backbone", "{backbone}"),
    params:
        part=lambda wildcards: part(parts.backbone(CONFIG, wildcards.backbone)),
    shell:
        "{PYTHON} -m pipelines.backbone --config {RESOLVED} --backbone {wildcards.backbone} > {log} 2>&1"
