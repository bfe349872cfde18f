"""The named shapes that are measured, and the work that each of them takes.

A shape is (B, T, I, H): batch, steps, input features, hidden units. A case is a shape with what
else describes the call, and is named after it: ``b64-t50-i1024-h1024``, ``b4-t100-i128-h128-bi``.
"""

from dataclasses import dataclass, replace

CELLS = ("rnn", "gru", "lstm")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
MODES = ("inference", "training", "memory")
ONLINE = ("exact", "snap1", "chunked")  # modes of real-time recurrent learning
PENDING = 32  # steps that the influence of exact RTRL may lag behind
ITEM_SIZE = {"float32": 4, "float64": 8, "bfloat16": 2}
ALL = None  # as many threads as torch uses
SHORTEST = 0.16  # of the longest sequence; lengths are even between the two, 58 % on average


@dataclass(frozen=True)
class Case:
    """One call of a module, and how it is measured.

    ragged: a PackedSequence. stateful: the call is given a state. resets: at this share of the
    steps of a sequence a new episode begins. layer_norm: of the LSTM. options: also with each of
    peers.OPTIONS, to see what it costs. vocabulary: if not 0, a
    language model generates the steps, tokens of so many. neighbours: processes that keep a CPU
    busy meanwhile. threads: measured with so many, unless the user says otherwise.
    """

    group: str
    batch: int
    steps: int
    inputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False
    stateful: bool = False
    resets: float = 0.0
    vocabulary: int = 0
    layer_norm: bool = False
    options: bool = False
    dtype: str = "float32"
    neighbours: int = 0
    threads: tuple = (ALL,)
    cells: tuple = CELLS
    modes: tuple = ("inference", "training")

    @property
    def name(self):
        parts = [f"b{self.batch}", f"t{self.steps}", f"i{self.inputs}", f"h{self.hidden}"]
        parts += [f"l{self.layers}"] if self.layers > 1 else []
        parts += ["bi"] if self.bidirectional else []
        parts += ["ragged"] if self.ragged else []
        parts += ["resets"] if self.resets else []
        parts += [f"v{self.vocabulary}"] if self.vocabulary else []
        parts += ["layer-norm"] if self.layer_norm else []
        parts += ["options"] if self.options else []
        parts += ["busy"] if self.neighbours else []
        return "-".join(parts)

    @property
    def directions(self):
        return 2 if self.bidirectional else 1

    def lengths(self):
        """Steps of each sequence, longest first."""
        if not self.ragged or self.batch == 1:
            return [self.steps] * self.batch
        fall = (1 - SHORTEST) / (self.batch - 1)
        return [max(1, round(self.steps * (1 - fall * row))) for row in range(self.batch)]

    def tokens(self):
        """Steps of all sequences together; T*B unless ragged."""
        return sum(self.lengths())

    def unit(self):
        """Bytes of one hidden state for every token, layer and direction."""
        return self.tokens() * self.hidden * self.layers * self.directions * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Product:
    """One of the matrix products of a call: its work, and the weights it has to read how often."""

    flops: float
    weight_bytes: float
    reads: int
    working_set: float  # bytes among which the weights must be found again before the next read


def products(case, cell, mode):
    """Every matrix product of one call, summed over layers and directions.

    The input projection reads its weights once a call; the recurrent product, forward and backward,
    once a step, because the next step needs the result. The weights' gradients read no weights.
    """
    if mode in ONLINE:
        return [_influence(case, cell, mode)]
    tokens, item = case.tokens(), ITEM_SIZE[case.dtype]
    rows, training = GATES[cell] * case.hidden, mode != "inference"
    sizes = []
    for layer in range(case.layers):
        width = case.inputs if layer == 0 else case.hidden * case.directions
        sizes += [(rows * width, rows * case.hidden)] * case.directions
    weights = item * sum(w_ih + w_hh for w_ih, w_hh in sizes)
    found = []
    for w_ih, w_hh in sizes:
        between_steps = item * w_hh if case.steps > 1 else weights
        project = Product(2.0 * tokens * w_ih, item * w_ih, 1, weights)
        recur = Product(2.0 * tokens * w_hh, item * w_hh, case.steps, between_steps)
        found += [project, recur]
        if training:
            found += [project, recur]  # gradients of the input and of the previous state
            found += [Product(p.flops, 0, 0, 0) for p in (project, recur)]  # and of the weights
    if case.vocabulary:
        weights = case.vocabulary * case.hidden
        found.append(Product(2.0 * tokens * weights, item * weights, case.steps, item * weights))
    return found


