"""What is tried, and refused, as a model is loaded: packed training and cached sampling must be the model itself.

Some models are not, at once or from some length on: windows that set in late, positions whose frequencies change with
the longest sequence of a batch, tables of positions that end. So the trial is as long as the longest sequence that the
policy is to see, wherever that is cheap or the model's configuration holds a number that may be such a length; for
other large models, whose layers are alike at every length, two short sequences do.
"""

import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gtpo.attention import SlotCache
from gtpo.batch import Batch, PackedSequence, pack

_log = logging.getLogger(__name__)
_SHORT, _OTHER = 7, 5
# floating-point operations of one pass over the longest sequence, about a second of one CPU core
_CHEAP = 1e11
# transformers' eager attention holds a score for each pair of tokens
_MAX_EAGER_TOKENS = 1024
_MAX_ROWS = 64
# what changes beyond its `original_max_position_embeddings`
_CHANGING_ROPES = ("dynamic", "longrope")
# numbers in a configuration that are widths, counts or ids; any other may be a length from which layers work otherwise
_NO_LENGTH = re.compile(
    r"^(num|d)_|^n_(?!positions|ctx)|(_|^)(dim|rank|layers?|heads?|groups|experts|token_id|tp|v\d+)$"
    r"|(vocab|hidden|intermediate|ffn|embedding|feed_forward|kernel|state|patch|image)_?(size|dim)$|^id2label|^label2id"
    r"|^chunk_size_feed_forward$|^max_window_layers$|_(dim|size)_per_|multiple_of$"
)
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


class Tried(Protocol):
    """What the trial asks of a `Policy`; `decoder` and `model` are those of transformers."""

    model: Any
    decoder: Any
    device: torch.device
    bfloat16: bool

    def hidden_states(self, batch: Batch) -> Tensor: ...
    def extend(self, input_ids: Tensor, cache: SlotCache) -> Tensor: ...
    def project(self, hidden: Tensor) -> Tensor: ...


def refuse_unsupported(config: Any, *, max_tokens: int) -> None:
    """Heads, attentions and positions that the packed path would compute wrongly are refused, not approximated."""
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1.0):
            raise ValueError(f"models with {key} are not supported: the packed path knows plain scores and logits only")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None:
        layer_types = {"sliding_attention"}
    if layer_types != {"full_attention"}:
        raise ValueError(f"every layer must have full causal attention, got layer types {sorted(layer_types)}")
    given = [getattr(config, key, None) for key in ("rope_parameters", "rope_scaling")]
    ropes = [rope for value in given if isinstance(value, Mapping) for rope in (value, *value.values())]
    for rope in ropes:
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
        if kind in _CHANGING_ROPES:
            key = "original_max_position_embeddings"
            limits = (rope.get(key), getattr(config, key, None), getattr(config, "max_position_embeddings", None))
            limit = min(limit for limit in limits if limit is not None)
            if max_tokens - 1 > limit:
                raise ValueError(
                    f"positions of rope_type {kind!r} change beyond {limit} tokens with the longest of a batch, "
                    f"which is not supported: rollout.max_trajectory_tokens must be at most {limit}, got {max_tokens}"
                )


