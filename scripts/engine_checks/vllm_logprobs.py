"""Run by ``serving_table.py`` in a Python that has vLLM for the CPU: log probabilities with and without adapters.

Usage: vllm_logprobs.py ORDER, a JSON file with base, tokens, adapters (name -> directory) and output.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def main(order: dict) -> None:
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    tokens, adapters = order["tokens"], order["adapters"]
    model = LLM(
        order["base"], enable_lora=True, max_lora_rank=8, max_loras=1, dtype="float32", enforce_eager=True,
        max_model_len=64, max_num_seqs=2, max_logprobs=order["vocabulary"], skip_tokenizer_init=True,
    )  # fmt: skip
    every = order["vocabulary"]
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=every, prompt_logprobs=every, detokenize=False)
    found = {}
    for number, (name, directory) in enumerate([("", ""), *adapters.items()]):
        request = LoRARequest(name, number, directory) if name else None
        answer = model.generate({"prompt_token_ids": tokens}, sampling, lora_request=request)[0]
        rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        found[name] = [[row[token].logprob for token in range(every)] for row in rows]
    Path(order["output"]).write_text(json.dumps({"version": f"vLLM {vllm.__version__} for CPU", "rows": found}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
