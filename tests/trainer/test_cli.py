"""The command line: what it prints, and that a mistake of the caller ends in one clear line before any work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from gtpo.__main__ import main
from gtpo.config import describe_keys
from gtpo.run_folder import read_rows
from gtpo.sandbox import SandboxPool, SandboxUnavailable
from tests.trainer.conftest import tiny_policy
from tests.trainer.test_trainer import TINY_RUN, write_config

ROWS = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(8)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_jsonl(path: Path) -> str:
    return TINY_RUN.replace('name = "retry"', 'name = "jsonl"').replace(
        "{ num_items = 1, num_getters = 2 }", f'{{ path = "{path}" }}'
    )


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str, command: str = "train") -> str:
    """The one line that a refused command says; the run's folder must not have been made."""
    capsys.readouterr()
    assert main([command, str(folder / "config.toml"), *overrides]) == 2
    captured = capsys.readouterr()
    # transformers draws a bar while it reads a model
    lines = [line for line in captured.err.splitlines() if line and not line.startswith("Loading weights")]
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("gtpo: "), captured.err
    assert not (folder / "run").exists()
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a configuration whose run has ended."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(write_config(folder)), "--train.steps", "1"]) == 0
    return folder


def test_help_and_the_list_of_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert "one reward a turn" in capsys.readouterr().out
    assert main([]) == 2
    capsys.readouterr()
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gtpo: argument {") and "invalid choice: 'trian'" in error and error.count("\n") == 1
    assert main(["config"]) == 0
    listing = capsys.readouterr().out.splitlines()
    for key, value, meaning, allowed, _ in describe_keys():
        assert f"{f'  {key} = {value!r}':46}  # {meaning} ({allowed})" in listing
    assert f"{'  rollout.group_size = 8':46}  # trajectories for each task (int at least 2)" in listing
    assert any("# preset of [reward], [credit], [loss]; `gtpo methods` lists them (one of gtpo, " in x for x in listing)
    assert any(line.endswith("learning rate to 0 (one of linear, cosine, constant)") for line in listing)
    assert listing[-1].startswith("methods: gtpo, gtpo_dense, gtpo_batch, ")
    assert main(["config", "extra"]) == 2


def test_the_module_is_the_command_and_help_needs_no_model_library() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['gtpo', 'config']\n"
        "try: runpy.run_module('gtpo', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rollout.group_size = 8" in done.stdout


def test_a_reader_that_has_read_enough_is_no_fault() -> None:
    command = [sys.executable, "-m", "gtpo", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--rollout.group_sise", "4"], "unknown config key 'rollout.group_sise'; did you mean 'rollout.group_size'?"),
        (["--bogus"], "--bogus needs a value"),
        (["stray"], "expected --key value, got 'stray'"),
        (["--rollout.group_size", "1"], "rollout.group_size must be at least 2, got 1"),
        (["--method", "ppo"], "method must be one of gtpo, gtpo_dense, "),
        (["--train.steps", "many"], "config key 'train.steps': "),
        (["--environments", '[{name = "chess"}]'], "environment must be one of"),
        (["--environments", '[{name = "retry", options = {size = 2}}]'], "options of environment 'retry' must be"),
        (["--environments", '[{name = "jsonl"}]'], "environment 'jsonl' needs the options path"),
        (["--rollout.tools", '["python", "web"]'], "rollout.tools must be among python, calculator, search, "),
        (["--rollout.tools", '["calculator"]'], 'rollout.tools must hold "python", which call_format = "code" calls'),
        (["--environments.0.weight", "0"], "environments.0.weight must be above 0, got 0"),
        (["--environments.0.options", '{num_items = "a"}'], "'environments.0.options.num_items': expected a whole"),
        (["--reward.similarity", "foo"], "config key 'reward.similarity': Input should be 'ngram', got 'foo'"),
        (["--model.device", "nowhere"], "model.device must be one that PyTorch has here, got 'nowhere': "),
        (
            ["--model.attention=flash", "--model.device=meta", "--model.dtype=bfloat16", "--model.lora_rank=1"],
            'model.attention = "flash" needs a GPU and',
        ),
        (
            ["--model.attention=flash", "--model.device=meta", "--model.compute_dtype=bfloat16"],
            '"flash" needs a GPU and',
        ),
        (["--model.attention", "flash"], '"flash" needs model.compute_dtype = "bfloat16", got "float32"'),
        (["--model.dtype", "bfloat16"], 'model.dtype = "bfloat16" can train adapters only'),
        (["--sandbox.output_bytes", "1"], "sandbox.output_bytes must be from 512 to 16384, got 1"),
        (["--rollout.max_trajectory_tokens", "9"], "4 of 4 eval tasks have prompts too long for rollout.max_t"),
        (["--resume", "--overwrite"], "expected --resume or --overwrite, got both"),
        (["--model.source", "no/such/model"], 'model.source must be "tiny", "package:NAME", a folder or a hub id'),
    ],
)
def test_mistakes_in_the_configuration_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    write_config(tmp_path)
    assert message in refused(tmp_path, capsys, *overrides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is there a GPU, it can be asked for")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    assert "model.device must be one that PyTorch has here, got 'cuda'" in refused(
        tmp_path, capsys, "--model.device", "cuda"
    )


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    # its importer may have been imported by another test
    monkeypatch.delitem(sys.modules, "gtpo.lora", raising=False)
    write_config(tmp_path)
    assert "peft" in refused(tmp_path, capsys, "--model.lora_rank", "2")


