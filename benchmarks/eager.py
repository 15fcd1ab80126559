"""ResNet-20 and MiniLM written directly in torch, with the weights of the ONNX files: a converter's measure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx.numpy_helper
import torch
from torch import Tensor
from torch.nn import functional

HEADS = 12
LAYERS = 6
BLOCKS = 3
Network = Callable[[Mapping[str, Tensor]], Tensor]


def load_weights(path: Path) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """The file and its initializers."""
    model = onnx.load(path)
    return model, {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in model.graph.initializer
    }


class ResNet20(torch.nn.Module):
    """CIFAR-10 ResNet-20 with folded batch norm and parameter-free shortcuts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        _, weights = load_weights(path)
        names = ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in range(BLOCKS) for c in (1, 2))]
        self.convolutions = torch.nn.ModuleDict()
        for name in names:
            weight = weights[f"{name}.weight"]
            stride = 2 if re.match(r"layer[23]\.0\.conv1", name) else 1
            layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride, 1)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.bias = torch.nn.Parameter(weights[f"{name}.weight_bias"], requires_grad=False)
            self.convolutions[name.replace(".", "_")] = layer
        self.linear = torch.nn.Linear(64, 10)
        self.linear.weight = torch.nn.Parameter(weights["linear.weight"], requires_grad=False)
        self.linear.bias = torch.nn.Parameter(weights["linear.bias"], requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu(self.convolutions["conv1"](image))
        for stage in (1, 2, 3):
            for block in range(BLOCKS):
                shortcut = x
                if stage > 1 and block == 0:
                    extra = x.shape[1] // 2
                    shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
                x = functional.relu(self.convolutions[f"layer{stage}_{block}_conv1"](x))
                x = functional.relu(self.convolutions[f"layer{stage}_{block}_conv2"](x) + shortcut)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class Layer(torch.nn.Module):
    """One BERT layer; attention written out, as the exported graph has it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
        self.norm, self.norm_out = torch.nn.LayerNorm(width, 1e-12), torch.nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, seq, width = x.shape

        def heads(part: Tensor) -> Tensor:
            return part.view(batch, seq, HEADS, width // HEADS).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = query @ key.transpose(2, 3) * (width // HEADS) ** -0.5 + mask
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, seq, width)
        x = self.norm(self.output(mixed) + x)
        normalised: Tensor = self.norm_out(self.down(functional.gelu(self.up(x))) + x)
        return normalised


class MiniLM(torch.nn.Module):
    """all-MiniLM-L6-v2 with mean pooling and normalisation."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        model, weights = load_weights(path)
        prefix = "encoder.embeddings"
        self.words = torch.nn.Parameter(weights[f"{prefix}.word_embeddings.weight"], requires_grad=False)
        self.places = torch.nn.Parameter(weights[f"{prefix}.position_embeddings.weight"], requires_grad=False)
        self.kinds = torch.nn.Parameter(weights[f"{prefix}.token_type_embeddings.weight"], requires_grad=False)
        width = self.words.shape[1]
        self.norm = torch.nn.LayerNorm(width, 1e-12)
        self.layers = torch.nn.ModuleList(Layer(width, 4 * width) for _ in range(LAYERS))
        self.requires_grad_(False)
        _copy_norm(self.norm, weights, f"{prefix}.LayerNorm")
        matrices = _matrices(model)
        for index, layer in enumerate(self.layers):
            base = f"encoder.encoder.layer.{index}"
            names = {
                "query": "attention.self.query",
                "key": "attention.self.key",
                "value": "attention.self.value",
                "output": "attention.output.dense",
                "up": "intermediate.dense",
                "down": "output.dense",
            }
            for own, theirs in names.items():
                bias = f"{base}.{theirs}.bias"
                linear = getattr(layer, own)
                linear.weight.copy_(weights[matrices[bias]].T)
                linear.bias.copy_(weights[bias])
            _copy_norm(layer.norm, weights, f"{base}.attention.output.LayerNorm")
            _copy_norm(layer.norm_out, weights, f"{base}.output.LayerNorm")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seq = input_ids.shape[1]
        x = self.norm(self.words[input_ids] + self.kinds[0] + self.places[:seq])
        hidden = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(
            attention_mask == 0, torch.finfo(x.dtype).min / 4
        )
        for layer in self.layers:
            x = layer(x, hidden[:, None, None, :])
        weight = attention_mask[..., None].to(x.dtype)
        pooled = (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
        return functional.normalize(pooled, dim=-1)


def _copy_norm(norm: torch.nn.LayerNorm, weights: Mapping[str, Tensor], name: str) -> None:
    norm.weight.copy_(weights[f"{name}.weight"])
    norm.bias.copy_(weights[f"{name}.bias"])


def _matrices(model: onnx.ModelProto) -> dict[str, str]:
    """Bias name -> name of the weight matrix whose product it is added to."""
    products = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Add":
            first, second = node.input
            for bias, product in ((first, second), (second, first)):
                if product in products:
                    found[bias] = products[product]
    return found
