"""Signatures as they are written: for constructors that hand on ``*args`` those of the stub beside
the module, and in rnn_ext.reference ``ArrayLike`` by that name, not as the long type it stands for.
"""

import ast
import inspect
from pathlib import Path

import rnn_ext.modules


def constructors():
    tree = ast.parse(Path(rnn_ext.modules.__file__).with_suffix(".pyi").read_text())
    for cls in tree.body:
        if isinstance(cls, ast.ClassDef):
            for part in cls.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    yield cls.name, part.args


def without_self(arguments):
    arguments.args = arguments.args[1:]
    return f"({ast.unparse(arguments)})".replace("Device", "torch.device | str | int | None")


SIGNATURES = {name: without_self(arguments) for name, arguments in constructors()}


def process(app, what, name, obj, options, signature, returns):
    if what == "class" and inspect.isclass(obj) and obj.__module__ == "rnn_ext.modules":
        return SIGNATURES[obj.__name__], returns
    if what == "function" and obj.__module__ == "rnn_ext.reference.sequence":
        written, _, returns = str(inspect.signature(obj)).replace("'", "").rpartition(" -> ")
        return written, returns
    return None


def setup(app):
    app.connect("autodoc-process-signature", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
