#!/usr/bin/env bash
# Compiles, validates and really runs the pipelines of demos/orchestrators with the real SDKs, each in its own
# environment (.venv-kubeflow, .venv-airflow, .venv-azureml; they conflict with each other and with nothing of ours).
#
#   scripts/check_orchestrators.sh [kubeflow] [airflow] [azureml]
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

check_result() { # check_result NAME FOLDER
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
  check_result kubeflow "$work/kubeflow"
}

airflow() {
  environment airflow "apache-airflow>=3"
  export AIRFLOW_HOME=$work/airflow-home AIRFLOW__CORE__DAGS_FOLDER=$work/dags AIRFLOW__CORE__LOAD_EXAMPLES=false
  mkdir -p "$work/dags"
  cp demos/orchestrators/airflow_dag.py "$work/dags"
  local bin=$here/.venv-airflow/bin
  PATH=$bin:$PATH "$bin/airflow" db migrate >"$work/airflow-db.log" 2>&1 || { tail -30 "$work/airflow-db.log"; return 1; }
  PATH=$bin:$PATH "$bin/airflow" dags reserialize >>"$work/airflow-db.log" 2>&1
  PATH=$bin:$PATH "$bin/airflow" dags list-import-errors 2>/dev/null | tail -3
  echo "airflow: loaded by airflow $("$bin/airflow" version 2>/dev/null | tail -1)"
  PATH=$bin:$PATH "$bin/airflow" dags test layerlens --conf \
    "{\"config\": \"$here/demos/orchestrators/config.yaml\", \"work\": \"$work/airflow\"}" \
    >"$work/airflow.log" 2>&1 || { tail -60 "$work/airflow.log"; return 1; }
  check_result airflow "$work/airflow" || { tail -60 "$work/airflow.log"; return 1; }
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

[ $# -gt 0 ] || set -- kubeflow airflow azureml
for one in "$@"; do "$one"; done
