"""The whole pipeline on real models: what it finds, says, times and writes, and what it does with bad images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys.detector import HELD_OUT_SEED
from toys.language_model import share_of_right_findings
from toys.plates import draw_plates
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config.vision_language import PipelineConfig
from layerlens.exceptions import ConfigurationError, DataError, ManifestError, ModelNotFoundError
from layerlens.integrations.ultralytics import load_detector
from layerlens.jobs.vision_language import run_vision_language
from layerlens.sources import load_pretrained
from layerlens.vision_language.local_model import LocalModel
from layerlens.vision_language.prompt import build_messages, check_report


@pytest.fixture
def config(detector_weights: Path, language_model_dir: Path) -> Callable[..., PipelineConfig]:
    """Makes the configuration of a job on these images with the session's models, and with further settings."""
    models = {"detector": str(detector_weights), "llm": str(language_model_dir), "threads": 1}

    def make(*images: Path, **settings: Any) -> PipelineConfig:
        return PipelineConfig(**{"images": tuple(map(str, images)), **models, **settings})

    return make


def test_reports_timings_and_files(config, plates: Path, tmp_path: Path):
    result = run_vision_language(config(plates, repeats=3, batch_size=2), tmp_path)
    assert result.failed == []
    (variant,) = result.summary["variants"]
    steady, warmup = variant["steady"], variant["warmup"]
    assert (steady["passes"], warmup["passes"]) == (12, 2)  # 4 images three times; one batch of 2 before
    # What lies between the steps is a few Python statements. Medians, since a busy machine may pause there for once.
    assert 0 <= steady["unattributed_ms"]["p50"] < 0.01 * steady["total_ms"]["p50"]
    for item in result.items:
        for outcome in item.outcomes["base"]:
            run = outcome.run
            assert sum(run.steps_ms.values()) + run.unattributed_ms == pytest.approx(run.total_ms, rel=1e-9)
            assert run.time_to_first_token_ms is not None
            assert len(run.token_ms) == outcome.usage["completion_tokens"] - 1
            assert sum(run.token_ms) == pytest.approx(run.steps_ms["llm_decode"], rel=1e-9)
    # The shares of a batch add up to its wall time.
    first, second = (item.outcomes["base"][-1].run for item in result.items[:2])
    assert first.batch_ms == second.batch_ms == pytest.approx(first.total_ms + second.total_ms, rel=1e-9)
    assert set(steady["steps_ms"]) == {
        "load", "preprocess", "detect", "nms", "prompt", "llm_encode", "llm_first_token", "llm_decode", "llm_finish",
        "check",
    }  # fmt: skip
    assert {"mean", "p50", "p95"} <= steady["per_token_ms"].keys()
    environment = result.summary["environment"]
    assert environment["threads"] == 1
    assert environment["device"].startswith("cpu (")

    written = json.loads((tmp_path / "results" / "plate0.json").read_text(encoding="utf-8"))
    assert written["report"].split()[1].lower() in ("nodule", "fracture", "device")
    assert (variant["reports_checked"], variant["reports_wrong"]) == (4, 0)
    assert written["detections"][0]["confidence"] >= 0.25
    assert len(written["variants"]["base"]["passes"]) == 4
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result.summary))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 4
    assert "4 of 4 reports agree with the boxes" in page
    assert "<mark>" not in page
    assert "non-maximum suppression</text>" in page.replace("\n", "")  # the chart's legend
    assert "http://" not in page.replace("http://www.w3.org", "")
    with Image.open(tmp_path / "annotated" / "plate0.png") as picture:
        assert picture.size == (512, 512)


