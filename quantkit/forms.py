"""In which form each layer is written: the one that keeps the most accuracy within the time that the budget allows.

Every form that can hold a layer is an option with two figures: the noise that it adds to the layer's output on
calibration rows, and its time on this machine at the shapes that the calibration data shows. One integer program picks
for all layers together:

    with a latency budget:  least noise, subject to the predicted time of the model
    without one:            least time, subject to at most a quarter more noise than the most accurate choice

Bits have been allocated before, counting each width in its fastest form, or in the one with the fewest bit operations:
what fits there can be met here. With both budgets, bit operations are those of the fastest forms; where nothing fits
then, they are kept in any forms, and the time gives way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from quantkit.allocators._ilp import Limit, choose, least, solve_choice
from quantkit.budget import Budget
from quantkit.costs.bops import bops, shapes_of
from quantkit.graph.emit import emitter
from quantkit.graph.regions import find_regions
from quantkit.types import ActParams, FloatArray, LayerStats, QuantizedWeight, QuantSpec, Target

NOISE_ALLOWANCE = 1.25
# A form must win by more than the measurement's own noise to be preferred.
LATENCY_STEP = 0.05
WEIGHT_ONLY_FORMS = ("packed", "matmulnbits")
INTEGER_FORMS = ("dynamic",)
# What the others hold of a layer at run time is four or eight bits a weight and more, whatever the file holds.
PACKED_AT_RUN_TIME = ("matmulnbits",)
# Without calibration rows, the noise of 8-bit activations is taken to be that of 40 dB.
UNSEEN_ACTIVATION_NOISE = 1e-4


@dataclass(frozen=True)
class Option:
    """One way to write one layer.

    Attributes:
        form: emitter's file name.
        spec: what it stores.
        noise: relative squared error of the layer's output.
        milliseconds: of the layer alone (0 where it was not measured: no choice depends on it).
        float_ms: of its float version.
    """

    form: str
    spec: QuantSpec
    noise: float
    milliseconds: float
    float_ms: float

    @property
    def ratio(self) -> float | None:
        """Time relative to float, None when not measured."""
        return self.milliseconds / self.float_ms if self.float_ms else None


@dataclass(frozen=True)
class Chooser:
    """What the choice depends on.

    Attributes:
        runtime: emission target.
        activations: `auto`, `8` or `none`.
        group_size: the user's, or None for the defaults.
        static: names of targets that run as static integer layers.
        activation_of: target name -> its input's parameters, for static layers.
        stats: target name -> calibration statistics.
        quantize: (target, spec) -> weight, remembered by the caller.
        cost: (target, spec, form, rows) -> (float ms, form ms).
        timed: measure layers that have no choice of form, too: the whole model's time is asked for.
        packed: layers stay packed at run time wherever a form can do that: the model is large.
    """

    runtime: str
    activations: str
    group_size: int | None
    static: frozenset[str]
    activation_of: Mapping[str, ActParams]
    stats: Mapping[str, LayerStats]
    quantize: Callable[[Target, QuantSpec], QuantizedWeight]
    cost: Callable[[Target, QuantSpec, str, int], tuple[float, float]]
    timed: bool = False
    packed: bool = False

    def options(self, target: Target, asked: QuantSpec) -> list[Option]:
        """All forms that can hold the layer at this width; the most accurate first.

        Args:
            asked: its `bits`, stored as suits each form; where its groups have widths of their own, stored like that.
        """
        found = []
        for form, spec in self.specs(target, asked):
            # The quantizer may have widths of its own for the groups, which not every form holds.
            spec = replace(spec, group_bits=self.quantize(target, spec).spec.group_bits)
            if emitter(form).refuse(target, spec, self.runtime) is None:
                found.append(self._option(target, spec, form))
        return sorted(found, key=lambda option: option.noise)

    def specs(self, target: Target, asked: QuantSpec) -> list[tuple[str, QuantSpec]]:
        """(form, what it would store) of the forms that can hold the layer."""
        found = []
        for form in self._forms(target):
            spec = self.spec(target, asked.bits, form)
            if asked.group_bits is not None:
                spec = replace(asked, act_bits=spec.act_bits)
            if emitter(form).refuse(target, spec, self.runtime) is None:
                found.append((form, spec))
        small = [pair for pair in found if pair[0] in PACKED_AT_RUN_TIME]
        return small if self.packed and small else found

    def _forms(self, target: Target) -> Sequence[str]:
        if target.name in self.static:
            return ("qdq",)
        if target.op == "Gather":
            return ("gather",)
        if target.op not in ("MatMul", "Gemm"):
            return ("packed",)
        if self.activations == "none":
            return WEIGHT_ONLY_FORMS
        if self.activations == "8" and emitter("dynamic").refuse(target, QuantSpec(8), self.runtime) is None:
            return INTEGER_FORMS
        return (*WEIGHT_ONLY_FORMS, *INTEGER_FORMS)

    def spec(self, target: Target, bits: int, form: str) -> QuantSpec:
        """The storage that suits a form: rows for static integers and 8-bit integer products, groups otherwise."""
        act_bits = 8 if form in ("qdq", "dynamic") else None
        by_row = form == "qdq" or (form == "dynamic" and bits == 8)
        default = -1 if by_row else default_group_size(bits)
        if form in ("packed", "dynamic") and not by_row:  # the kernels behind the other forms want powers of two
            default = even_groups(target.shape[1], default)
        group_size = default if self.group_size is None else self.group_size
        return QuantSpec(bits, group_size, symmetric=by_row and group_size == -1, act_bits=act_bits)

    def _option(self, target: Target, spec: QuantSpec, form: str) -> Option:
        seen = self.stats.get(target.name)
        unseen = seen is None or seen.rows is None
        noise = 0.0 if self.packed and unseen else self.noise(target, spec, form)
        chosen = not self.packed and form in (*WEIGHT_ONLY_FORMS, *INTEGER_FORMS) and target.op in ("MatMul", "Gemm")
        if not chosen and not self.timed:
            return Option(form, spec, noise, 0.0, 0.0)
        float_ms, form_ms = self.cost(target, spec, form, typical_rows(self.stats.get(target.name)))
        return Option(form, spec, noise, form_ms, float_ms)

    def milliseconds(self, target: Target, spec: QuantSpec | None) -> float:
        """Of the layer in the fastest form that holds this width; None = in float.

        Every form was measured beside a float layer of its own: what counts is how far it is from that one.
        """
        reference = min((float_ms for _, float_ms, _ in self._costs(target, QuantSpec(8))), default=0.0)
        if spec is None:
            return reference
        return reference + min((change for change, _, _ in self._costs(target, spec)), default=0.0)

    def _costs(self, target: Target, asked: QuantSpec) -> list[tuple[float, float, QuantSpec]]:
        """(change from float, float ms, what is stored) of every form."""
        rows, found = typical_rows(self.stats.get(target.name)), []
        for form, stored in self.specs(target, asked):
            float_ms, form_ms = self.cost(target, stored, form, rows)
            found.append((form_ms - float_ms, float_ms, stored))
        return found

    def operations(self, target: Target, spec: QuantSpec | None, *, fastest: bool = False) -> int:
        """Bit operations of one sample in the form with the fewest that holds this width; None = in float.

        Forms differ in their activations: `dynamic` multiplies with 8 bits where all others of a product take 32.

        Args:
            fastest: in the fastest form instead.
        """
        shapes = shapes_of(target, self.stats)
        forms = [] if spec is None else [stored for _, stored in self.specs(target, spec)]
        if fastest and spec is not None and forms:
            forms = [min(self._costs(target, spec), key=lambda item: item[0])[2]]
        return min((bops(target, stored, shapes) for stored in forms), default=bops(target, spec, shapes))

    def noise(self, target: Target, spec: QuantSpec, form: str) -> float:
        """||y_quantized - y||^2 / ||y||^2 on calibration rows, or of the weight when no rows were seen."""
        weight = target.load()
        quantized = self.quantize(target, spec)
        effective = emitter(form).effective_weight(quantized)
        stats = self.stats.get(target.name)
        if stats is None or stats.rows is None:
            noise = _relative(weight, effective)
            return noise if spec.act_bits is None else noise + UNSEEN_ACTIVATION_NOISE
        act = self.activation_of.get(target.name)
        rounded = emitter(form).fake_quantize(stats.rows, quantized, act)
        return _relative(multiply(stats.rows, weight), multiply(rounded, effective))


def default_group_size(bits: int) -> int:
    """Inputs per scale when the user does not say: finer where codes are coarse."""
    return 32 if bits <= 4 else 128


def even_groups(num_inputs: int, group_size: int) -> int:
    """The group size near the one given that fills up least: 576 inputs make 4 groups of 144, not 5 of 128."""
    if num_inputs <= group_size or num_inputs % group_size == 0:
        return group_size
    return -(-num_inputs // max(round(num_inputs / group_size), 1))


def multiply(rows: FloatArray, weight: FloatArray) -> FloatArray:
    """rows [groups, T, K] and W[N, K] -> [groups, T, N/groups]."""
    groups = rows.shape[0]
    return np.asarray(rows @ weight.reshape(groups, -1, weight.shape[1]).transpose(0, 2, 1))


def _relative(reference: FloatArray, measured: FloatArray) -> float:
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(measured.astype(np.float64) - reference).sum())
    return noise / signal if signal > 0 else noise


def typical_rows(stats: LayerStats | None) -> int:
    """Rows of one run of a matrix product: the median over the calibration batches, rounded to a power of two."""
    if stats is None or not stats.data_shapes:
        return 1
    rows = [int(np.prod(shape[:-1])) for shape, count in stats.data_shapes.items() for _ in range(count)]
    return int(2 ** round(np.log2(max(float(np.median(rows)), 1.0))))


def static_layers(
    model: ir.Model, targets: Mapping[str, Target], runtime: str, activations: str
) -> dict[str, list[str]]:
    """Target name -> node names of the layers that run as static integer kernels.

    Convolutions do; matrix products do when integers reach them (a classifier behind its convolutions). Elsewhere
    static ranges cost too much accuracy, and dynamic ones are as fast.
    """
    if activations == "none":
        return {}
    spec = QuantSpec(8, -1, symmetric=True, act_bits=8)
    able = {
        name: target
        for name, target in targets.items()
        if emitter("qdq").refuse(target, spec, runtime) is None
        and all(use.node.graph is model.graph for use in target.uses)
    }
    static = {name: _nodes(target) for name, target in able.items() if target.op == "Conv"}
    if not static:
        return {}
    for name, target in able.items():
        if target.op == "Conv":
            continue
        layers = [node for nodes in (*static.values(), _nodes(target)) for node in nodes]
        produced = find_regions(model, layers).produced
        if all(str(use.data.name) in produced for use in target.uses):
            static[name] = _nodes(target)
    return static


def _nodes(target: Target) -> list[str]:
    return [str(use.node.name) for use in target.uses]


def choose_forms(
    options: Mapping[str, Sequence[Option]],
    *,
    model_ms: float | None,
    max_latency: float | None,
    correction: float = 1.0,
    limits: Sequence[Limit] = (),
) -> dict[str, Option]:
    """One option for each layer.

    Args:
        options: target name -> its options, at least one each.
        model_ms: time of the float model at the measured shapes; None = not measured.
        max_latency: of the whole model relative to float.
        correction: measured time of a quantized model over what its layers' times predict.
        limits: on anything but time, with an amount for each option; one that nothing meets is met as nearly as
            possible.
    """
    names = list(options)
    noise = [[option.noise for option in options[name]] for name in names]
    times = [[_stepped(option) for option in options[name]] for name in names]
    limits = [replace(limit, bound=max(limit.bound, least(limit) or 0.0)) for limit in limits]
    if max_latency is not None and model_ms:
        changes = [[option.milliseconds - option.float_ms for option in options[name]] for name in names]
        picked = choose(noise, [Limit(changes, (max_latency / correction - 1) * model_ms), *limits])
        if picked is None:
            picked = choose(times, limits)
    else:
        exact = solve_choice(noise, limits)
        lowest = 0.0 if exact is None else exact.cost
        # Of equally fast forms the more accurate: noise counts a thousandth of the layer's float time.
        tiebreak = [
            [
                time + 1e-3 * options[name][0].float_ms * value / (lowest or 1.0)
                for time, value in zip(*row, strict=True)
            ]
            for name, row in zip(names, zip(times, noise, strict=True), strict=True)
        ]
        picked = choose(tiebreak, [Limit(noise, NOISE_ALLOWANCE * lowest), *limits])
    if picked is None:
        picked = [int(np.argmin(row)) for row in noise]
    return {name: options[name][index] for name, index in zip(names, picked, strict=True)}


def operations_limits(
    targets: Mapping[str, Target],
    options: Mapping[str, Sequence[Option]],
    stats: Mapping[str, LayerStats],
    max_bops: int | Fraction | None,
) -> list[Limit]:
    """The budget of bit operations over the options of some targets, the others being float; none without a budget."""
    floats = {name: bops(target, None, shapes_of(target, stats)) for name, target in targets.items()}
    most = Budget(max_bops=max_bops).max_bit_operations(sum(floats.values()))
    if most is None:
        return []
    amounts = [
        [float(bops(targets[name], option.spec, shapes_of(targets[name], stats))) for option in options[name]]
        for name in options
    ]
    return [Limit(amounts, most - sum(count for name, count in floats.items() if name not in options))]


def _stepped(option: Option) -> float:
    """Milliseconds, in steps of the float time that are wider than the measurement's noise."""
    if not option.float_ms:
        return 0.0
    return round(option.milliseconds / option.float_ms / LATENCY_STEP) * LATENCY_STEP * option.float_ms