def _influence(case, cell, mode):
    """What RTRL does with the influence of P parameters on all units; SnAp-1 goes over that on the
    own unit, which it has to read. The LSTM has two states.

    Exact, a gradient reads all of it, and goes back through 16 pending steps in the mean; the
    influence takes the pending steps with a product with dh_t/dh_{t-32} once in 32 steps.
    """
    states, h = 2 if cell == "lstm" else 1, case.hidden
    parameters = GATES[cell] * h * (case.inputs + h + 2)
    samples, rows = case.steps * case.batch, states * h
    if mode == "snap1":
        size = ITEM_SIZE[case.dtype] * states * parameters * case.batch
        return Product(4.0 * samples * states * parameters, size, case.steps, size)
    if mode == "exact":
        size = ITEM_SIZE[case.dtype] * rows * parameters * case.batch
        operations = 4.0 * rows + 2.0 * rows**2 / PENDING + PENDING
        return Product(samples * parameters * operations, size, case.steps, size)
    # Once in H steps the product with dh_t/dh_{t-H}, and a backward pass for every unit.
    passes = 4.0 * GATES[cell] * h * h + 2.0 * GATES[cell] * h * case.inputs
    return Product(samples * states * (2.0 * rows * parameters + h * passes), 0, 0, 0)


def flops(case, cell, mode):
    """Multiplications and additions in the matrix products of one call; training counts 3 times."""
    return sum(product.flops for product in products(case, cell, mode))


def _core():
    shapes = [
        (1, 100, 128, 128),
        (1, 100, 512, 512),
        (1, 200, 64, 1024),
        (16, 50, 128, 128),
        (32, 35, 256, 512),
        (64, 100, 256, 256),
        (64, 50, 1024, 1024),
        (128, 25, 512, 512),
        (256, 10, 64, 64),
        (4, 1000, 40, 320),
    ]
    return [Case("core", *shape, threads=(ALL, 1), modes=MODES) for shape in shapes]


def _stream():
    common = {"stateful": True, "threads": (1,), "modes": ("inference",)}
    return [Case("stream", 1, 1, h, h, **common) for h in (64, 128, 256, 512, 1024)]


def _ragged():
    shapes = [(16, 50, 128, 128), (64, 100, 256, 256), (32, 200, 80, 512)]
    return [Case("ragged", *shape, ragged=True) for shape in shapes]


def _bidirectional():
    shapes = [(1, 100, 128, 128), (4, 200, 128, 256), (32, 50, 256, 256)]
    return [Case("bidirectional", *shape, bidirectional=True) for shape in shapes]


def _stacked():
    return [
        Case("stacked", 1, 100, 256, 256, layers=3),
        Case("stacked", 32, 35, 256, 256, layers=2, modes=MODES),
        Case("stacked", 16, 60, 80, 320, layers=3, bidirectional=True),
    ]


def _reinforcement():
    acting = {"stateful": True, "modes": ("inference",)}
    learning = {"stateful": True, "modes": ("training",)}
    return [
        Case("rl", 16, 1, 64, 128, **acting),
        Case("rl", 256, 1, 128, 256, **acting),
        Case("rl", 64, 16, 64, 128, **learning),
        Case("rl", 16, 128, 128, 256, **learning),
    ]


def _busy():
    acting = {"stateful": True, "threads": (ALL, 1), "modes": ("inference",)}
    shapes = [(1, 100, 128, 128), (16, 50, 128, 128), (64, 100, 256, 256)]
    cases = [Case("busy", 1, 1, 256, 256, **acting), *(Case("busy", *shape) for shape in shapes)]
    return [replace(case, neighbours=1) for case in cases]


def _in(dtype):
    shapes = [(1, 100, 128, 128), (64, 50, 256, 256)]
    return [Case(dtype, *shape, dtype=dtype) for shape in shapes]


def _beyond():
    resets = {"resets": 0.01, "modes": ("training",)}
    normalized = {"layer_norm": True, "cells": ("lstm",), "modes": ("training",)}
    options = {"options": True, "modes": ("training",)}
    return [
        *[Case("beyond", batch, 64, 256, 256, **resets) for batch in (4, 128)],
        *[Case("beyond", batch, 64, 256, 256, **normalized) for batch in (1, 32)],
        *[Case("beyond", batch, 64, 256, 256, **options) for batch in (1, 32)],
    ]


def _generate():
    common = {"vocabulary": 100, "threads": (1, ALL), "modes": ("inference",)}
    shapes = [(1, 1), (1, 2), (16, 1)]
    return [Case("generate", n, 100, 256, 256, layers=layers, **common) for n, layers in shapes]


