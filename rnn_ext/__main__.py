"""``python -m rnn_ext``: versions, backends and what this machine offers them."""

import platform

import torch

import rnn_ext
from rnn_ext import _C


def main() -> None:
    rows = [
        ("rnn_ext", rnn_ext.__version__),
        ("torch", f"{torch.__version__} (built for {_C.built_for_torch}, with {_C.compiler})"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
        ("CPU", f"{_C.cpu_isa()} active; {', '.join(_C.cpu_isas())} available (RNN_EXT_ISA)"),
    ]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows.append(("CUDA", ", ".join(devices) or "no device"))
    for label, text in rows:
        print(f"{label:<9}{text}")
    print("\nbackends")
    for name, entry in rnn_ext.backends().items():
        print(f"  {'yes' if entry['available'] else 'no ':<5}{name:<17}{entry['reason']}")


if __name__ == "__main__":
    main()
