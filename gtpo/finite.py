"""Guards against numbers that are NaN or infinite: nothing is learned along them, nothing is sampled from them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from gtpo.batch import Batch, PackedSequence
from gtpo.policy import Policy
from gtpo.types import RunFault


class NonFiniteLoss(RunFault):
    """The loss, its gradient or a weight is NaN or infinite. The batch of a bad loss was saved."""


def refuse_non_finite_loss(
    loss: float, norm: float, batches: Sequence[Batch | PackedSequence], *, step: int, folder: Path, phase: str = ""
) -> None:
    """Raises NonFiniteLoss, with the batches saved in `folder`, unless the loss and its gradient's norm are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    name = f"{phase}step {step + 1}"
    path = folder / f"nonfinite_batch_{name.replace(' ', '_')}.pt"
    torch.save({"step": step + 1, "batches": [dataclasses.asdict(batch) for batch in batches]}, path)
    raise NonFiniteLoss(
        f"{name}: loss {loss}, gradient norm {norm}; the batch is in {path}, "
        "the last good weights in the last checkpoint"
    )


def refuse_non_finite_weights(policy: Policy) -> None:
    """Raises NonFiniteLoss before sampling: from such weights the sampler would draw ids that do not exist."""
    bad = [name for name, value in policy.weights().items() if not bool(value.isfinite().all())]
    if bad:
        raise NonFiniteLoss(f"{len(bad)} weights are not finite, the first is {bad[0]}; nothing was sampled")
