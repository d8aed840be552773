"""The shape of the code in figures: what makes it dear to add something.

    python scripts/structure.py [--root rlhf] [--list]

Reads the source alone; nothing is imported. ``--list`` names every place. Figures that are to be small come first.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_PARAMETERS, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_MODULE = 7, 50, 250
STAGE, SECTION = "StageConfig", "Section"
COMMANDS = ("commands", "cli")
TRANSFORMERS = ("models", "planning")  # what is called config there is a model's
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name below the root, its text and its tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The first part of the name: a package, or a file at the root."""
        return self.name.split(".")[0]

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def at(self, node: ast.AST) -> str:
        return f"{self.name.replace('.', '/')}.py:{getattr(node, 'lineno', 1)}"


def read(root: Path) -> list[Module]:
    """Every module below ``root``."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        modules.append(Module(name, path.read_text(), ast.parse(path.read_text())))
    return modules


def imports(module: Module, known: set[str], root: str) -> Iterator[tuple[str, ast.AST]]:
    """Modules of the project that it imports, also inside functions and by ``import_module``."""
    for node in ast.walk(module.tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == root:
            base = (node.module or "").removeprefix(root).strip(".")
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.removeprefix(f"{root}.") for alias in node.names if alias.name.startswith(f"{root}.")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{root}."):
            names = [node.value.removeprefix(f"{root}.").replace(":", ".")]
        for name in names:
            while name and name not in known and f"{name}.__init__" not in known:
                name = name.rpartition(".")[0]
            if name and name != module.name:
                yield name, node


def circles(modules: list[Module], root: str) -> list[str]:
    """Groups of packages that import one another, each package by way of the others."""
    known = {module.name for module in modules}
    edges: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        edges[module.package] |= {name.split(".")[0] for name, _ in imports(module, known, root)} - {module.package}
    reached = {package: _reached(package, edges) for package in list(edges)}
    groups = {
        tuple(sorted({package, *(other for other in reached[package] if package in reached.get(other, ()))}))
        for package in reached
    }
    return sorted(" <-> ".join(group) for group in groups if len(group) > 1)


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in edges.get(waiting.pop(), ()):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def loose(modules: list[Module]) -> list[str]:
    """Files at the root beside ``__init__`` and ``__main__``."""
    return [module.name for module in modules if "." not in module.name and not module.name.startswith("__")]


def parameters(node: Function) -> list[ast.arg]:
    """All but ``self`` and ``cls``."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [one for one in every if one.arg not in ("self", "cls")]


def crowded(modules: list[Module]) -> list[str]:
    """Functions with more parameters than an eye takes in, command signatures apart."""
    return [
        f"{module.at(node)} {node.name} ({len(parameters(node))})"
        for module in modules if module.package not in COMMANDS
        for node in module.functions() if len(parameters(node)) > MOST_PARAMETERS
    ]  # fmt: skip


def carried(modules: list[Module]) -> list[str]:
    """Functions that hide their parameters: ``**kwargs`` that are passed on to a function of the project."""
    found = []
    for module in modules:
        for node in module.functions():
            if not (extra := node.args.kwarg):
                continue
            calls = (call for call in ast.walk(node) if isinstance(call, ast.Call))
            if any(
                word.arg is None and ast.unparse(word.value) == extra.arg for call in calls for word in call.keywords
            ):
                found.append(f"{module.at(node)} {node.name} (**{extra.arg})")
    return found


