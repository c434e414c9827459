"""Run by ``serving_table.py`` in a Python that has xllamacpp: log probabilities of a GGUF model and of its adapters.

Usage: llama_cpp_logprobs.py ORDER, a JSON file with base, tokens, adapters (name -> GGUF file) and output.
"""

import json
import sys
from pathlib import Path


def rows_of(base: str, adapter: str, tokens: list, vocabulary: int) -> list:
    """Log probabilities of the next token after each beginning of ``tokens``."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = base
    settings.n_ctx, settings.n_parallel, settings.warmup = 64, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    # Keys and values in half precision, as they are by default, change a logit by 5e-3 with and without an adapter.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server, found = xllamacpp.Server(settings), []
    for end in range(1, len(tokens) + 1):
        question = {"prompt": tokens[:end], "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0}
        answer = server.handle_completions({**question, "cache_prompt": False, "post_sampling_probs": False})
        known = {one["id"]: one["logprob"] for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        found.append([known[token] for token in range(vocabulary)])
    return found


def main(order: dict) -> None:
    import xllamacpp

    tokens, vocabulary = order["tokens"], order["vocabulary"]
    adapters = {"": "", **order["adapters"]}
    found = {name: rows_of(order["base"], path, tokens, vocabulary) for name, path in adapters.items()}
    Path(order["output"]).write_text(json.dumps({"version": f"xllamacpp {xllamacpp.__version__}", "rows": found}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
