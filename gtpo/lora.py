"""LoRA adapters: with `peft`, whose only user this is."""

import copy
import warnings
from typing import Any

import peft

from gtpo.config import ModelConfig


def with_adapters(model: Any, config: ModelConfig) -> Any:
    """The model with adapters of rank `config.lora_rank` put into its linear layers; only these train from now on."""
    lora = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that the latter is about to drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return peft.get_peft_model(model, lora)


def merged(adapted: Any) -> Any:
    """A copy of the model whose weights have taken the adapters in."""
    return copy.deepcopy(adapted).merge_and_unload()
