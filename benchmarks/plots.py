"""Pictures of a record: who is faster, how near the limit, how much memory."""

from pathlib import Path

from .machine import notices
from .online_plot import online
from .peers import OURS, TORCH
from .report import times
from .rows import count_threads, geometric_mean, rate, special_dtype, timed

COLORS = {"rnn": "#d1495b", "gru": "#edae49", "lstm": "#00798c"}
TIMES = ("inference", "training")
MARKERS = {"rnn": "o", "gru": "s", "lstm": "D"}
LIBRARIES = {
    OURS: "#0b5d66",
    TORCH: "#f4a340",
    "onnxruntime": "#8d6cab",
    "torch.compile": "#c26d6d",
}
STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
ROW_HEIGHT = 0.27  # inches for each case
MOST_CASES = 48  # in one picture


def draw(record, folder):
    """Writes the pictures that the record has rows for. Returns their titles and paths."""
    try:
        import matplotlib
    except ImportError:
        record["notices"].append("no plots: pip install matplotlib")
        return []
    pictures = []
    with matplotlib.rc_context(STYLE):
        for threads, dtype in subjects(record["rows"]):
            rows = [
                row
                for row in record["rows"]
                if (row["threads"], special_dtype(row)) == (threads, dtype)
            ]
            count = count_threads(threads) + (f", {dtype}" if dtype else "")
            for plot in (speedup, throughput, memory, online):
                special = [row for row in rows if (row["group"] == "online") == (plot is online)]
                for number, part in enumerate(parts(special), 1):
                    figure = plot(part)
                    if figure is None:
                        continue
                    of = f"-{dtype}" if dtype else ""
                    path = Path(folder, f"{plot.__name__}-{threads}{of}-{number}.png")
                    finish(figure, record, count)
                    figure.savefig(path, bbox_inches="tight")
                    pictures.append((f"{plot.__name__}, {count}", path))
    return pictures


def subjects(rows):
    """What has pictures of its own, threads and an unusual dtype; most threads first."""
    found = {(row["threads"], special_dtype(row)) for row in rows}
    return sorted(found, key=lambda subject: (-subject[0], subject[1]))


def parts(rows):
    """Groups together, as many as one picture can hold and of one kind of picture."""
    found, held, kind = [], MOST_CASES, None
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        size = len({row["case"] for row in members})
        if held + size > MOST_CASES or one_each(members) != kind:
            found.append([])
            held, kind = 0, one_each(members)
        found[-1] += members
        held += size
    return found


def finish(figure, record, threads):
    """The line under every picture: where it was made, and what to beware of."""
    machine, found = record["machine"], record["machine"]["versions"]
    text = f"{machine['cpu']}, {threads}, {machine['isa']}, torch {found['torch']}, "
    text += f"commit {machine['commit']}, {record['date'][:10]}"
    beware = [note for note in notices(record) if "NOT" in note]
    figure.text(
        0.01, -0.01, "\n".join([text, *beware]), va="top", fontsize=7, color="#555555", wrap=True
    )