def test_a_key_may_stand_before_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    for words in (["--seed", "-1"], ["--seed=-1"]):
        assert main(["train", *words, str(config), "--overwrite"]) == 2
        assert capsys.readouterr().err == "gtpo: seed must be at least 0, got -1\n"
    assert main(["train", str(config), "--seed"]) == 2
    assert "--seed needs a value" in capsys.readouterr().err


def test_a_flag_of_another_command_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(write_config(tmp_path)), "--resume"]) == 2
    assert capsys.readouterr().err == "gtpo: `gtpo sft` takes no --resume\n"


def test_a_data_set_without_demonstrations_cannot_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS * 4)
    write_config(tmp_path, with_jsonl(data).replace("num_eval = 4", "num_eval = 1"))
    assert "environment 'jsonl' has no scripted demonstrations" in refused(tmp_path, capsys)


def test_a_sandbox_that_does_not_start_leaves_the_run_that_was_to_be_overwritten(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(self: SandboxPool) -> None:
        raise SandboxUnavailable("no isolation\nhere")

    monkeypatch.setattr(SandboxPool, "start", unavailable)
    before = (trained / "run" / "metrics.jsonl").read_bytes()
    assert main(["train", str(trained / "config.toml"), "--overwrite"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "gtpo: no isolation here"
    assert (trained / "run" / "metrics.jsonl").read_bytes() == before
    assert main(["train", str(trained / "config.toml"), "--overwrite", "--sandbox.output_bytes", "1"]) == 2
    assert (trained / "run" / "metrics.jsonl").read_bytes() == before


def test_bad_data_sets_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    write_config(tmp_path, with_jsonl(data))
    assert "data.jsonl" in refused(tmp_path, capsys)
    write_rows(data, [])
    assert "empty data set" in refused(tmp_path, capsys)
    write_rows(data, [*ROWS, {"question": "9 + 9?", "solution": "18"}])
    error = refused(tmp_path, capsys)
    assert "line 9: expected a column among answer, ground_truth, found question, solution" in error
    write_rows(data, ROWS)
    error = refused(tmp_path, capsys)
    assert (
        "tasks.num_eval in a configuration) must be at most the 2 rows that are held out for evaluation, got 4" in error
    )


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config.toml" in refused(tmp_path, capsys)
    (tmp_path / "config.toml").write_text("steps: 3")
    assert "is not valid TOML" in refused(tmp_path, capsys)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    tiny_policy().save_model(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    write_config(tmp_path)
    assert "must have a chat template, got none" in refused(tmp_path, capsys, "--model.source", str(model))


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    (tmp_path / "model").mkdir()
    assert "model" in refused(tmp_path, capsys, "--model.source", str(tmp_path / "model"))


def test_train_writes_what_it_says(trained: Path) -> None:
    run = trained / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "gtpo" and summary["seed"] == 0
    before, after = (row for row in read_rows(run / "metrics.jsonl") if row["phase"] == "eval")
    assert summary["success_before"] == before["success"] and summary["turns_after"] == after["turns"]
    assert summary["num_tokens"]["sampled"] > summary["num_tokens"]["trained"] / 10 > 0
    assert summary["seconds"]["total"] > 0 and summary["peak_memory_mb"] > 10
    assert "| success rate" in (run / "table.md").read_text()
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_eval_reports_a_checkpoint_and_leaves_its_run_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    metrics = (run / "metrics.jsonl").read_bytes()
    config, checkpoint = str(trained / "config.toml"), str(run / "checkpoints" / "last")
    assert main(["eval", config, "--checkpoint", checkpoint, "--eval.samples", "2"]) == 0
    out = capsys.readouterr().out
    result = json.loads((run / "eval" / "evaluation.json").read_text())
    assert result["num_tasks"] == 4 and result["samples"] == 2 and result["pass_at_k"] >= result["success"]
    assert f"4 tasks, k = 2: avg@k {result['success']:.1%}, pass@k {result['pass_at_k']:.1%}" in out
    # one sample a task: the figures of the run's own last evaluation
    assert main(["eval", config, "--checkpoint", checkpoint]) == 0
    again = json.loads((run / "eval" / "evaluation.json").read_text())
    last = read_rows(run / "metrics.jsonl")[-1]
    assert again == {key: last[key] for key in again}
    assert (run / "metrics.jsonl").read_bytes() == metrics
    capsys.readouterr()
    assert main(["eval", config, "--checkpoint", str(trained / "nothing")]) == 2
    assert "--checkpoint must be a Hugging Face model folder" in capsys.readouterr().err


def test_sft_leaves_a_model_that_training_starts_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    assert "sft.steps must be at least 1" in refused(tmp_path, capsys, "--sft.steps", "0", command="sft")
    assert main(["sft", str(config), "--sft.steps", "2"]) == 0
    assert "on 4 held-out tasks" in capsys.readouterr().out
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["sft", "sft", "eval"] and rows[1]["loss"] < rows[0]["loss"]
    assert main(["sft", str(config)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    model = ["--model.source", str(tmp_path / "run" / "checkpoints" / "last"), "--output_dir", str(tmp_path / "second")]
    assert main(["train", str(config), *model, "--sft.steps", "0", "--train.steps", "1"]) == 0
    first, *_ = read_rows(tmp_path / "second" / "metrics.jsonl")
    assert {k: first[k] for k in ("success", "turns")} == {k: rows[-1][k] for k in ("success", "turns")}
