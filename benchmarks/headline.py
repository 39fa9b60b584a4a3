"""The tables of the headline results, for docs/results.md and README: figures of `suite.py` in, Markdown out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from publish import RESULTS, cpu, link

from compressor.records.measurements import Latency
from compressor.report.json import read_report
from compressor.report.markdown import to_markdown
from compressor.text.figures import count, factor, size, size_ratio, speed

NETWORKS = {
    "digits": "digits",
    "mnist": "LeNet-5",
    "mnist_300_100": "LeNet-300-100",
    "cifar10": "ResNet-56",
    "cifar10_parts": "ResNet-56 in parts",
}
"""What each part of the suite compresses."""
SUMMARY = {
    "digits": "digits, the demo",
    "mnist": "MNIST, LeNet-5",
    "mnist_300_100": "MNIST, LeNet-300-100",
    "cifar10": "CIFAR-10, ResNet-56",
}
"""The rows of README's table."""
DEEP_COMPRESSION = {"mnist": (39, 0.9920, 0.9926), "mnist_300_100": (40, 0.9836, 0.9842)}
"""How much smaller Han et al. (2016) made the same network, and its test accuracy before and after (table 1)."""
WHOLE = "distillation → pruning → int8 (QAT)"
PRUNED_FIRST = "pruning, to that size → distillation → int8 (QAT)"


def table(result: Mapping[str, Any]) -> str:
    """The headline results in full: the demo, MNIST beside Deep Compression, CIFAR-10 in parts and beside peers."""
    demo = read_report(RESULTS / "pipeline_digits.json")
    _, headline, of_demo, *_ = to_markdown(demo).split("\n\n")
    facts = result["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "onnxruntime", "nncf"))
    networks = result["networks"]
    first, *_ = result["seeds"]
    provenance = (
        f"<sub>`{result['command']}`, {dates(networks)}. Ranges and standard deviations (±) are over seeds, everything "
        f"else is of seed {first}; sizes without what exporters leave of themselves. {facts['cores']} cores of "
        f"{cpu(facts)}, {versions}; all of it in {link('headline')}, reports of seed {first} in pipeline_*.json beside "
        "it.</sub>"
    )
    return "\n\n".join([f"**{demo.pipeline}**: {headline}", of_demo, of_mnist(result), of_cifar10(result), provenance])


def summary(result: Mapping[str, Any]) -> str:
    """README's one table: what comes in and what goes out, for each network."""
    lines = [
        "| network | file | | speed at batch 1 | accuracy before | after |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, network in SUMMARY.items():
        runs = result["networks"][name]["runs"]
        after = runs[0]["size_bytes"]
        before = round(runs[0]["size_ratio"] * after)
        smaller, faster = ([run[figure] for run in runs] for figure in ("size_ratio", "latency"))
        lines.append(
            f"| {network} | {size(before)} → {size(after)} | {least_and_most(smaller)} smaller | "
            f"{least_and_most([one['ratio'] for one in faster])} faster | "
            f"{mean([run['baseline_accuracy'] for run in runs])} | {mean([run['accuracy'] for run in runs])} |"
        )
    facts = result["environment"]
    seeds = ", ".join(
        f"{network} {count(len(result['networks'][name]['runs']), 'seed')}"
        for name, network in NETWORKS.items()
        if name in SUMMARY
    )
    source = (
        f"<sub>ONNX files under ONNX Runtime {facts['versions']['onnxruntime']}, one thread of {cpu(facts)}, a CPU "
        f"with VNNI. {seeds}; ± is a standard deviation over them.</sub>"
    )
    return "\n".join([*lines, "", source])


def of_mnist(result: Mapping[str, Any]) -> str:
    """MNIST beside what was published."""
    lines = [
        "| MNIST, ONNX file | smaller | faster, batch 1 | accuracy before | after | Deep Compression |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (smaller, before, after) in DEEP_COMPRESSION.items():
        runs = result["networks"][name]["runs"]
        lines.append(
            f"| {NETWORKS[name]}, {count(len(runs), 'seed')} | {least_and_most([run['size_ratio'] for run in runs])} | "
            f"{least_and_most([run['latency']['ratio'] for run in runs])} | "
            f"{mean([run['baseline_accuracy'] for run in runs])} | {mean([run['accuracy'] for run in runs])} | "
            f"{smaller}x, {100 * before:.2f} to {100 * after:.2f} % |"
        )
    found = result["networks"]["mnist_300_100"]["bounds"]
    one_layer, copy, of_32 = (speed(Latency.model_validate(found[name])) for name in ("one_layer", "copy", "batch_32"))
    bounds = (
        f"What a call leaves, beside LeNet-300-100 at batch 1: a file that only copies its input, {copy}; one of one "
        f"layer, 784 inputs and 10 outputs, {one_layer}. Ours at a batch of 32: {of_32}."
    )
    return "\n".join([*lines, "", bounds])


def of_cifar10(result: Mapping[str, Any]) -> str:
    """CIFAR-10: each technique alone, every pair, the whole in both orders, and peers, in one session."""
    runs, parts = result["networks"]["cifar10"]["runs"], result["networks"]["cifar10_parts"]
    rows = parts["rows"]
    lines = [
        "| CIFAR-10 (1,000 training and 200 test files a class), ResNet-56 | size | | latency | accuracy |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, row in rows.items():
        first = label == next(iter(rows))
        smaller = "" if first else size_ratio(rows["float32"]["size_bytes"], row["size_bytes"])
        faster = "" if first else speed(Latency.model_validate(row["latency"]))
        accuracy = mean([run["accuracy"] for run in (runs if label == WHOLE else [row])])
        lines.append(f"| {label} | {size(row['size_bytes'])} | {smaller} | {faster} | {accuracy} |")
    floor = Latency.model_validate(parts["session"]["noise"]).interval.distance
    speeds = least_and_most([run["latency"]["ratio"] for run in runs])
    session = (
        f"One latency session; in it the baseline against itself differs by up to {100 * floor:.1f} %. Timed each with "
        f"its own pipeline, the {count(len(runs), 'seed')} of the whole are {speeds} faster."
    )
    return "\n".join([*lines, "", session])


def mean(shares: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several, of shares, in percent."""
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.fmean(shares):.2f}{deviation} %"


def least_and_most(ratios: Sequence[float]) -> str:
    """The smallest and the largest of some ratios, or one figure where both are written alike."""
    return " to ".join(dict.fromkeys(f"{factor(ratio)}x" for ratio in (min(ratios), max(ratios))))


def dates(networks: Mapping[str, Any]) -> str:
    """The day on which the networks were run, or each day with its networks."""
    by_date: dict[str, list[str]] = {}
    for name, network in NETWORKS.items():
        by_date.setdefault(networks[name]["date"], []).append(network)
    if len(by_date) == 1:
        return next(iter(by_date))
    return "; ".join(f"{', '.join(names)} on {date}" for date, names in sorted(by_date.items()))
