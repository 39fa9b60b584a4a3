"""The facts of the machine that a measurement depends on; names no user, path or host. Knows no torch."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "compressor",
    "torch",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "accelerate",
    "safetensors",
    "numpy",
    "pydantic",
)
_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""Instructions that decide which integer kernels ONNX Runtime takes."""


def environment() -> dict[str, Any]:
    """Processor, operating system, versions and load of the moment, ready for JSON; None where the system is silent."""
    processor = _cpuinfo(_read("/proc/cpuinfo"))
    return {
        "cpu": processor.get("model name") or platform.processor() or None,
        "cpu_flags": [flag for flag in _FLAGS if flag in processor.get("flags", processor.get("Features", "")).split()],
        "cpu_governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "steal_share": _steal_share(_read("/proc/stat")),
        "os": f"{platform.system()} {platform.release().partition('-')[0]}",  # a local suffix may name the host
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Version of each installed package that results depend on."""
    return {name: number for name in _PACKAGES if (number := _version(name)) is not None}


def _cpuinfo(text: str) -> Mapping[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    first = text.partition("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _steal_share(text: str) -> float | None:
    """Share of processor time since boot that other guests of the host took, from /proc/stat."""
    ticks = [int(number) for number in text.partition("\n")[0].split()[1:9]]
    if len(ticks) < 8:
        return None
    return round(ticks[7] / sum(ticks), 6)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
