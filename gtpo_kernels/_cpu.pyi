"""The compiled module of csrc/bindings.cpp."""

import enum

import numpy as np
from numpy.typing import NDArray

class Scope(enum.Enum):
    group = ...
    batch = ...
    group_turn = ...
    group_anchor = ...
    none = ...

class Population(enum.Enum):
    turns = ...
    trajectories = ...
    tokens = ...

class Centre(enum.Enum):
    mean = ...
    leave_one_out = ...
    none = ...

class CreditRule:
    def __init__(
        self,
        *,
        gamma_before: float,
        gamma_after: float,
        per_trajectory: bool,
        scope: Scope,
        population: Population,
        centre: Centre,
        divides: bool,
        ddof: int,
        eps: float,
        keeps_alone: bool,
    ) -> None: ...

def turn_returns(
    turn_rewards: NDArray[np.float64], cu_turns: NDArray[np.int64], gamma: float
) -> NDArray[np.float64]: ...
def turn_advantages(
    turn_rewards: NDArray[np.float64],
    cu_turns: NDArray[np.int64],
    group_ids: NDArray[np.int64],
    turn_ids: NDArray[np.int64],
    anchor_ids: NDArray[np.int64] | None,
    rule: CreditRule,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]: ...
def turn_advantages_float32(
    turn_rewards: NDArray[np.float64],
    cu_turns: NDArray[np.int64],
    group_ids: NDArray[np.int64],
    turn_ids: NDArray[np.int64],
    anchor_ids: NDArray[np.int64] | None,
    rule: CreditRule,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]: ...

class InstructionSet(enum.Enum):
    portable = ...
    avx2 = ...
    avx512 = ...

class LogitType(enum.Enum):
    float32 = ...
    bfloat16 = ...
    float64 = ...

class Logits:
    def __init__(
        self, *, data: int, type: LogitType, num_rows: int, vocab: int, row_stride: int, vocab_stride: int
    ) -> None: ...

def instruction_sets() -> list[InstructionSet]: ...
def instruction_set() -> InstructionSet: ...
def set_instruction_set(set: InstructionSet) -> None: ...
def exp(x: NDArray[np.float32]) -> NDArray[np.float32]: ...
def tanh(x: NDArray[np.float32]) -> NDArray[np.float32]: ...
def token_statistics(
    logits: Logits,
    rows: NDArray[np.int64] | None,
    targets: NDArray[np.int64],
    temperature: NDArray[np.float64] | None,
    *,
    softcap: float,
    num_threads: int,
) -> NDArray[np.float64]: ...
def token_gradient(
    logits: Logits,
    d_logits: Logits,
    rows: NDArray[np.int64] | None,
    targets: NDArray[np.int64],
    temperature: NDArray[np.float64] | None,
    *,
    softcap: float,
    grad_logprobs: NDArray[np.float64],
    grad_entropy: NDArray[np.float64] | None,
    num_threads: int,
) -> None: ...
def gtpo_loss(
    logits: Logits,
    d_logits: Logits | None,
    rows: NDArray[np.int64] | None,
    targets: NDArray[np.int64],
    temperature: NDArray[np.float64] | None,
    *,
    softcap: float,
    advantages: NDArray[np.float64],
    old_logprobs: NDArray[np.float64] | None,
    denominator: float,
    clip_low: float,
    clip_high: float,
    num_threads: int,
) -> NDArray[np.float64]: ...
def clipped_loss(
    logprobs: NDArray[np.float64],
    advantages: NDArray[np.float64],
    loss_mask: NDArray[np.bool_],
    old_logprobs: NDArray[np.float64] | None,
    entropy: NDArray[np.float64] | None,
    *,
    denominator: float,
    clip_low: float,
    clip_high: float,
    all_metrics: bool,
    need_gradient: bool,
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]: ...
