"""LoRA adapters: with `peft`, whose only user this is."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

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


def save_adapters(adapted: Any, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` reads."""
    folder.mkdir()
    # not by its own save_pretrained, which asks a hub of models for the base and writes a page about it
    weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file(
        {name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
    )
    adapted.active_peft_config.save_pretrained(str(folder))


def load_adapters(adapted: Any, folder: Path) -> None:
    """The adapters become those of a folder that `save_adapters` wrote, bit for bit."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        weights = load_file(path)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must hold the adapters of a run, but reading it raised: {reason}") from error
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name, weight in expected.items():
        if name not in weights or weights[name].shape != weight.shape:
            found = "none" if name not in weights else f"one of shape {list(weights[name].shape)}"
            raise ValueError(f"{path} must hold the weight {name} of shape {list(weight.shape)}, got {found}")
    peft.set_peft_model_state_dict(adapted, weights)
