"""What the examples share: options, packages, text, batches, devices, Ctrl-C."""

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import signal
import sys
import zlib
from pathlib import Path

import torch

CELLS = ("rnn", "gru", "lstm")


class InputError(Exception):
    """Something the user gave cannot work. The message is one sentence that says what to do."""


def require(*packages, **imported_as):
    """Stop with a sentence unless all packages are there: require("tqdm", sklearn="scikit-learn").

    A keyword is the name that Python imports, its value the name that pip knows.
    """
    names = {name: name for name in packages} | imported_as
    specs = {pip: importlib.util.find_spec(name) for name, pip in names.items()}
    missing = [pip for pip, spec in specs.items() if spec is None or spec.origin is None]
    if missing:  # without an origin it is but a folder of that name
        raise InputError(
            f"this example needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def package_folder(name):
    """Where a package that `require` found lies, without importing it (for the data in it)."""
    return Path(importlib.util.find_spec(name).origin).parent


def package_data(name, file, read):
    """read(path) of a file that comes with a package: what is in it, as a list or a dict."""
    path = package_folder(name) / file
    with contextlib.suppress(OSError, EOFError, ValueError, IndexError, zlib.error):
        if found := read(path):
            return found
    raise InputError(f"{path} is missing or damaged; install the package {name} anew")


def exit_code(main, arguments):
    """Run main(arguments); an InputError becomes its sentence on stderr, and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # for text that the terminal cannot show
    try:
        main(arguments)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one says it
            print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # of rnn_ext.online
        print(f"error: {error}; lower --lr", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, options with their defaults."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.nargs != 0 and "default" not in action.help
        return action.help + " (default: %(default)s)" * shown

    def _get_default_metavar_for_optional(self, action):
        return {Path: "FILE", None: "TEXT"}.get(action.type, "N")


class Parser(argparse.ArgumentParser):
    """The options that every training example has; its errors are InputErrors."""

    def __init__(self, description, hidden, batch, epochs, cell="lstm", cells=CELLS, lr=3e-3):
        super().__init__(description=description, formatter_class=Help)
        self.epochs = epochs
        add, whole, real = self.add_argument, positive(int), positive(float)
        about = "of the recurrent layer" if len(cells) > 1 else argparse.SUPPRESS
        add("--cell", choices=cells, default=cell, help=about)
        add("--layers", type=whole, default=1, help="on top of each other")
        add("--hidden", type=whole, default=hidden, help="units in a layer")
        add("--batch", type=whole, default=batch, help="sequences trained side by side")
        duration = self.add_mutually_exclusive_group()
        passes = f"passes over the data (default: {epochs})" if epochs else argparse.SUPPRESS
        duration.add_argument("--epochs", type=real, help=passes)
        duration.add_argument("--steps", type=whole, help="training steps, instead of --epochs")
        add("--lr", type=real, default=lr, help="learning rate")
        add("--clip", type=real, default=1.0, help="largest norm of the gradient")
        add("--seed", type=seed, default=0, help="of all random numbers")
        add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ...")
        add("--checkpoint", type=Path, help="default: runs/EXAMPLE/CELL.pt")
        add("--plot", type=Path, help="default: runs/EXAMPLE/CELL.png")
        add("--resume", action="store_true", help="go on from the checkpoint")
        add("--no-compare", action="store_true", help="train rnn_ext only, not torch.nn")
        add("--quick", action="store_true", help="a small model for a few seconds")

    def parse(self, arguments, example, quick, variant=lambda args: ""):
        """Parse; --quick replaces the defaults by those in quick, a dict.

        variant(args) is what the names of checkpoint and plot say beside the cell.
        """
        if self.parse_args(arguments).quick:
            self.set_defaults(**quick)
        args = self.parse_args(arguments)
        require("tqdm", "matplotlib")
        args.example, args.default_epochs = example, self.epochs
        outputs = f"runs/{example}/{args.cell}{variant(args)}{'-quick' * args.quick}"
        args.checkpoint = args.checkpoint or Path(outputs + ".pt")
        args.plot = args.plot or Path(outputs + ".png")
        if args.plot == args.checkpoint:
            self.error("--plot and --checkpoint are the same file")
        return args

    def error(self, message):
        raise InputError(f"{message}; --help lists the options")


def positive(kind, or_zero=False):
    """Return what argparse calls for a finite number of this kind (int or float) above zero."""

    def parse(text):
        value = kind(text)
        if not (0 < value < math.inf or (or_zero and value == 0)):
            raise ValueError
        return value

    sign = "non-negative" if or_zero else "positive"
    parse.__name__ = f"{sign} {kind.__name__}"  # argparse writes "invalid positive int value"
    return parse


def seed(text):
    value = int(text)
    if not 0 <= value < 2**32:  # torch takes more, gymnasium does not
        raise ValueError
    return value


def read_text(path):
    """Return (text, description) of a UTF-8 file, or of Python's language help if path is None."""
    if path is None:
        try:
            from pydoc_data import topics
        except ImportError:
            raise InputError("this Python has no pydoc_data; give a text with --text") from None
        return "\n".join(topics.topics.values()), "Python's language help (pydoc_data.topics)"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        position = f"byte {error.start} cannot be decoded"
        raise InputError(f"{path} is not UTF-8 text ({position}); convert it first") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not text:
        raise InputError(f"{path} is empty; give a file with text in it")
    return text, str(path)


def encode(text, device):
    """Return (vocabulary, codes): the different characters, and text as indices into them."""
    code_points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    different, codes = code_points.unique(return_inverse=True)
    return "".join(map(chr, different.tolist())), codes.to(device)


class Batches:
    """The same shuffled batches of range(size) for every learner and after every resume.

    batches(step) -> [batch] indices; each pass over the data has an order of its own, drawn from
    seed, and a last batch that would be short is left out.
    """

    def __init__(self, size, batch, seed):
        self.size, self.batch, self.seed = size, min(batch, size), seed
        self.per_epoch = size // self.batch
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        return torch.randperm(self.size, generator=generator)

    def __call__(self, step):
        epoch, index = divmod(step, self.per_epoch)
        return self.order(epoch)[index * self.batch : (index + 1) * self.batch]


def usable_device(name):
    try:
        return torch.zeros(1, device=name).device
    except Exception:  # its type differs between unknown names, missing drivers and wrong indices
        raise InputError(f"device {name!r} cannot be used here; try --device cpu") from None


class CtrlC(contextlib.AbstractContextManager):
    """The first Ctrl-C only sets .pressed, for a tidy end; a second one ends the program."""

    def __enter__(self):
        self.pressed = False
        self.previous = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)
