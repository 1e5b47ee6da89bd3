"""English prose that is on every machine: the documentation inside Python's own standard library.

The language reference's help topics and the docstrings of the standard library's modules, read with `ast` and imported
nowhere. For one version of Python it is always the same text. It serves examples and tests that need real words and no
network; and as questions with answers it serves those that need chats.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3

FORMAT = 1
"""Changed when the same Python would give other text."""

# Not in every installation, or no prose of the library.
_LEFT_OUT = frozenset({
    "__pycache__", "__phello__", "config", "dist-packages", "distutils", "ensurepip", "idlelib", "lib-dynload",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo", "venv",
})  # fmt: skip
_SHORTEST_ANSWER = 20


@dataclass(frozen=True)
class Entry:
    """Something with a docstring. kind: "module", "class" or "function". call: how it is called, or ""."""

    kind: str
    name: str
    call: str
    text: str


def write(kind: str, folder: Path) -> Path:
    """The file of kind `python-docs` (lines with `text`) or `python-chat` (`messages`), made unless it is there."""
    made = f"{sysconfig.get_path('stdlib')} {sys.version} {FORMAT}"
    path = (
        folder
        / f"{kind}-{sys.version_info.major}.{sys.version_info.minor}-{blake3(made.encode()).hexdigest()[:12]}.jsonl"
    )
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "python-docs":
            write_lines(path, ({"text": text} for text in documents()))
        else:
            write_lines(path, ({"messages": messages} for messages in conversations()))
    return path


def write_lines(path: Path, records: Iterator[dict[str, Any]]) -> int:
    """Writes JSONL whole or not at all; how many lines."""
    count = 0
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        unfinished = Path(file.name)
        try:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            unfinished.chmod(0o644)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    return count


def documents() -> Iterator[str]:
    """One text for each help topic, and one for each module with all that it documents."""
    # Some topics have two names.
    yield from dict.fromkeys(text.strip() + "\n" for _, text in sorted(_topics().items()))
    for module in _modules(Path(sysconfig.get_path("stdlib"))):
        parts = []
        for entry in module:
            head = f"module {entry.name}" if entry.kind == "module" else entry.call or f"{entry.kind} {entry.name}"
            parts.append(f"{head}\n\n{entry.text}\n")
        yield "\n\n".join(parts)


def conversations() -> Iterator[list[dict[str, str]]]:
    """Messages of a user who asks what something is for, and sometimes how it is called, and of one who knows."""
    seen = set()
    for entry in (entry for module in _modules(Path(sysconfig.get_path("stdlib"))) for entry in module):
        answer = " ".join(entry.text.split("\n\n")[0].split())
        if len(answer) < _SHORTEST_ANSWER or entry.name in seen or entry.name.rpartition(".")[2].startswith("_"):
            continue
        seen.add(entry.name)
        choice = blake3(entry.name.encode()).digest(1)[0]
        asked = _QUESTIONS[entry.kind]
        messages = [("user", asked[choice % len(asked)].format(entry.name)), ("assistant", answer)]
        if entry.call and choice % 4 == 0:
            messages += [("user", "How is it called?"), ("assistant", f"Like this: {entry.call}")]
        yield [{"role": role, "content": content} for role, content in messages]


_QUESTIONS = {
    "module": ("What is the module {} for?", "What does the Python module {} do?"),
    "class": ("What is the class {} for?", "What is a {} in Python?"),
    "function": ("What does {} do?", "Explain {} in Python.", "What is {} for?"),
}


def _topics() -> dict[str, str]:
    """The help topics; some distributions leave them out."""
    spec = importlib.util.find_spec("pydoc_data")
    path = Path(next(iter(spec.submodule_search_locations or [""]))) / "topics.py" if spec else Path()
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics":
            return dict(ast.literal_eval(node.value))
    return {}


@cache
def _modules(root: Path) -> list[list[Entry]]:
    """What each module documents, in the order of the file; modules by name, and the built-in types before them."""
    modules, files = [list(_builtins())], []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT and not name.startswith("config-")]
        files += [
            Path(folder) / name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    for path in sorted(files, key=lambda path: path.relative_to(root).with_suffix("").parts):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__").replace("posixpath", "os.path")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        modules.append(list(_entries(tree, name, "module")))
    return [module for module in modules if module]


def _entries(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, kind: str
) -> Iterator[Entry]:
    """A documented thing and those in it, but not what is inside functions or begins with an underscore."""
    if text := ast.get_docstring(node):
        call = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            call = f"{name}({ast.unparse(node.args)})"
        yield Entry(kind, name, call, text.strip())
    if kind == "function":
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            inner = "class" if isinstance(child, ast.ClassDef) else "function"
            yield from _entries(child, f"{name}.{child.name}", inner)


def _builtins() -> Iterator[Entry]:
    """Those of the interpreter itself: functions, types and their methods."""
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isbuiltin(value)):
            continue
        yield from _builtin("class" if inspect.isclass(value) else "function", name, value)
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for inner, method in sorted(vars(value).items()):
                if not inner.startswith("_") and callable(method):
                    yield from _builtin("function", f"{name}.{inner}", method)


def _builtin(kind: str, name: str, value: Any) -> Iterator[Entry]:
    text = inspect.getdoc(value)
    if text:
        signature = getattr(value, "__text_signature__", None)
        call = f"{name}{signature}" if kind == "function" and signature else ""
        yield Entry(kind, name, call.replace("$self, ", "").replace("$self", "").replace("$module, ", ""), text.strip())
