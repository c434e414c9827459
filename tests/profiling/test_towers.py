"""Vision-language models on chats about images: every tower is measured, against plain autograd sample by sample."""

from __future__ import annotations

import sys
from pathlib import Path

import brute_force
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from image_text_support import save_llava, write_rows

from layerlens.config import DataConfig
from layerlens.data import load_dataset
from layerlens.integrations.layers import model_spec
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, make_batches


def test_statistics_of_both_towers_equal_one_backward_pass_for_each_sample(tmp_path: Path):
    llava = load_pretrained(str(save_llava(tmp_path / "model")), "causal-lm", [])
    config = DataConfig(source=str(write_rows(tmp_path / "rows", 6)))
    dataset = load_dataset(config, None, "causal-lm").select(range(4))
    batches = make_batches(TASKS["image-text"], llava, dataset, config, batch_size=4)
    spec = model_spec(llava, "tiny", inputs=batches[0].inputs)
    loss = TASKS["image-text"].loss
    found = brute_force.profile(llava.model, spec, batches, loss, everything=False)
    towers = {layer.layer.split(".")[1] for layer in found.layers}
    assert towers == {"vision_tower", "language_model"}
    assert all("vision_tower.encoder.layers.1" in name for name in found.unmeasured)
    each = [brute_force.sample_gradients(llava.model, batch, loss) for batch in batches]
    gradients = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    brute_force.assert_equal(found, gradients, 1e-4)
