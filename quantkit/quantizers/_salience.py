"""How much each weight and each group of weights matters to a layer's output, read off the Gram matrix of its inputs.

salience of a weight    w^2 / U_ii^2, U the upper Cholesky factor of the inverse Gram matrix: what the output loses
                        when the weight goes and later ones make up for it (SliM-LLM, arXiv 2405.14917)
salient                 more than two standard deviations above or below the mean salience of its group's weights
block terms             tr(D_g H_gh D_h^T): what errors D in the groups g and h cost together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from quantkit.quantizers._gram import damped, row_errors, usable_gram
from quantkit.types import Array, FloatArray, LayerStats

Doubles = npt.NDArray[np.float64]
DAMP = 0.01
DEVIATIONS = 2.0
_CHUNK_COLUMNS = 512


@dataclass(frozen=True)
class Inputs:
    """What is known about a layer's inputs.

    Attributes:
        gram: [groups, K, K], or None when calibration did not see the inputs, or not together.
        energy: [groups, K] mean square of each input; ones when nothing was seen.
    """

    gram: Doubles | None
    energy: Doubles

    @cached_property
    def leftover(self) -> Doubles:
        """[groups, K] 1 / U_ii^2: the energy of each input that the inputs after it cannot imitate.

        All of it where there is no Gram matrix.
        """
        if self.gram is None:
            return self.energy
        # 1 / U_ii is the diagonal of the Cholesky factor of H with its rows and columns in reverse.
        factors = [np.linalg.cholesky(damped(matrix[::-1, ::-1], DAMP)) for matrix in self.gram]
        return np.stack([np.square(np.diagonal(factor))[::-1] for factor in factors])

    def salience(self, weight: FloatArray) -> Doubles:
        """[N, K] w^2 / U_ii^2."""
        squares: Doubles = np.square(weight, dtype=np.float64)
        return squares * importance_of_rows(self.leftover, len(weight))

    def error(self, error: FloatArray) -> float:
        """tr(D H D^T) of an error matrix [N, K], summed over convolution groups."""
        if self.gram is None:
            return float(diagonal_terms([error], self.energy, error.shape[1])[0, 0])
        return float(row_errors(np.zeros_like(error), error, self.gram).sum())

    def own_terms(self, error: FloatArray, width: int) -> Doubles:
        """[G] tr(D_g H_gg D_g^T)."""
        if self.gram is None:
            return diagonal_terms([error], self.energy, width)[:, 0]
        parts = error.reshape(len(self.gram), -1, error.shape[1])
        found = []
        for start in range(0, error.shape[1], width):
            columns = slice(start, start + width)
            blocks = parts[:, :, columns].astype(np.float64)
            found.append(np.vdot(blocks @ self.gram[:, columns, columns], blocks))
        return np.maximum(found, 0)

    def terms(self, errors: Sequence[FloatArray], width: int) -> Doubles:
        """[G, L, G, L] what errors of two groups cost together, for the L error matrices [N, K]."""
        if self.gram is None:
            return _separate(diagonal_terms(errors, self.energy, width))
        return block_terms(errors, self.gram, width)


def inputs_of(stats: LayerStats | None, shape: tuple[int, int]) -> Inputs:
    """What calibration saw of the inputs of a weight [N, K]; a Gram matrix of zeros tells nothing and counts as none.

    Raises:
        InputError: the Gram matrix fits no such weight.
    """
    gram = usable_gram(stats, shape)
    if gram is not None and np.any(gram):
        return Inputs(gram, np.diagonal(gram, axis1=1, axis2=2))
    energy = None if stats is None else stats.square_mean
    if energy is None or not np.any(energy):
        energy = np.ones((1, shape[1]))
    return Inputs(None, np.asarray(energy, dtype=np.float64))


def importance_of_rows(importance: Array, num_rows: int) -> Doubles:
    """[groups, K] -> [N, K]: each row gets the numbers of its convolution group."""
    return np.repeat(np.asarray(importance, dtype=np.float64), num_rows // importance.shape[0], axis=0)


def salient(salience: Array, width: int) -> npt.NDArray[np.bool_]:
    """[N, K] weights whose salience lies more than two deviations from the mean of all rows of their group."""
    num_inputs = salience.shape[1]
    marks = np.zeros(salience.shape, dtype=np.bool_)
    for start in range(0, num_inputs, width):
        block = salience[:, start : start + width]
        marks[:, start : start + width] = np.abs(block - block.mean()) > DEVIATIONS * block.std()
    return marks


def group_sums(values: Array, width: int) -> Doubles:
    """[N, K] -> [G] sums over the rows and columns of each group."""
    return np.add.reduceat(values.sum(axis=0, dtype=np.float64), np.arange(0, values.shape[1], width))


def block_terms(errors: Sequence[FloatArray], gram: Array, width: int) -> Doubles:
    """[G, L, G, L] tr(D_g H_gh D_h^T), D_g the g-th group of one of the L error matrices [N, K].

    Args:
        errors: one for each level.
        gram: [groups, K, K]; rows of the errors belong to the groups in turn.
        width: inputs per group.
    """
    num_rows, num_inputs = errors[0].shape
    starts = np.arange(0, num_inputs, width)
    levels, groups = len(errors), len(starts)
    terms = np.zeros((groups, levels, groups, levels))
    step = max(_CHUNK_COLUMNS // width, 1)
    for part, matrix in enumerate(gram):
        rows = slice(part * num_rows // len(gram), (part + 1) * num_rows // len(gram))
        for first in range(0, groups, step):
            chunk = slice(first * width, min((first + step) * width, num_inputs))
            inner = starts[first : first + step] - starts[first]
            for a, left in enumerate(errors):
                for b, right in enumerate(errors[a:], start=a):
                    # [columns of the chunk, K]: products of errors, weighted as the inputs go together
                    shared = (left[rows, chunk].T @ right[rows]) * matrix[chunk]
                    sums = np.add.reduceat(np.add.reduceat(shared, inner, axis=0), starts, axis=1)
                    terms[first : first + step, a, :, b] += sums
    for a in range(levels):
        for b in range(a):
            terms[:, a, :, b] = terms[:, b, :, a].T
    return (terms + terms.transpose(2, 3, 0, 1)) / 2


def diagonal_terms(errors: Sequence[FloatArray], importance: Array, width: int) -> Doubles:
    """[G, L] sums of importance[groups, K] * D^2: what each group costs by itself."""
    weights = importance_of_rows(importance, len(errors[0]))
    return np.stack([group_sums(weights * np.square(error, dtype=np.float64), width) for error in errors], axis=1)


def _separate(costs: Doubles) -> Doubles:
    """[G, L] costs as terms [G, L, G, L] of groups that do not interact."""
    groups, levels = costs.shape
    return (np.eye(groups * levels) * costs.reshape(-1)).reshape(groups, levels, groups, levels)
