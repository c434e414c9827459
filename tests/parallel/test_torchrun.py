"""torchrun itself: a worker that is killed in the middle, and what `--max-restarts` makes of it."""

from __future__ import annotations

import collections
import json
import os
import shutil
from pathlib import Path

import pytest

from layerlens.config import RunConfig
from layerlens.pipeline import run_config

CONFIG = {
    "model": {"factory": "own_job:build", "task": "custom", "loss": "own_job:loss"},
    "data": {"source": "own_job:points", "calibration_samples": 32, "batch_size": 4},
    "optimization": {
        "max_trainable_params": 100,
        "lora_ranks": [1, 2],
        "methods": ["lora"],
        "check_predictions": False,  # it times steps with the loss, whose calls are counted here
    },
    "runtime": {"threads": 1, "cache_dir": "cache", "saving_time_share": 1},
}


def test_a_killed_worker_is_restarted_and_measures_no_finished_batch_again(tmp_path, monkeypatch, warm_python):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(Path(__file__).parent / "own_job.py", tmp_path / folder)
    (tmp_path / "two/config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")  # JSON is YAML
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment["PYTHON_EXEC"] = str(warm_python.program("python"))  # what torchrun starts
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    done = warm_python.run(
        *torchrun, "-m", "layerlens", "run", "config.yaml", "--json", cwd=tmp_path / "two", env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # by process 0 alone
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [
        "error: terminated by torchrun; its report names the process that failed; no result was written; run it again, "
        "and finished statistics come from the cache"
    ]
    begun = [collections.Counter((tmp_path / f"two/measured-{rank}.txt").read_text().split()) for rank in range(2)]
    assert [sum(counts.values()) for counts in begun] == [4 + 1, 4 + 1]  # only the batch that was being measured
    assert sorted(counts.most_common(1)[0][1] for counts in begun) == [2, 2]
    monkeypatch.chdir(tmp_path / "one")
    alone = run_config(RunConfig.model_validate(CONFIG), base_dir=tmp_path / "one")
    assert result["score"] == pytest.approx(alone.manifest.score, rel=1e-6)  # float32 sums in another order
