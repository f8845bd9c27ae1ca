"""No wait of the product can become an endless one."""

import ast

from tests.helpers_config import ROOT


def test_nobody_waits_with_a_timeout_at_a_simple_queue():
    """Such a ``get`` never returns if the thread has the processor back only after that time.

    It can get the queue's lock although nothing is in the queue, as after each item. Python before
    3.13 then waits for what is left of the time, and takes a negative rest for no limit.
    """
    texts = {
        path: text
        for folder in ("kvpipe", "phases")
        for path in (ROOT / folder).rglob("*.py")
        if "SimpleQueue" in (text := path.read_text(encoding="utf-8"))
    }
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and (node.args[1:] or any(word.arg == "timeout" for word in node.keywords))
    ]
    assert texts and found == []
