"""Int8 files on other processors: `python benchmarks/portability.py MNIST_DIR CIFAR10_DIR MACHINE=COMMAND …`.

Runs the files that `benchmarks/quantization.py` made on the same test images here and by each COMMAND, which starts a
Python with onnxruntime on another processor, real or emulated, such as
`"Haswell=qemu-x86_64-static -cpu Haswell /usr/bin/python3"`. Share of the images whose logits are equal bit for bit,
the largest difference, and the share of equal classes.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "pipelines"), str(ROOT / "benchmarks")]  # the examples' data

from publish import cpu, link, publish

from compressor.records.environment import environment
from quantization import task_of

NETWORKS = ("lenet5", "mobile", "resnet20")
MAKERS = ("float32", "int8_ptq_portable", "int8_qat_portable", "int8_ptq_x86-vnni")
IMAGES = 40
RUN = """
import sys
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for name in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    inputs = np.load(name.split(".")[0] + ".npy")
    np.save(f"{name}.npy", session.run(None, {session.get_inputs()[0].name: inputs})[0])
"""


def main() -> None:
    """Run every file everywhere, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mnist_dir", type=Path)
    parser.add_argument("cifar10_dir", type=Path)
    parser.add_argument("machines", nargs="+", metavar="MACHINE=COMMAND")
    arguments = parser.parse_args()
    images = {
        name: task_of(name, arguments.mnist_dir, arguments.cifar10_dir).test.inputs[0][:IMAGES].numpy()
        for name in NETWORKS
    }
    if faults := [text for text in arguments.machines if "=" not in text]:
        parser.error(f"each machine must be MACHINE=COMMAND, got {faults}")
    machines = dict(text.split("=", 1) for text in arguments.machines)
    here = logits([sys.executable], images)
    rows = []
    for machine, command in machines.items():
        for name, found in logits(shlex.split(command), images).items():
            rows.append(
                {
                    "machine": machine,
                    "file": name,
                    "equal": float((found == here[name]).all(axis=1).mean()),
                    "largest_difference": float(np.abs(found - here[name]).max()),
                    "classes": float((found.argmax(axis=1) == here[name].argmax(axis=1)).mean()),
                }
            )
    names = " ".join(f"'{machine}=COMMAND'" for machine in machines)
    commands = {machine: without_places(command) for machine, command in machines.items()}
    result = {"machines": commands, "images": IMAGES, "rows": rows, "environment": environment()}
    publish("portability", f"python benchmarks/portability.py MNIST_DIR CIFAR10_DIR {names}", result, table)


def without_places(command: str) -> str:
    """The command with the last component of each path: where things lie is of no use on another machine."""
    return shlex.join(Path(part).name if "/" in part else part for part in shlex.split(command))


def logits(command: list[str], images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each file gives for the images of its network, by `NETWORK.MAKER`."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for network, inputs in images.items():
            np.save(place / f"{network}.npy", inputs)
            for maker in MAKERS:
                made = ROOT / "runs" / "benchmark_quantization" / network / maker / "model.onnx"
                shutil.copy(made, place / f"{network}.{maker}.onnx")
        names = [f"{network}.{maker}" for network in NETWORKS for maker in MAKERS]
        (place / "run.py").write_text(RUN)
        subprocess.run([*command, "run.py", *names], cwd=place, check=True)
        return {name: np.load(place / f"{name}.npy") for name in names}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown, a row for each file and a column for each machine."""
    machines = list(dict.fromkeys(row["machine"] for row in result["rows"]))
    found = {(row["file"], row["machine"]): row for row in result["rows"]}
    lines = [f"| logits beside those here | {' | '.join(machines)} |", f"|---|{'--:|' * len(machines)}"]
    for file in dict.fromkeys(row["file"] for row in result["rows"]):
        texts = " | ".join(described(found[file, machine]) for machine in machines)
        lines.append(f"| {file.replace('.', ', ').replace('_', ' ')} | {texts} |")
    facts = result["environment"]
    lines += [
        "",
        f"<sub>`{result['command']}`, {result['date']}: logits of {result['images']} test images, beside those on "
        f"{cpu(facts)}, onnxruntime {facts['versions']['onnxruntime']}; all of it in {link('portability')}.</sub>",
    ]
    return "\n".join(lines)


def described(row: Mapping[str, Any]) -> str:
    """One cell of the table."""
    if row["equal"] == 1:
        return "equal bit for bit"
    classes = "" if row["classes"] == 1 else f", another class for {100 * (1 - row['classes']):.1f} %"
    return f"{100 * row['equal']:.1f} % equal, others up to {row['largest_difference']:.2g} apart{classes}"


if __name__ == "__main__":
    main()
