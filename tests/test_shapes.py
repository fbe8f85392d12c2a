"""Machines in numbers: what they hold, which labels they have, and how far a cluster grows."""

from __future__ import annotations

import math

import pytest

from tunefleet.hardware import Hardware
from tunefleet.shapes import SINGLE_WORKER, ClusterShape, NodeShape, NodeType, at_most

SMALL = NodeType("small", NodeShape(1, others={}, labels={SINGLE_WORKER: "true"}), most=2)
LARGE = NodeType("large", NodeShape(2, others={"fast": 1.0}), most=1)
HEAD = NodeShape(0, others={"trial_driver": 4.0})


def test_a_cluster_grows_to_all_nodes_of_every_type() -> None:
    grown = (HEAD, SMALL.shape, SMALL.shape, LARGE.shape)
    assert at_most([HEAD], [SMALL, LARGE]) == grown
    there = NodeShape(1, others={}, labels={SINGLE_WORKER: "true", "ray.io/node-id": "a"})
    assert at_most([HEAD, there], [SMALL, LARGE]) == grown, "what is there is one of them"
    assert at_most([HEAD, there, there, there], [SMALL]) == (HEAD, there, SMALL.shape, SMALL.shape)


def test_a_node_of_the_same_size_with_another_label_is_of_no_type() -> None:
    other = NodeShape(1, others={}, labels={"pool": "batch"})
    assert at_most([other], [SMALL]) == (other, SMALL.shape, SMALL.shape)


@pytest.mark.parametrize(
    ("own", "asked", "answer"),
    [
        ({}, {}, True),
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": "y"}, {"a": "x"}, False),
        ({}, {"a": "x"}, False),
        ({}, {"a": "!x"}, True),
        ({"a": "y"}, {"a": "!x"}, True),
        ({"a": "x"}, {"a": "!x"}, False),
    ],
)
def test_labels_are_matched_as_ray_matches_them(own: dict[str, str], asked: dict[str, str], answer: bool) -> None:
    assert NodeShape(1, labels=own).is_as(asked) is answer


def test_memory_without_end_is_no_limit() -> None:
    assert NodeShape(4, others={"memory": 2e9}).fits({"CPU": 1, "memory": 1e9}) == 2
    endless = NodeShape(4, others={"memory": math.inf})
    assert endless.fits({"CPU": 1, "memory": 1e9}) == 4
    assert endless.fits({"memory": 1e9}) > 1000
    assert NodeType("a", endless, 1).in_words() == "a (4 CPU; at most 1)"
    there = NodeShape(4, others={"memory": 5e9})
    assert at_most([there], [NodeType("a", endless, 1)]) == (endless,)


def test_a_cluster_is_bounded_where_nothing_joins_or_its_types_are_known() -> None:
    shape = ClusterShape((HEAD,), cpu=Hardware("cpu", bf16=True))
    assert shape.bounded
    assert not ClusterShape((HEAD,), cpu=shape.cpu, may_grow=True).bounded
    assert ClusterShape((HEAD,), cpu=shape.cpu, may_grow=True, node_types=(SMALL,)).bounded


def test_a_type_in_words() -> None:
    assert LARGE.in_words() == "large (2 CPU, 1 fast; at most 1)"
