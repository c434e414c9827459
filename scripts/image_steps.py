#!/usr/bin/env python3
"""Does what a target of the Dockerfile says, step by step, in plain root file systems: chroot, no container engine.

    python image_steps.py TARGET BASE.tar WHEELHOUSE SCRATCH -- COMMAND ...

BASE.tar stands for the base image. Python packages come from WHEELHOUSE, without a network; Debian's from the mirrors
of this machine. Then COMMAND runs as a container would run it: as the image's user, in its folder, with its
environment; and so do the health check and the image's own default command. It knows the instructions that our
Dockerfile uses, and stops at one that it does not know. scripts/check_image_steps.sh calls this.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIND = re.compile(r"--mount=type=bind,from=(?P<stage>\w+),source=(?P<source>\S+),target=(?P<target>\S+)\s+")
# The stand-in has Debian's Python: the base image's is called `python`, has pip and headers, and may be installed into.
LIKE_THE_BASE = (
    "apt-get update -qq && apt-get install -qq --yes --no-install-recommends python3-dev >/dev/null && "
    "rm -f /usr/lib/python3*/EXTERNALLY-MANAGED && ln -sf python3 /usr/bin/python && "
    'python "$(ls /wheelhouse/pip-*.whl)/pip" install --quiet --root-user-action ignore pip'
)


@dataclass
class Stage:
    """A root file system, and what its image says of how to run in it."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    folder: str = "/"
    user: str = "0"
    health: list[str] = field(default_factory=list)
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, words: list[str]) -> None:
        """Run in the root; a failure ends the program."""
        told = {**self.environment, "HOME": "/tmp", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheelhouse"}
        user = ["--userspec", f"{self.user}:{self.user}"] if self.user != "0" else []
        inside = f"cd {shlex.quote(self.folder)} && exec {shlex.join(words)}"
        given = [f"{name}={value}" for name, value in told.items()]
        subprocess.run(["env", "-i", *given, "chroot", *user, str(self.root), "bash", "-c", inside], check=True)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, the rest), comments left out and lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def build(text: str, target: str, base: Path, wheelhouse: Path, scratch: Path) -> Stage:
    """All stages up to ``target``; those that it does not come from, or copy from, are left out."""
    wanted, blocks = needed_stages(text, target)
    stages: dict[str, Stage] = {}
    for name, parent, steps in blocks:
        if name not in wanted:
            continue
        print(f"== {name}", flush=True)
        stage = Stage(scratch / name)
        if parent in stages:
            before = stages[parent]
            subprocess.run(["cp", "-a", "--one-file-system", f"{before.root}/.", str(made(stage.root))], check=True)
            stage.environment, stage.folder = dict(before.environment), before.folder
        else:
            subprocess.run(["tar", "-C", str(made(stage.root)), "-xf", str(base)], check=True)
            stage.root.chmod(0o755)  # debootstrap's folder was its owner's alone
        subprocess.run(["mount", "-t", "proc", "proc", str(made(stage.root / "proc"))], check=True)
        subprocess.run(["mount", "--bind", str(wheelhouse), str(made(stage.root / "wheelhouse"))], check=True)
        shutil.copy("/etc/resolv.conf", stage.root / "etc/resolv.conf")
        for mirrors in ("apt.conf.d", "sources.list.d"):
            shutil.copytree(f"/etc/apt/{mirrors}", stage.root / "etc/apt" / mirrors, dirs_exist_ok=True)
        if parent not in stages:
            stage.run(["bash", "-c", LIKE_THE_BASE])
        for instruction, rest in steps:
            follow(stage, instruction, rest, stages)
        stages[name] = stage
    return stages[target]


def needed_stages(text: str, target: str) -> tuple[set[str], list[tuple[str, str, list[tuple[str, str]]]]]:
    """Names of the stages that ``target`` rests on, and every stage as (name, parent, steps)."""
    blocks: list[tuple[str, str, list[tuple[str, str]]]] = []
    for instruction, rest in instructions(text):
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            blocks.append((name, parent, []))
        elif blocks:
            blocks[-1][2].append((instruction, rest))
    parents = {name: parent for name, parent, _ in blocks}
    if target not in parents:
        raise SystemExit(f"error: no stage {target!r}; there are {', '.join(parents)}")
    wanted, todo = set(), [target]
    while todo:
        name = todo.pop()
        if name in parents and name not in wanted:
            wanted.add(name)
            steps = next(steps for stage, _, steps in blocks if stage == name)
            todo += [parents[name], *re.findall(r"(?:--from=|from=)(\w+)", " ".join(rest for _, rest in steps))]
    return wanted, blocks


def follow(stage: Stage, instruction: str, rest: str, stages: dict[str, Stage]) -> None:
    """One instruction."""
    print(f"   {instruction} {rest[:100]}", flush=True)
    if instruction == "RUN":
        bind = BIND.match(rest)
        if bind:
            target = made(stage.root / bind["target"].lstrip("/"))
            source = stages[bind["stage"]].root / bind["source"].lstrip("/")
            subprocess.run(["mount", "--bind", str(source), str(target)], check=True)
        stage.run(["bash", "-euo", "pipefail", "-c", rest[bind.end() :] if bind else rest])
        if bind:
            subprocess.run(["umount", str(target)], check=True)
    elif instruction == "ENV":
        stage.environment |= dict(word.partition("=")[::2] for word in shlex.split(rest))
    elif instruction == "WORKDIR":
        stage.folder = rest
        made(stage.root / rest.lstrip("/"))
    elif instruction == "COPY":
        copy(stage, shlex.split(rest), stages)
    elif instruction == "USER":
        stage.user = rest
    elif instruction == "HEALTHCHECK":
        stage.health = json.loads(rest.partition("CMD ")[2])
    elif instruction in ("ENTRYPOINT", "CMD"):
        setattr(stage, "entry" if instruction == "ENTRYPOINT" else "command", json.loads(rest))
    else:
        raise SystemExit(f"error: {instruction} is not known here")


def copy(stage: Stage, words: list[str], stages: dict[str, Stage]) -> None:
    """COPY, from the repository or from another stage."""
    origin = ROOT
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).removeprefix("--from=")].root
    *sources, target = words
    place = stage.root / os.path.join(stage.folder, target).lstrip("/")
    for source in sources:
        path = origin / source.lstrip("/")
        if path.is_dir():
            shutil.copytree(path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into_folder = target.endswith("/") or len(sources) > 1
            made(place if into_folder else place.parent)
            shutil.copy(path, place / path.name if into_folder else place)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    given, _, command = [list(part) for part in partition(sys.argv[1:], "--")]
    if len(given) != 4 or not command:
        print(__doc__.splitlines()[2].strip(), file=sys.stderr)
        return 2
    target, (base, wheelhouse, scratch) = given[0], map(Path, given[1:])
    try:
        stage = build((ROOT / "Dockerfile").read_text(), target, base, wheelhouse.resolve(), scratch.resolve())
        if stage.user == "0":
            raise SystemExit("error: the image runs as root")
        asked = {"default command": stage.entry + stage.command, "health check": stage.health, command[0]: command}
        for name, words in asked.items():
            print(f"== {name}, as user {stage.user}", flush=True)
            stage.run(words)
    except subprocess.CalledProcessError as error:
        print(f"error: the step above ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    return 0


def partition(words: list[str], at: str) -> tuple[list[str], list[str], list[str]]:
    index = words.index(at) if at in words else len(words)
    return words[:index], words[index : index + 1], words[index + 1 :]


if __name__ == "__main__":
    sys.exit(main())
