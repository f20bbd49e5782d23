"""The model under training: its hidden states over a packed batch, its head, its trainable weights, what it saves.

What it does not do: find a model, see `gtpo.models`; put adapters into one, see `gtpo.lora`; compute logits of a batch,
which is the work of `gtpo_kernels.linear_gtpo_loss`.
"""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from gtpo.attention import SlotCache, block_causal_attention, flash_varlen_attention
from gtpo.batch import Batch
from gtpo.config import ModelConfig, RolloutConfig
from gtpo.masters import Masters, cast_weights, meet_bfloat16
from gtpo.models import load_model_and_tokenizer
from gtpo.trial import refuse_unknown_ids, refuse_unsupported, refuse_wrong_logits
from gtpo_kernels.token_logprobs.kernel_torch import Head

# the folder, in that of a model, which holds the adapters alone
_ADAPTER = "adapter"
# of a policy for which nothing else is said
_MAX_TOKENS = RolloutConfig().max_trajectory_tokens


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    slot_cache: SlotCache | None = None,
    packed_lengths: list[int] | None = None,
    cu_seqlens: Tensor | None = None,
    use_flash: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls in every layer: packed training, or sampling with a `SlotCache`.

    Raises ValueError for any other argument that changes the result, such as a window, a softcap or a sink (`s_aux`),
    and for a mask: transformers makes none for this attention, so it is one of the model's own.
    """
    # dropout is 0 in every layer (`Policy._dropout_off`), positions are in query and key already
    unknown = others.keys() - {"position_ids", "use_cache", "dropout"}
    if refused := sorted(name for name in unknown if others[name] is not None):
        raise ValueError(f"{type(module).__name__} needs attention that is not supported: {', '.join(refused)}")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} masks or biases its attention in a way that is not supported")
    if slot_cache is not None:
        output = slot_cache.attend(query, key, value, scale=scaling)
    elif packed_lengths is None:
        raise ValueError("the policy's attention needs packed_lengths: call Policy.hidden_states, not the model itself")
    elif use_flash:
        output = flash_varlen_attention(
            query, key, value, cu_seqlens=cu_seqlens, longest=max(packed_lengths), scale=scaling
        )
    else:
        output = block_causal_attention(query, key, value, lengths=packed_lengths, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register("gtpo_packed", _attention)


class Policy:
    """A causal language model and its tokenizer, ready for packed training and for sampling.

    max_tokens: of the longest sequence that it is to see; up to there it is known to be the model itself.
    Raises ValueError for a model that it would compute wrongly, see `gtpo.trial`.
    """

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, *, max_tokens: int = _MAX_TOKENS) -> None:
        refuse_unsupported(model.config.get_text_config(), max_tokens=max_tokens)
        self.config = config
        self.max_tokens = max_tokens
        self.bfloat16 = config.computes_in == "bfloat16"
        self.tokenizer = tokenizer
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        self.reference_device = self.device if config.reference_device == "auto" else torch.device("cpu")
        self.model = model.to(self.device)
        self.model.set_attn_implementation("gtpo_packed")
        self.decoder = model.get_decoder()
        self.head: nn.Linear = model.get_output_embeddings()
        # what embeds and what projects, where two modules may have one weight
        self.edges: tuple[nn.Parameter, nn.Parameter] = (model.get_input_embeddings().weight, self.head.weight)
        wide_head = [module for module in model.modules() if getattr(module, "weight", None) is self.head.weight]
        if config.head_dtype == "auto":
            wide_head = []
        cast_weights(model, getattr(torch, config.dtype), kept=wide_head)
        self._without_token = self._ids_without_token()
        self.use_flash = config.attention == "flash" or (
            config.attention == "auto"
            and self.device.type == "cuda"
            and self.bfloat16
            and importlib.util.find_spec("flash_attn") is not None
        )
        self._adapted: Any = None
        if config.lora_rank:
            # imported where adapters train: no other run waits for peft
            from gtpo.lora import with_adapters

            self._adapted = with_adapters(model, config)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if config.freeze_head:
            if self.edges[0] is self.edges[1]:
                raise ValueError(
                    "model.freeze_head needs a head of its own; this model ties it to the input embeddings"
                )
            self.head.requires_grad_(False)
        self._masters: Masters | None = None
        if config.dtype != config.computes_in:
            # looking up is no arithmetic: embeddings need no copies, and their gradients are added up in float32
            wide = [*wide_head, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
            self._masters = Masters(model, torch.bfloat16, kept=wide)
        if self.bfloat16:
            meet_bfloat16(model, self.head)
        if config.gradient_checkpointing:
            _checkpoint_activations(self.model)
            # frozen embeddings would otherwise cut the graph in front of the first checkpointed layer
            self.model.enable_input_require_grads()
        # dropout is off in training too: the policy that samples and the one that is trained must be the same function
        self._dropout_off()
        refuse_wrong_logits(self, max_tokens=max_tokens)

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to every row of logits, [V]: the head's own bias, and -inf at ids that have no token.

        Those ids, rows that pad a head, would else be sampled, decode to nothing, and be trained on.
        """
        bias: Tensor | None = self.head.bias
        if self._without_token is None or bias is None:
            return bias if self._without_token is None else self._without_token
        return bias + self._without_token

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids with which the model ends a turn, as its generation config lists them; there may be none."""
        found = self.model.generation_config.eos_token_id
        return frozenset(() if found is None else [found] if isinstance(found, int) else found)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that an optimizer moves, by name; float32 where training is allowed at all."""
        weights = self.model.named_parameters() if self._masters is None else self._masters.weights.items()
        return {name: weight for name, weight in weights if weight.requires_grad}

    def weights(self) -> dict[str, nn.Parameter]:
        """All weights that a forward pass reads, as they are now."""
        self._refresh()
        return dict(self.model.named_parameters())

    @contextlib.contextmanager
    def as_reference(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the weights that train, under LoRA the adapters, are these. Nothing may be trained within it."""
        moving = self._moving()
        kept = {name: weight.data for name, weight in moving.items()}
        try:
            for name, weight in moving.items():
                weight.data = weights[name].to(self.device)
            yield
        finally:
            for name, weight in moving.items():
                weight.data = kept[name]

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within it a policy with adapters is the model that they were put into."""
        with self._adapted.disable_adapter():
            yield

    def reference_weights(self) -> dict[str, Tensor]:
        """A copy of the weights that train as the forward pass reads them now, for `as_reference`.

        It lies on `reference_device`.
        """
        return {name: weight.detach().to(self.reference_device, copy=True) for name, weight in self._moving().items()}

    def _moving(self) -> dict[str, nn.Parameter]:
        """Of the weights that a forward pass reads those that training changes; not the masters, but their copies."""
        return {name: weight for name, weight in self.weights().items() if weight.requires_grad}

    def _refresh(self) -> None:
        if self._masters is not None:
            self._masters.refresh()

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states of a packed batch, [N, D]; row i predicts `batch.targets[i]`.

        No attention crosses sequences. Raises ValueError for sequences of more than `max_tokens`.
        """
        if (longest := max(batch.lengths) + 1) > self.max_tokens:
            raise ValueError(f"a sequence must have at most the policy's {self.max_tokens} tokens, got {longest}")
        self._refresh()
        # transformers checkpoints in training mode only, and drops the cache that `extend` needs while it does
        self.model.train(self.config.gradient_checkpointing)
        output = self.decoder(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            packed_lengths=batch.lengths,
            cu_seqlens=batch.cu_seqlens,
            use_flash=self.use_flash,
        )
        return output.last_hidden_state[0]

    @torch.no_grad()
    def extend(self, input_ids: Tensor, cache: SlotCache) -> Tensor:
        """Logits after the last new token of every sequence of the cache's current step, [num_sequences, V] float32."""
        self._refresh()
        if self.model.training:
            self.model.eval()
        output = self.decoder(
            input_ids=input_ids[None],
            position_ids=cache.positions[None],
            past_key_values=cache,
            use_cache=True,
            slot_cache=cache,
        )
        return self.project(output.last_hidden_state[0][cache.last_rows]).float()

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states, [rows, D] to [rows, V], by the arithmetic of the losses; for sampling only.

        Of bfloat16 states they are float32 too: log-probs from logits of 8 bits would not be those of the losses.
        """
        if hidden.dtype != torch.bfloat16:
            return F.linear(hidden, self.head.weight, self.logit_bias)
        head = Head(hidden, self.head.weight, self.logit_bias, chunk_rows=len(hidden))
        _, _, logits = next(head.chunks(torch.arange(len(hidden), device=hidden.device)))
        return logits

    def save_model(self, folder: Path) -> None:
        """Writes a plain Hugging Face model and tokenizer; LoRA weights are merged into a copy first.

        The adapters alone, as peft writes them, go to `folder`/adapter: beside the model's own files transformers would
        take them for what is to be loaded.
        """
        with contextlib.nullcontext() if self._masters is None else self._masters.in_place():
            if self._adapted is None:
                self.model.save_pretrained(folder)
            else:
                from gtpo.lora import merged, save_adapters

                merged(self._adapted).save_pretrained(folder)
                save_adapters(self._adapted, folder / _ADAPTER)
        self.tokenizer.save_pretrained(folder)

    def load_adapters(self, folder: Path) -> None:
        """The adapters become those that `save_model` wrote to `folder`; nothing is done to a policy without any."""
        if self._adapted is not None:
            from gtpo.lora import load_adapters

            load_adapters(self._adapted, folder / _ADAPTER)

    def _ids_without_token(self) -> Tensor | None:
        """[V] of the head's dtype: -inf at ids for which the tokenizer has no token, else 0; None where it has all."""
        num_logits = self.head.weight.shape[0]
        if self.tokenizer is None:
            return None
        num_embeddings = self.model.get_input_embeddings().weight.shape[0]
        refuse_unknown_ids(self.tokenizer, num_embeddings=num_embeddings, num_logits=num_logits)
        bias = torch.full_like(self.head.weight[:, 0], -torch.inf, requires_grad=False)
        bias[list(set(self.tokenizer.get_vocab().values()))] = 0.0
        return bias if bool(bias.any()) else None

    def _dropout_off(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0


def _checkpoint_activations(model: Any) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_policy(
    config: ModelConfig, *, corpus: Iterable[str] = (), seed: int = 0, max_tokens: int = _MAX_TOKENS
) -> Policy:
    """The policy that `config.source` names, for sequences of at most `max_tokens`.

    corpus, seed: as for `gtpo.models.load_model_and_tokenizer`.
    """
    model, tokenizer = load_model_and_tokenizer(config, corpus=corpus, seed=seed, max_tokens=max_tokens)
    return Policy(model, tokenizer, config, max_tokens=max_tokens)
