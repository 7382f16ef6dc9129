"""Tasks of lm-evaluation-harness, as part of the quality."""

from __future__ import annotations


def check(tasks): ...
def parts(session, tasks):
    return []


def add_figures(found, rows): ...
