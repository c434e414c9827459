"""Server-sent events: however the bytes are cut, the events are the same."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from layerlens.vision_language.server_answer import EventParser

STREAM = 'event: x\ndata: {"a": 1}\n\n: comment\r\ndata: zwei\r\ndata:größe\r\n\r\nid: 3\rdata: last\r\r\n'.encode()
EVENTS = ['{"a": 1}', "zwei\ngröße", "last"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cuts_give_the_same_events(cuts: list[int]):
    parser, found = EventParser(), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(edges):
        found += parser.feed(STREAM[start:end])
    assert found == EVENTS
    assert not parser.unfinished


def test_an_event_without_its_end_is_not_given_out():
    parser = EventParser()
    assert parser.feed(b"data: half") == []
    assert parser.unfinished
