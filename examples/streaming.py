"""What the examples of learning along a stream share: options, a bar, and who is who in plots."""

import argparse
from pathlib import Path

from common import Help, InputError, positive, require, seed

BAR = "{desc:24} {percentage:3.0f}% |{bar:20}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
COLORS = ["#0b5d66", "#5b8c5a", "#f4a340", "#c8553d", "#7a2e5d", "#4a6fa5"]


class Parser(argparse.ArgumentParser):
    """--steps, --seed, --plot and --quick; its errors are InputErrors."""

    def __init__(self, description, steps):
        super().__init__(description=description, formatter_class=Help)
        self.add_argument("--steps", type=positive(int), default=steps, help="of the stream")
        self.add_argument("--seed", type=seed, default=0, help="of all random numbers")
        self.add_argument("--plot", type=Path, help="default: runs/EXAMPLE.png")
        self.add_argument("--quick", action="store_true", help="a few seconds")

    def parse(self, arguments, example, quick):
        """Parse; --quick replaces the defaults by those in quick, a dict."""
        if self.parse_args(arguments).quick:
            self.set_defaults(**quick)
        args = self.parse_args(arguments)
        require("tqdm", "matplotlib")
        args.plot = args.plot or Path(f"runs/{example}{'-quick' * args.quick}.png")
        return args

    def error(self, message):
        raise InputError(f"{message}; --help lists the options")


def bar(steps, name):
    from tqdm import tqdm

    return tqdm(range(steps), desc=name, bar_format=BAR)
