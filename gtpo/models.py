"""Where a model and its tokenizer come from: built small and random, read from a Python package, a folder or the hub.

Plain models of transformers come out. What it does not do: make them ready for training, which is `gtpo.policy`'s.
"""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gtpo.config import ModelConfig

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# of the Hugging Face hub, or of what was kept of it on this machine
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# bars of its own while weights load and save would break up ours
transformers.utils.logging.disable_progress_bar()


def load_model_and_tokenizer(
    config: ModelConfig, *, corpus: Iterable[str], seed: int, max_tokens: int
) -> tuple[Any, Any]:
    """The model that `config.source` names, and its tokenizer.

    corpus: trains the tokenizer of a "tiny" model, and of no other. seed: of its weights.
    max_tokens: of the longest sequence that a "tiny" model is to see.
    """
    if config.source == "tiny":
        return _build_tiny(config, corpus=corpus, seed=seed, max_tokens=max_tokens)
    if config.source.startswith("package:"):
        return _load_gguf_package(config.source.removeprefix("package:"))
    if not Path(config.source).is_dir() and not _HUB_ID.fullmatch(config.source):
        raise ValueError(
            f'model.source must be "tiny", "package:NAME", a folder or a hub id: "org/name", got {config.source!r}'
        )
    # a head that is to be float32 must not be rounded on the way
    dtype = torch.float32 if config.head_dtype == "float32" else getattr(torch, config.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.source, dtype=dtype)
    return model, transformers.AutoTokenizer.from_pretrained(config.source)


def _build_tiny(config: ModelConfig, *, corpus: Iterable[str], seed: int, max_tokens: int) -> tuple[Any, Any]:
    """A random Qwen3-style model with a byte-level BPE tokenizer trained on `corpus`, digits kept apart."""
    tokenizer = _train_tokenizer(corpus, config.vocab_size)
    model_config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max(4096, max_tokens),
        tie_word_embeddings=False,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(model_config)
    return model, tokenizer


def _train_tokenizer(corpus: Iterable[str], vocab_size: int) -> Any:
    control = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    least = len(control) + 256
    if vocab_size < least:
        raise ValueError(
            f"model.vocab_size must be at least {least} (all bytes and the control tokens), got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


def _load_gguf_package(name: str) -> tuple[Any, Any]:
    # the package is located, not imported: only its file of weights is wanted, not its own inference stack
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model.source names the Python package {name!r}, which is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"the Python package {name!r} must hold one .gguf file, got {[file.name for file in files]}")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
    # a model read from GGUF still carries its quantisation config and cannot be saved; a fresh one with its weights can
    config = type(loaded.config)(
        **{key: value for key, value in loaded.config.to_dict().items() if key not in ("quantization_config", "dtype")}
    )
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer
