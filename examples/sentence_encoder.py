"""A sentence encoder: train it to recognise a sentence of which words are missing, compress it, compare embeddings.

python examples/sentence_encoder.py [--tiny]      needs: pip install 'quantkit[torch]'
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics  # some 600 kB of English that comes with Python

import numpy as np
import torch
from torch import nn

import quantkit

LENGTH = 16
WORD = re.compile(r"[a-z]+")


def sentences() -> list[list[str]]:
    """Sentences of 6 to 16 words, each once, in random order."""
    found = dict.fromkeys(
        tuple(WORD.findall(text.lower())) for text in re.split(r"[.\n]{2,}|\. ", " ".join(topics.values()))
    )
    kept = [list(words) for words in found if 6 <= len(words) <= LENGTH]
    return [kept[place] for place in np.random.default_rng(0).permutation(len(kept))]


def ids(texts: list[list[str]], vocabulary: dict[str, int]) -> np.ndarray:
    """[n, LENGTH] int64; 0 = nothing, 1 = a word that is not known."""
    rows = np.zeros((len(texts), LENGTH), np.int64)
    for row, words in zip(rows, texts, strict=True):
        row[: len(words)] = [vocabulary.get(word, 1) for word in words]
    return rows


class Encoder(nn.Module):
    """Word embeddings, self-attention, mean over the words, unit length."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) / 10)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        known = (ids > 0).unsqueeze(-1).float()
        x = (self.words(ids) + self.places) * known
        for at, (attention, inner) in enumerate(zip(self.attention, self.inner, strict=True)):
            y = self.norms[2 * at](x)
            x = x + attention(y, y, y, need_weights=False)[0] * known
            x = x + inner(self.norms[2 * at + 1](x)) * known
        return nn.functional.normalize((x * known).sum(1) / known.sum(1), dim=-1)


def train(model: nn.Module, rows: np.ndarray, steps: int) -> None:
    """Two copies of a sentence, a fifth of the words missing in each, have to find each other in a batch (SimCSE)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.from_numpy(rows)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (64,))]
        first, second = (model(batch * (torch.rand(batch.shape) > 0.2)) for _ in range(2))
        optimizer.zero_grad()
        nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(batch))).backward()
        optimizer.step()


def export(model: nn.Module, path: Path) -> None:
    model.eval()
    torch.onnx.export(
        model,
        (torch.ones(2, LENGTH, dtype=torch.int64),),
        path,
        input_names=["ids"],
        output_names=["vectors"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def embed(path: Path, rows: np.ndarray) -> np.ndarray:
    return quantkit.InferenceSession(path, device="cpu").run(["vectors"], {"ids": rows})[0]


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """For each sentence the most similar other one."""
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -2)
    return similar.argmax(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small network, a few steps, one budget")
    args = parser.parse_args()
    options = {"allocator": "uniform", "quantizer": "mse", "inputs": "float"} if args.tiny else {}  # the fast ones
    torch.manual_seed(0)
    texts = sentences()
    common = Counter(word for text in texts for word in text).most_common(500 if args.tiny else 4000)
    rows = ids(texts, {word: place for place, (word, _) in enumerate(common, start=2)})
    test, calibration, rest = rows[:200], rows[200:232] if args.tiny else rows[200:400], rows[400:]
    model = Encoder(len(common) + 2, 32 if args.tiny else 128, 1 if args.tiny else 3)
    train(model, rest, 5 if args.tiny else 600)
    folder = Path(tempfile.mkdtemp(prefix="quantkit-encoder-"))
    export(model, folder / "float.onnx")
    wanted = embed(folder / "float.onnx", test)
    print(f"{'':>10} {'bytes':>9} {'cosine':>8} {'same neighbour':>15}")
    print(f"{'float':>10} {(folder / 'float.onnx').stat().st_size:9}")
    for bits in [4] if args.tiny else [8, 5, 4, 3]:
        budget = quantkit.Budget(avg_bits=bits)
        result = quantkit.compress(folder / "float.onnx", calibration={"ids": calibration}, budget=budget, **options)
        path = folder / f"{bits}bit.onnx"
        result.save(path)
        found = embed(path, test)
        cosine, same = (found * wanted).sum(axis=1).mean(), (nearest(found) == nearest(wanted)).mean()
        print(f"{f'{bits} bits':>10} {path.stat().st_size:9} {cosine:8.4f} {same:15.1%}")
    print(f"the models are in {folder}")


if __name__ == "__main__":
    main()
