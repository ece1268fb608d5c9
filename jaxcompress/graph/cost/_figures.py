"""Figures with their origin, and memory by kind."""

from dataclasses import dataclass, fields
from typing import Any

from jaxcompress.graph.cost._aot import Outcome

COUNTED = "jaxpr count"
TPU_ESTIMATE = "TPU compiler estimate"
PROGRAM = "compiled program"
ROOFLINE = "roofline from published peaks"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number, its unit, and where it comes from.

    Attributes:
        value: The number.
        unit: `"FLOP"`, `"B"`, `"s"` or `"entries"`.
        origin: `"jaxpr count"`, `"TPU compiler estimate"`, `"compiled program"` or
            `"roofline from published peaks"`.
    """

    value: float
    unit: str
    origin: str

    def __float__(self) -> float:
        return float(self.value)

    def as_dict(self) -> dict[str, Any]:
        """Give the fields as plain values.

        Returns:
            A mapping with `value`, `unit` and `origin`.
        """
        return {"value": self.value, "unit": self.unit, "origin": self.origin}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a program keeps on one device, by kind; `None` where it was refused.

    Attributes:
        arguments: Arguments; those that fn does not read are dropped.
        outputs: Results.
        temporaries: What lives only while it runs.
        aliased: Results that overwrite donated arguments.
        code: The program itself; 0 where the compiler does not say.
        peak: arguments + outputs + temporaries - aliased, or what a compiler that refused says
            it would need.
    """

    arguments: Figure
    outputs: Figure | None = None
    temporaries: Figure | None = None
    aliased: Figure | None = None
    code: Figure | None = None
    peak: Figure | None = None

    @staticmethod
    def of(outcome: Outcome, told: str) -> "Memory":
        """Read a compiler's outcome.

        Args:
            outcome: The outcome.
            told: The origin of a figure that the compiler estimates.

        Returns:
            The bytes.
        """

        def figure(value: float, origin: str = PROGRAM) -> Figure:
            return Figure(value=value, unit="B", origin=origin)

        if outcome.program is None:
            needed = outcome.required
            return Memory(
                arguments=figure(outcome.arguments, COUNTED),
                peak=None if needed is None else figure(needed, told),
            )
        stats = outcome.program.memory_analysis()
        arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
        temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
        return Memory(
            arguments=figure(arguments),
            outputs=figure(outputs),
            temporaries=figure(temporaries),
            aliased=figure(aliased),
            code=figure(stats.generated_code_size_in_bytes),
            peak=figure(arguments + outputs + temporaries - aliased),
        )

    def as_dict(self) -> dict[str, Any]:
        """Give the kinds as plain values.

        Returns:
            `{kind: figure or None}`.
        """
        kinds = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: None if one is None else one.as_dict() for k, one in kinds.items()}
