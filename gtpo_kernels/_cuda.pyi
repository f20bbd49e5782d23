"""The compiled module of csrc/bindings_cuda.cpp.  Every address is of device memory, 0 for null."""

import enum

class DType(enum.Enum):
    float32 = ...
    float64 = ...
    bfloat16 = ...
    float16 = ...

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

class Logits:
    def __init__(
        self,
        *,
        dtype: DType,
        data: int,
        stride: int,
        num_rows: int,
        vocab: int,
        rows: int,
        targets: int,
        temperature: float,
        row_temperature: int,
        softcap: float,
    ) -> None: ...

class RowStatistics:
    def __init__(self, logprobs: int, entropy: int, row_max: int, log_sum: int) -> None: ...

class Ids:
    def __init__(self, data: int, wide: bool) -> None: ...

class Turns:
    def __init__(
        self, *, turn_rewards: int, dtype: DType, cu_turns: Ids, num_turns: int, num_trajectories: int
    ) -> None: ...

def token_logprobs(logits: Logits, statistics: RowStatistics, *, stream: int) -> None: ...
def token_logprobs_backward(
    logits: Logits,
    statistics: RowStatistics,
    *,
    grad_logprobs: int,
    grad_entropy: int,
    d_logits: int,
    stream: int,
) -> None: ...
def gtpo_loss(
    logits: Logits,
    *,
    d_logits: int,
    loss_mask: int,
    advantages: int,
    old_logprobs: int,
    denominator: int,
    clip_low: float,
    clip_high: float,
    all_metrics: bool,
    logprobs: int,
    entropy: int,
    stream: int,
) -> None: ...
def turn_returns(turns: Turns, *, gamma: float, returns: int, stream: int) -> None: ...
def turn_advantages(
    turns: Turns,
    *,
    group_ids: Ids,
    turn_ids: Ids,
    anchor_ids: Ids,
    num_tokens: int,
    rule: CreditRule,
    token_counts: int,
    exact_returns: int,
    exact_advantages: int,
    wide_results: bool,
    returns: int,
    turn_advantages: int,
    token_advantages: int,
    stream: int,
) -> None: ...
