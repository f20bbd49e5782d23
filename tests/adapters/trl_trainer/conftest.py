"""The trainers that these tests build, on one thread."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.trl_trainer.training import BUILT, example, example_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BUILT:
    def build(**options: Any) -> Any:
        arguments = {"per_device_train_batch_size": 8, "num_generations": 4, **options.pop("arguments", {})}
        if arguments.get("beta"):
            # TRL loads the reference policy from where the model came from
            model, tokenizer = example_model()
            model.save_pretrained(tmp_path / "model")
            model.config._name_or_path = str(tmp_path / "model")
            monkeypatch.setattr(example, "build_model", lambda: (model, tokenizer))
        return example.build_trainer(str(tmp_path), arguments=arguments, **options)

    return build
