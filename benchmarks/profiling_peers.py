"""What other libraries take for per-sample or Kronecker statistics of every Linear, beside one ordinary training step.

    python benchmarks/profiling_peers.py --out benchmarks/results/profiling_peers.json

Same models, batches and interleaving as ``profiling_benchmark.py``, float32. Install the peers in an environment of
their own without their dependencies, which may bring another torch (``pip install --no-deps opacus backpack-for-pytorch
curvlinops-for-pytorch nngeometry asdfghjkl kronfluence einops einconv unfoldNd linear_operator jaxtyping
opt_einsum wadler-lindig``). One that cannot be imported or fails is listed with its error.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from profiling_benchmark import MODELS, build

from layerlens.tasks.losses import classification_loss

Step = Callable[[], object]


def only_linear(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the weights of its Linear modules alone requiring gradients."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.requires_grad_(True)
    return model


def opacus_per_sample(model: torch.nn.Module, batch: Any) -> Step:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(only_linear(copy.deepcopy(model)).train(), strict=False)

    def step() -> None:
        classification_loss(wrapped(**batch.inputs), batch).mean().backward()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.grad_sample.square().flatten(1).sum(dim=1)
        wrapped.zero_grad()

    return step


def opacus_ghost(model: torch.nn.Module, batch: Any) -> Step:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        only_linear(copy.deepcopy(model)).train(), strict=False, max_grad_norm=1.0, use_ghost_clipping=True
    )

    def step() -> None:
        classification_loss(wrapped(**batch.inputs), batch).mean().backward()
        wrapped.get_norm_sample()
        wrapped.zero_grad()

    return step


def curvlinops_kfac(model: torch.nn.Module, batch: Any) -> Step:
    from curvlinops import KFACLinearOperator

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = only_linear(copy.deepcopy(model))

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model(**inputs).logits

    wrapped = Logits()
    parameters = [x for x in wrapped.parameters() if x.requires_grad]
    data = [(dict(batch.inputs), batch.labels)]

    def step() -> None:
        operator = KFACLinearOperator(
            wrapped, torch.nn.CrossEntropyLoss(), parameters, data, fisher_type="empirical", check_deterministic=False,
            batch_size_fn=lambda inputs: len(next(iter(inputs.values()))),
        )  # fmt: skip
        operator @ torch.zeros(operator.shape[1])

    return step


def backpack_batch_l2(model: torch.nn.Module, batch: Any) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended = extend(only_linear(copy.deepcopy(model)))
    loss = extend(torch.nn.CrossEntropyLoss())

    def step() -> None:
        with backpack(BatchL2Grad()):
            loss(extended(**batch.inputs).logits, batch.labels).backward()
        norms = [x.batch_l2 for x in extended.parameters() if x.requires_grad]
        if any(norm.shape != (len(batch.labels),) for norm in norms):
            raise ValueError("norms are not those of samples")
        extended.zero_grad()

    return step


def nngeometry_kfac(model: torch.nn.Module, batch: Any) -> Step:
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    frozen = only_linear(copy.deepcopy(model))
    name, first = next(iter(batch.inputs.items()))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(first, batch.labels), batch_size=len(first))
    layers = LayerCollection.from_model(frozen, ignore_unsupported_layers=True)

    def step() -> None:
        FIM(
            model=frozen, loader=loader, representation=PMatKFAC, variant="classif_logits", device="cpu",
            function=lambda inputs, labels: frozen(**{name: inputs}).logits, layer_collection=layers,
        )  # fmt: skip

    return step


def asdl_kfac(model: torch.nn.Module, batch: Any) -> Step:
    from asdl import FISHER_EMP, LOSS_CROSS_ENTROPY, SHAPE_KRON, FisherConfig, get_fisher_maker

    maker = get_fisher_maker(
        only_linear(copy.deepcopy(model)),
        FisherConfig(fisher_type=FISHER_EMP, fisher_shapes=[SHAPE_KRON], loss_type=LOSS_CROSS_ENTROPY),
    )

    def step() -> None:
        output = maker.setup_model_call(maker.model, **batch.inputs)
        maker.setup_loss_call(torch.nn.functional.cross_entropy, output.logits, batch.labels)
        maker.forward_and_backward(data_size=len(batch.labels))

    return step


def kronfluence_factors(model: torch.nn.Module, batch: Any) -> Step:
    import tempfile

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
            inputs, labels = batch
            return torch.nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

    class Samples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(batch.labels)

        def __getitem__(self, index: int) -> Any:
            return {name: tensor[index] for name, tensor in batch.inputs.items()}, batch.labels[index]

    task = Classification()
    prepared = prepare_model(only_linear(copy.deepcopy(model)), task)
    folder = tempfile.mkdtemp()
    analyzer = Analyzer("benchmark", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True)
    arguments = FactorArguments(strategy="kfac", use_empirical_fisher=True)

    def step() -> None:
        analyzer.fit_covariance_matrices(
            "factors", Samples(), per_device_batch_size=len(batch.labels), factor_args=arguments,
            overwrite_output_dir=True,
        )  # fmt: skip

    return step


PEERS: dict[str, Callable[[torch.nn.Module, Any], Step]] = {
    "Opacus per-sample gradients": opacus_per_sample,
    "Opacus ghost norms": opacus_ghost,
    "BackPACK BatchL2Grad": backpack_batch_l2,
    "curvlinops KFAC (empirical)": curvlinops_kfac,
    "nngeometry KFAC": nngeometry_kfac,
    "ASDL KFAC (empirical)": asdl_kfac,
    "kronfluence covariance factors": kronfluence_factors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter  # as in profiling_benchmark.py
    results = []
    for name in options.models:
        model, batch = build(name, "float32")

        def ordinary(model: torch.nn.Module = model, batch: Any = batch) -> None:
            model.requires_grad_(True)
            classification_loss(model(**batch.inputs), batch).mean().backward()
            model.zero_grad()

        for peer in options.peers:
            make = PEERS[peer]
            row: dict[str, Any] = {"model": name, "peer": peer, "threads": options.threads}
            try:
                step = make(model, batch)
                step()
            except Exception as error:  # whatever a peer raises is its result
                words = " ".join(str(error).split())[:160]
                row["fails"] = f"{type(error).__name__}: {words}"
            else:
                ratios = []
                for _ in range(options.rounds):
                    times = []
                    for candidate in (ordinary, step):
                        start = clock()
                        candidate()
                        times.append(clock() - start)
                    ratios.append(times[1] / times[0])
                row["ratio"] = round(statistics.median(ratios), 2)
            results.append(row)
            print(row, flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
