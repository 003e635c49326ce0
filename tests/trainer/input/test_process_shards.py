"""The pieces of a micro-step that processes make of each other's descriptions. Two processes are in test_processes."""

import json
import types

import numpy as np
import pytest
from training import assert_same, loader

from jaxaccum.trainer.input import process_shards
from jaxaccum.trainer.input.strategies import Strategy


@pytest.mark.parametrize(
    ("name", "sizes", "places"),
    [
        ("dp", [16], [[0, 4, 1]]),
        ("dp", [14], [[0, 4, 0], [4, 1, 1]]),
        ("dp", [3], [[0, 1, 1]]),
        ("ddp", [4] * 4, [[0, 4, 4]]),
    ],
)
def test_one_process_has_the_pieces_of_its_strategy(name, sizes, places):
    """Catches a share that is lost, on another device, or counted twice or not at all, so that keys repeat."""
    strategy, batches = Strategy(name, 4), loader(*sizes)
    offers = json.loads(json.dumps([process_shards.offer(strategy, batches)]))
    pieces = process_shards.pieces(strategy, batches, offers, batches[0])
    assert [np.asarray(piece.place).tolist() for piece in pieces] == places
    assert_same([piece.batch for piece in pieces], [piece.batch for piece in strategy.pieces(batches)])


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_without_a_last_share_fills_in(process):
    """Catches rounds that are paired with those of other devices where a process has fewer of them."""
    batches = [[np.arange(5.0)], [np.arange(4.0)]]
    sent = lambda batch, place: (batch.tolist(), place[:2])
    strategies = [
        types.SimpleNamespace(name="dp", own=2, size=4, process_count=2, process_index=i, sent=sent) for i in (0, 1)
    ]
    offers = [process_shards.offer(*entry) for entry in zip(strategies, batches, strict=True)]
    got = process_shards.pieces(strategies[process], batches[process], offers, batches[process][0])
    last = [4.0, 4.0] if process == 0 else [0.0, 0.0]
    assert got == [([0.0, 1.0, 2.0, 3.0], (0, 4)), (last, (4, 1))]
