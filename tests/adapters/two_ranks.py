"""Three steps of TRL's trainer and of ours on two ranks that talk over gloo, a group split over both; prints the logs.

One interpreter that imports once and then forks: importing TRL costs more than the steps.  Before the fork nothing may
go backward, for autograd does not survive it.
"""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from multiprocessing.connection import wait
from typing import Any

import torch
import trl

from gtpo.adapters.layouts import GRPO
from tests.adapters.conftest import load_example

NUM_RANKS = 2


def logs(folder: str, **options: Any) -> list[list[float]]:
    example = load_example("trl_turn_rewards")
    trainer = example.build_trainer(
        folder,
        steps=3,
        arguments={
            "per_device_train_batch_size": 4,
            "num_generations": 16,  # half of them on each of two ranks, which generate for two steps at once
            "steps_per_generation": 2,
            "optim": "sgd",
            "learning_rate": 1.0,
            "epsilon": 0.02,
            "loss_type": "dapo",
            "ddp_backend": "gloo",
        },
        **options,
    )
    trainer.train()
    return [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "loss" in line]


def rank(number: int, port: int, folder: str, results: Any) -> None:
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    example = load_example("trl_turn_rewards")

    def looks(**columns: Any) -> list[float]:
        return [sum(row) for row in example.first_look(**columns)]

    rewards = {"reward_funcs": [looks, example.answered]}
    theirs = logs(f"{folder}/theirs", trainer=trl.GRPOTrainer, **rewards)
    ours = logs(f"{folder}/ours", credit={**GRPO, "eps": 1e-4}, **rewards)
    results.put((number, theirs, ours))
    torch.distributed.destroy_process_group()


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank, args=(number, port, folder, results)) for number in range(NUM_RANKS)]
        for process in ranks:
            process.start()
        while running := [process.sentinel for process in ranks if process.is_alive()]:
            wait(running)
            if any(process.exitcode for process in ranks):  # the other would wait for it in vain
                for process in ranks:
                    process.kill()
                raise SystemExit("a rank failed")
    print(json.dumps(sorted(results.get() for _ in ranks)))


if __name__ == "__main__":
    main()
