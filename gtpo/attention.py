"""Causal attention over packed sequences, in training and, with a key/value cache, in sampling.

Both work on tokens packed in one row, [1, H, N, head_dim], with `cu_seqlens`; no padding and no [N, N] mask. Off the
GPU each sequence is one block of the block-diagonal causal mask, and the blocks are computed one by one: the work is
that of the blocks, where a dense block mask would pay for the whole square.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def block_causal_attention(query: Tensor, key: Tensor, value: Tensor, *, lengths: list[int], scale: float) -> Tensor:
    """softmax(q k^T * scale) v inside each sequence, causal, nothing across sequences.

    query: [1, H, N, d].  key, value: [1, H_kv, N, d], H a multiple of H_kv.  lengths: of the packed sequences, summing
    to N.  Returns [1, H, N, d].
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    blocks = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in blocks]
    return torch.cat(outputs, dim=2)


@dataclass
class SlotCache:
    """Keys and values of up to `num_slots` sequences that grow at different speeds.

    One step adds `new_lengths[i]` tokens to the sequence in `slots[i]`. It takes the place of a transformers cache:
    each layer calls `update` with the packed new keys and values, then `attend` with its queries.
    The buffers grow with what is used, by doubling: never beyond `num_slots` and `max_tokens`. Nothing here waits for
    the device.
    """

    num_slots: int
    max_tokens: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    new_lengths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    _capacity: tuple[int, int] = (0, 0)
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def begin_step(self, slots: list[int], *, new_lengths: list[int], lengths: list[int], device: torch.device) -> None:
        """`lengths` are those after the step, the new tokens included."""
        self.slots, self.new_lengths, self.lengths, self._device = slots, new_lengths, lengths, device
        self._grow(max(slots) + 1, max(lengths))
        token_slots: list[int] = []
        positions: list[int] = []
        for slot, new, total in zip(slots, new_lengths, lengths, strict=True):
            token_slots += [slot] * new
            positions += range(total - new, total)
        self._token_slots, self.positions = self.on_device(token_slots), self.on_device(positions)
        ends = list(itertools.accumulate(new_lengths))
        self.last_rows = self.on_device([end - 1 for end in ends])
        self._decoding = [i for i, new in enumerate(new_lengths) if new == 1]
        self._filling = [(i, ends[i] - new) for i, new in enumerate(new_lengths) if new > 1]
        if self._decoding:
            self._decode_slots = self.on_device([slots[i] for i in self._decoding])
            self._decode_rows = self.on_device([ends[i] - 1 for i in self._decoding])
            self._num_used = max(slots[i] for i in self._decoding) + 1
            self._longest = max(lengths[i] for i in self._decoding)
            seen = [1] * self._num_used
            for i in self._decoding:
                seen[slots[i]] = lengths[i]
            places = torch.arange(self._longest, device=device)
            self._visible = (places < self.on_device(seen)[:, None])[:, None, None, :]

    def on_device(self, values: Sequence[int] | Sequence[float]) -> Tensor:
        """A tensor of the step's device, int64 or float64, for which the host does not wait."""
        tensor = torch.tensor(values, dtype=None if isinstance(values[0], int) else torch.float64)
        if self._device.type == "cuda":
            # from other memory than pinned the copy would wait for all that the device has still to do
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    def copy(self, sources: list[int], destinations: list[int], *, num_tokens: int) -> None:
        """Gives the slots `destinations` the first `num_tokens` keys and values of `sources`, slot by slot."""
        self._grow(max(destinations) + 1, num_tokens)
        for buffers in (self.keys, self.values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer = self._with_room(buffer, like=buffer)
                buffer[self.on_device(destinations), :, :num_tokens] = buffer[self.on_device(sources), :, :num_tokens]

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        self._capacity = (
            _grown(self._capacity[0], num_slots, most=self.num_slots),
            _grown(self._capacity[1], num_tokens, most=self.max_tokens),
        )

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values, [1, H_kv, T, d], and returns the whole buffers of the layer."""
        for buffers, new in ((self.keys, key), (self.values, value)):
            buffers[layer] = self._with_room(buffers.get(layer), like=new)
        self.keys[layer][self._token_slots, :, self.positions] = key[0].transpose(0, 1)
        self.values[layer][self._token_slots, :, self.positions] = value[0].transpose(0, 1)
        return self.keys[layer], self.values[layer]

    def _with_room(self, buffer: Tensor | None, *, like: Tensor) -> Tensor:
        """`buffer`, or a larger one that holds what it holds, [slots, H_kv, tokens, d] of the present capacity."""
        num_slots, num_tokens = self._capacity
        if buffer is not None and (buffer.shape[0], buffer.shape[2]) == self._capacity:
            return buffer
        grown = like.new_zeros(num_slots, like.shape[1], num_tokens, like.shape[3])
        if buffer is not None:
            grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
        return grown

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
        """query: [1, H, T, d], the packed new tokens; keys, values: the buffers. Returns [1, H, T, d]."""
        output = torch.empty_like(query)
        num_kv = keys.shape[1]
        repeats = query.shape[1] // num_kv
        if self._decoding:
            # slots that are not decoding ride along and are thrown away: gathering the others would copy the cache
            rows = query.new_zeros(self._num_used, num_kv, repeats, query.shape[3])
            rows[self._decode_slots] = query[0].transpose(0, 1)[self._decode_rows].unflatten(1, (num_kv, repeats))
            used = slice(0, self._num_used), slice(None), slice(0, self._longest)
            attended = F.scaled_dot_product_attention(
                rows, keys[used], values[used], attn_mask=self._visible, scale=scale
            )
            output[0, :, self._decode_rows] = attended[self._decode_slots].flatten(1, 2).transpose(0, 1)
        for i, start in self._filling:
            new, total = self.new_lengths[i], self.lengths[i]
            q = query[:, :, start : start + new]
            k = keys[self.slots[i], None, :, :total].repeat_interleave(repeats, dim=1)
            v = values[self.slots[i], None, :, :total].repeat_interleave(repeats, dim=1)
            mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
            output[:, :, start : start + new] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return output

    def move(self, source: int, destination: int) -> None:
        """Keeps the used slots together: the sequence in `source` goes to the freed slot `destination`."""
        for buffers in (self.keys, self.values):
            for buffer in buffers.values():
                buffer[destination].copy_(buffer[source])


def _grown(capacity: int, needed: int, *, most: int) -> int:
    """
    >>> _grown(0, 5, most=100), _grown(8, 9, most=100), _grown(64, 65, most=100), _grown(8, 8, most=100)
    (5, 16, 100, 8)
    """
    return capacity if needed <= capacity else min(max(2 * capacity, needed), most)


def flash_varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, longest: int, scale: float
) -> Tensor:
    """`block_causal_attention` by flash-attn's varlen kernel: the same function in bfloat16 or float16 on a GPU."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output: Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True
    )
    return output.transpose(0, 1)[None]