def _online():
    shapes = [(batch, 1, h, h) for batch in (1, 16) for h in (32, 64, 128)]
    found = [Case("online", *shape, threads=(1,), modes=("exact", "snap1")) for shape in shapes]
    whole_chunks = [(1, h, h, h) for h in (8, 16, 32, 64, 128)]
    return found + [
        Case("online", *shape, threads=(1,), modes=("chunked",)) for shape in whole_chunks
    ]


# DeepBench (github.com/baidu-research/DeepBench): cell, hidden = inputs, steps, batches.
GRU_STEPS = (187, 375, 750, 1500)
DEEPBENCH = {
    "training": [
        *[("rnn", h, 50, (16, 32, 64, 128)) for h in (1760, 2048, 2560)],
        *[("lstm", h, 25, (16, 32, 64, 128)) for h in (512, 1024, 2048, 4096)],
        ("lstm", 1536, 50, (8, 16, 32)),
        ("lstm", 256, 150, (16, 32, 64)),
        *[("gru", h, t, (32,)) for h in (1536, 2048, 2560, 2816) for t in GRU_STEPS],
        ("gru", 512, 1, (32,)),
        ("gru", 1024, 1500, (32, 64)),
    ],
    "inference": [
        *[("lstm", h, 25, (1, 2, 4)) for h in (512, 1024, 2048)],
        ("lstm", 1536, 50, (1, 2, 4)),
        ("lstm", 256, 150, (1, 2, 4)),
        *[("gru", h, t, (1, 2, 4)) for h in (1536, 2048, 2560, 2816) for t in GRU_STEPS],
        ("gru", 512, 1, (1, 2, 4)),
        ("gru", 1024, 1500, (1, 2, 4)),
        ("rnn", 32, 672, (1,)),
        ("rnn", 64, 96, (1,)),
    ],
}
CPU_SIZED = 12e9  # flops of a forward pass


def _deepbench():
    chosen = []
    for mode, problems in DEEPBENCH.items():
        for cell, hidden, steps, batches in problems:
            for batch in batches:
                shape = (batch, steps, hidden, hidden)
                case = Case("deepbench", *shape, cells=(cell,), modes=(mode,))
                if flops(case, cell, "inference") <= CPU_SIZED:
                    chosen.append(case)
    return chosen


def _torch_rnn():
    common = {"cells": ("lstm",), "modes": ("training",)}
    grid = [(layers, hidden) for layers in (1, 2, 3) for hidden in (64, 128, 256, 512)]
    return [Case("torch-rnn", 50, 50, 64, hidden, layers=n, **common) for n, hidden in grid]


GROUPS = {
    "core": ("ten shapes from small to large, from one sequence to many", _core),
    "stream": ("one step of one sequence a call, the state carried on", _stream),
    "ragged": ("PackedSequence, mean length 58 % of the longest", _ragged),
    "bidirectional": ("both directions", _bidirectional),
    "stacked": ("several layers", _stacked),
    "rl": ("policies: acting one step a call, learning from short segments", _reinforcement),
    "float64": ("double precision", lambda: _in("float64")),
    "bfloat16": ("half the bits", lambda: _in("bfloat16")),
    "busy": ("with one other busy process on the machine", _busy),
    "beyond": ("what torch.nn's users write a loop for: over its cells, or scripted", _beyond),
    "online": ("real-time recurrent learning beside torch operations", _online),
    "generate": ("tokens of a language model, sampled one after the other", _generate),
    "deepbench": ("DeepBench's lists, up to 12 GFLOP a forward pass", _deepbench),
    "torch-rnn": ("torch-rnn's grid of character models", _torch_rnn),
}
TIMES = ("inference", "training")
QUICK = {
    "core/b1-t100-i128-h128": TIMES,
    "core/b16-t50-i128-h128": MODES,
    "core/b64-t100-i256-h256": TIMES,
    "core/b256-t10-i64-h64": TIMES,
    "stream/b1-t1-i256-h256": ("inference",),
    "ragged/b16-t50-i128-h128-ragged": TIMES,
    "bidirectional/b1-t100-i128-h128-bi": ("inference",),
    "busy/b1-t1-i256-h256-busy": ("inference",),
}


def all_cases():
    """Every case of every group, in the order of the table."""
    return [case for _, make in GROUPS.values() for case in make()]


def quick_cases():
    """A few small ones of several kinds."""
    named = {f"{case.group}/{case.name}": case for case in all_cases()}
    return [
        replace(named[name], modes=modes, threads=named[name].threads[:1])
        for name, modes in QUICK.items()
    ]
