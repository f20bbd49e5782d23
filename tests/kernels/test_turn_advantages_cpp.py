"""The compiled turn_advantages below its door: what it must refuse itself, because it dereferences it."""

import numpy as np
import pytest

from gtpo_kernels import CreditRule, _cpu
from gtpo_kernels.turn_advantages.compiled import compiled_rule


def test_the_compiled_module_checks_what_it_dereferences() -> None:
    rewards, cu_turns, groups, ids = np.zeros(2), np.array([0, 2]), np.array([0]), np.array([0, 1])
    rule = compiled_rule(_cpu, CreditRule())
    for bad_cu_turns in ([0, 3], [1, 2], [0, 3, 2], [0, -1, 2]):
        with pytest.raises(ValueError, match="cu_turns must rise from 0"):
            _cpu.turn_returns(rewards, np.array(bad_cu_turns), 0.9)
    with pytest.raises(ValueError, match=r"cu_turns must be \[B\+1\]"):
        _cpu.turn_returns(rewards, np.zeros(0, np.int64), 0.9)
    for bad_id in (2, -2):
        with pytest.raises(ValueError, match="turn_ids must lie in"):
            _cpu.turn_advantages(rewards, cu_turns, groups, np.array([bad_id]), None, rule)
    with pytest.raises(ValueError, match=r"group_ids must be \[1\]"):
        _cpu.turn_advantages(rewards, cu_turns, np.array([0, 0]), ids, None, rule)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.turn_advantages(rewards.astype(np.float32), cu_turns, groups, ids, None, rule)
    with pytest.raises(ValueError, match=r"anchor_ids must be \[2\]"):
        _cpu.turn_advantages(rewards, cu_turns, groups, ids, np.array([0]), rule)
    with pytest.raises(ValueError, match="anchor_ids must be given"):
        _cpu.turn_advantages(
            rewards, cu_turns, groups, ids, None, compiled_rule(_cpu, CreditRule(scope="group_anchor"))
        )
