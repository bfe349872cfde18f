"""What is measured on a GPU: DeepBench's RNN set, FlashRNN's grid, shapes of RL and of speech."""

from dataclasses import dataclass

from ..cases import DEEPBENCH, GATES

MODES = ("inference", "training")
# tf32: float32 tensors, torch's switches for TF32 on. The first two go first: they decide.
DTYPES = ("bfloat16", "float16", "tf32")
ITEM_SIZE = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}


@dataclass(frozen=True)
class Case:
    """One cell in one shape, mode and dtype; one layer, one direction."""

    group: str
    cell: str
    batch: int
    steps: int
    inputs: int
    hidden: int
    mode: str
    dtype: str

    @property
    def name(self):
        shape = f"b{self.batch}-t{self.steps}-i{self.inputs}-h{self.hidden}"
        return f"{self.cell}-{shape}-{self.mode}-{self.dtype}"

    @property
    def gates(self):
        return GATES[self.cell]

    @property
    def in_cudnn_region(self):
        """Whether cuDNN, as torch calls it (RNN.cpp), keeps the weights on chip."""
        aligned = self.hidden % 128 == 0 and self.inputs % 128 == 0 and self.batch % 8 == 0
        small = self.hidden <= 1024 and self.batch <= 128
        return self.dtype == "float16" and self.cell != "gru" and aligned and small


def _deepbench(mode):
    return [
        ("deepbench-" + mode, cell, batch, steps, hidden, hidden, mode)
        for cell, hidden, steps, batches in DEEPBENCH[mode]
        for batch in batches
    ]


def _everyday():
    shapes = [("flashrnn", 16, 1024, 768, 768), ("rl", 4096, 64, 128, 256)]
    shapes += [("speech", 8, 2000, 80, 512), ("one step", 1, 1, 256, 256)]
    return [
        (group, cell, *shape, mode)
        for group, *shape in shapes
        for cell in ("lstm", "gru", "rnn")
        for mode in MODES
    ]


def all_cases(dtypes=DTYPES):
    """Every case, those first whose result is asked for first when time is short."""
    shapes = [*_everyday(), *_deepbench("training"), *_deepbench("inference")]
    cases = [Case(*shape, dtype) for dtype in dtypes for shape in shapes]
    last = [case for case in cases if case.group == "deepbench-inference"]
    return [case for case in cases if case not in last] + last
