"""quantkit tune: learn from real evaluations which configuration of everything is best within a budget."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.commands import _common
from quantkit.commands.compress import (
    add_budget,
    add_evaluation,
    budget_of,
    check_methods,
    evaluation_of,
    finish,
    method_options,
    output_files,
    with_command,
)
from quantkit.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantkit.tuning.trials import Progressed
    from quantkit.tuning.tune import Tuned, Watcher

HELP = "search for the best configuration by measuring many"
USAGE = "quantkit tune MODEL --calib SRC --max-size SIZE [options]"
SHOWN = 12
HOLDOUT = 40  # percent of the samples: trials are many, and the least of noisy figures is too low


def add(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the .onnx file")
    _common.add_files(parser)
    _common.add_data(parser)
    add_evaluation(parser)
    add_budget(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--trials", metavar="N", type=int, default=40, help="configurations to measure (default: 40)")
    group.add_argument(
        "--tuner", metavar="NAME", default="quantune", help="one of `quantkit methods` (default: quantune)"
    )
    group.add_argument("--batch", metavar="N", type=int, default=1, help="measured at once (default: 1)")
    group.add_argument(
        "--objective",
        choices=("loss", "drop", "size"),
        help="what to make small: nats, the metric's drop, or bytes within --max-drop (default: loss; size where "
        "--max-drop is all that limits it)",
    )
    group.add_argument(
        "--history",
        metavar="DIR",
        help="folder of measured trials to learn from, whatever model they are of; this run's are added (default: "
        "this run's alone, in OUT with .trials.jsonl)",
    )
    group.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where a batch runs: processes here, or a Ray cluster (default: local)",
    )
    group.add_argument(
        "--no-refit",
        action="store_true",
        help="keep the model that was tried (else the best is made again with nearly all samples)",
    )
    _common.add_method_choice(parser, holdout=HOLDOUT)
    _common.add_run(parser)
    _common.add_output(parser)


def run(args: Namespace) -> int:
    model = _common.existing_file(args.model)
    outputs = output_files(args, model)
    _common.check_writable(outputs, {"input model": model, **_common.data_sources(args)})
    budget = budget_of(args)
    check_methods(args)
    if args.calib is None and not args.random_calibration:
        raise InputError("tuning needs calibration data to measure on: give --calib")
    history = history_file(args, outputs["--output"])
    options = {"holdout": HOLDOUT, **method_options(args)}
    calibration, evaluation = _common.calibration_of(args), evaluation_of(args)

    from quantkit.tuning.tune import TuneSettings, tune

    _common.keep_external(outputs, model)
    settings = TuneSettings(
        args.trials, args.tuner, args.batch, args.objective, history, args.executor, not args.no_refit
    )
    console = _common.console_of(args)
    try:
        with watching(console, quiet=args.quiet) as watch:
            found = tune(
                model,
                calibration=calibration,
                budget=budget,
                evaluation=evaluation,
                search_settings=settings,
                watch=watch,
                progress=_common.progress_of(args, console),  # above the same table
                **options,
            )
    except KeyboardInterrupt as stop:
        raise InputError(f"interrupted; the trials so far are kept in {history}: the same command goes on") from stop
    console.print(trials_table(found))
    console.print(f"{found.ended}; {found.known} of {len(found.trials)} trials were known from {history}")
    args.json, wanted = False, args.json
    code = finish(args, found.result, outputs)
    if wanted:
        report = with_command(found.result.report, args)
        _common.print_json({**report.to_dict(), **to_dict(found), "output": outputs["--output"]})
    return code


def history_file(args: Namespace, output: Path | None) -> Path:
    """Where trials are kept.

    Raises:
        InputError: --history is no folder, or cannot be one.
    """
    from quantkit.tuning.history import FILE

    if args.history is None:
        assert output is not None
        return output.with_name(f"{output.name}.trials.jsonl")
    folder = Path(args.history)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--history {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / FILE


@contextmanager
def watching(console: Console, *, quiet: bool) -> Iterator[Watcher | None]:
    """A live table of the last trials and the best one; lines where there is no terminal; nothing with --quiet."""
    if quiet:
        yield None
    elif not console.is_terminal:
        yield lambda done: console.print(line(done), soft_wrap=True, markup=False)
    else:
        from rich.live import Live

        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda done: live.update(live_table(done), refresh=True)


def line(done: Progressed) -> str:
    """The last trial in one line."""
    from quantkit.tuning.recipes import label

    trial = done.trials[-1]
    mark = "" if done.best != len(done.trials) - 1 else "  best so far"
    return f"trial {len(done.trials)}: {_figures(trial, done.feasible[-1])}  {label(trial.configuration)}{mark}"


def _figures(trial: Any, feasible: bool) -> str:
    state = "" if feasible else ("  over budget" if trial.complete or not trial.losses else "  ended early")
    loss = f"{trial.loss:.4g} nats" if math.isfinite(trial.loss) else "not run"
    return f"{trial.size:,} B  {loss}{state}"


def live_table(done: Progressed) -> Table:
    from quantkit.tuning.recipes import label

    table = _table(f"trial {len(done.trials)}")
    count = len(done.trials)
    shown = sorted({*range(max(count - SHOWN, 0), count), *([] if done.best is None else [done.best])})
    for index in shown:
        trial = done.trials[index]
        mark = "best" if index == done.best else ""
        _row(table, index, trial, done.feasible[index], mark, label(trial.configuration))
    return table


def trials_table(found: Tuned) -> Table:
    """The front of size against loss, the first two trials, and the one that was kept."""
    from quantkit.tuning.recipes import label

    table = _table(f"{len(found.trials)} trials: the front of size and loss, the first two, and the best")
    front = set(found.front)
    for index in sorted({0, min(1, len(found.trials) - 1), found.best, *front}):
        trial = found.trials[index]
        mark = "kept" if index == found.best else ("front" if index in front else "")
        _row(table, index, trial, found.feasible[index], mark, label(trial.configuration))
    return table


def _table(title: str) -> Table:
    from quantkit.report.console import plain_table

    table = plain_table(title, ("trial",))
    for heading in ("bytes", "nats", "drop", "time"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("configuration", overflow="fold")
    return table


def _row(table: Table, index: int, trial: Any, feasible: bool, mark: str, configuration: str) -> None:
    from rich.text import Text

    state = mark or ("" if feasible else ("over" if trial.complete or not trial.losses else "ended"))
    table.add_row(
        str(index + 1),
        f"{trial.size:,}",
        f"{trial.loss:.3g}" if math.isfinite(trial.loss) else "-",
        "-" if trial.drop is None else f"{100 * trial.drop:.2f} %",
        "-" if trial.latency is None else f"{trial.latency:.2f}x",
        Text(state),
        Text(configuration),
    )


def to_dict(found: Tuned) -> dict[str, Any]:
    """Plain JSON values of the search."""
    rows = []
    for index, trial in enumerate(found.trials):
        rows.append(
            {
                "configuration": dict(trial.configuration),
                "size": trial.size,
                "loss": trial.loss,
                "complete": trial.complete,
                "sqnr": trial.sqnr,
                "drop": trial.drop,
                "latency": trial.latency,
                "feasible": found.feasible[index],
                "front": index in found.front,
                "kept": index == found.best,
            }
        )
    return {"objective": found.objective, "ended": found.ended, "known": found.known, "trials": rows}