def test_bad_images_are_marked_and_the_others_go_on(config, plates: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    good = sorted(plates.iterdir())[0].read_bytes()
    (tmp_path / "in" / "good.png").write_bytes(good)
    (tmp_path / "in" / "cut.png").write_bytes(good[: len(good) // 2])
    Image.new("L", (128, 128), 60).save(tmp_path / "in" / "nothing.png")
    Image.new("L", (2000, 1000)).save(tmp_path / "in" / "large.png")
    (tmp_path / "in" / "words.png").write_text("hello")
    (tmp_path / "in2").mkdir()
    (tmp_path / "in2" / "good.jpg").write_bytes(good)
    warnings: list[str] = []
    wanted = config(tmp_path / "in", tmp_path / "in2", max_megapixels=1.5, batch_size=4)
    result = run_vision_language(wanted, tmp_path / "out", warn=warnings.append)
    latest = {item.path.name: item.latest("base") for item in result.items}
    assert {name: outcome.status for name, outcome in latest.items()} == {
        "good.png": "done", "cut.png": "failed", "nothing.png": "done", "large.png": "failed", "words.png": "failed",
        "good.jpg": "done",
    }  # fmt: skip
    assert latest["nothing.png"].report == "No findings were detected (confidence 0.25 and above)."
    assert latest["nothing.png"].report_source == "no detections"
    assert latest["nothing.png"].usage is None
    assert sorted(warnings)[0].startswith("cut.png: failed (load): is damaged or truncated")
    assert [failure["step"] for failure in result.summary["failures"]] == ["load"] * 3
    names = {path.name for path in (tmp_path / "out" / "results").iterdir()}
    assert names == {"good.json", "good-2.json", "cut.json", "nothing.json", "large.json", "words.json"}


def test_a_folder_as_people_have_it_gives_the_same_boxes_in_every_format(config, plates: Path, tmp_path: Path):
    """16 bits, CMYK, transparency, palettes, a turned photograph: one plate. What cannot be read is named."""
    folder = tmp_path / "in"
    folder.mkdir()
    with Image.open(sorted(plates.iterdir())[0]) as opened:
        plate = opened.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    plate.save(folder / "a_grey.png")
    plate.convert("RGB").save(folder / "b_rgb.webp", lossless=True)
    plate.convert("RGB").convert("CMYK").save(folder / "c_cmyk.jpg", quality=95)
    plate.convert("RGBA").save(folder / "d_rgba.png")
    Image.fromarray(np.asarray(plate).astype(np.uint16) * 257).save(folder / "e_16bit.png")
    plate.convert("P").save(folder / "f_palette.gif")
    plate.rotate(90, expand=True).save(folder / "g_turned.jpg", exif=turned, quality=95)
    (folder / "h_phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "notes.txt").write_text("x")
    warnings: list[str] = []
    result = run_vision_language(config(folder, warmup=0, max_new_tokens=4), tmp_path / "out", warn=warnings.append)
    found = {item.path.name: item.latest("base").detections for item in result.items}
    assert list(found) == sorted(found)
    assert found.pop("h_phone.heic") is None
    assert warnings[0].startswith("h_phone.heic: failed (load): is a HEIC image; run: pip install")
    assert len(found) == 7
    labels = {tuple(sorted(detection.label for detection in detections)) for detections in found.values()}
    assert len(labels) == 1
    assert labels.pop()


def test_nothing_usable_and_models_that_cannot_be_had(config, plates: Path, tmp_path: Path):
    (tmp_path / "words.png").write_text("hello")
    with pytest.raises(DataError, match=r"images: none of 1 can be used; .*words.png: is not an image"):
        run_vision_language(config(tmp_path / "words.png"), tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match="detector: no weights at"):
        run_vision_language(config(plates, detector="missing.pt"), tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match="llm: no model directory at"):
        run_vision_language(config(plates, llm="./missing"), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="llm_model: is for servers"):
        run_vision_language(config(plates, llm_model="x"), tmp_path / "out")


def test_a_server_that_is_down_loses_no_detection(config, plates: Path, tmp_path: Path):
    result = run_vision_language(config(plates, llm="http://127.0.0.1:9/v1", retries=0, warmup=0), tmp_path)
    assert len(result.failed) == 4
    assert all(item.latest("base").detections for item in result.items)
    assert "no answer at" in result.summary["failures"][0]["reason"]


def _save_lora(model: torch.nn.Module, targets: list[str], folder: Path) -> None:
    """A LoRA adapter whose B is not zero, so that it changes what the model computes."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    tuned.save_pretrained(folder)


def test_adapted_models_before_and_after_merging(
    config, plates: Path, tmp_path: Path, detector_weights: Path, language_model_dir: Path
):
    language_model = load_pretrained(str(language_model_dir), "causal-lm", []).model
    _save_lora(language_model, ["q_proj", "v_proj"], tmp_path / "llm" / "peft")
    _save_lora(load_detector(detector_weights).module, ["cv1.conv", "cv2.conv"], tmp_path / "detector")
    wanted = config(plates, detector_adapter=str(tmp_path / "detector"), llm_adapter=str(tmp_path / "llm"))
    result = run_vision_language(wanted, tmp_path / "out")
    assert [variant["variant"] for variant in result.summary["variants"]] == ["base", "adapted", "merged"]
    assert result.summary["primary"] == "adapted"
    models = result.summary["models"]
    base, adapted, merged = (models[name] for name in ("base", "adapted", "merged"))
    assert (base["detector"]["fused"], adapted["detector"]["fused"], merged["detector"]["fused"]) == (True, False, True)
    assert adapted["llm"]["parameters"] > merged["llm"]["parameters"] == base["llm"]["parameters"]
    for item in result.items:
        beside, within = item.latest("adapted"), item.latest("merged")
        assert beside.report == within.report
        # B A is added to the weight in float32, batch normalisation is folded in: rounding of sums of up to 432 terms.
        boxes = [[detection.box for detection in outcome.detections] for outcome in (beside, within)]
        assert np.allclose(*boxes, atol=0.05)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "merged, measured" in page


def test_folders_without_an_adapter(config, plates: Path, tmp_path: Path):
    with pytest.raises(ManifestError, match=r"no adapter_config\.json"):
        run_vision_language(config(plates, detector_adapter=str(tmp_path)), tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match="llm_adapter: no folder at"):
        run_vision_language(config(plates, llm_adapter="missing"), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="llm_adapter: works with a local language model"):
        run_vision_language(config(plates, llm="http://127.0.0.1:9", llm_adapter=str(tmp_path)), tmp_path / "out")


def test_the_tiny_language_model_words_findings(language_model_dir: Path, detector_weights: Path):
    """What the demonstration shows. benchmarks/toy_models.py asks for 19 reports of 20, of models just trained."""
    loaded = load_pretrained(str(language_model_dir), "causal-lm", [])
    model = LocalModel(loaded.model, loaded.tokenizer, "tiny")
    assert share_of_right_findings(model, count=4) >= 0.8
    detector = load_detector(detector_weights, fuse=True)
    right = []
    for plate in draw_plates(4, HELD_OUT_SEED):
        image = Image.fromarray(plate.pixels).convert("RGB")
        (found,) = detector.suppress(detector.infer(detector.preprocess(image)[None]), [image.size])
        if found:
            report = model.generate(build_messages(found, image="plate.png", size=image.size), 160).text
            right.append(not any(check_report(report, found, detector.names, image.size).values()))
    assert right.count(True) >= max(1, len(right) - 1)


def test_wrong_reports_are_marked_and_counted(config, plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A language model that says left for right: its sentence is marked on the page, and a warning counts it."""
    told = LocalModel.generate

    def other_side(self: LocalModel, messages: Any, max_new_tokens: int) -> Any:
        made = told(self, messages, max_new_tokens)
        sides = {"left": "right", "right": "left", "center": "left"}
        text = re.sub(r"\b(left|right|center)\b", lambda found: sides[found.group()], made.text)
        return replace(made, text=text.replace("the middle", "the lower left"))

    monkeypatch.setattr(LocalModel, "generate", other_side)
    lines: list[str] = []
    result = run_vision_language(config(plates, warmup=0), tmp_path, warn=lines.append)
    assert result.summary["variants"][0]["reports_wrong"] == 4
    assert any(line.startswith("4 of 4 reports disagree with the boxes (plate0.png ...)") for line in lines)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<mark>") >= 4
    check = json.loads((tmp_path / "results" / "plate0.json").read_text(encoding="utf-8"))["variants"]["base"]["check"]
    assert check["sentences"][0]["number"] == 1
    assert " in the " in check["sentences"][0]["faults"][0]


def test_command_line(
    plates: Path, tmp_path: Path, detector_weights: Path, language_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    models = ("--detector", str(detector_weights), "--llm", str(language_model_dir))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["pipeline", "--threads", "1", *models, *arguments])

    done = run("--images", str(plates), "-o", "out")
    assert done.exit_code == 0, done.stderr
    for shown in (
        "plate0.png: ",
        "non-maximum suppression",
        "per token",
        "AGPL-3.0",
        "a demonstration model",
        "out/report",
    ):
        assert shown in done.stderr
    as_json = run("--images", str(plates / "plate0.png"), "-o", "out", "--json", "--warmup", "0")
    assert json.loads(as_json.stdout)["images"] == 1

    (tmp_path / "words.png").write_text("hello")
    some = run("-i", str(plates / "plate0.png"), "-i", "words.png", "-o", "out", "--warmup", "0")
    assert some.exit_code == 1
    assert "error: 1 of 2 images failed; the reasons are in summary.json" in some.stderr
    for arguments, code, line in (
        (["-i", "words.png"], 4, "error: images: none of 1 can be used; words.png: is not an image"),
        (["-i", "missing.png"], 4, "error: images: nothing at missing.png"),
        (["-i", "words.png", "--detector", "missing.pt"], 4, "error: detector: no weights at missing.pt"),
        (["-i", "words.png", "--repeats", "0"], 2, "error: --repeats: must be greater than"),
        (["-i", "words.png", "--prompt", "missing.txt"], 2, "error: --prompt: cannot read missing.txt"),
    ):
        failed = run(*arguments)
        assert (failed.exit_code, line in failed.stderr) == (code, True), failed.stderr


@pytest.mark.parametrize(("given", "missing"), [((), ("detector", "llm")), (("--llm", "./mine"), ("detector",))])
def test_no_model_is_a_default(given: tuple[str, ...], missing: tuple[str, ...], plates: Path):
    shown = CliRunner().invoke(app, ["pipeline", "--images", str(plates), *given])
    assert shown.exit_code == 2
    for name, example in (("detector", "`yolo11n.pt`"), ("llm", "OpenAI-compatible server")):
        assert (f"--{name} is missing: " in shown.stderr and example in shown.stderr) == (name in missing), shown.stderr
