"""A pytest plugin that runs every fifth of the chosen tests, which takes a few minutes."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fifth", type=int, default=0, help="Which of the fifths, from 0 to 4.")


# After the deselection by marks.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = items[config.getoption("--fifth") :: 5]
    config.hook.pytest_deselected(items=[each for each in items if each not in chosen])
    items[:] = chosen
