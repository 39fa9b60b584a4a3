"""Run a pipeline and keep what it found: `python benchmarks/headline.py pipelines/mnist.yaml [--set …]`.

The report goes to benchmarks/results/NAME.json, and the README's results are written anew from all reports there.
"""

import subprocess
import sys
from pathlib import Path

from compressor.report.json import read_report, to_json
from compressor.report.markdown import to_markdown
from compressor.report.records import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main() -> None:
    """Run the pipeline named on the command line, keep its report and renew the README."""
    pipeline = sys.argv[1]
    finished = subprocess.run([sys.executable, "-m", "compressor", "run", *sys.argv[1:]], check=False)
    if finished.returncode not in (0, 3, 4):  # an unmet gate is a result too
        sys.exit(finished.returncode)
    report = read_report(Path("runs") / Path(pipeline).stem / "report.json")
    (RESULTS / f"pipeline_{report.pipeline}.json").write_text(to_json(report))
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join(section(file) for file in sorted(RESULTS.glob("pipeline_*.json")))
    README.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


def section(file: Path) -> str:
    """Headline and table of a kept report, and what they were taken with."""
    report = read_report(file)
    _, headline, table, *_ = to_markdown(report).split("\n\n")
    return f"**{report.pipeline}**: {headline}\n\n{table}\n\n{provenance(report, file)}"


def provenance(report: Report, file: Path) -> str:
    """The command, machine and versions of a report."""
    facts = report.environment
    overrides = "".join(f" --set {override}" for override in report.overrides)
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "onnxruntime"))
    minutes = sum(row.seconds for row in report.rows) / 60
    return (
        f"<sub>`python benchmarks/headline.py pipelines/{report.pipeline}.yaml{overrides}`, "
        f"{minutes:.0f} minutes of stages on {facts['cores']} cores of {facts['cpu']} "
        f"({', '.join(facts['cpu_flags'])}), {versions}; all of it in [{file.name}]({file.relative_to(ROOT)}).</sub>"
    )


if __name__ == "__main__":
    main()
