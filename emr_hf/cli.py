"""The command `emr-hf`: one verb a thing one can do, results on stdout, messages on stderr."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from . import __version__
from .distributed import PARTNER_TIMEOUT, is_main_process, launch, launched_size
from .errors import EMRError, OptionError, one_line
from .quiet import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status.

    It is 0, 1 after an error, 130 when interrupted and 141 when nobody reads the results any more. An error is one
    line on stderr; `--debug` prints where it came from too. Of a launcher's processes all merge, the main one does
    everything else.
    """
    collecting = gc.isenabled()
    gc.disable()  # importing torch and transformers makes a million objects, and what follows few
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path need not be text
    try:
        return _main(arguments)
    finally:
        if collecting:
            gc.enable()


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    if options.run is not _merge and not is_main_process():
        return 0
    try:
        status = _launch(options)
        if status is None:
            quiet_libraries()
            options.run(options)
            print(end="", flush=True)  # what is not yet written out may still fail
        return status or 0
    except KeyboardInterrupt:
        _complain("interrupted, nothing was written")
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Tell the user of an error in one line; returns the exit status."""
    if isinstance(error, OSError) and not isinstance(error, EMRError):
        _let_go_of_stdout()
        if isinstance(error, BrokenPipeError):
            return 141  # 128 + SIGPIPE, as of any command in a pipe
    if isinstance(error, (EMRError, OSError)):
        _complain(" ".join(str(error).splitlines()))
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        _complain(f"out of memory: {one_line(error)}".removesuffix(": "), everywhere=True)
    else:
        what = f"{type(error).__name__}: {one_line(error)}"
        _complain(f"internal error: {what}; run again with --debug and report it", everywhere=True)
    return 1


def _let_go_of_stdout() -> None:
    """Drop what could not be written: Python would try again when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _launch(options: argparse.Namespace) -> int | None:
    """Start the processes that are asked for, unless a launcher has; their exit status."""
    count, launched = getattr(options, "num_processes", None), launched_size()
    if count is None or count == launched:
        return None
    if launched > 1:
        raise OptionError(f"num_processes={count}: a launcher has started {launched} processes already")
    return launch([sys.executable, "-m", "emr_hf", *options.arguments], count, Path(options.out))


def _complain(message: str, everywhere: bool = False) -> None:
    """Print a message, of several processes in the main one, which is told of the others' errors."""
    if everywhere or is_main_process():
        with suppress(OSError):
            print(f"emr-hf: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emr-hf",
        description="Merge finetunes of one pretrained model into one repo that becomes any of its tasks.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help=_DEBUG)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run, text: str, *names: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG)
        for positional in names:
            sub.add_argument(positional, help=_POSITIONALS[positional])
        return sub

    sub = verb("check", _check, "validate a recipe from configurations and headers, and print the plan", "recipe")
    sub.add_argument("out", nargs="?", help="folder to check for space and for what is there already")
    sub.add_argument("--overwrite", action="store_true", help="the folder may hold a merged repo already")
    _add_layout(sub)
    sub = verb("merge", _merge, "merge a recipe's finetunes or adapters into a repo", "recipe", "out")
    _add_overwrite(sub)
    _add_layout(sub)
    _add_format(sub)
    sub.add_argument("--threads", type=int, help="to work with in each process (default: as many as torch has)")
    sub.add_argument("--num-processes", type=int, help="to share the work out among (default: the launcher's, or one)")
    sub.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: %(default)s)")
    sub.add_argument(
        "--partner-timeout",
        type=float,
        default=PARTNER_TIMEOUT,
        metavar="SECONDS",
        help="end when a process is stopped, hung or out of reach for so long; busy it may be (default: %(default)g)",
    )
    sub = verb("align", _align, "write a recipe's models with their units in the first one's order", "recipe", "out")
    sub.add_argument("--overwrite", action="store_true", help="replace what an earlier alignment wrote")
    sub = verb(
        "add", _add, "add a task to a merged repo, without its other finetunes", "repo", "task", "finetune", "out"
    )
    _add_overwrite(sub)
    _add_format(sub)
    sub = verb("remove", _remove, "remove a task from a merged repo", "repo", "task", "out")
    sub.add_argument("--default-task", help="active after loading (default: the repo's, or the first one left)")
    _add_overwrite(sub)
    _add_format(sub)
    sub = verb("inspect", _inspect, "print what a merged repo holds", "repo")
    sub.add_argument("--verify", action="store_true", help="compare the tensor files with the digests in the report")
    sub.add_argument("--plot", metavar="FILE", help="draw what was lost, layers by tasks: .png, .svg or .pdf")
    _add_format(sub)
    sub = verb("eval", _eval, "measure a task of a merged repo on labelled data", "repo")
    _add_evaluation(sub)
    _add_format(sub)
    sub = verb("export", _export, "write one task so that transformers or PEFT loads it by itself", "repo", "out")
    sub.add_argument("--task", required=True, help="the task")
    sub.add_argument(
        "--as",
        dest="save_as",
        choices=("model", "lora", "ia3"),
        default="model",
        help="a plain checkpoint, a LoRA by truncated SVD, or an (IA)³ adapter (default: %(default)s)",
    )
    sub.add_argument("--rank", type=int, help="of the LoRA")
    sub.add_argument("--max-shard-size", default="5GB", help="of one file (default: %(default)s)")
    sub = verb("push", _push, "upload a merged repo to the Hub", "folder", "repo_id")
    sub.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    return parser


