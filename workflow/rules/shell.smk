# The page without models: its library, pictures, styles and script. Nothing waits for it but the report.
rule shell:
    input:
        unpack(shell_input),
    output:
        shell=PATHS.report("shell.txt"),
        record=RECORDS["shell"],
    log:
        PATHS.log("shell"),
    priority: -1
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        **job("shell"),
    message:
        "Making the page without models"
    script:
        JOB
