"""A `CreditRule` as the compiled modules take it."""

from typing import Any

from gtpo_kernels.turn_advantages.reference import CreditRule


def compiled_rule(module: Any, rule: CreditRule) -> Any:
    """The `CreditRule` of `module`, which is gtpo_kernels._cpu or gtpo_kernels._cuda."""
    return module.CreditRule(
        gamma_before=rule.gamma_before,
        gamma_after=rule.gamma_after,
        per_trajectory=rule.per_trajectory,
        scope=getattr(module.Scope, rule.scope),
        population=getattr(module.Population, rule.population),
        centre=getattr(module.Centre, rule.centre),
        divides=rule.scale == "std",
        ddof=rule.ddof,
        eps=rule.eps,
        keeps_alone=rule.singleton == "keep",
    )
