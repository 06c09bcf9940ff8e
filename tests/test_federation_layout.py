"""Flower changes often: what knows it is a thin adapter on each side, and the wire format that both share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
WIRE = "fedprior_node/mail.py"
SIDES = {"server": {"fedprior/federation/flower.py", WIRE}, "node": {"fedprior_node/flower.py", WIRE}}
MOST_LINES = 120
# Attributes of a Grid, of a Message and of a Context that nothing of ours has.
GRID = {"get_node_ids", "get_nodes", "push_messages", "pull_messages", "send_and_receive", "create_message"}
MESSAGE = {"has_error", "has_content", "metadata", "reply_to_message_id", "dst_node_id", "src_node_id"}
CONTEXT = {"node_config", "node_id", "run_config", "run_id"}


def names(path: Path) -> Iterator[str]:
    """What a file imports and which attributes it reads."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr


def knows_flower(name: str) -> bool:
    return name.split(".")[0] == "flwr" or name.startswith("fedprior_node.mail") or name in GRID | MESSAGE | CONTEXT


def test_what_knows_flower_is_a_thin_adapter_on_each_side() -> None:
    """Lines are all lines of the files: imports, docstrings and blank ones too."""
    paths = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    assert {name for name, path in paths.items() if any(map(knows_flower, names(path)))} == set().union(*SIDES.values())
    for side, files in SIDES.items():
        lines = sum(len(paths[name].read_text(encoding="utf-8").splitlines()) for name in files)
        assert lines <= MOST_LINES, f"{side}: {lines} lines in {sorted(files)}"
