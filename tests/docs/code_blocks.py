"""Finds the code blocks of a Markdown page and runs them, in order, in one folder, as a reader would.

A comment on the line before a block tells what a reader knows from the text around it:

- ``<!-- file: NAME -->``: the block is a file that the reader saves;
- ``<!-- part of: NAME -->``: YAML that may go into that file in place of its sections;
- ``<!-- exit code: N -->``: the block's last command ends so;
- ``<!-- run by: PATH -->``: the block cannot be run here, and that file of the repository runs its commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

BLOCK = re.compile(
    r"(?:^<!-- (?P<key>file|part of|exit code|run by): (?P<value>.+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NOT_CODE = ("", "text", "console")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, where it begins, and the comment before it."""

    language: str
    text: str
    line: int
    key: str
    value: str


def blocks_of(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start("text"))
        yield Block(found["language"], found["text"], line, found["key"] or "", found["value"] or "")


class Reader:
    """Does what a page says, in ``folder``, with one Python session for the page.

    Programs are looked for in ``programs`` first.
    """

    def __init__(self, folder: Path, root: Path, programs: Path | None = None) -> None:
        self.folder = folder
        self.root = root
        self.programs = programs
        self.session: dict[str, Any] = {"__name__": "__page__"}

    def follow(self, block: Block) -> None:
        """Raises whatever goes wrong."""
        if block.key == "file":
            (self.folder / block.value).write_text(block.text, encoding="utf-8")
            if block.language == "bash":
                return  # a script, which a later block runs
        elif block.key == "run by":
            self._is_run_by(block)
            return
        if block.key == "part of":
            path = self.folder / block.value
            whole = yaml.safe_load(path.read_text(encoding="utf-8")) | yaml.safe_load(block.text)
            changed = self.folder / "changed.yaml"
            changed.write_text(yaml.safe_dump(whole), encoding="utf-8")
            self._valid_configuration(changed)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, f"line {block.line}", "exec"), self.session)
        elif block.language == "bash":
            self._run(block)
        elif block.language == "yaml":
            path = self.folder / (block.value if block.key == "file" else "block.yaml")
            path.write_text(block.text, encoding="utf-8")
            self._valid_configuration(path)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language not in NOT_CODE:
            raise AssertionError(f"nobody runs blocks of {block.language}")

    def _is_run_by(self, block: Block) -> None:
        text = (self.root / block.value).read_text(encoding="utf-8")
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            options = [word for word in words if word.startswith("--")]
            for needed in (*words[1:2], *options) if options else (word.rpartition("/")[2] for word in words[-1:]):
                assert needed in text, f"{block.value} does not run: {line} ({needed})"

    def _valid_configuration(self, path: Path) -> None:
        from layerlens.config import load_run_config

        load_run_config(path)

    def _run(self, block: Block) -> None:
        wanted = int(block.value) if block.key == "exit code" else 0
        commands = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
        commands = [words for words in commands if words]
        for index, words in enumerate(commands):
            code, said = _layerlens(words[1:]) if words[0] == "layerlens" else self._other(words)
            assert code == (wanted if index == len(commands) - 1 else 0), (
                f"{shlex.join(words)}: exit code {code}\n{said}"
            )

    def _other(self, words: list[str]) -> tuple[int, str]:
        places = [self.programs, Path(sys.executable).parent, os.environ["PATH"]]
        path = os.pathsep.join(str(place) for place in places if place)
        done = subprocess.run(words, cwd=self.folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


def _layerlens(arguments: list[str]) -> tuple[int, str]:
    """The command line in this process: a new one would spend its time importing torch."""
    from typer.testing import CliRunner

    from layerlens.cli.main import app

    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output
