"""Parses the HLO text of a compiled program."""

import re
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_CALL = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(%[\w.-]+|\{[^}]*\})"
)
_ARRAY = re.compile(r"\b([a-z]+(\d*)[a-z0-9]*)\[([\d,<=]*)\]")


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    shape: str  # Of its result, as XLA prints it.
    opcode: str  # For example "all-reduce".
    operands: tuple[str, ...]  # The names of instructions in the same computation.
    attributes: str  # The rest of the line, with strings emptied.
    trip_count: int | None  # A loop's number of iterations, if XLA knows it.

    def calls(self) -> list[tuple[str, str]]:
        """The computations that it calls, as (attribute, computation)."""
        if self.opcode.endswith(("-done", "-update")):  # The asynchronous start made the call.
            return []
        return [(how, name) for how, names in _CALL.findall(self.attributes) for name in _names(names)]


class Module(NamedTuple):
    """A compiled program for replicas × partitions devices."""

    replicas: int
    partitions: int
    entry: str  # The name of the entry computation.
    computations: dict[str, dict[str, Instruction]]  # Computation name -> instruction name -> instruction.


def parse(text: str) -> Module:
    """Parses the text of one compiled program, or raises ValueError."""
    header, *lines = text.strip().split("\n")
    header = _STRING.sub('""', header)
    entries, computations, current = [], {}, None
    for line in lines:
        if line.startswith("}"):
            current = None
        elif line[:1].isspace() and line.strip():
            if current is None:
                raise ValueError(f"compiled has an instruction outside of any computation: {line.strip()[:200]!r}.")
            name, instruction = _instruction(line)
            current[name] = instruction
        elif match := _HEADER.fullmatch(line):
            current = computations[match[2]] = {}
            entries += [match[2]] if match[1] else []
    if len(entries) != 1:
        raise ValueError(f"compiled must be the text of one module, but it has {len(entries)} entry computations.")
    return Module(_number(header, "replica_count"), _number(header, "num_partitions"), entries[0], computations)


def num_bytes(shape: str) -> int:
    """The size in bytes of a shape as XLA prints it: 26 for "(f32[2,3]{1,0}, s4[3]{0}, token[])", as s4 is packed."""
    total = 0
    for dtype, digits, dims in _ARRAY.findall(shape):
        bits = int(digits) if digits else 8 * (dtype == "pred")
        for dim in dims.replace("<=", "").split(","):
            bits *= int(dim or 1)
        total += -(-bits // 8)
    return total


def _instruction(line: str) -> tuple[str, Instruction]:
    match = _INSTRUCTION.fullmatch(_STRING.sub('""', line))
    if match is None:
        raise ValueError(f"compiled has a line that is not understood as XLA's: {line.strip()[:200]!r}.")
    name, shape, opcode, rest = match.groups()
    trips = _TRIP_COUNT.search(line) if opcode == "while" else None
    depth, end = 1, len(rest)
    for bracket in re.finditer(r"[()]", rest):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            end = bracket.start()
            break
    return name, Instruction(shape, opcode, _names(rest[:end]), rest[end + 1 :], int(trips[1]) if trips else None)


def _names(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.-]+)", text))


def _number(header: str, name: str) -> int:
    match = re.search(rf", {name}=(\d+)", header)
    return int(match[1]) if match else 1