def refuse_unknown_ids(tokenizer: Any, *, num_embeddings: int, num_logits: int) -> None:
    """Raises ValueError where the tokenizer has ids that the model has not."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= min(num_embeddings, num_logits):
        raise ValueError(
            f"the model must have a row for each id of its tokenizer: the token {token!r} has the id {largest}, the "
            f"embedding has {num_embeddings} rows and the head {num_logits}; resize_token_embeddings adds rows"
        )


def refuse_wrong_logits(policy: Tried, *, max_tokens: int) -> None:
    """Raises ValueError unless packed training and cached sampling give the logits that transformers computes."""
    model_type = policy.model.config.model_type
    unsupported = f"models of type {model_type!r} are not supported"
    config = policy.model.config.get_text_config()
    try:
        _compare(policy, _SHORT, unsupported)
        longest = max_tokens - 1
        tables = _rows_of_position_tables(policy)
        if tables and min(tables) < longest:
            raise ValueError(
                f"the model's table of positions has {min(tables)} rows: rollout.max_trajectory_tokens must be at most "
                f"{min(tables) + 1}, got {max_tokens}"
            )
        lengths = [length for length in _possible_lengths(config.to_dict()) if length <= longest]
        num_parameters = sum(parameter.numel() for parameter in policy.model.parameters())
        if longest > _SHORT and (lengths or 2 * num_parameters * longest <= _CHEAP):
            _compare(policy, longest, unsupported)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{unsupported}: a trial run raised {type(error).__name__}: {error}") from error
    for key in _LENGTH_KEYS:
        most = getattr(config, key, None)
        if isinstance(most, int) and most < max_tokens:
            _log.warning(
                "the model was made for %d tokens (%s), rollout.max_trajectory_tokens is %d", most, key, max_tokens
            )
            break


def _possible_lengths(config: Any, key: str = "") -> Iterator[int]:
    """The numbers of a configuration that may be a length from which on its layers work otherwise.

    >>> list(_possible_lengths({"hidden_size": 64, "num_heads": 8, "keep_window_size": 16, "rope": {"original": 128}}))
    [16, 128]
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            if not _NO_LENGTH.search(str(name)):
                yield from _possible_lengths(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _possible_lengths(value, key)
    elif isinstance(config, int) and not isinstance(config, bool) and config >= _SHORT:
        yield config


class _PositionTables(TorchDispatchMode):
    """Keeps the rows of each embedding that is asked for consecutive entries, less where these begin."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            ids = args[1].flatten()[:_SHORT]
            if len(ids) == _SHORT and torch.equal(ids - ids[0], torch.arange(_SHORT, device=ids.device)):
                self.rows.append(args[0].shape[0] - int(ids[0]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _rows_of_position_tables(policy: Tried) -> list[int]:
    # found before a long trial: a GPU does not survive an index behind the end of a table
    ids = _random_ids(policy, _SHORT)
    with _PositionTables() as tables:
        policy.hidden_states(pack([_without_credit([*ids.tolist(), 0])], device=policy.device))
    return tables.rows


def _compare(policy: Tried, longest: int, unsupported: str) -> None:
    """Raises ValueError where a way differs at a sequence of `longest` tokens, packed in front of a short one."""
    try:
        plain, packed, sampled, sampled_plain = _logits_of_three_ways(policy, longest)
    except Exception as error:
        at = f" of {longest} tokens" if longest > _SHORT else ""
        raise ValueError(f"{unsupported}: a trial run{at} raised {type(error).__name__}: {error}") from error
    # of SmolLM2-135M: rounding makes 0.04 and 2e-6, tokens of another sequence in sight 0.5
    tolerance = 0.2 if policy.bfloat16 else 1e-3
    for way, found, expected in (("packed training", packed, plain), ("sampling", sampled, sampled_plain)):
        # less their mean, which softmax forgets and which would hide a difference
        found, expected = (x - x.mean(dim=1, keepdim=True) for x in (found, expected))
        distances, norms = (found - expected).norm(dim=1), expected.norm(dim=1)
        # not >: NaN is refused too
        if not bool((distances <= tolerance * norms).all()):
            worst = int((distances / norms).nan_to_num(torch.inf).argmax())
            gap = f"distance {float(distances[worst]):.2g}, norm {float(norms[worst]):.2g}"
            at = f" at {longest} tokens, though they are at {_SHORT}" if longest > _SHORT else ""
            raise ValueError(f"{unsupported}: logits in {way} are not those of the model itself{at} ({gap})")


@torch.no_grad()
def _logits_of_three_ways(policy: Tried, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [rows, V] float32 of two sequences, of `longest` and 5 tokens: by transformers' own attention, one by one,
    and packed; then after each of three steps of the sampler, [6, V], and what transformers has there."""
    ids = _random_ids(policy, longest + _OTHER)
    sequences = ids.split([longest, _OTHER])
    rows = torch.linspace(0, longest - 1, min(longest, _MAX_ROWS), device=policy.device).long()
    rows = torch.cat([rows, longest + torch.arange(_OTHER, device=policy.device)])
    # the last token of a packed sequence is a target only
    batch = pack([_without_credit([*part.tolist(), 0]) for part in sequences], device=policy.device)
    packed = policy.project(policy.hidden_states(batch)[rows])
    cache = SlotCache(num_slots=2, max_tokens=longest)
    sampled, ends = [], [(0, 0), (longest // 2, _OTHER - 2), (longest - 1, _OTHER - 1), (longest, _OTHER)]
    for before, after in itertools.pairwise(ends):
        new = [part[start:end] for part, start, end in zip(sequences, before, after, strict=True)]
        cache.begin_step([0, 1], new_lengths=[len(part) for part in new], lengths=list(after), device=policy.device)
        sampled.append(policy.extend(torch.cat(new), cache))
    seen = torch.tensor([row for a, b in ends[1:] for row in (a - 1, longest + b - 1)], device=policy.device)
    plain = torch.cat([_plain_logits(policy, part) for part in sequences]) if longest == _SHORT else None
    if plain is None:
        hidden = torch.cat([_plain_hidden(policy, part) for part in sequences])
        plain, sampled_plain = policy.project(hidden[rows]), policy.project(hidden[seen])
    else:
        plain, sampled_plain = plain[rows], plain[seen]
    # an id without a token has no logit in sampling
    used = torch.cat(sampled)
    known = used.isfinite().all(dim=0) | used.isnan().any(dim=0)
    return plain.float()[:, known], packed.float()[:, known], used[:, known], sampled_plain.float()[:, known]


def _plain_logits(policy: Tried, ids: Tensor) -> Tensor:
    with _Attention(policy.model, "eager"):
        logits: Tensor = policy.model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def _plain_hidden(policy: Tried, ids: Tensor) -> Tensor:
    has_sdpa = getattr(policy.model, "_supports_sdpa", False)
    with _Attention(policy.model, "sdpa" if len(ids) > _MAX_EAGER_TOKENS and has_sdpa else "eager"):
        hidden: Tensor = policy.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return hidden


class _Attention:
    """Within it the model has transformers' own attention `name`."""

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name
        self._kept = model.config.get_text_config()._attn_implementation

    def __enter__(self) -> None:
        self._model.set_attn_implementation(self._name)

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._kept)


def _random_ids(policy: Tried, num: int) -> Tensor:
    vocab_size = policy.model.get_input_embeddings().num_embeddings
    # a generator of its own: the global one stays as it is
    return torch.randint(vocab_size, (num,), generator=torch.Generator().manual_seed(0)).to(policy.device)


def _without_credit(ids: list[int]) -> PackedSequence:
    return PackedSequence(ids, [0.0] * len(ids), [False] * len(ids), [0.0] * len(ids))
