# What happens when a run begins, and when it ends.


def begin_run():
    with headgram_errors():
        if workflow.local_exec:
            require_device(PLAN.config.device)
        RUN.begin(workflow, beside_outputs, on_gpu=bool(GPUS))


onstart:
    begin_run()


onsuccess:
    RUN.end()


onerror:
    RUN.end()


if not IS_MAIN:
    add_handlers(workflow, begin_run, RUN.end)
