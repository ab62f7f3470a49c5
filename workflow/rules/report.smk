rule report:
    message:
        "Writing the report"
    input:
        evaluations=EVALUATIONS,
        training=TRAINING_RECORDS,
        champions=[LAYOUT.champion(backbone) for backbone in CONFIG.backbones],
    output:
        page=report(LAYOUT.report_page, caption="../report/page.rst", category="Results"),
        table=report(LAYOUT.report / "table.csv", caption="../report/table.rst", category="Results"),
        markdown=LAYOUT.report / "table.md",
        effect=report(
            LAYOUT.report / "memory_effect.svg", caption="../report/memory_effect.rst", category="Results"
        ),
        recovery=report(
            LAYOUT.report / "context_recovery.svg",
            caption="../report/context_recovery.rst",
            category="Results",
        ),
        loss=report(LAYOUT.report / "loss.svg", caption="../report/loss.rst", category="Training"),
        memory=report(LAYOUT.report / "memory.svg", caption="../report/memory.rst", category="Training"),
    log:
        LAYOUT.log("report"),
    params:
        part=part(parts.report(CONFIG)),
    shell:
        "{PYTHON} -m pipelines.report --config {RESOLVED} > {log} 2>&1"
