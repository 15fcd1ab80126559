"""From a saved plan to the same bytes again."""

from __future__ import annotations

from dataclasses import replace

from quantkit.allocation import Outcome
from quantkit.calibration.accumulators import SCHEMES
from quantkit.candidate import Context, Recipe, activation_params, assemble
from quantkit.errors import InputError
from quantkit.forms import Chooser, Option, choose_forms
from quantkit.graph.emit import emitter
from quantkit.graph.regions import find_regions
from quantkit.measuring import measure
from quantkit.plan import resolve
from quantkit.problem import sizing_chooser
from quantkit.report.types import Contender
from quantkit.types import LayerPlan, Plan


def apply_plan(context: Context, plan: Plan) -> Outcome:
    """The candidate that a plan describes; forms left at `auto` are chosen, missing ranges are calibrated.

    Raises:
        InputError: a rule asks for something impossible, or ranges are missing and there is no calibration data.
    """
    resolved = resolve(plan.layers, {name: target.op for name, target in context.targets.items()})
    recipe = Recipe(
        str(plan.settings.get("calibrator", "minmax")),
        plan.settings.get("bias_correction", False) is True,
        plan.settings.get("inputs") == "quantized",
        _scheme(plan.settings.get("scheme", "asymmetric")),
    )
    if plan.settings.get("calibrated") is True and context.held_out is None:
        raise InputError("the plan was made with calibration data; give the same data with --calib to repeat it")
    model = context.loaded.model
    static = {
        name: [str(use.node.name) for use in context.targets[name].uses]
        for name, layer in resolved.items()
        if layer.spec is not None and layer.form == "qdq"
    }
    regions = find_regions(model, [node for nodes in static.values() for node in nodes])
    missing = [group for group in dict.fromkeys(regions.groups.values()) if group not in plan.activations]
    params = {group: act for group, act in plan.activations.items() if group in set(regions.groups.values())}
    if missing:
        if not set(missing) <= set(context.histograms):
            raise InputError(
                f"the plan has no activation range for {missing[0]!r} and {len(missing) - 1} more; give --calib"
            )
        calibrated = activation_params(regions, context.histograms, recipe.calibrator, recipe.scheme)
        params.update({group: calibrated[group] for group in missing})
    inputs = {name: params[regions.groups[str(context.targets[name].uses[0].data.name)]] for name in static}
    chooser = replace(sizing_chooser(context), static=frozenset(static), activation_of=inputs)
    chosen = {}
    for name, layer in resolved.items():
        if layer.spec is not None:
            chosen[name] = _planned_option(context, chooser, name, layer)
    candidate = assemble(context, chosen, regions, params, "plan", recipe)
    figures = measure(context, candidate)
    row = Contender("plan", candidate.size, figures.sqnr, figures.latency, True, figures.loss)
    layers = {
        name: LayerPlan(chosen[name].spec, chosen[name].form, layer.reason) if name in chosen else layer
        for name, layer in resolved.items()
    }
    return Outcome(candidate, Plan(layers, params, plan.settings), (row,) if context.held_out is not None else ())


def _scheme(value: object) -> str:
    if value not in SCHEMES:
        raise InputError(f"plan: settings: scheme must be one of {', '.join(SCHEMES)}, got {value!r}")
    return str(value)


def _planned_option(context: Context, chooser: Chooser, name: str, layer: LayerPlan) -> Option:
    target, spec = context.targets[name], layer.spec
    assert spec is not None
    try:
        spec.widths(target.shape[1])
    except InputError as error:
        raise InputError(f"the plan's rule for {name} does not fit it: {error}") from error
    if layer.form in (None, "auto"):
        allowed = chooser.options(target, spec)
        return choose_forms({name: allowed}, model_ms=None, max_latency=None)[name]
    assert layer.form is not None
    if emitter(layer.form).refuse(target, spec, context.options.target) is None:
        # The quantizer may choose the groups' widths; the form must hold those.
        spec = replace(spec, group_bits=chooser.quantize(target, spec).spec.group_bits)
    refusal = emitter(layer.form).refuse(target, spec, context.options.target)
    if refusal is not None:
        raise InputError(f"the plan asks for the form {layer.form} at {name}, which is impossible: {refusal}")
    if layer.form == "qdq" and name not in chooser.activation_of:
        raise InputError(f"the plan asks for the form qdq at {name}, which lies outside the integer path")
    return Option(layer.form, spec, chooser.noise(target, spec, layer.form), 0.0, 0.0)
