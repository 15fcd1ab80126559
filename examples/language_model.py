"""A small language model, letter by letter: perplexity before and after compression.

python examples/language_model.py [--tiny]      needs: pip install 'quantkit[torch]'
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from pydoc_data.topics import topics  # some 600 kB of English that comes with Python

import numpy as np
import torch
from torch import nn

import quantkit

CONTEXT = 64


class Model(nn.Module):
    """Decoder: letters so far -> scores of the next one, at every place."""

    def __init__(self, letters: int, width: int, layers: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.places = nn.Parameter(torch.randn(CONTEXT, width) / 10)
        self.queries = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, letters)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.letters(ids) + self.places
        for query, output, inner, norm in zip(self.queries, self.outputs, self.inner, self.norms, strict=True):
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in query(norm(x)).chunk(3, dim=-1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + output(y.transpose(1, 2).flatten(2))
            x = x + inner(x)
        return self.head(x)


def pieces(text: str, letters: str) -> np.ndarray:
    """[n, CONTEXT + 1] int64."""
    codes = np.array([letters.index(letter) for letter in text], np.int64)
    return codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)


def train(model: nn.Module, rows: np.ndarray, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x = torch.from_numpy(rows)
    for step in range(steps):
        batch = x[torch.randint(len(x), (32,))]
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()


def export(model: nn.Module, path: Path) -> None:
    model.eval()
    torch.onnx.export(
        model,
        (torch.ones(2, CONTEXT, dtype=torch.int64),),
        path,
        input_names=["ids"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def perplexity(path: Path, rows: np.ndarray) -> float:
    """exp of the mean cross entropy of the next letter: among so many letters the model hesitates."""
    (scores,) = quantkit.InferenceSession(path, device="cpu").run(["scores"], {"ids": rows[:, :-1]})
    losses = nn.functional.cross_entropy(
        torch.from_numpy(scores).flatten(0, 1), torch.from_numpy(rows[:, 1:]).flatten()
    )
    return math.exp(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small network, a few steps, one budget")
    args = parser.parse_args()
    options = {"allocator": "uniform", "quantizer": "mse", "inputs": "float"} if args.tiny else {}  # the fast ones
    torch.manual_seed(0)
    text = " ".join(" ".join(topics.values()).split())
    letters = "".join(sorted(set(text)))
    rows = pieces(text, letters)[np.random.default_rng(0).permutation(len(text) // (CONTEXT + 1))]
    test, calibration, rest = rows[:100], rows[100 : 124 if args.tiny else 300], rows[300:]
    model = Model(len(letters), 32 if args.tiny else 128, 1 if args.tiny else 3)
    train(model, rest, 5 if args.tiny else 1500)
    folder = Path(tempfile.mkdtemp(prefix="quantkit-letters-"))
    export(model, folder / "float.onnx")
    print(f"{'':>10} {'bytes':>9} {'perplexity':>11}")
    print(f"{'float':>10} {(folder / 'float.onnx').stat().st_size:9} {perplexity(folder / 'float.onnx', test):11.3f}")
    for bits in [4] if args.tiny else [8, 5, 4, 3, 2]:
        budget = quantkit.Budget(avg_bits=bits)
        result = quantkit.compress(
            folder / "float.onnx", calibration={"ids": calibration[:, :-1]}, budget=budget, **options
        )
        path = folder / f"{bits}bit.onnx"
        result.save(path)
        print(f"{f'{bits} bits':>10} {path.stat().st_size:9} {perplexity(path, test):11.3f}")
    print(f"the models are in {folder}")


if __name__ == "__main__":
    main()
