"""Notes which lines of bdpo_plugin run, in every process that has this folder in PYTHONPATH.

Every process leaves a file in the folder that BDPO_LINES names, also forks and ranks that end by
``os._exit``; a killed one leaves none. Until Python 3.12 a tracer, such as coverage.py's, slows all
code of a process down (these tests by a half): here the package's own modules get, when they are
imported, a mark before each statement, and all else runs as it is.
"""

import ast
import atexit
import json
import os
import sys
import time
from importlib.machinery import PathFinder, SourceFileLoader

PACKAGE = "bdpo_plugin"
FOLDER = os.environ.get("BDPO_LINES")
NAME = "__lines_run__"
_run: dict[str, set[int]] = {}


class _Marks(ast.NodeTransformer):
    """Puts `__lines_run__.update((LINE, ...))` before each statement."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        # whoever comes into a clause has run the lines of those above it
        clauses = getattr(node, "handlers", []) + getattr(node, "cases", [])
        lines = [getattr(clause, "pattern", clause).lineno for clause in clauses]
        for i, clause in enumerate(clauses):
            clause.tried = lines[: i + 1]
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block:
                setattr(node, field, self._marked(node, block))
        return node

    def _marked(self, parent: ast.AST, block: list[ast.stmt]) -> list[ast.stmt]:
        tried = getattr(parent, "tried", [])
        marked = [_mark(block[0], tried)] if tried else []
        for i, statement in enumerate(block):
            first = isinstance(parent, ast.Module | ast.ClassDef | ast.FunctionDef) and i == 0
            docstring = first and ast.get_docstring(parent, clean=False) is not None
            future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
            decorators = getattr(statement, "decorator_list", [])
            mark = _mark(statement, [statement.lineno, *(d.lineno for d in decorators)])
            if docstring:
                marked.append(statement)
            elif future:
                marked += [statement, mark]
            else:
                marked += [mark, statement]
        return marked


def _mark(place: ast.stmt, lines: list[int]) -> ast.stmt:
    call = ast.parse(f"{NAME}.update({tuple(lines)})").body[0]
    for node in ast.walk(call):
        ast.copy_location(node, place)
    return call


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        tree = _Marks().visit(ast.parse(self.get_data(path)))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module):
        vars(module)[NAME] = _run.setdefault(self.path, set())
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _save() -> None:
    found = {path: sorted(lines) for path, lines in _run.items()}
    if found:
        os.makedirs(FOLDER, exist_ok=True)
        file = os.path.join(FOLDER, f"{os.getpid()}-{time.time_ns()}")
        with open(file, "w") as out:
            json.dump(found, out)
        os.replace(file, f"{file}.json")  # one that is killed meanwhile leaves none


def _exit(status: int, _leave=os._exit) -> None:
    try:
        _save()
    finally:
        _leave(status)


if FOLDER:
    sys.meta_path.insert(0, _Finder)
    atexit.register(_save)
    os._exit = _exit
