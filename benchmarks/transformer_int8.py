"""Which int8 is fastest for transformers: `python benchmarks/transformer_int8.py`.

Hugging Face's BERT, ViT and GPT-2 in small configurations with random weights, one sample on one thread: static int8
with float outputs (`int8_ptq`), dynamic int8 (onnxruntime's `quantize_dynamic`: MatMulInteger, ranges found at each
call) and weights alone (`weight_only`: MatMulNBits), beside float32 in one session. SQNR is of the outputs on other
samples than those of the calibration; random weights say nothing about the accuracy of a trained model.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from publish import cpu, link, publish
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from compressor.export.to_onnx import to_onnx
from compressor.measure.latency import time_models
from compressor.models.artifact import OnnxModel, TorchModel
from compressor.quantization.analysis import sqnr_db
from compressor.records.environment import environment
from compressor.records.measurements import Latency
from compressor.references.reference import Reference
from compressor.stage import Stage, StageContext
from compressor.stages.int8_ptq import Int8Ptq
from compressor.stages.weight_only import WeightOnly
from compressor.task import Samples, Task
from compressor.text.figures import size, speed

WIDTH, BLOCKS, HEADS, TOKENS, VOCABULARY = 384, 6, 6, 128, 8192
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
}


class Logits(nn.Module):
    """A Hugging Face model that gives a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token indices (N, tokens) or images (N, 3, H, W) to logits."""
        logits: Tensor = self.model(inputs).logits
        return logits


def bert() -> nn.Module:
    """An encoder of text, 128 tokens."""
    return Logits(BertForSequenceClassification(BertConfig(**SIZES, vocab_size=VOCABULARY, num_labels=10)))


def vit() -> nn.Module:
    """An encoder of images, 64 patches."""
    return Logits(ViTForImageClassification(ViTConfig(**SIZES, image_size=64, patch_size=8, num_labels=10)))


class Next(Logits):
    """One that gives the logits of what follows the last token."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token indices (N, tokens) to logits (N, vocabulary)."""
        return super().forward(inputs)[:, -1]


def gpt2() -> nn.Module:
    """A decoder of text that reads 128 tokens at once."""
    sizes = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": TOKENS}
    return Next(GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=VOCABULARY, use_cache=False)))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"bert": bert, "vit": vit, "gpt2": gpt2}
STAGES: Mapping[str, tuple[type[Stage[TorchModel, OnnxModel]], Mapping[str, Any]]] = {
    "int8_ptq, portable": (Int8Ptq, {"target": "portable"}),
    "int8_ptq, x86-vnni": (Int8Ptq, {"target": "x86-vnni"}),
    "weight_only, 8 bits": (WeightOnly, {"bits": 8}),
    "weight_only, 4 bits": (WeightOnly, {"bits": 4}),
}


def main() -> None:
    """Make and time every file, then print and write the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        rows = [row for name in NETWORKS for row in compared(name, Path(directory))]
    result = {"rows": rows, "environment": environment()}
    publish("transformer_int8", "python benchmarks/transformer_int8.py", result, table)


def compared(name: str, directory: Path) -> list[dict[str, Any]]:
    """Figures of each form of one network, float32 first."""
    torch.manual_seed(0)
    model = TorchModel(NETWORKS[name]().eval(), Reference(factory=f"transformer_int8:{name}"))
    task = task_of(name)
    (directory / name).mkdir()
    files = {"float32": to_onnx(model.module, task, directory / name / "float32.onnx").path}
    for maker, (stage, settings) in STAGES.items():
        print(f"{name}: {maker}", flush=True)
        place = directory / name / maker.replace(", ", "_").replace(" ", "_")
        place.mkdir(parents=True)
        context = StageContext(model, torch.device("cpu"), 0, place, print)
        files[maker] = stage.model_validate_json(json.dumps(settings)).apply(model, task, context).path
    dynamic = directory / name / "dynamic.onnx"
    quantize_dynamic(files["float32"], dynamic, per_channel=True, weight_type=QuantType.QInt8)
    files["dynamic, onnxruntime"] = dynamic
    wanted = OnnxModel(files["float32"]).predict(task.test.inputs)
    times, session = time_models(tuple(files.values()), inputs=[task.example_inputs[0][:1].numpy()])
    return [
        {
            "network": name,
            "maker": maker,
            "size_bytes": sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")),
            "sqnr_db": sqnr_db([OnnxModel(file).predict(task.test.inputs)], [wanted]),
            "latency": latency.model_dump(),
            "latency_session": session.model_dump(),
        }
        for (maker, file), latency in zip(files.items(), times, strict=True)
    ]


def task_of(name: str) -> Task:
    """Random tokens, or images of smooth noise, and no targets that mean anything."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        coarse = torch.randn(96, 3, 16, 16, generator=generator)
        inputs = nn.functional.interpolate(coarse, size=64, mode="bilinear")
    else:
        inputs = torch.randint(VOCABULARY, (96, TOKENS), generator=generator)
    targets = torch.zeros(96, dtype=torch.int64)
    seen, unseen = Samples((inputs[:64],), targets[:64]), Samples((inputs[64:],), targets[64:])
    return Task(seen, unseen, unseen, seen, (inputs[:2],))


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| network | weights and activations | size | latency | SQNR, dB |", "|---|---|--:|--:|--:|"]
    for row in result["rows"]:
        sqnr = row["sqnr_db"]
        faster = "" if row["maker"] == "float32" else speed(Latency.model_validate(row["latency"]))
        lines.append(
            f"| {row['network']} | {row['maker']} | {size(row['size_bytes'])} | {faster} | "
            f"{'' if sqnr is None else f'{sqnr:.1f}'} |"
        )
    noises = [Latency.model_validate(row["latency_session"]["noise"]) for row in result["rows"]]
    noise = max(found.interval.distance for found in noises)
    facts = result["environment"]
    lines += [
        "",
        f"<sub>`{result['command']}`, {result['date']}: {BLOCKS} blocks of width {WIDTH}, random weights, one sample "
        f"({TOKENS} tokens; 64 patches) on one thread; a latency session for each network: in each, the baseline timed "
        f"against itself differs by up to {100 * noise:.1f} %. {cpu(facts)}, "
        f"torch {facts['versions']['torch']}, onnxruntime {facts['versions']['onnxruntime']}; all of it in "
        f"{link('transformer_int8')}.</sub>",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
