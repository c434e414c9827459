"""What leaves the house: signed releases, workflows that run what they name, a container file without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, Path]:
    """A signed directory of two files, and who may sign."""
    directory = tmp_path / "dist"
    directory.mkdir()
    (directory / "layerlens-1.0-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(bytes(range(256)) * 40)
    (directory / "layerlens 1.0.tar.gz").write_bytes(b"source")
    key = tmp_path / "key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key)
    signers = tmp_path / "allowed_signers"
    signers.write_text("# who may sign\nreleases@layerlens.example " + key.with_suffix(".pub").read_text())
    signed = run(ROOT / "scripts/sign_release.sh", directory, key)
    assert signed.returncode == 0, signed.stderr
    return directory, signers


def test_what_was_signed_is_verified(release):
    verified = run(ROOT / "scripts/verify_release.sh", *release)
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout == "2 files are what releases@layerlens.example signed\n"


@pytest.mark.parametrize("name", ["*.whl", "*.tar.gz", "SHA256SUMS", "SHA256SUMS.sig"])
def test_one_changed_byte_is_noticed(release, name):
    directory, _ = release
    [path] = directory.glob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verified = run(ROOT / "scripts/verify_release.sh", *release)
    assert verified.returncode == 1
    assert "error: " in verified.stderr


def test_a_missing_an_added_and_a_file_of_another_signer_are_noticed(release, tmp_path):
    directory, signers = release
    (directory / "extra.whl").write_bytes(b"")
    assert "not among the signed files: extra.whl" in run(ROOT / "scripts/verify_release.sh", *release).stderr
    (directory / "extra.whl").unlink()
    (directory / "layerlens 1.0.tar.gz").rename(tmp_path / "elsewhere")
    assert run(ROOT / "scripts/verify_release.sh", *release).returncode == 1
    (tmp_path / "elsewhere").rename(directory / "layerlens 1.0.tar.gz")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", tmp_path / "other")
    signers.write_text("releases@layerlens.example " + (tmp_path / "other.pub").read_text())
    assert "not signed by" in run(ROOT / "scripts/verify_release.sh", *release).stderr


def test_workflows_follow_githubs_schema():
    tool = Path(sysconfig.get_path("scripts")) / "check-jsonschema"
    checked = run(tool, "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_every_action_and_run_scripts_that_exist(workflow):
    assert WORKFLOWS
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job.get("steps", []):
            if "uses" in step:
                assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"])
            for script in re.findall(r"scripts/\S+\.(?:sh|py)", step.get("run", "")):
                assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not there or cannot be run"


def test_container_file_has_no_warning():
    """hadolint: pinned bases and packages, no root at run time, no needless layer."""
    tool = Path(sysconfig.get_path("scripts")) / "hadolint"
    linted = run(tool, ROOT / "Dockerfile")
    assert linted.returncode == 0, linted.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert text.count("\nHEALTHCHECK ") == text.count("\nENTRYPOINT ") == text.count("\nUSER ") == 2


def test_scripts_have_no_warning():
    """shellcheck: every shell script, the sourced ones followed."""
    tool = Path(sysconfig.get_path("scripts")) / "shellcheck"
    scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"]
    linted = subprocess.run([tool, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_container_file_copies_what_the_build_needs():
    """Every source of a COPY is in the repository and let through by .dockerignore."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists()
            assert any(source == name or source.startswith(name + "/") for name in allowed)


def test_wheels_are_built_by_the_pythons_that_answer(tmp_path, monkeypatch):
    """pyenv has a name on PATH for each Python that it knows, whether it is installed or not."""
    (tmp_path / "python3.10").symlink_to(sys.executable)  # whichever it is, it can build
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: version `3.12` is not installed' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("PYTHONS", raising=False)
    listed = run(ROOT / "scripts/build_wheels.sh", "--list")
    assert listed.returncode == 0, listed.stderr
    assert str(tmp_path / "python3.10") in listed.stdout.splitlines()
    assert f"left out: {shim} does not answer" in listed.stderr
    assert str(shim) not in listed.stdout
    monkeypatch.setenv("PYTHONS", str(shim))
    refused = run(ROOT / "scripts/build_wheels.sh", "--list")
    assert (refused.returncode, refused.stderr) == (2, f"error: {shim} does not answer; name others in PYTHONS\n")


def test_repairing_tells_what_is_missing(tmp_path):
    told = run(sys.executable, ROOT / "scripts/repair_wheel.py", tmp_path / "none.whl", tmp_path)
    assert told.returncode == 2
    assert f"no wheel at {tmp_path / 'none.whl'}" in told.stderr
