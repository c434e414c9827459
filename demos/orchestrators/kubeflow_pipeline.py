"""LayerLens as a Kubeflow pipeline (KFP SDK 2): profile → optimize → fine-tune → register.

    python kubeflow_pipeline.py compile pipeline.yaml            # then upload it, or kfp run create
    python kubeflow_pipeline.py local --config C --work FOLDER   # here, with KFP's own local runner

Each step is a container with LayerLens and ``stages.py`` in it (set LAYERLENS_IMAGE); state goes through ``work``.
"""

import os
import sys

from kfp import compiler, dsl, local

IMAGE = os.environ.get("LAYERLENS_IMAGE", "registry.example/layerlens:0.1.0")


@dsl.component(base_image=IMAGE)
def stage(name: str, config: str, work: str, python: str, script: str, after: str = "") -> str:
    """Run one stage; its JSON is the step's output."""
    import subprocess

    command = [python, script, name, "--config", config, "--work", work]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@dsl.pipeline(name="layerlens", description="Measure, choose under budgets with a proved gap, fine-tune, register.")
def layerlens(config: str, work: str, python: str = "python3", script: str = "/app/stages.py") -> str:
    """The four stages in a row."""
    before = stage(name="profile", config=config, work=work, python=python, script=script)
    before.set_display_name("profile")
    for name in ("optimize", "fine-tune", "register"):
        step = stage(name=name, config=config, work=work, python=python, script=script, after=before.output)
        step.set_display_name(name)
        before = step
    return before.output


def main() -> None:
    """Compile, or run here."""
    if sys.argv[1] == "compile":
        compiler.Compiler().compile(layerlens, sys.argv[2])
        return
    options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=options.pop("--root", "./local_outputs"))
    run = layerlens(**{name.removeprefix("--"): value for name, value in options.items()})
    print(run.output)


if __name__ == "__main__":
    main()
