"""Every way to distil, against training on the labels alone: `python benchmarks/distillation.py DATA_DIR WEIGHTS_FILE`.

ResNet-56 teaches ResNet-8 (75 thousand parameters) on CIFAR-10 as JPEG files. Every method trains the student for the
same number of steps of the same size with the same optimizer, chosen beforehand and tuned for none. What is reported is
the test accuracy after the last step, never the best on the way. Methods share a seed's first weights and order of
samples, so they are compared seed by seed: the verdict is BEATS or DOES NOT BEAT if Student's 95 % interval of the mean
difference from plain training lies on one side of zero, else INCONCLUSIVE. The interval is over seeds, not over test
images, and of seven such verdicts one may be wrong by chance in every third table. The teacher has seen every label,
those of `semi_supervised` too.

What is done is kept under runs/, and the same command goes on from there.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines")]  # the example's models and data

import cifar10
from publish import cpu, link, publish

from compressor.measure.latency import t_quantile
from compressor.measure.quality import agreement
from compressor.models.artifact import TorchModel
from compressor.records.environment import environment
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.distillation import Distillation
from compressor.stages.mutual_learning import MutualLearning
from compressor.stages.soft_labels import SoftLabels
from compressor.stages.training import Training
from compressor.task import Task, batches

EPOCHS, BATCH_SIZE, SAMPLES, LABELS = 20, 128, 9000, 500
STUDENT = {"factory": "cifar10:resnet8"}
COURSE = {"batch_size": BATCH_SIZE, "optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}}
KD = {"kd": {"temperature": 4.0, "weight": 0.9}, "hard": {"weight": 0.1}}
OFFLINE = {"student": STUDENT, "epochs": EPOCHS, **COURSE}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "soft_labels": {"views": EPOCHS},
    "soft_labels_few": {"views": 8},
    "plain": {"epochs": EPOCHS, **COURSE},
    "kd": {**OFFLINE, "losses": KD},
    "kd_hint": {**OFFLINE, "losses": {**KD, "hint": {"layers": {"layer2": "layer2"}, "weight": 1.0}}},
    "dkd": {
        **OFFLINE,
        "losses": {"dkd": {"temperature": 4.0, "alpha": 1.0, "beta": 2.0, "weight": 1.0}, "hard": {"weight": 1.0}},
    },
    "dist": {
        **OFFLINE,
        "losses": {"dist": {"temperature": 1.0, "inter": 2.0, "intra": 2.0, "weight": 1.0}, "hard": {"weight": 1.0}},
    },
    "mutual": {"students": [STUDENT, STUDENT], "epochs": EPOCHS, **COURSE},
    "born_again": {"epochs": EPOCHS, **COURSE, "losses": KD},
    "semi_supervised": {**OFFLINE, "losses": KD, "unlabeled_share": 0.944},
    "plain_500_labels": {"epochs": EPOCHS * (SAMPLES // BATCH_SIZE) // (LABELS // BATCH_SIZE), **COURSE},
}
"""Stage settings by method, as a pipeline file would have them. `born_again` starts from the plain student's teaching;
`semi_supervised` sees 500 labels and 8,500 images without, in 8 views each; `plain_500_labels` those labels alone."""
AGAINST = {"semi_supervised": "plain_500_labels"}
"""What a method is compared with, if not with `plain`."""
CONTROLS = ("plain", *AGAINST.values())
"""What others are compared with; they differ in their labels, so between them there is nothing to decide."""
METHODS = tuple(name for name in SETTINGS if not name.startswith("soft_labels"))

ORDER = (
    ("soft_labels", "plain", "kd", "dkd", "dist", "born_again"),
    ("mutual", "kd_hint", "soft_labels_few", "semi_supervised", "plain_500_labels"),
)
"""What one process does after another: a method comes after those whose result it learns from."""


def main() -> None:
    """Run what is not there yet, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("weights_file", type=Path)
    parser.add_argument("--seeds", type=int, choices=range(2, 21), metavar="N", default=3)
    parser.add_argument("--jobs", type=int, default=2, help="Processes, of one thread each.")
    arguments = parser.parse_args()
    kept = ROOT / "runs" / "benchmark_distillation"
    kept.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        where = (arguments.data_dir, arguments.weights_file, kept)
        jobs = [(seed, pool.submit(run, seed, names, *where)) for seed in range(arguments.seeds) for names in ORDER]
        found: list[dict[str, dict[str, float]]] = [{} for _ in range(arguments.seeds)]
        for seed, job in jobs:
            found[seed] |= job.result()
    result = {
        "settings": SETTINGS,
        "steps": EPOCHS * (SAMPLES // BATCH_SIZE),
        "teacher_accuracy": found[0]["soft_labels"]["accuracy"],
        "test_samples": len(cifar10.task(arguments.data_dir).test),
        "methods": {name: summary(name, found) for name in METHODS},
        "environment": environment(),
    }
    publish("distillation", "python benchmarks/distillation.py DATA_DIR WEIGHTS_FILE", result, table)


def run(seed: int, names: Sequence[str], data_dir: Path, weights_file: Path, kept: Path) -> dict[str, dict[str, float]]:
    """Accuracy, agreement with the teacher and seconds of each method of `names`, in order, with one seed."""
    torch.set_num_threads(1)
    task, few = cifar10.task(data_dir), cifar10.task(data_dir, labels=LABELS)
    teacher = TorchModel.build(Reference(factory="cifar10:resnet56", weights_file=str(weights_file)), seed=seed)
    student = TorchModel.build(Reference(**STUDENT), seed=seed)
    teacher_logits = logits(teacher, task)
    directory = kept / f"seed{seed}"
    directory.mkdir(exist_ok=True)

    def context(name: str) -> StageContext:
        work_dir = directory / name
        work_dir.mkdir(exist_ok=True)
        return StageContext(teacher, torch.device("cpu"), seed, work_dir, lambda line: print(f"{seed} {name}: {line}"))

    def stored(name: str) -> TorchModel:
        return TorchModel.load(directory / f"{name}.model")

    def distilled(name: str, teach: Callable[[], TorchModel], on: Task) -> Callable[[], TorchModel]:
        stage = Distillation.model_validate_json(json.dumps(SETTINGS[name]))
        return lambda: stage.apply(teach(), on, context(name))

    mutual = MutualLearning.model_validate_json(json.dumps(SETTINGS["mutual"]))

    def measured(name: str, train: Callable[[], TorchModel]) -> dict[str, float]:
        folder = directory / f"{name}.model"
        file = folder / "result.json"
        settings = json.loads(json.dumps(SETTINGS[name]))
        if not file.exists() or json.loads(file.read_text())["settings"] != settings:
            start = time.perf_counter()
            model = train()
            seconds = time.perf_counter() - start
            folder.mkdir(exist_ok=True)
            model.save(folder)
            own = logits(model, task)
            result = {
                "settings": settings,
                "accuracy": float((own.argmax(1) == targets(task)).mean()),
                "agreement": agreement(teacher_logits, own),
                "seconds": seconds,
            }
            file.write_text(json.dumps(result))
        found: dict[str, float] = json.loads(file.read_text())
        return found

    ways: Mapping[str, Callable[[], TorchModel]] = {
        "soft_labels": lambda: SoftLabels(**SETTINGS["soft_labels"]).apply(teacher, task, context("soft_labels")),
        "soft_labels_few": lambda: SoftLabels(**SETTINGS["soft_labels_few"]).apply(
            teacher, few, context("soft_labels_few")
        ),
        "plain": lambda: Training(**SETTINGS["plain"]).apply(student, task, context("plain")),
        **{name: distilled(name, lambda: stored("soft_labels"), task) for name in ("kd", "dkd", "dist")},
        "born_again": distilled("born_again", lambda: stored("plain"), task),
        "mutual": lambda: mutual.apply(teacher, task, context("mutual")),
        "kd_hint": distilled("kd_hint", lambda: teacher, task),
        "semi_supervised": distilled("semi_supervised", lambda: stored("soft_labels_few"), few),
        "plain_500_labels": lambda: Training(**SETTINGS["plain_500_labels"]).apply(student, few, context("plain_500")),
    }
    return {name: measured(name, ways[name]) for name in names}


def logits(model: TorchModel, task: Task) -> np.ndarray:
    """Outputs on the test split."""
    return torch.cat([model.predict(batch.inputs) for batch in batches(task.test, 250)]).numpy()


def targets(task: Task) -> np.ndarray:
    """Labels of the test split."""
    return torch.cat([batch.targets for batch in batches(task.test, 250)]).numpy()


def summary(name: str, by_seed: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Mean, spread and verdict of a method over seeds."""
    plain = AGAINST.get(name, "plain")
    found = [of_seed[name] for of_seed in by_seed]
    accuracies = [one["accuracy"] for one in found]
    gains = [of_seed[name]["accuracy"] - of_seed[plain]["accuracy"] for of_seed in by_seed]
    gain = statistics.fmean(gains)
    half_width = t_quantile(len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    verdict = "BEATS" if gain > half_width else "DOES NOT BEAT" if gain < -half_width else "INCONCLUSIVE"
    return {
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "standard_deviation": statistics.stdev(accuracies),
        "gain": gain,
        "gain_interval_95": [gain - half_width, gain + half_width],
        "against": plain,
        "verdict": "" if name in CONTROLS else verdict,
        "agreement": statistics.fmean(one["agreement"] for one in found),
        "seconds": statistics.fmean(one["seconds"] for one in found),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| method | accuracy | gain | over | verdict | agreement with the teacher |",
        "|---|--:|--:|---|---|--:|",
    ]
    for name, one in result["methods"].items():
        low, high = (100 * end for end in one["gain_interval_95"])
        gain = f"{100 * one['gain']:+.1f} [{low:+.1f}, {high:+.1f}] | {one['against']} | {one['verdict']}"
        spread = f"{100 * one['mean']:.1f} ± {100 * one['standard_deviation']:.1f} %"
        compared = " |  | " if name in CONTROLS else gain
        lines.append(f"| {name} | {spread} | {compared} | {100 * one['agreement']:.1f} % |")
    facts = result["environment"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "accelerate"))
    seeds = len(result["methods"]["plain"]["accuracies"])
    teacher = f"ResNet-56 ({100 * result['teacher_accuracy']:.2f} %)"
    source = (
        f"<sub>`{result['command']}`, {result['date']}: {teacher} teaches ResNet-8 on CIFAR-10 as JPEG files, "
        f"{result['steps']} steps, {seeds} seeds, mean ± standard deviation of the accuracy on "
        f"{result['test_samples']:,} test images after the last step; gains in points with Student's 95 % interval "
        f"over seeds. {cpu(facts)}, {versions}; all of it in {link('distillation')}.</sub>"
    )
    return "\n".join([*lines, "", source])


if __name__ == "__main__":
    main()
