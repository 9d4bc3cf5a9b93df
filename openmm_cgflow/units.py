"""Units at the public door: strings such as ``"300 K"`` and ``openmm.unit`` quantities become plain floats.

Inside the package everything is in nm, ps, kJ/mol, K and Da.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import pint
from openmm import unit
from pydantic import BeforeValidator, GetCoreSchemaHandler

__all__ = [
    "GAS_CONSTANT",
    "ForcePerMole",
    "Friction",
    "Length",
    "Mass",
    "Seconds",
    "Temperature",
    "Thermal",
    "Time",
    "Unit",
    "parse_quantity",
    "thermal_beta",
]

GAS_CONSTANT = 8.31446261815324e-3
"""kJ/mol/K"""

_OPENMM_UNITS = {
    "K": unit.kelvin,
    "ps": unit.picosecond,
    "1/ps": unit.picosecond**-1,
    "Da": unit.dalton,
    "s": unit.second,
    "nm": unit.nanometer,
    "kJ/mol/nm": unit.kilojoule_per_mole / unit.nanometer,
}


def thermal_beta(temperature: float) -> float:
    """Inverse temperature β = 1/(RT) in mol/kJ of a temperature in K."""
    return 1.0 / (GAS_CONSTANT * temperature)


@cache
def _registry() -> pint.UnitRegistry:
    registry: pint.UnitRegistry = pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
    registry.define("kT = [thermal_energy]")  # of a temperature that is given elsewhere: it converts to nothing else
    return registry


def parse_quantity(value: Any, target: str) -> float:
    """Converts a number, a string with a unit or an ``openmm.unit.Quantity`` to a float in ``target``.

    Arguments:
        value: A plain number (already in ``target``), ``"0.25 kcal/mol"``, ``"10 /ps"``, or a Quantity.
        target: A unit that pint knows, such as ``"K"``, ``"ps"`` or ``"1/ps"``, or ``"kT"``.

    Raises:
        ValueError: If the value has no number, an unknown unit or a unit of another dimension.
    """
    if isinstance(value, bool):
        raise ValueError(f"got {value!r}, expected a number or a quantity in {target}")
    if isinstance(value, (int, float)):
        return float(value)
    if unit.is_quantity(value):
        try:
            return float(value.value_in_unit(_OPENMM_UNITS[target]))
        except (KeyError, TypeError):
            raise ValueError(f"got {value}, expected a quantity in {target}") from None
    text = str(value).strip()
    # "10 /ps" is how the field writes a rate; pint wants an explicit numerator.
    expression = text.replace(" /", " 1/", 1) if " /" in text else text
    try:
        quantity: Any = _registry().Quantity(expression)
        if quantity.dimensionless and quantity.unitless:
            return float(quantity.magnitude)
        return float(quantity.to(target).magnitude)
    except Exception as error:  # pint raises many unrelated types on malformed text
        raise ValueError(f"got {text!r}, expected a number or a quantity in {target} ({error})") from None


@dataclass(frozen=True)
class Unit:
    """Marks a setting with its unit: values are converted to it by :func:`parse_quantity`."""

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        convert = BeforeValidator(lambda value: None if value is None else parse_quantity(value, self.name))
        return convert.__get_pydantic_core_schema__(source, handler)


Temperature = Annotated[float, Unit("K")]
Time = Annotated[float, Unit("ps")]
Friction = Annotated[float, Unit("1/ps")]
Seconds = Annotated[float, Unit("s")]
Mass = Annotated[float, Unit("Da")]
Length = Annotated[float, Unit("nm")]
ForcePerMole = Annotated[float, Unit("kJ/mol/nm")]
Thermal = Annotated[float, Unit("kT")]
