"""Embeddings and the output layer as layers: statistics against one backward pass for each sample, and brute force.

The models are float64: both routes round at 2^-53 and sum some thousand products, so 1e-9 leaves four decimal digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from brute_force import assert_equal, pieces, profile, sample_gradients

from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import MethodStatistics, ModelSpec
from layerlens.profiling.statistics.spectra import DAMPING, split_half_spectrum
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import IGNORED, causal_loss, classification_loss

N, T, ROWS, WIDTH = 6, 5, 40, 16
SMALL: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "tie_word_embeddings": False,
    "max_position_embeddings": 16,
}  # fmt: skip
GEMMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))


def gemma() -> Any:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA))


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3))


def frozen(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().double().eval().requires_grad_(False)


def texts(*, classes: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 9, (N, T), generator=generator)  # of few tokens, so that samples share some
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[4, 2:] = 0
    ids = ids * mask
    labels = torch.arange(N) % 3 if classes else ids.masked_fill(mask == 0, IGNORED)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, torch.arange(N))


def spec_of(model: Any, *only: str) -> ModelSpec:
    return model_spec(PretrainedModel(model, None, "", ()), "tiny", only=only)


def measured(model: Any, spec: ModelSpec, batches: Sequence[Batch], loss: Any, *statistics: str) -> MethodStatistics:
    found = profile(model, spec, batches, loss, statistics=statistics, everything=False)
    return found.by_name()[spec.layers[0].name].by_method["lora"]


@pytest.mark.parametrize(
    ("make", "loss", "names"),
    [
        (llama, causal_loss, ("embed_tokens", "lm_head")),
        (gemma, causal_loss, ("embed_tokens", "lm_head")),
        (bert, classification_loss, ("word_embeddings", "position_embeddings", "token_type_embeddings")),
    ],
    ids=["llama", "gemma-scales-its-rows", "bert-pads-and-numbers-positions"],
)
def test_gradients_of_each_sample(make, loss, names):
    model, batch = frozen(make), texts(classes=make is bert)
    spec = spec_of(model, *names)
    assert [layer.name.rpartition(".")[2] for layer in spec.layers] == list(names)
    assert spec.layers[0].layer_type == "embedding"
    assert (spec.layers[0].n_in, spec.layers[0].n_out) == (ROWS, WIDTH)
    found = profile(model, spec, pieces(batch, 4, 2), loss, everything=False)
    assert not found.unmeasured
    assert_equal(found, sample_gradients(model, batch, loss), 1e-9)
    first = found.by_name()[spec.layers[0].name].by_method["lora"]
    assert first.input_mean_square == pytest.approx(1 / ROWS)  # one 1 among zeros


def test_a_scaled_embedding_outside_the_layers_is_measured_too():
    model, batch = frozen(gemma), texts()
    found = profile(model, spec_of(model), [batch], causal_loss)
    assert "model.embed_tokens.weight" in found.other_weights
    assert_equal(found, sample_gradients(model, batch, causal_loss), 1e-9)


def test_spectra_with_the_factors_of_inputs_that_are_ones_among_zeros():
    model, batch = frozen(llama), texts()
    spec = spec_of(model, "embed_tokens")
    names = ("gradient", "spectrum", "whitened_spectrum", "sketched_spectrum", "factors", "fisher_diagonal")
    found = measured(model, spec, pieces(batch, 4, 2), causal_loss, *names)
    each = sample_gradients(model, batch, causal_loss)["model.embed_tokens.weight"].reshape(N, ROWS, WIDTH)
    halves = [torch.from_numpy(each[half::2].mean(axis=0).T.copy()) for half in (0, 1)]
    plain = split_half_spectrum(*halves)
    assert found.plain_spectrum == pytest.approx(plain, abs=1e-9 * plain[0])
    assert np.array_equal(found.sketched_spectrum, found.plain_spectrum)  # rows are not worth sketching
    ids = batch.inputs["input_ids"][batch.inputs["attention_mask"].bool()]
    inputs = torch.diag(torch.bincount(ids, minlength=ROWS).double() / len(ids))
    outputs = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad_(True)))
    causal_loss(model(**batch.inputs), batch).sum().backward()
    handle.remove()
    gradients = seen[0].grad
    assert gradients is not None
    outputs = gradients.flatten(0, 1).T @ gradients.flatten(0, 1) / N
    # Padding has the row of padding_idx, whose gradient is dropped; no other token's gradient is.
    assert float(gradients[batch.inputs["attention_mask"] == 0].abs().max()) == 0.0
    whitened = split_half_spectrum(*halves, inputs, outputs, DAMPING)
    # Cholesky and division by roots differ in the last digits; eigenvalues of A spread over 1/DAMPING.
    assert found.spectrum == pytest.approx(whitened, abs=1e-7 * np.abs(whitened).max())
    assert found.input_factor.size == 0


def test_the_tangent_kernel_has_its_part_exact_and_sketched():
    model, batch = frozen(llama), texts()
    each = sample_gradients(model, batch, causal_loss)["model.embed_tokens.weight"]
    spec = spec_of(model, "embed_tokens")
    exact = profile(model, spec, pieces(batch, 4, 2), causal_loss, statistics=("ntk",), everything=False).kernel
    assert exact is not None
    assert exact.gram == pytest.approx(each @ each.T, rel=1e-9, abs=1e-9)


def test_sketched_features_of_rows_have_the_kernel_as_their_mean():
    from layerlens.profiling.projections import Projection
    from layerlens.profiling.sample_matrices import SampleMatrices, gram_matrix
    from layerlens.profiling.statistics.ntk import features
    from layerlens.profiling.sums import MatrixBatch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (N, T), generator=generator)
    rows = torch.randn(N, T, WIDTH, generator=generator, dtype=torch.float64)
    matrices = SampleMatrices(ids__bt=ids, rows__bti=rows)
    one_hot = torch.nn.functional.one_hot(ids, ROWS).double()
    dense = SampleMatrices(one_hot[:, None], rows[:, None])
    half = torch.zeros(N, dtype=torch.int64)
    # The same projections of the same matrix: bits differ by the order of additions alone.
    ours = features(MatrixBatch(matrices, half, 0, 1, Projection("x"), ROWS))
    theirs = features(MatrixBatch(dense, half, 0, 1, Projection("x"), ROWS))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert gram_matrix([matrices], 1) == pytest.approx(gram_matrix([dense], 1), rel=1e-12)


def test_tied_weights_and_other_lookups_are_left_out_with_the_reason():
    tied = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "tie_word_embeddings": True}))
    spec = spec_of(tied.requires_grad_(False), "layers.*", "embed_tokens", "lm_head")
    assert "tied to lm_head: PEFT's LoRA would act in model.embed_tokens only" in spec.left_out["model.embed_tokens"]
    assert "tied to model.embed_tokens" in spec.left_out["lm_head"]
    t5: Any = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=ROWS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    t5_spec = spec_of(t5.requires_grad_(False), "*.block.*", "shared", "relative_attention_bias")
    assert "relative positions" in t5_spec.left_out[
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ]  # fmt: skip
    assert "tied to" in t5_spec.left_out["shared"]
    opt: Any = hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=ROWS, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
                     word_embed_proj_dim=16, max_position_embeddings=16)
    )  # fmt: skip
    opt_spec = spec_of(opt.requires_grad_(False), "layers.*", "embed_positions")
    assert "computes something else than Embedding" in opt_spec.left_out["model.decoder.embed_positions"]


def test_gpt2s_table_of_positions_has_no_ties():
    config = hf.GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0)
    model = frozen(lambda: hf.GPT2LMHeadModel(config))
    spec, batch = spec_of(model, "wpe", "wte", "lm_head"), texts()
    assert [layer.name for layer in spec.layers] == ["transformer.wpe"]
    assert {"transformer.wte", "lm_head"} <= set(spec.left_out)
    found = profile(model, spec, [batch], causal_loss, everything=False)
    assert_equal(found, sample_gradients(model, batch, causal_loss), 1e-9)
