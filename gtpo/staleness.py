"""Guards against a sampler whose weights are not those that are trained, as when it never took an update."""

from collections.abc import Sequence

from torch import Tensor

from gtpo.types import RunFault, Trajectory

# Nats a token, in the mean: well above what rounding makes.
_MAX_GAP_FLOAT32, _MAX_GAP_BFLOAT16 = 1e-3, 0.1


class StaleSampler(RunFault):
    """The sampler's weights are not those of the policy: what it samples would be credited to another model."""


def refuse_other_version(groups: Sequence[Sequence[Trajectory]], *, version: int) -> None:
    """Raises StaleSampler unless every turn says that `version` of the weights sampled it."""
    turns = [turn for group in groups for trajectory in group for turn in trajectory.turns]
    if other := [turn.policy_version for turn in turns if turn.policy_version != version]:
        raise StaleSampler(
            f"{len(other)} of {len(turns)} turns were sampled by version {other[0]} of the weights, the policy is at "
            f"version {version}: the sampler did not take the weights that it was given"
        )


def refuse_logprob_gap(gaps: Sequence[Tensor], *, bound: float | None, bfloat16: bool, step: int) -> None:
    """Raises StaleSampler where |log-prob of the trainer - log-prob of the sampler| has a mean above `bound`, in nats.

    gaps: of the tokens in the loss, for each micro-batch. bound: None takes that of rounding in the policy's dtype.
    A sampler that is behind by less than the bound does no more harm than rounding does.
    """
    if bound is None:
        bound = _MAX_GAP_BFLOAT16 if bfloat16 else _MAX_GAP_FLOAT32
    count = sum(len(gap) for gap in gaps)
    mean = sum(float(gap.sum()) for gap in gaps) / max(count, 1)
    # written so that NaN is refused too
    if not mean <= bound:
        raise StaleSampler(
            f"step {step + 1}: the sampler's log-probs of {count} tokens are {mean:.3g} nats from the trainer's in the "
            f"mean, rollout.max_logprob_gap is {bound:g}: the sampler has other weights or computes another function"
        )
