"""The house rules of DESIGN.md, read from the source with `ast`: layers, imports, size, types."""

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import minildm

PACKAGE = Path(minildm.__file__).parent
LAYERS = (
    "types schedule layers regularizers features ema files",
    "autoencoder discriminator unet conditioning samplers guidance toy data plots runs",
    "losses metrics judge",
    "diffusion",
    "presets",
    "checkpoints loop",
    "interop training exercises",
    "sweeps demo",
    "cli __main__",
)
LATER = {  # grown since DESIGN's table was drawn
    "draws": 0,
    "intervals": 0,
    "processes": 0,
    "tokenizer": 0,
    "segmenter": 2,
    "transformer": 0,
    "tau_theta": 1,
    "frozen_text": 1,
    "spatial": 1,
    "distances": 1,
    "fidelity": 1,
    "flow": 2,
    "report": 1,
    "attention_maps": 4,
    "evaluation": 4,
    "experiments": 4,
    "following": 4,
    "panel": 4,
    "preference": 5,
    "restoring": 4,
    "upscaling": 4,
    "paper": 4,
    "published": 4,
    "tasks": 4,
    "notebook": 6,
}
LAYER_OF = LATER | {name: layer for layer, names in enumerate(LAYERS) for name in names.split()}
MAX_FILE, MAX_FUNCTION = 400, 60  # lines
ONLY_IN = {
    "matplotlib": {"plots"},
    "typer": {"cli", "__main__"},
    "argparse": {"cli", "__main__"},
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Trees = dict[str, ast.Module]  # "data.emoji" -> its syntax tree


def parse(package: Path) -> Trees:
    """Every module by its name below the package; a folder's __init__ has the folder's name."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:  # the package's own __init__ re-exports: it stands above all layers
            trees[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def top(name: str) -> str:
    return name.partition(".")[0]


def imports(name: str, tree: ast.Module, trees: Trees, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a module imports, wherever it does so."""
    is_folder = any(other.startswith(f"{name}.") for other in trees)
    here = [package, *name.split(".")] if is_folder else [package, *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield node.lineno, whole if whole.removeprefix(f"{package}.") in trees else module


def own_imports(trees: Trees, package: str) -> Iterator[tuple[str, int, str]]:
    """(module, line, module of this package that it imports; "" for the package itself)."""
    for name, tree in trees.items():
        for line, target in imports(name, tree, trees, package):
            if target == package or target.startswith(f"{package}."):
                yield name, line, target[len(package) + 1 :]


def wrong_layers(package: Path) -> Iterator[str]:
    trees = parse(package)
    for name in trees:
        if top(name) not in LAYER_OF:
            yield f"{name} is missing from the table of layers"
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, line, target in own_imports(trees, package.name):
        graph[name].add(target)
        if not target:
            yield f"{name}:{line} imports the package itself"
        elif LAYER_OF.get(top(target), 99) > LAYER_OF.get(top(name), 99):
            yield f"{name}:{line} imports {target} from a higher layer"
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"cycle: {' <- '.join(error.args[1])}"


def misplaced_imports(package: Path) -> Iterator[str]:
    trees = parse(package)
    for name, tree in trees.items():
        for line, target in imports(name, tree, trees, package.name):
            if top(name) not in ONLY_IN.get(top(target), {top(name)}):
                yield f"{name}:{line} imports {target}"


def hidden_names(package: Path) -> Iterator[str]:
    """Names that no search finds: `import *`, exec, eval."""
    for name, tree in parse(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                yield f"{name}:{node.lineno} imports *"
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in ("exec", "eval"):
                yield f"{name}:{node.lineno} calls {called.id}"


def too_long(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            yield f"{path.relative_to(package)} has {lines} lines"
    for name, tree in parse(package).items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION:
                    yield f"{name}:{node.lineno} {node.name} has {lines} lines"


def public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """(dotted name, node) of public classes, their public methods, and public functions."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def undocumented(package: Path) -> Iterator[str]:
    for name, tree in parse(package).items():
        for dotted, node in public(tree):
            if not ast.get_docstring(node) and not dotted.endswith(".forward"):
                yield f"{name}:{node.lineno} {dotted} has no docstring"


def untyped(package: Path) -> Iterator[str]:
    for name, tree in parse(package).items():
        functions = [(d, n) for d, n in public(tree) if isinstance(n, Function)]
        classes = [(d, n) for d, n in public(tree) if isinstance(n, ast.ClassDef)]
        for dotted, node in classes:  # __init__, __getitem__ and the like are called, too
            functions += [
                (f"{dotted}.{inner.name}", inner)
                for inner in node.body
                if isinstance(inner, Function) and inner.name.startswith("__")
            ]
        for dotted, node in functions:
            args = node.args
            every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            bare = [a.arg for a in every if a is not None and a.annotation is None]
            bare = bare[1:] if "." in dotted and bare[:1] in (["self"], ["cls"]) else bare
            if bare or node.returns is None:
                yield f"{name}:{node.lineno} {dotted} lacks the types of {bare or 'its return'}"


RULES = (wrong_layers, misplaced_imports, hidden_names, too_long, undocumented, untyped)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    found = list(rule(PACKAGE))
    assert not found, "\n".join(found)


def test_every_module_is_read() -> None:
    trees = parse(PACKAGE)
    assert {"types", "diffusion", "data.latents", "training"} <= trees.keys()
    links = {(name, target) for name, _, target in own_imports(trees, "minildm")}
    assert {("diffusion", "unet"), ("training", "data.latents"), ("samplers", "types")} <= links


TYPED = 'def f(x: int) -> int:\n    """Doc."""\n'
BROKEN = {  # rule, what it says, the modules that break it
    "upwards": (wrong_layers, "higher layer", {"types": "from toy_pkg.unet import UNet"}),
    "upwards, relative": (wrong_layers, "higher layer", {"types": "from .unet import UNet"}),
    "upwards, late": (wrong_layers, "higher", {"types": "def f():\n    import toy_pkg.cli"}),
    "upwards, by name": (wrong_layers, "higher", {"ema": "from toy_pkg import unet", "unet": ""}),
    "upwards, from a folder": (
        wrong_layers,
        "data.a:1 imports losses",
        {"data/__init__": "", "data/a": "from ..losses import ldm_loss", "losses": ""},
    ),
    "cycle": (
        wrong_layers,
        "cycle",
        {"ema": "import toy_pkg.files", "files": "from .ema import E"},
    ),
    "cycle in a folder": (
        wrong_layers,
        "cycle",
        {"data/__init__": "", "data/a": "from .b import B", "data/b": "from .a import A"},
    ),
    "the package": (wrong_layers, "package itself", {"demo": "from toy_pkg import pretrained"}),
    "unknown module": (wrong_layers, "helpers is missing", {"helpers": ""}),
    "plots elsewhere": (
        misplaced_imports,
        "demo:2 imports matplotlib.pyplot",
        {"demo": "def f():\n    import matplotlib.pyplot as plt"},
    ),
    "plots in exercises": (
        misplaced_imports,
        "exercises.a:1",
        {"exercises/__init__": "", "exercises/a": "from matplotlib import pyplot"},
    ),
    "arguments elsewhere": (misplaced_imports, "demo:1", {"demo": "import typer"}),
    "argparse elsewhere": (misplaced_imports, "demo:1", {"demo": "import argparse"}),
    "star": (hidden_names, "imports *", {"toy": "from os import *"}),
    "exec": (hidden_names, "calls exec", {"toy": "exec('1')"}),
    "eval": (hidden_names, "calls eval", {"toy": "x = [eval('1')]"}),
    "long file": (too_long, "toy.py has 401 lines", {"toy": "\n" * 401}),
    "long function": (
        too_long,
        "toy:2 f has 61 lines",
        {"toy": "class A:\n    def f(self):\n" + "        pass\n" * 60},
    ),
    "class without docstring": (undocumented, "A has no", {"toy": "class A:\n    x = 1"}),
    "method without docstring": (
        undocumented,
        "A.f has no",
        {"toy": 'class A:\n    """A."""\n    def f(self): pass'},
    ),
    "untyped argument": (untyped, "['y']", {"toy": "def f(x: int, *, y=1) -> int: return x"}),
    "untyped rest": (untyped, "['rest']", {"toy": "def f(**rest) -> None: pass"}),
    "untyped return": (untyped, "its return", {"toy": "def f(x: int): return x"}),
    "untyped constructor": (
        untyped,
        "A.__init__",
        {"toy": "class A:\n    def __init__(self, x) -> None: pass"},
    ),
}
HARMLESS = {
    "downwards": (wrong_layers, {"unet": "from toy_pkg.types import A", "types": ""}),
    "sideways": (wrong_layers, {"cli": "from .__main__ import main", "__main__": ""}),
    "in plots": (misplaced_imports, {"plots": "import matplotlib"}),
    "model.eval": (hidden_names, {"toy": "model.eval()"}),
    "limits": (too_long, {"toy": "def f():\n" + "    pass\n" * 59 + "\n" * 340}),
    "private": (undocumented, {"toy": "class _A:\n    x = 1\ndef _f(): pass"}),
    "forward": (undocumented, {"toy": 'class A:\n    """A."""\n    def forward(self, x): pass'}),
    "closure": (untyped, {"toy": TYPED + "    return lambda y: y"}),
}


def write(package: Path, modules: dict[str, str]) -> Path:
    (package / "__init__.py").parent.mkdir(parents=True)
    (package / "__init__.py").write_text("from toy_pkg.training import train_ldm\n")
    for name, source in modules.items():
        (package / f"{name}.py").parent.mkdir(exist_ok=True)
        (package / f"{name}.py").write_text(source)
    return package


@pytest.mark.parametrize("case", BROKEN)
def test_a_seeded_violation_is_found(case: str, tmp_path: Path) -> None:
    rule, said, modules = BROKEN[case]
    found = list(rule(write(tmp_path / "toy_pkg", modules)))
    assert any(said in line for line in found), found


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_allowed_is_not_reported(case: str, tmp_path: Path) -> None:
    rule, modules = HARMLESS[case]
    assert not list(rule(write(tmp_path / "toy_pkg", modules)))
