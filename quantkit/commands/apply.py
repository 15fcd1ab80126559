"""quantkit apply: a plan, perhaps edited by hand, onto a model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from quantkit.commands import _common
from quantkit.commands.compress import add_evaluation, evaluation_of, finish, output_files, parse_settings

HELP = "quantize a model as a plan says"
USAGE = "quantkit apply MODEL PLAN [-o OUT] [--calib SRC] [options]"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the .onnx file")
    parser.add_argument("plan", metavar="PLAN", help="a plan as `compress --save-plan` writes it")
    _common.add_files(parser)
    _common.add_data(parser)
    add_evaluation(parser)
    parser.add_argument_group("methods").add_argument(
        "--set", metavar="M.S=VALUE", action="append", help="a method's setting, such as mse.steps=40; repeatable"
    )
    _common.add_run(parser)
    _common.add_output(parser)


def run(args: Namespace) -> int:
    model, plan_file = _common.existing_file(args.model), _common.existing_file(args.plan)
    outputs = output_files(args, model)
    _common.check_writable(outputs, {"input model": model, "plan": plan_file, **_common.data_sources(args)})
    options = {"settings": parse_settings(args.set or ()), **_common.run_options(args)}
    calibration, evaluation = _common.calibration_of(args), evaluation_of(args)

    from quantkit import pipeline
    from quantkit.plan import load_plan

    _common.keep_external(outputs, model)
    result = pipeline.compress(
        model,
        calibration=calibration,
        evaluation=evaluation,
        plan=load_plan(plan_file),
        progress=_common.progress_of(args),
        **options,
    )
    return finish(args, result, outputs)
