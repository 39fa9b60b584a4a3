"""What each target asks of an int8 model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

TargetName: TypeAlias = Literal["portable", "x86-vnni", "arm64"]


@dataclass(frozen=True)
class Target:
    """Activations are uint8 with one scale per tensor, weights int8 with one or more, on every target."""

    weight_limit: int
    """Largest weight, as an integer."""
    reason: str


TARGETS: Mapping[TargetName, Target] = {
    "portable": Target(63, "AVX2 adds two uint8 x int8 products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not"),
    "x86-vnni": Target(127, "VNNI adds four products in 32 bits"),
    "arm64": Target(127, "NEON adds products in 32 bits"),
}
