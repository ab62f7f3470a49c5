rule preprocess:
    message:
        "Making training and evaluation episodes for {wildcards.backbone}"
    input:
        backbone=LAYOUT.backbone_record("{backbone}"),
        papers=CONFIG.data.files,
        replies=[LAYOUT.replies_record("{backbone}", source) for source in CONFIG.data.replies],
    output:
        LAYOUT.data_manifest("{backbone}", "train"),
        LAYOUT.data_manifest("{backbone}", "eval"),
    log:
        LAYOUT.log("preprocess", "{backbone}"),
    params:
        part=part(parts.preprocess(CONFIG)),
    threads: CONFIG.data.processes
    shell:
        "{PYTHON} -m pipelines.preprocess --config {RESOLVED} --backbone {wildcards.backbone} > {log} 2>&1"
