"""The compiled module of csrc/bindings.cpp."""

import enum

import numpy as np
from numpy.typing import NDArray

class Scope(enum.Enum):
    group = ...
    batch = ...
    group_turn = ...
    none = ...

class Population(enum.Enum):
    turns = ...
    trajectories = ...

def turn_returns(
    turn_rewards: NDArray[np.float64], cu_turns: NDArray[np.int64], gamma: float
) -> NDArray[np.float64]: ...
def turn_advantages(
    turn_rewards: NDArray[np.float64],
    cu_turns: NDArray[np.int64],
    group_ids: NDArray[np.int64],
    turn_ids: NDArray[np.int64],
    *,
    gamma: float,
    scope: Scope,
    population: Population,
    ddof: int,
    eps: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]: ...
