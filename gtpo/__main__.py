"""The command line: `gtpo init`, `gtpo train`, `gtpo sft`, `gtpo eval`, `gtpo config`, `gtpo methods`,
`gtpo sandbox`."""

import argparse
import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gtpo.config import METHODS, Config, describe_keys, load_config
from gtpo.config_lines import place_of
from gtpo.methods import NAMESAKES, PRESETS, describe_credit, describe_loss, describe_reward
from gtpo.sandbox import SandboxUnavailable
from gtpo.types import RunFault

if TYPE_CHECKING:
    from gtpo.trainer import Trainer

# what is not the key of a config
_FLAGS = ("--help", "--checkpoint", "--overwrite", "--resume", "--min-tier", "--profile", "--kind", "--adapter")
_DESCRIPTION = """\
Train tool-using language models with one reward a turn (GTPO, arXiv 2511.14846).

  gtpo init my_project                              a small project of your own: environment, reward, configuration
  gtpo train examples/demo.toml                     warm-up, evaluation, GTPO, evaluation
  gtpo train examples/demo.toml --method grpo       the same with the GRPO baseline
  gtpo train examples/demo.toml --train.steps 20    any key of the config can be set as --table.key value
  gtpo eval examples/demo.toml --checkpoint runs/demo/checkpoints/last
  gtpo config                                       every key with its default
  gtpo methods                                      every method with its formula and source
  gtpo sandbox check                                what isolates model-written code here, tested by attempts
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it did its work. What went wrong is said in one line: 2 for the caller's mistake, before
    any work; 1 for a fault from outside in mid-run; 130 for Ctrl-C."""
    try:
        parser = _parser()
        own, overrides = _split_overrides(sys.argv[1:] if arguments is None else arguments)
        options, stray = parser.parse_known_args(own)
        overrides += stray
        if options.command is None:
            parser.print_help()
            raise _Refused("expected a command: see `gtpo --help`")
        foreign = [word for word in stray if word.partition("=")[0] in _FLAGS]
        if foreign:
            raise _Refused(f"`gtpo {options.command}` takes no {foreign[0]}")
        try:
            code = int(options.run(options, overrides))
        except _Refused as error:
            raise _Refused(f"{error}{_place(str(error), options, overrides)}") from error
        sys.stdout.flush()
        return code
    except _Refused as error:
        print(f"gtpo: {error}", file=sys.stderr)
        return 2
    except RunFault as error:
        print(f"gtpo: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gtpo: interrupted; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `gtpo config | head`: ends as a command that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the `--key value` pairs out, wherever they stand: argparse would take a value for the CONFIG.toml."""
    own, overrides = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or word.partition("=")[0] in _FLAGS:
            own.append(word)
        else:
            overrides += [word] if "=" in word else [word, *itertools.islice(words, 1)]
    return own, overrides


class _Refused(Exception):
    """What the caller asked for cannot be done, and no work was started. A fault in mid-run keeps its traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; `{self.prog} --help` says more")


@contextlib.contextmanager
def _refusing_mistakes() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError, SandboxUnavailable, RunFault) as error:
        raise _Refused(" ".join(str(error).split())) from error


def _place(message: str, options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """The file and the line of the key that a refusal names, if it was read from there."""
    if not hasattr(options, "config"):
        return ""
    overridden = {word[2:].partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")}
    return place_of(message, Path(options.config), overridden)


@contextlib.contextmanager
def _opened(config: Config, *, resume: bool = False, overwrite: bool = False) -> Iterator["Trainer"]:
    with contextlib.ExitStack() as stack:
        with _refusing_mistakes():
            # heavy imports wait until the arguments are known to be right
            from gtpo.trainer import Trainer

            trainer = stack.enter_context(Trainer(config, resume=resume, overwrite=overwrite))
        yield trainer


def _load(options: argparse.Namespace, overrides: Sequence[str]) -> Config:
    with _refusing_mistakes():
        return load_config(options.config, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gtpo", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="{init,train,sft,eval,config,methods,sandbox}"
    )
    init = commands.add_parser("init", help="write a small project: an environment, a reward, a configuration")
    init.add_argument("folder", metavar="DIR", help="where to; it is made")
    init.set_defaults(run=_init)
    for name, run, text in (
        ("train", _train, "warm up (if sft.steps > 0), evaluate, train with the method, evaluate again"),
        ("sft", _sft, "only the supervised warm-up on the environments' demonstrations"),
        ("eval", _eval, "evaluate a checkpoint on the held-out tasks: success, avg@k, pass@k, turns, calls"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text}.",
            epilog="Any config key: --table.key value, e.g. --rollout.group_size 4. `gtpo config` lists them.",
            allow_abbrev=False,
        )
        command.add_argument("config", metavar="CONFIG.toml", help="the run's configuration")
        command.set_defaults(run=run)
        if name == "eval":
            command.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a Hugging Face model folder")
        else:
            command.add_argument("--overwrite", action="store_true", help="delete what output_dir holds and start anew")
        if name == "train":
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on from the last checkpoint of output_dir; start where there is none",
            )
    listing = commands.add_parser("config", help="list every config key with its default")
    listing.set_defaults(run=_list_keys)
    methods = commands.add_parser("methods", help="list every method with its formula and source")
    methods.set_defaults(run=_list_methods)
    sandbox = commands.add_parser("sandbox", help="`gtpo sandbox check`: what isolates model-written code here, tested")
    checks = sandbox.add_subparsers(required=True, metavar="{check}")
    check = checks.add_parser(
        "check",
        help="self test and abuse suite",
        description="What isolates model-written code here, tested by attempts.",
    )
    check.add_argument("--min-tier", default="namespaces", metavar="TIER", help="landlock or namespaces (default)")
    check.add_argument("--profile", default="plain", help="the libraries of the cells: plain (default), math, data")
    check.add_argument("--kind", action="append", default=[], help="only attempts of this kind; can be repeated")
    check.add_argument("--adapter", default="", metavar="MODULE:NAME", help="another sandbox than ours")
    check.set_defaults(run=_check_sandbox)
    return parser


def _init(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if overrides:
        raise _Refused(f"`gtpo init` takes DIR alone, got {overrides[0]}")
    from gtpo.starter import write_starter

    with _refusing_mistakes():
        paths = write_starter(options.folder)
    _say([f"wrote {path}" for path in paths])
    _say([f"now: cd {options.folder} && gtpo train {paths[-1].name}"])
    return 0


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(options, overrides)
    from gtpo.checkpoints import writing
    from gtpo.report.plot import plot_run
    from gtpo.report.table import before_after_table
    from gtpo.run_folder import read_rows, write_json

    with _opened(config, resume=options.resume, overwrite=options.overwrite) as trainer:
        _say(trainer.describe())
        before, after = trainer.train()
        summary = trainer.summary(before, after) | {"peak_memory_mb": _peak_memory_mb()}
        folder = trainer.run.path
        table = before_after_table(before, after)
        with writing(folder / "table.md"):
            (folder / "table.md").write_text(table + "\n")
        with writing(folder / "plot.png"):
            plot_run(read_rows(folder / "metrics.jsonl"), folder / "plot.png")
        write_json(folder / "summary.json", summary)
    print(f"\n{config.method}, seed {config.seed}\n{table}")
    print(f"\n{_split(summary['seconds'])}")
    print(f"results: {folder}/summary.json, table.md, plot.png, turns.jsonl, checkpoints/last")
    return 0


def _sft(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(options, overrides)
    if config.sft.steps < 1:
        raise _Refused(f"sft.steps must be at least 1 for `gtpo sft`, got {config.sft.steps}")
    with _opened(config, overwrite=options.overwrite) as trainer:
        _say(trainer.describe())
        evaluation = trainer.warm_up_only()
    print(f"success {evaluation.success:.1%} on {evaluation.num_tasks} held-out tasks")
    print(f"results: {trainer.run.path}/checkpoints/last; `gtpo train CONFIG.toml --resume` goes on from there")
    return 0


def _eval(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = _load(options, overrides)
    with _refusing_mistakes():
        # of a link what it leads to now: a live run sets it anew
        checkpoint = Path(options.checkpoint).resolve()
    if not checkpoint.is_dir():
        raise _Refused(f"--checkpoint must be a Hugging Face model folder, got {options.checkpoint!r}")
    model = dataclasses.replace(config.model, source=str(checkpoint), lora_rank=0)
    folder = Path(config.output_dir) / "eval"
    # without steps, what only training needs is not asked for
    sft, train = dataclasses.replace(config.sft, steps=0), dataclasses.replace(config.train, steps=0)
    config = dataclasses.replace(config, model=model, output_dir=str(folder), sft=sft, train=train)
    from gtpo.run_folder import write_json

    with _opened(config, overwrite=True) as trainer:
        _say(trainer.describe())
        evaluation = trainer.evaluate(step=0)
        result = dataclasses.asdict(evaluation)
        write_json(folder / "evaluation.json", result)
    print(
        f"{evaluation.num_tasks} tasks, k = {evaluation.samples}: "
        f"avg@k {evaluation.success:.1%}, pass@k {evaluation.pass_at_k:.1%}, {evaluation.turns:.2f} turns, "
        f"{evaluation.calls:.2f} calls, {evaluation.invalid_calls:.3f} invalid"
    )
    print(f"results: {folder}/evaluation.json")
    return 0


def _list_keys(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if overrides:
        raise _Refused(f"`gtpo config` takes no arguments, got {' '.join(overrides)}")
    previous = ""
    for key, value, meaning, allowed, purpose in describe_keys():
        table = key.rpartition(".")[0]
        if table != previous:
            print(f"\n[{table}]  {purpose}")
            previous = table
        print(f"  {key} = {value!r}".ljust(46) + f"  # {meaning} ({allowed})")
    print(f"\nmethods: {', '.join(METHODS)}; `gtpo methods` says what [reward], [credit], [loss] are in each")
    return 0


def _list_methods(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if overrides:
        raise _Refused(f"`gtpo methods` takes no arguments, got {' '.join(overrides)}")
    for name, preset in PRESETS.items():
        print(f"{name}  {preset.source}")
        print(f"  reward  {describe_reward(preset.method.reward)}")
        print(f"  credit  {describe_credit(preset.method.credit)}")
        print(f"  loss    {describe_loss(preset.method.loss)}")
        print()
    print(
        'method = "NAME" selects one, keys of [reward], [credit], [loss] override its fields; '
        "notes on each: gtpo/methods/presets.py"
    )
    print(
        "norm[s](x) = (x - mean) / (deviation + eps) over the entries of scope s; centre[s](x) = x - mean;\n"
        "leave-one-out[s](x) = x - mean of the others; whiten: norm over the tokens of the batch"
    )
    print("\nOther methods called GTPO:")
    for name, covered in NAMESAKES.items():
        print(f"  {name}: {covered}")
    return 0


def _check_sandbox(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    if overrides:
        raise _Refused(f"`gtpo sandbox check` takes no config keys, got {' '.join(overrides)}")
    from gtpo.sandbox.abuse.check import run_check

    with _refusing_mistakes():
        contained = run_check(
            min_tier=options.min_tier, profile=options.profile, only=options.kind, adapter=options.adapter
        )
    return 0 if contained else 1


def _peak_memory_mb() -> float | None:
    """The process's peak of resident memory; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _split(seconds: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    return f"{seconds['total']:.0f} s ({parts}; tools run beside generation)"


__all__ = ["Config", "main"]

if __name__ == "__main__":
    sys.exit(main())