def new_figure(rows, columns, width, kinds=1):
    """A figure as high as its rows, ``kinds`` times, with room on top for a legend; its panels."""
    from matplotlib.figure import Figure

    height = 0.6 + kinds * (0.7 + ROW_HEIGHT * rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(kinds, columns, squeeze=False, sharey=True)
    return figure, list(panels.flat)


def one_each(rows):
    """Is there one row only for each case, as in the lists of others' benchmarks?"""
    return len(rows) == len({(row["group"], row["case"]) for row in rows})


def places(rows):
    """(labels, {case: y}) from the top down, with a gap between groups. With one row each, they
    share one panel, and so the label tells cell and mode too."""
    single, positions, labels, last, y = one_each(rows), {}, [], None, 0.0
    for row in sorted_by_case(rows):
        name = row["group"], row["case"]
        if name in positions:
            continue
        kind = f"{row['group']} {row['mode']}" if single else row["group"]
        if last not in (None, kind):
            y -= 0.5
        last = kind
        positions[name] = y
        label = row["case"].removesuffix(f"-{row['group']}") + (f"  {row['cell']}" * single)
        labels.append((y, label if kind == "core" else f"{kind}   {label}"))
        y -= 1
    return labels, positions


def label_cases(panel, labels):
    panel.set_yticks([y for y, _ in labels], [text for _, text in labels])
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(labels[-1][0] - 0.7, labels[0][0] + 0.7)
    panel.grid(axis="y", visible=False)


def speedup(rows):
    """The ratio to torch.nn of every case, cells side by side; left of the line rnn_ext loses."""
    rows = [row for row in rows if timed(row) and TORCH in row["ratios"]]
    if not rows:
        return None
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shares = {"all": rows}
    if not one_each(rows):
        shares = {m: [row for row in rows if row["mode"] == m] for m in TIMES}
    shares = {name: share for name, share in shares.items() if share}
    labels, positions = places(rows)
    figure, panels = new_figure(len(labels), len(shares), 3 + 3.4 * len(shares))
    for panel, (name, share) in zip(panels, shares.items()):
        for row in share:
            ratio, cell = row["ratios"][TORCH], row["cell"]
            y = positions[row["group"], row["case"]]
            y += 0 if one_each(rows) else {"rnn": 0.22, "gru": 0, "lstm": -0.22}[cell]
            panel.plot([ratio["q1"], ratio["q3"]], [y, y], color=COLORS[cell], lw=3, alpha=0.3)
            slower = ratio["median"] < 1
            face = "white" if slower else COLORS[cell]
            panel.plot(ratio["median"], y, MARKERS[cell], ms=5, mfc=face, mec=COLORS[cell])
        panel.set_xscale("log")
        panel.set_title("" if name == "all" else f"{name}\n{mean_ratios(share)}")
        panel.set_xlabel("times as fast as torch.nn")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        label_cases(panel, labels)
    low = min(0.7, *(row["ratios"][TORCH]["q1"] for row in rows))
    high = max(2.0, *(row["ratios"][TORCH]["q3"] for row in rows))
    for panel in panels:
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
        panel.set_xlim(low * 0.9, high * 1.15)
        panel.axvspan(low * 0.9, 1, color="#d1495b", alpha=0.07, lw=0)
        panel.axvline(1, color="#444444", lw=1)
    handles = [
        Line2D([], [], color=COLORS[cell], marker=MARKERS[cell], ls="", label=cell)
        for cell in COLORS
        if any(row["cell"] == cell for row in rows)
    ]
    handles.append(Line2D([], [], color="#444444", marker="o", mfc="white", ls="", label="slower"))
    figure.legend(handles=handles, loc="outside upper right", ncols=4)
    figure.suptitle("rnn_ext beside torch.nn", x=0.01, ha="left", weight="bold")
    return figure


def mean_ratios(rows):
    """The geometric mean of each cell as text, of the core shapes if there are any."""
    rows = [row for row in rows if row["group"] == "core"] or rows
    found = []
    for cell in COLORS:
        ratios = [row["ratios"][TORCH]["median"] for row in rows if row["cell"] == cell]
        found += [f"{cell.upper()} {times(geometric_mean(ratios))}"] if ratios else []
    of = " of core" if rows[0]["group"] == "core" else ""
    return f"mean{of}: {', '.join(found)}"


def sorted_by_case(rows):
    """Rows in the order in which their cases first come, whatever the mode."""
    order = {}
    for row in rows:
        order.setdefault(row["group"], {}).setdefault(row["case"], len(order))
    return [r for g in order for c in order[g] for r in rows if (r["group"], r["case"]) == (g, c)]


def throughput(rows):
    """GF/s of every library, and the limit of each call, one panel for each cell and mode."""
    rows = [row for row in rows if timed(row)]
    if not rows:
        return None
    from matplotlib.lines import Line2D

    shares = {"all": rows}
    if not one_each(rows):
        shares = {
            f"{cell} {mode}": [r for r in rows if (r["cell"], r["mode"]) == (cell, mode)]
            for mode in TIMES
            for cell in COLORS
        }
    shares = {name: share for name, share in shares.items() if share}
    labels, positions = places(rows)
    kinds = 1 if len(shares) == 1 else len({name.split()[1] for name in shares})
    columns = -(-len(shares) // kinds)
    figure, panels = new_figure(len(labels), columns, 3.2 + 3.2 * columns, kinds)
    for unused in panels[len(shares) :]:
        unused.set_visible(False)
    libraries = [n for n in LIBRARIES if any(n in row["times"] for row in rows)]
    most = 0.0
    for panel, (name, share) in zip(panels, shares.items()):
        for row in share:
            y = positions[row["group"], row["case"]]
            if "limit" in row:
                limit = row["flops"] / row["limit"]["seconds"] / 1e9
                panel.barh(y, limit, height=0.72, color="#e9ecef", lw=0)
                panel.plot([limit, limit], [y - 0.36, y + 0.36], color="#6c757d", lw=1.5)
                most = max(most, limit)
            for library in reversed(libraries):
                if library in row["times"]:
                    done = rate(row, library) / 1e9
                    size = 6 if library == OURS else 4.5
                    panel.plot(done, y, "o", color=LIBRARIES[library], ms=size)
                    most = max(most, done)
        panel.set_title("" if name == "all" else name)
        panel.set_xlabel("GF/s")
        label_cases(panel, labels)
    for panel in panels:
        panel.set_xlim(0, 1.04 * most)
    handles = [Line2D([], [], color=LIBRARIES[n], marker="o", ls="", label=n) for n in libraries]
    handles.append(
        Line2D([], [], color="#6c757d", marker="|", ms=10, mew=1.5, ls="", label="limit of the CPU")
    )
    figure.legend(handles=handles, loc="outside upper right", ncols=5)
    figure.suptitle("Work done in a second", x=0.01, ha="left", weight="bold")
    return figure


def memory(rows):
    """Bytes that a training step keeps, and its peak, of both libraries."""
    rows = [row for row in rows if "memory" in row]
    if not rows:
        return None
    from matplotlib.patches import Patch

    labels, y, last = [], 0.0, rows[0]["case"]
    for row in rows:
        y -= 0.4 if row["case"] != last else 0
        last = row["case"]
        labels.append((y, f"{row['case']}   {row['cell']}"))
        y -= 1
    figure, panels = new_figure(len(labels), 2, 9.5)
    for row, (y, _) in zip(rows, labels):
        for shift, name in ((0.2, OURS), (-0.2, TORCH)):
            used = row["memory"][name]
            values = used["saved"] / row["unit"], (used["peak"] or 0) / row["unit"]
            for panel, value in zip(panels, values):
                panel.barh(y + shift, value, height=0.38, color=LIBRARIES[name])
    for panel, title in zip(panels, ("kept for the backward pass", "peak of a training step")):
        panel.set_title(title)
        panel.set_xlabel("hidden states for every step (T B H numbers)")
        label_cases(panel, labels)
    handles = [Patch(color=LIBRARIES[name], label=name) for name in (OURS, TORCH)]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    figure.suptitle("Memory of training", x=0.01, ha="left", weight="bold")
    return figure
