"""What a package's source says that its functions take, without importing it."""

import ast


def parameters(tree: ast.AST, function: str) -> tuple[str, ...]:
    """Names of a function's or method's parameters, or of a class' or named tuple's annotated fields."""
    *owners, name = function.split(".")
    for owner in owners:
        (tree,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    found = next(n for n in tree.body if getattr(n, "name", None) == name)
    if isinstance(found, ast.ClassDef):
        return tuple(n.target.id for n in found.body if isinstance(n, ast.AnnAssign))
    names = [a.arg for a in found.args.args + found.args.kwonlyargs]
    return tuple(n for n in names if n != "self")
