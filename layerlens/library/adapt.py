"""``layerlens.adapt``: adds the chosen LoRA to the model of an existing trainer, before ``trainer.train()``."""

from __future__ import annotations

from typing import Any

import torch

from layerlens.exceptions import ConfigurationError
from layerlens.library import api
from layerlens.library.plan import Plan
from layerlens.library.settings import METHODS
from layerlens.library.trainers import is_trainer, refuse_trainer

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""The setting's older and newer name in transformers."""
PEFT_FLAGS = ("is_peft_model", "_is_peft_model", "is_peft", "_is_peft")
"""Under which names trainers have kept whether their model is PEFT's."""


def adapt(trainer: Any, **settings: Any) -> Plan:
    """Plan on a trainer's data and loss, and add the chosen LoRA to its model, so that ``trainer.train()`` trains it.

    The model becomes an ordinary PEFT model, so ``trainer.save_model`` writes an ordinary adapter directory.

    Args:
        trainer: a ``transformers.Trainer``, TRL's ``SFTTrainer``, ``DPOTrainer`` or ``RewardTrainer``, a
            ``SentenceTransformerTrainer``, or a trainer derived from one of them. ``train()`` has not been called, and
            the trainer has no optimizer yet.
        settings: budgets and other settings, as for ``layerlens.plan``.

    Returns:
        the plan.

    Raises:
        ConfigurationError: training has begun, or the trainer can no longer take an adapter. The trainer is unchanged.
        LayerLensError: planning failed, as in ``layerlens.plan``. The trainer is unchanged.

    >>> plan = layerlens.adapt(trainer, max_trainable_params="2k")
    >>> sorted(trainer.model.peft_config)  # ready for trainer.train()
    ['default']
    """
    _refuse(trainer)
    if tuple(settings.get("methods", METHODS)) != METHODS:
        raise ConfigurationError(
            f"methods: a trainer gets only LoRA, which it can train and save, got {settings['methods']!r}; for "
            "adapters and prefixes use layerlens.plan and plan.apply(model) before the trainer is made"
        )
    if _checkpoints(trainer.args):  # its memory and time are those of checkpointed blocks
        settings.setdefault("gradient_checkpointing", True)
    plan = api.plan(trainer, **settings)
    if not plan.ranks:
        return plan
    if settings.get("gradient_checkpointing") == "auto":  # the trainer would checkpoint every block
        for name in CHECKPOINTING:
            if getattr(trainer.args, name, False):
                setattr(trainer.args, name, False)
        plan.checkpoint(trainer.model)
    if hasattr(trainer.model, "transformers_model"):  # a SentenceTransformer holds its adapters itself
        inner = trainer.model.transformers_model
        trainer.model.add_adapter(plan.lora_config(inner))
        _input_gradients(trainer, inner)
        return plan
    config = plan.lora_config(trainer.model)
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):  # A is drawn from the trainer's seed, whatever was drawn before
        torch.manual_seed(trainer.args.seed)
        model: Any = get_peft_model(trainer.model, config)
    _put_in(trainer, model)
    return plan


def _refuse(trainer: Any) -> None:
    """Raise ConfigurationError if the trainer can no longer take an adapter."""
    if not is_trainer(trainer):
        raise ConfigurationError(
            f"trainer: must be a transformers.Trainer or one that derives from it, got {type(trainer).__name__}; for a "
            "model use layerlens.plan(model, data).lora_config()"
        )
    refuse_trainer(trainer)
    name, args = type(trainer).__name__, trainer.args
    if trainer.optimizer is not None:
        raise ConfigurationError(
            f"trainer: this {name} already has an optimizer for the model's own weights (training has begun, or you "
            "passed one); call layerlens.adapt before train(), and name the optimizer by optim= or "
            "optimizer_cls_and_kwargs"
        )
    if getattr(trainer, "model_init", None) is not None:
        raise ConfigurationError(
            f"trainer: this {name} makes a new model in train() (model_init), without the adapter; give it the model"
        )
    if getattr(args, "sync_ref_model", False):
        raise ConfigurationError(
            f"trainer: {name} updates its reference model to the trained weights (sync_ref_model), which TRL cannot do "
            "with an adapter; leave it out"
        )
    if hasattr(trainer.model, "add_adapter") and hasattr(trainer.model, "transformers_model"):
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils.peft_utils import check_peft_version

        try:
            check_peft_version(min_version=MIN_PEFT_VERSION)
        except ValueError as error:
            raise ConfigurationError(
                f"trainer: a {type(trainer.model).__name__} holds adapters by transformers' add_adapter, which needs "
                f"PEFT {MIN_PEFT_VERSION} or newer; upgrade it: pip install -U peft"
            ) from error
    template = getattr(args, "chat_template_path", None)
    if template and not str(template).endswith((".jinja", ".j2")):
        raise ConfigurationError(
            f"trainer: {name} uses the chat template of {template}, whose new tokens an adapter must train; use "
            "peft_config=layerlens.plan(model, ...).lora_config() when it is made, which TRL completes"
        )


def _put_in(trainer: Any, model: Any) -> None:
    """Make this the trainer's model, and update what the trainer recorded about its model when it was created."""
    trainer.model = trainer.model_wrapped = model
    trainer.callback_handler.model = model
    for name in PEFT_FLAGS:
        if name in vars(trainer):
            setattr(trainer, name, True)
    _input_gradients(trainer, model)
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and _is_copy(reference, model.get_base_model()):
        trainer.ref_model = None  # as TRL has it with PEFT: the reference is the model with its adapter off


def _input_gradients(trainer: Any, model: Any) -> None:
    """Let the inputs require gradients: reentrant checkpointing of blocks with frozen weights needs this."""
    given = vars(trainer.args)
    reentrant = (given.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant", False)
    if reentrant and _checkpoints(trainer.args):
        model.enable_input_require_grads()


def _checkpoints(args: Any) -> bool:
    return any(getattr(args, name, False) for name in CHECKPOINTING)


def _is_copy(reference: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Whether two models have the same weights, adapters apart."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = {}
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, weight in model.state_dict().items():
        layer = next((one for one in layers if name.startswith(f"{one}.")), None)
        if layer is None:
            own[name] = weight
        elif ".base_layer." in name:
            own[name.replace(".base_layer.", ".")] = weight
    found = reference.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
