"""How fast the machine could be: ceilings measured here, and a model of a step that uses them.

    t_step = max(t_mma, t_weights, t_hbm) + t_gather + t_sync + 0.1 us
    t_mma = 2 B G H^2 / F            t_weights = 0 if U fits on chip, else its bytes from L2
    t_gather = (B / P) H s / beta    P batch groups, each with a copy of U

It is a model, not a proof: a fraction above 1 says that the model is too pessimistic.
"""

import math

import torch

from .cases import ITEM_SIZE

OVERHEAD = 0.1e-6
L2_BYTES_PER_SECOND = 5.5e12
ON_CHIP = 0.85 * (256 + 227) * 1024  # bytes of a multiprocessor that may hold weights
# Used where entries/latency.cu has not measured them.
SYNC, BETA = 0.3e-6, 100e9


def seconds_of(call, repeats=10):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


class Limits:
    """Ceilings of the current GPU; ``latency`` is what cuda_on_cpu.latency measured, or None."""

    def __init__(self, latency=None):
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.flops = {dtype: self._product(dtype) for dtype in ("bfloat16", "float16", "tf32")}
        free, _ = torch.cuda.mem_get_info()
        source = torch.randn(min(1 << 28, free // 16), device="cuda")
        target = torch.empty_like(source)
        self.bytes_per_second = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
        latency = latency or {}
        meeting = [
            latency.get(name)
            for name in ("cluster barrier, 8 blocks", "flags, groups of 8 blocks")
            if latency.get(name)
        ]
        self.sync = min(meeting) * 1e-6 if meeting else SYNC
        rate = latency.get("gather 32 KB from L2, KB/us of a block")
        self.beta = rate * 1024e6 if rate else BETA
        self.measured = bool(latency)

    def _product(self, dtype, size=8192):
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        a, b = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
        time = seconds_of(lambda: a @ b)
        torch.backends.cuda.matmul.allow_tf32 = before
        return 2 * size**3 / time

    def seconds(self, case):
        """The model's time of a case: its steps, and the products outside of them."""
        item, flops = ITEM_SIZE[case.dtype], self.flops[case.dtype]
        recurrent = case.gates * case.hidden**2
        weights = recurrent * item
        chip = self.multiprocessors * ON_CHIP
        copies = min(math.ceil(case.batch / 8), int(chip // weights))
        traffic = case.batch * (case.gates + 1) * case.hidden * item
        if case.mode == "training":
            traffic *= 2
        step = max(
            2 * case.batch * recurrent / flops,
            0 if copies else weights / L2_BYTES_PER_SECOND,
            traffic / self.bytes_per_second,
        )
        step += case.batch / max(copies, 1) * case.hidden * item / self.beta
        step += self.sync + OVERHEAD
        rows = case.batch * case.steps
        project = 2 * rows * case.gates * case.hidden * case.inputs / flops
        if case.mode == "inference":
            return case.steps * step + project
        update = 2 * rows * recurrent / flops  # dU; dW and dx cost what the projection does
        return 2 * case.steps * step + 3 * project + update

    def describe(self):
        rates = {f"{name} TFLOP/s": round(value / 1e12) for name, value in self.flops.items()}
        return rates | {
            "copy TB/s": round(self.bytes_per_second / 1e12, 2),
            "meeting us": round(self.sync * 1e6, 3),
            "gather KB/us": round(self.beta / 1024e6, 1),
            "latencies measured": self.measured,
        }