_DEBUG = "show where an error comes from, with Python's traceback"
_POSITIONALS = {
    "recipe": "YAML file: base, tasks (name: folder or Hub id), and options",
    "out": "folder to write",
    "repo": "merged repo: a folder or a Hub id",
    "task": "name of the task",
    "finetune": "full checkpoint or PEFT adapter: a folder or a Hub id",
    "folder": "merged repo",
    "repo_id": "Hub id, such as me/bert-emr",
}


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace a merged repo that is there already")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as",
        dest="save_as",
        choices=("model", "peft"),
        default="model",
        help="model: with the base in it; peft: an adapter for a base kept elsewhere (default: %(default)s)",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the output (default: text)")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, help=".csv, .tsv, .json(l), .parquet, a saved folder, or Hub id[:split]"
    )
    parser.add_argument("--task", help="the task (default: the repo's default task)")
    parser.add_argument("--config", help="of the data, where it has several, such as sst2 of nyu-mll/glue")
    parser.add_argument("--split", help="of the data, where it has several")
    parser.add_argument(
        "--text-column",
        nargs="+",
        metavar="COLUMN",
        help="of the texts or images; two of pairs (default: by its name)",
    )
    parser.add_argument(
        "--label-column", metavar="COLUMN", help="of the labels, names or ids (default: label or labels)"
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=["accuracy"],
        help="names or paths for evaluate.load; f1:macro for an average (default: accuracy)",
    )
    parser.add_argument("--compare", metavar="MODEL", help="the task's own finetune, to measure on the same rows")
    parser.add_argument("--batch-size", type=int, default=32, help="rows at a time (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda (default: %(default)s)")


def _show(result: object, style: str) -> None:
    if style == "json":
        from .report import to_json, without_nan

        print(to_json(without_nan(asdict(result))))  # type: ignore[call-overload]
    else:
        print(result)


def _check(options: argparse.Namespace) -> None:
    from . import Recipe, check

    print(check(Recipe.load(options.recipe), options.out, options.overwrite, options.save_as))


def _merge(options: argparse.Namespace) -> None:
    from . import Recipe, merge_recipe

    report = merge_recipe(
        Recipe.load(options.recipe),
        options.out,
        save_as=options.save_as,
        overwrite=options.overwrite,
        threads=options.threads,
        device=options.device,
        partner_timeout=options.partner_timeout,
        tell=lambda plan: print(plan, file=sys.stderr),
    )
    if is_main_process():
        _show(report, options.format)


def _align(options: argparse.Namespace) -> None:
    from . import Recipe, align_recipe

    print(align_recipe(Recipe.load(options.recipe), options.out, overwrite=options.overwrite))


def _add(options: argparse.Namespace) -> None:
    from . import add_task

    report = add_task(options.repo, options.task, options.finetune, options.out, overwrite=options.overwrite)
    _show(report, options.format)


def _remove(options: argparse.Namespace) -> None:
    from . import remove_task

    report = remove_task(
        options.repo, options.task, options.out, default_task=options.default_task, overwrite=options.overwrite
    )
    _show(report, options.format)


def _inspect(options: argparse.Namespace) -> None:
    from . import inspect
    from .plotting import check_plot

    if options.plot is not None:
        check_plot(options.plot)
    found = inspect(options.repo, verify=options.verify)
    if options.plot is not None:
        print(f"emr-hf: wrote {found.plot(options.plot)}", file=sys.stderr)
    _show(found, options.format)


def _eval(options: argparse.Namespace) -> None:
    from . import evaluate_task

    with suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
    found = evaluate_task(
        options.repo,
        options.data,
        options.task,
        config=options.config,
        split=options.split,
        text_column=options.text_column,
        label_column=options.label_column,
        metrics=options.metric,
        batch_size=options.batch_size,
        rows=options.rows,
        device=options.device,
        compare=options.compare,
    )
    _show(found, options.format)


def _export(options: argparse.Namespace) -> None:
    from . import export

    report = export(
        options.repo,
        options.task,
        options.out,
        save_as=options.save_as,
        rank=options.rank,
        max_shard_size=options.max_shard_size,
    )
    if report is not None:
        print(report, file=sys.stderr)
    print(options.out)


def _push(options: argparse.Namespace) -> None:
    from . import push_folder

    print(push_folder(options.folder, options.repo_id, private=options.private, create_pr=options.create_pr))


if __name__ == "__main__":
    sys.exit(main())
