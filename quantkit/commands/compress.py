"""quantkit compress: model, data and budget in; smaller model, plan and report out."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import methods
from quantkit.budget import Budget
from quantkit.calibration.request import EvaluationRequest
from quantkit.commands import _common
from quantkit.commands._loss import with_loss
from quantkit.errors import InputError

if TYPE_CHECKING:
    from quantkit.report.types import Report
    from quantkit.result import Result

HELP = "compress a model within a budget"
USAGE = "quantkit compress MODEL [-o OUT] [--calib SRC] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the .onnx file")
    _common.add_files(parser)
    _common.add_data(parser)
    add_evaluation(parser)
    add_budget(parser)
    _common.add_method_choice(parser)
    parser.add_argument_group("plan").add_argument(
        "--plan", metavar="FILE", help="follow this plan instead of a search"
    )
    parser.add_argument_group("front").add_argument(
        "--pareto", metavar="DIR", help="write the plans between smallest and best into this folder, with front.json"
    )
    _common.add_run(parser)
    _common.add_output(parser)


def add_budget(parser: ArgumentParser) -> None:
    budget = parser.add_argument_group("budget (all that are given have to hold)")
    budget.add_argument("--avg-bits", metavar="B", help="bits per weight on average, such as 4.25")
    budget.add_argument("--max-size", metavar="SIZE", help="of the file: 12MB, 12MiB or 25%% of the float model")
    budget.add_argument("--max-drop", metavar="DROP", help="loss of the metric: 1%% = one point")
    budget.add_argument("--max-bops", metavar="COUNT", help="bit operations of one sample: 3.5G or 10%% of float's")
    budget.add_argument("--max-latency", metavar="RATIO", help="time against the float model: 0.8x")


def add_evaluation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval", metavar="SRC", help="held-out data, in the forms that --calib takes")
    group.add_argument("--metric", metavar="M", help="top1, agreement, cosine, sqnr or MODULE:FUNCTION (needs --eval)")


def run(args: Namespace) -> int:
    model = _common.existing_file(args.model)
    outputs = output_files(args, model)
    keep = {"input model": model}
    if args.plan:
        keep["plan"] = _common.existing_file(args.plan)
    _common.check_writable(outputs, keep | _common.data_sources(args))
    budget = budget_of(args)
    front = None if args.pareto is None else _common.output_folder("--pareto", args.pareto)
    check_methods(args)
    if front is not None:
        from quantkit.front import check_front

        has_data = args.calib is not None or args.random_calibration
        check_front(args.allocator, has_data=has_data, has_plan=args.plan is not None)
    options = method_options(args)
    plan = None
    if args.plan:
        from quantkit.plan import load_plan

        plan = load_plan(args.plan)
    calibration, evaluation = _common.calibration_of(args), evaluation_of(args)

    from quantkit import pipeline

    _common.keep_external(outputs, model)
    result = pipeline.compress(
        model,
        calibration=calibration,
        evaluation=evaluation,
        budget=None if budget.is_empty else budget,
        plan=plan,
        progress=_common.progress_of(args),
        **options,
        **({} if front is None else {"front": True}),
    )
    code = finish(args, result, outputs)
    return code if front is None else max(code, write_front(result, front))


def budget_of(args: Namespace) -> Budget:
    return Budget.parse(
        avg_bits=args.avg_bits,
        max_size=args.max_size,
        max_drop=args.max_drop,
        max_latency=args.max_latency,
        max_bops=args.max_bops,
    )


def check_methods(args: Namespace) -> None:
    """Raises: InputError for names of methods that there are not."""
    for kind, name in (("allocators", args.allocator), ("quantizers", args.quantizer)):
        if name != "auto":
            methods.check(kind, name)
    methods.transform_names(args.transform)


def method_options(args: Namespace) -> dict[str, Any]:
    """Fields of Options behind add_method_choice and add_run."""
    return {
        "bits": parse_bits(args.bits),
        "activations": args.activations,
        "allocator": args.allocator,
        "quantizer": args.quantizer,
        "transform": args.transform,
        "calibrator": args.calibrator,
        "inputs": args.inputs,
        "augment": args.augment,
        "group_size": args.group_size,
        "ignore": tuple(args.ignore or ()),
        "settings": with_loss(parse_settings(args.set or ()), args.loss, (args.allocator,), "--allocator"),
        **({} if args.holdout is None else {"holdout": args.holdout}),
        **_common.run_options(args),
    }


def write_front(result: Result, folder: Path) -> int:
    """0, or 1 where there is no front to write: the model is written already and stays."""
    from quantkit.front import save_front

    try:
        save_front(result, folder)
    except InputError as error:
        sys.stderr.write(f"quantkit: not met: {error}\n")
        return 1
    return 0


def output_files(args: Namespace, model: Path) -> dict[str, Path | None]:
    """Option -> file to write."""
    report = Path(args.report) if args.report else None
    if report is not None and report.suffix.lower() not in (".html", ".json"):
        raise InputError(f"--report must end in .html or .json, got {report}")
    if report is not None and report.suffix.lower() == ".html":
        from quantkit.report.html import check_html

        check_html()
    return {
        "--output": _common.output_path(args.output, model),
        "--save-plan": Path(args.save_plan) if args.save_plan else None,
        "--report": report,
    }


def finish(args: Namespace, result: Result, outputs: dict[str, Path | None]) -> int:
    """Write what was asked for, show the report; 0 = done, 1 = done but the budget was not met."""
    from quantkit.files import write_text
    from quantkit.plan import save_plan
    from quantkit.report.console import print_report, print_unmet

    report = with_command(result.report, args)
    output, plan_file, report_file = outputs["--output"], outputs["--save-plan"], outputs["--report"]
    assert output is not None
    result.save(output)
    try:
        if plan_file is not None:
            save_plan(result.plan, plan_file)
        if report_file is not None:
            write_text(report_file, report_text(report, report_file))
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; the model is written and verified ({output}), this file is not"
        ) from error
    console = _common.console_of(args)
    print_report(report, console, all_layers=args.all_layers)
    console.print(f"written: {', '.join(str(path) for path in outputs.values() if path is not None)}", soft_wrap=True)
    if args.quiet:
        print_unmet(report)
    if args.json:
        _common.print_json({**report.to_dict(), "output": output})
    return 0 if report.budget_met else 1


def with_command(report: Report, args: Namespace) -> Report:
    """The report with the command line that it was made by."""
    return replace(report, command=shlex.join(["quantkit", *args.argv]))


def report_text(report: Report, path: Path) -> str:
    """As the ending of the file says: a page or JSON."""
    if path.suffix.lower() == ".html":
        from quantkit.report.html import report_html

        return report_html(report)
    return _common.to_json(report.to_dict()) + "\n"


def evaluation_of(args: Namespace) -> EvaluationRequest | None:
    if args.eval is None:
        if args.metric is not None:
            raise InputError("--metric needs held-out data: give --eval")
        return None
    if args.metric is None:
        raise InputError("--eval needs to know what counts: give --metric (top1, agreement, cosine, sqnr)")
    return EvaluationRequest(data=_common.evaluation_data(args, args.eval), metric=args.metric)


def parse_bits(text: str | None) -> tuple[int, ...] | None:
    """`2,3,4,8`, in any order."""
    if text is None:
        return None
    try:
        return tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--bits must be widths from 1 to 8 such as 2,3,4,8, got {text!r}") from error


def parse_settings(items: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """`mse.steps=40` -> {"mse.steps": "40"}; the method converts the text."""
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or "." not in key:
            raise InputError(f"--set must be METHOD.SETTING=VALUE such as mse.steps=40, got {item!r}")
        if key in settings:
            raise InputError(f"--set {key} is given twice")
        settings[key] = value
    methods.check_settings(settings)
    return settings
