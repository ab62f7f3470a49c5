# The whole reproduction: episodes, adapters for every backbone × strategy × seed, evaluations, registered models
# and a report.
#
#   snakemake                                          the quickstart, on this machine's cores
#   snakemake --configfile configs/single_gpu.yaml     another configuration
#   snakemake --configfile A.yaml B.yaml               a configuration with another laid over it
#   snakemake --resources gpus=4                       on no more than four GPUs, whatever share of one a job takes
#   snakemake -n --configfile configs/paper.yaml       what would be done
#   snakemake --forcerun evaluate                      one stage again, and what hangs on it
from snakemake.utils import min_version

min_version("9.0")

# Snakemake would lay a configuration from the command line over this one, key by key; it has to replace it.
if not workflow.overwrite_configfiles:
    configfile: "configs/quickstart.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/backbone.smk"
include: "workflow/rules/replies.smk"
include: "workflow/rules/preprocess.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/register.smk"
include: "workflow/rules/report.smk"


# Every result by name, for a report may already be there that a failed run wrote of what it had finished.
rule all:
    default_target: True
    input:
        LAYOUT.report_page,
        EVALUATIONS,
        TRAINING_RECORDS,
        REGISTRATIONS,


onstart:
    write_resolved_config()


onsuccess:
    print(explain_success())


onerror:
    print(explain_failure())
