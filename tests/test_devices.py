"""What breaks on accelerators alone is forbidden in the code, since tests run on a CPU.

Apple's MPS has no float64, and a copy from it into a CPU tensor of float64 fails, as Metal makes
the cast before the copy. ``fork_rng`` keeps the generators of a CPU and of one device, and
``torch.manual_seed`` seeds all devices. An index on the CPU makes a GPU wait.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ncprior

PACKAGE = Path(ncprior.__file__).parent
FILES = {
    str(path.relative_to(PACKAGE)): path
    for pattern in ("*.py", "*/*.py", "*/*/*.py")
    for path in sorted(PACKAGE.glob(pattern))
    if "demo" not in path.parts  # which runs on a CPU
}

# fit_mixture moves latents from MPS to the CPU before it calls these.
WIDE = {"bases/em.py", "bases/mixture_em.py"}

MADE = ("zeros", "ones", "full", "empty")


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Functions and methods, and code outside of them; a nested function is read with its own."""
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    statements = [n for n in ast.iter_child_nodes(tree) if isinstance(n, ast.stmt)]
    kept = [n for n in statements if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
    yield ast.Module(body=kept, type_ignores=[])


def calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of ``….name(…)`` within a node."""
    for n in ast.walk(node):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == name:
            yield n


def has_float64(call: ast.Call) -> bool:
    return "torch.float64" in [
        ast.unparse(a) for a in (*call.args, *(k.value for k in call.keywords))
    ]


def wide_copies(function: ast.AST) -> Iterator[str]:
    """Casts to float64 of what may be on a device that has none."""
    code = ast.unparse(function)
    for call in calls(function, "to"):
        if has_float64(call):
            yield ast.unparse(call)
    if ".cpu()" not in code and "mps" not in code:
        yield from (ast.unparse(call) for call in calls(function, "double"))
    wide = set()
    for n in ast.walk(function):
        if isinstance(n, ast.Assign) and any(
            has_float64(call) for name in MADE for call in calls(n.value, name)
        ):
            wide |= {ast.unparse(target) for target in n.targets}
    for n in ast.walk(function):
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Subscript):
            name, value = ast.unparse(n.targets[0].value), ast.unparse(n.value)
            if name in wide and ".cpu()" not in value and not isinstance(n.value, ast.Constant):
                yield ast.unparse(n)


def forked_seeds(function: ast.AST) -> Iterator[str]:
    """Seeds of all devices where one device's generator is kept."""
    if any(calls(function, "fork_rng")):
        seeds = calls(function, "manual_seed")
        yield from (ast.unparse(c) for c in seeds if ast.unparse(c).startswith("torch."))


def indices_on_the_cpu(function: ast.AST) -> Iterator[str]:
    """Row numbers without a device that index a tensor."""

    def made(node: ast.AST) -> list[ast.Call]:
        found = [*calls(node, "arange"), *calls(node, "randperm")]
        found = [c for c in found if ast.unparse(c.func).startswith("torch.")]
        return [c for c in found if not {"device", "generator"} & {k.arg for k in c.keywords}]

    moved = {id(n) for call in calls(function, "to") for n in ast.walk(call)}
    names: dict[str, ast.Call] = {}
    for n in ast.walk(function):
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
            found = [c for c in made(n.value) if id(c) not in moved]
            names |= dict.fromkeys([n.targets[0].id], found[0]) if found else {}
    for n in ast.walk(function):
        if isinstance(n, ast.Subscript):
            yield from (ast.unparse(c) for c in made(n.slice) if id(c) not in moved)
            held = [it for it in ast.walk(n.slice) if isinstance(it, ast.Name)]
            yield from (ast.unparse(names[it.id]) for it in held if it.id in names)


def generators_without_a_device(function: ast.AST) -> Iterator[str]:
    """Random numbers of a generator, which the CPU has here, on whatever the default device is."""
    for name in ("randperm", "randint", "rand", "randn"):
        for call in calls(function, name):
            names = {k.arg for k in call.keywords}
            if "generator" in names and "device" not in names:
                yield ast.unparse(call)


Rule = Callable[[ast.AST], Iterator[str]]

RULES: Sequence[Rule] = (
    *(wide_copies, forked_seeds),
    *(indices_on_the_cpu, generators_without_a_device),
)


def broken(code: str, rules: Sequence[Rule] = RULES) -> list[str]:
    parts = list(functions(ast.parse(code)))
    return sorted({wrong for rule in rules for part in parts for wrong in rule(part)})


@pytest.mark.parametrize(
    "code",
    [
        'x.to("cpu", torch.float64)',
        'x.to(device="cpu", dtype=torch.float64)',
        "y = x.square().double().sum()",
        "wide = torch.zeros(3, dtype=torch.float64)\nwide[k] = x.mean()",
        "with torch.random.fork_rng([device]):\n    torch.manual_seed(0)",
        "x[torch.randperm(len(x))[:3]]",
        "rows = torch.arange(3)\nx[rows]",
        "torch.randperm(len(x), generator=torch.Generator().manual_seed(0))",
    ],
)
def test_GM1_GS2_GS3_the_rules_see_what_they_forbid(code: str) -> None:
    assert broken(code)
    assert broken("def f(x, device):\n    " + code.replace("\n", "\n    "))


@pytest.mark.parametrize(
    "code",
    [
        "x.cpu().double()",
        'y = x.to("cpu" if x.device.type == "mps" else x.device).double()',
        "wide = torch.zeros(3, dtype=torch.float64)\nwide[k] = x.mean().cpu()",
        "with seeded(0):\n    x = torch.randn(3)",
        "x[torch.randperm(len(x), device=x.device)]",
        "rows = torch.randperm(len(x)).to(x.device)\nx[rows]",
        "rows = torch.randperm(len(x), generator=generator, device='cpu')\nx[rows]",
    ],
)
def test_GM1_GS2_GS3_the_rules_pass_what_works(code: str) -> None:
    assert not broken(code)


@pytest.mark.parametrize("name", FILES)
def test_GM1_GS2_GS3_no_code_that_breaks_on_accelerators(name: str) -> None:
    rules = [rule for rule in RULES if name not in WIDE or rule is not wide_copies]
    assert not broken(FILES[name].read_text(), rules)