def descendants(modules: list[Module], base: str) -> dict[str, str]:
    """Class -> the module that defines it, for all that derive from ``base``."""
    bases = {
        node.name: ({ast.unparse(one).split(".")[-1].split("[")[0] for one in node.bases}, module.name)
        for module in modules for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    found = {base}
    while more := {name for name, (parents, _) in bases.items() if parents & found} - found:
        found |= more
    return {name: bases[name][1] for name in found if name in bases}


def _is_of_a_stage(module: str) -> bool:
    """Whether a module is a file of a stage's folder."""
    parts = module.split(".")
    return parts[0] == "stages" and len(parts) > 2


def _home(module: str) -> str:
    """Where a config class may be told from its kin: its package, or a stage's own folder."""
    parts = module.split(".")
    return ".".join(parts[:2]) if _is_of_a_stage(module) else parts[0]


def switches(modules: list[Module]) -> list[str]:
    """Tests of a config's kind outside of where the class is defined: isinstance, match, ``.kind ==``, hasattr."""
    sections = descendants(modules, SECTION)
    found = []
    for module in modules:
        strange = {name for name, home in sections.items() if name != SECTION and _home(home) != _home(module.name)}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                hit = bool(strange & _names(node.args[1]))
            elif isinstance(node, ast.MatchClass):
                hit = bool(strange & _names(node.cls))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
                ours = module.package not in TRANSFORMERS
                hit = ours and bool(re.fullmatch(r"(\w+\.)?(config|section|source)", ast.unparse(node.args[0])))
            elif isinstance(node, ast.Compare):
                hit = _home(module.name) != "config" and any(
                    isinstance(side, ast.Attribute) and side.attr in ("kind", "stage") and "config" in ast.unparse(side)
                    for side in (node.left, *node.comparators)
                )
            else:
                continue
            if hit:
                found.append(f"{module.at(node)} {ast.unparse(node)[:80]}")
    return found


def _names(node: ast.AST) -> set[str]:
    return {
        one.id if isinstance(one, ast.Name) else one.attr
        for one in ast.walk(node)
        if isinstance(one, ast.Name | ast.Attribute)
    }


def climbs(modules: list[Module]) -> list[str]:
    """Functions outside a stage's own folder that take a whole stage config."""
    configs = descendants(modules, STAGE)
    found = []
    for module in modules:
        if module.package == "config" or _is_of_a_stage(module.name):
            continue
        for node in module.functions():
            whole = [
                one.arg for one in parameters(node) if one.annotation and _names(one.annotation) & {STAGE, *configs}
            ]
            if whole:
                found.append(f"{module.at(node)} {node.name}({', '.join(whole)})")
    return found


def filled(modules: list[Module]) -> list[str]:
    """Functions that are given a list to fill."""
    found = []
    for module in modules:
        for node in module.functions():
            names = {
                one.arg
                for one in parameters(node)
                if one.annotation and ast.unparse(one.annotation).startswith("list[")
            }
            changed = {ast.unparse(one.target) for one in ast.walk(node) if isinstance(one, ast.AugAssign)} | {
                ast.unparse(one.func.value)
                for one in ast.walk(node)
                if isinstance(one, ast.Call)
                and isinstance(one.func, ast.Attribute)
                and one.func.attr in ("append", "extend")
            }
            found += [f"{module.at(node)} {node.name}({name})" for name in sorted(names & changed)]
    return found


def skips(modules: list[Module]) -> list[str]:
    """Lines that the formatter is kept from."""
    found = []
    for module in modules:
        lines = enumerate(module.text.splitlines(), 1)
        found += [f"{module.name.replace('.', '/')}.py:{number}" for number, line in lines if "# fmt: skip" in line]
    return found


def twice(modules: list[Module]) -> list[str]:
    """File names that occur in two packages, those apart that every stage's folder has."""
    places = defaultdict(list)
    for module in modules:
        *folder, name = module.name.split(".")
        if name != "__init__" and not (folder[:1] == ["stages"] and len(folder) == 2):
            places[name].append("/".join(folder) or ".")
    return [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def long_functions(modules: list[Module]) -> list[str]:
    return [
        f"{module.at(node)} {node.name} ({size})"
        for module in modules for node in module.functions()
        if (size := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    ]  # fmt: skip


def long_modules(modules: list[Module]) -> list[str]:
    return [
        f"{module.name} ({size})" for module in modules
        if (size := len(module.text.splitlines())) > MOST_LINES_OF_A_MODULE
    ]  # fmt: skip


def table(root: Path) -> dict[str, list[str]]:
    """Each figure's places."""
    modules = read(root)
    return {
        "package circles": circles(modules, root.name),
        "loose files at the root": loose(modules),
        f"functions with more than {MOST_PARAMETERS} parameters": crowded(modules),
        "functions that pass **kwargs on": carried(modules),
        "switches over kinds of config": switches(modules),
        "functions outside a stage that take its whole config": climbs(modules),
        "lists passed in to be filled": filled(modules),
        "lines kept from the formatter": skips(modules),
        "file names in two packages": twice(modules),
        f"functions of more than {MOST_LINES_OF_A_FUNCTION} lines": long_functions(modules),
        f"modules of more than {MOST_LINES_OF_A_MODULE} lines": long_modules(modules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1] / "rlhf")
    parser.add_argument("--list", action="store_true", help="name every place")
    args = parser.parse_args()
    for name, places in table(args.root).items():
        print(f"{len(places):5d}  {name}")
        if args.list:
            print(*(f"         {place}" for place in places), sep="\n")
    modules = read(args.root)
    lines = sum(len(module.text.splitlines()) for module in modules)
    comments = sum(line.lstrip().startswith("#") for module in modules for line in module.text.splitlines())
    sizes = Counter(module.package for module in modules if "." in module.name)
    print(f"{len(modules)} modules, {lines} lines, {comments} of them comments; files by package: {dict(sizes)}")


if __name__ == "__main__":
    main()
