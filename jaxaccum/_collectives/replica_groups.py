"""Parses XLA's replica groups, in each of its syntaxes."""

import math
import re
from collections.abc import Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_INTEGERS = r"\d+(?:,\d+)*"
_GROUP = rf"\{{(?:{_INTEGERS})?\}}"
_NAME = r"(?:'[^']*'|[^\s'\"=:,{}\[\]()]+)"
_AXIS, _PART = rf"{_NAME}=\d+", rf"{_NAME}(?::\(\d+\)\d+)?"
_LISTS = re.compile(rf"\{{(?:{_GROUP}(?:,{_GROUP})*)?\}}")
_IOTA = re.compile(rf"\[({_INTEGERS})\]<=\[({_INTEGERS})\](?:T\(({_INTEGERS})\))?")
_MESH = re.compile(
    rf"mesh\[({_AXIS}(?:,{_AXIS})*)\]"
    rf"(?:, device_ids=\((?:\[({_INTEGERS})\](?:T\(({_INTEGERS})\))?|({_INTEGERS}))\))?"
    rf" \{{({_PART}(?:,{_PART})*)\}}"
)


def devices(opcode: str, attributes: str, replicas: int, partitions: int) -> Groups:
    """The groups of devices that participate in an instruction, sorted; empty if it is not a collective.

    A group is a sorted tuple; for a collective-permute, a (source, target) pair. Device r·partitions + p runs partition
    p of replica r. `opcode` has no "-start", and the strings in `attributes` are emptied. Raises for an unknown
    collective or syntax.
    """
    pairs, groups = (parse(attributes, name) for name in ("source_target_pairs", "replica_groups"))
    if opcode not in KINDS:
        # The groups of a "-done" or "-update" are those of its start.
        if (pairs or groups) and not opcode.endswith(("-done", "-update")):
            raise ValueError(
                f"{opcode} is no collective that jaxaccum knows. Please report it, with the version of jaxlib."
            )
        return ()
    of_replicas, of_partitions = (pairs or groups or [range(number)] for number in (replicas, partitions))
    if "use_global_device_ids=true" in attributes:
        found = groups or [range(replicas * partitions)]
    elif "channel_id=" not in attributes:  # Replica ids; the groups apply to each partition separately.
        found = [[r * partitions + p for r in group] for p in range(partitions) for group in of_replicas]
    elif opcode in ("all-gather", "all-reduce", "reduce-scatter"):  # Replica ids; all their partitions participate.
        found = [[r * partitions + p for r in group for p in range(partitions)] for group in of_replicas]
    else:  # Partition ids; the groups apply to each replica separately.
        found = [[r * partitions + p for p in group] for r in range(replicas) for group in of_partitions]
    strange = [device for group in found for device in group if device >= replicas * partitions]
    if strange:
        raise ValueError(f"{opcode} takes in device {strange[0]}, but the program has {replicas * partitions}.")
    order = tuple if opcode == "collective-permute" else sorted
    return tuple(sorted(tuple(order(group)) for group in found))


def parse(attributes: str, name: str) -> Groups:
    """The groups in the attribute `name`, in XLA's order; empty, for all devices, if it is `{}` or missing."""
    start = re.search(rf"(?:^|, ){name}=", attributes)
    if start is None:
        return ()
    text = attributes[start.end() :]
    for syntax, read in ((_LISTS, _lists), (_IOTA, _iota), (_MESH, _mesh)):
        match = syntax.match(text)
        if match and text[match.end() : match.end() + 1] in ("", ","):
            try:
                return tuple(tuple(int(device) for device in group) for group in read(match))
            except (KeyError, ValueError, ZeroDivisionError):
                break
    raise ValueError(
        f"{name}={text[:200]} is no syntax of XLA's that jaxaccum knows, so what runs where can't be told. Please "
        "report it, with the version of jaxlib."
    )


def _lists(match: re.Match[str]) -> Sequence[Sequence[int]]:
    """Reads `{{0,1},{2,3}}`, explicit groups."""
    return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", match[0][1:-1])]


def _iota(match: re.Match[str]) -> np.ndarray:
    """Reads `[2,4]<=[4,2]T(1,0)`: an iota of shape (4, 2), transposed and reshaped to (2, 4); each row is a group."""
    groups, size = _integers(match[1])
    return _numbered(match[2], match[3]).reshape(groups, size)


def _mesh(match: re.Match[str]) -> np.ndarray:
    """Reads `mesh['a'=4,'b'=2] {'a'}`: groups along some axes of a mesh.

    An axis may be split: `'a':(2)4` is the middle sub-axis, of size 4, when a is reshaped to (2, 4, rest).
    """
    axes = [(name, int(size)) for name, size in re.findall(rf"({_NAME})=(\d+)", match[1])]
    sizes = dict(axes)
    grouped = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(rf"({_NAME})(?::\((\d+)\)(\d+))?", match[5])
    ]
    dims: list[int] = []
    place = {}
    for name, length in axes:
        done = 1
        for _, before, size in sorted(part for part in grouped if part[0] == name):
            dims += [before // done, size]
            place[name, before] = len(dims) - 1
            done = before * size
        dims.append(length // done)
    along = [place[name, before] for name, before, _ in grouped]
    across = [dim for dim in range(len(dims)) if dim not in along]
    if match[4]:
        ids = np.array(_integers(match[4]))
    else:
        ids = _numbered(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
    return ids.reshape(dims).transpose(across + along).reshape(-1, math.prod(dims[dim] for dim in along))


def _numbered(dims: str, permutation: str | None) -> np.ndarray:
    """An iota of shape `dims`, transposed by `permutation` if given, and flattened."""
    shape = _integers(dims)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_integers(permutation)) if permutation else numbers).reshape(-1)


def _integers(text: str) -> list[int]:
    return [int(digits) for digits in text.split(",") if digits]
