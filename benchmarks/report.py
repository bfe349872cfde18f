"""Tables of a record, as text while it is made and as Markdown afterwards."""

from . import cases as known
from . import measures
from .cases import CELLS
from .machine import lines, notices
from .peers import OURS, TORCH
from .rows import (
    count_threads,
    full_name,
    losses,
    means,
    memory_ratio,
    rate,
    remarks,
    section,
    share_of_limit,
    timed,
)

CASE_WIDTH = 26


def duration(seconds):
    """Three digits and a unit."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def spread(values):
    """Half the distance of the quartiles, of the median."""
    share = (values["q3"] - values["q1"]) / 2 / values["median"]
    return f"±{share:.0%}" if share < 0.995 else "±>99%"


def times(ratio):
    return (
        f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x" if ratio >= 9.95 else f"{ratio:.2f}x"
    )


def megabytes(size):
    return "?" if size is None else f"{size / 1e6:.1f} MB"


def headings(mode, peers):
    """Names of the columns, and how wide each is at least; negative: aligned to the right."""
    left = [("case", CASE_WIDTH), ("cell", 4)]
    if mode == "memory":
        right = [(f"{n} {w}", -16) for n in (OURS, TORCH) for w in ("saves", "peak")]
        return [*left, *right, ("ratio", -6)]
    per_peer = [column for p in peers for column in ((p, -11), ("ratio", -6), ("", -5))]
    return [*left, (OURS, -8), ("", -5), *per_peer, ("GF/s", -5), ("of limit", -8)]


def cells(row, peers):
    """The texts of a row, one for each of `headings`."""
    start = [row["case"], row["cell"]]
    if "memory" in row:
        found = []
        for name in (OURS, TORCH):
            used = row["memory"][name]
            found += [f"{used['saved'] / row['unit']:.2f} TBH", megabytes(used["peak"])]
        ratio = memory_ratio(row)
        return [*start, *found, "" if ratio is None else times(ratio)]
    mine = row["times"][OURS]
    found = [duration(mine["median"]), spread(mine)]
    for peer in peers:
        if peer in row["times"]:
            ratio = row["ratios"][peer]
            found += [duration(row["times"][peer]["median"]), times(ratio["median"]), spread(ratio)]
        else:
            found += ["-", "", ""]
    share = share_of_limit(row)
    return [*start, *found, f"{rate(row) / 1e9:.0f}", "" if share is None else f"{share:.0%}"]


def aligned(texts, columns):
    padded = [t.ljust(w) if w > 0 else t.rjust(-w) for t, (_, w) in zip(texts, columns)]
    return " ".join(padded).rstrip()


def title(name):
    group, mode, dtype, threads = name
    about = known.GROUPS[group][0] if group in known.GROUPS else "no group of this version"
    dtype = "" if dtype in ("float32", group) else f", {dtype}"
    return f"{group}, {mode}{dtype}, {count_threads(threads)}: {about}"


def text_row(row, peers):
    """One line; what loses or is wrong says so at its end."""
    if "wrong" in row:
        return f"{row['case']:<{CASE_WIDTH}} {row['cell']:<4} WRONG, not timed: {row['wrong']}"
    if "times" not in row and "memory" not in row:
        return f"{row['case']:<{CASE_WIDTH}} {row['cell']:<4} {row['skipped'][OURS]}"
    line = aligned(cells(row, peers), headings(row["mode"], peers))
    said = "; ".join(remarks(row))
    line += f"  {said}" if said else ""
    mark = "; ".join(losses(row))
    return f"{line}  <- {mark}" if mark else line


class TextTable:
    """Prints rows as they come, with a heading whenever the section changes.

    ``peers``: those that can run in a section, by section.
    """

    def __init__(self, peers, write):
        self.peers, self.write, self.current = peers, write, None

    def add(self, row):
        peers = self.peers.get(section(row), ())
        if section(row) != self.current:
            self.current = section(row)
            columns = headings(row["mode"], peers)
            self.write(f"\n{title(self.current)}")
            self.write(aligned([name for name, _ in columns], columns))
        self.write(text_row(row, peers))


def peers_by_section(record):
    """The peers that were timed in each section, in the order of the record."""
    found = {}
    for row in record["rows"]:
        found.setdefault(section(row), set()).update(row.get("ratios", {}))
    return {name: [p for p in record["peers"] if p in ran] for name, ran in found.items()}


def headline(record):
    """One line that says what comes out: the ratios to torch.nn, in how many rows we lose, and
    whether to believe it."""
    rows = [row for row in record["rows"] if timed(row) and TORCH in row["ratios"]]
    if not rows:
        return "Nothing was timed beside torch.nn."
    group = "core" if any(row["group"] == "core" for row in rows) else rows[0]["group"]
    threads = max(row["threads"] for row in rows if row["group"] == group)
    said = []
    for (name, mode, _, count), by_peer in means(rows).items():
        if (name, count) == (group, threads) and TORCH in by_peer:
            ratios = [f"{c.upper()} {times(r)}" for c, (r, _) in sorted_cells(by_peer[TORCH])]
            said.append(f"{mode} {', '.join(ratios)}")
    worst = min(rows, key=lambda row: row["ratios"][TORCH]["median"])
    least = f"least {times(worst['ratios'][TORCH]['median'])} ({full_name(worst)})"
    doubt = any("NOT A QUIET" in notice for notice in notices(record))
    return (
        ("NOT A QUIET MACHINE, do not quote: " if doubt else "")
        + f"rnn_ext against torch.nn, {group} shapes, {count_threads(threads)} (above 1: faster): "
        + f"{'; '.join(said)}. Slower than torch.nn in {lost(rows, TORCH)} rows, {least}"
        + "".join(f"; than {peer} in {lost(rows, peer)}" for peer in others(rows))
        + "."
    )


def lost(rows, peer):
    """In how many rows the peer is faster, as text."""
    ratios = [row["ratios"][peer]["median"] for row in rows if peer in row["ratios"]]
    return f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"


def others(rows):
    """The peers besides torch.nn that ran."""
    return dict.fromkeys(peer for row in rows for peer in row["ratios"] if peer != TORCH)


def sorted_cells(by_cell):
    return [(cell, by_cell[cell]) for cell in CELLS if cell in by_cell]


def measure_table(record):
    """Headings and rows of texts: what was promised, and what this record has of it."""
    results, table = measures.results(record), []
    kept = sum(found.reached for found in results)
    threads = count_threads(measures.Rows(record).threads)
    names = [
        f"what we promise on {threads}: {kept} of {len(results)} reached",
        "target",
        "here",
        "",
    ]
    names += ["rows", "decided by"]
    for found in results:
        sign = "<=" if found.at_most else ">="
        numbers = [f"{sign} {found.show(found.target)}", found.show(found.value), found.state]
        rows = f"{found.rows} of {found.needed}"
        table.append([found.text, *numbers, rows, found.worst])
    return names, table


def verdict(rows):
    """Lines that say where rnn_ext loses and what was wrong."""
    against = {}
    for row in filter(timed, rows):
        for peer, ratio in row["ratios"].items():
            against.setdefault(peer, []).append(ratio["median"] < 1)
    lost = [row for row in rows if losses(row)]
    wrong = [row for row in rows if "wrong" in row]
    found = [
        f"rnn_ext is slower than {peer} in {sum(slower)} of {len(slower)} rows."
        for peer, slower in against.items()
    ]
    found += [f"  {full_name(row)}: {'; '.join(losses(row))}" for row in lost]
    if wrong:
        found.append(f"{len(wrong)} rows are WRONG and were not timed:")
        found += [f"  {full_name(row)}: {row['wrong']}" for row in wrong]
    return found


def mean_table(rows):
    """Headings and rows of texts: the geometric mean ratio to each peer by group, mode, cell."""
    table = []
    for name, by_peer in means(rows).items():
        for peer, by_cell in by_peer.items():
            values = [times(by_cell[c][0]) if c in by_cell else "" for c in CELLS]
            count = max(n for _, n in by_cell.values())
            group = " ".join(dict.fromkeys([name[0], name[2]])).removesuffix(" float32")
            table.append([group, name[1], str(name[3]), peer, str(count), *values])
    return ["group", "mode", "threads", "against", "shapes", *CELLS], table


def text_table(names, table, signs):
    """Lines; the sign of a column is -1 where it is aligned to the right."""
    widths = [max(map(len, column)) for column in zip(names, *table)]
    columns = [(name, sign * width) for name, sign, width in zip(names, signs, widths)]
    return [aligned(row, columns) for row in [names, *table]]


def text_summary(record):
    found = []
    names, table = mean_table(record["rows"])
    if table:
        found.append("geometric means of the ratio (above 1: rnn_ext is faster)")
        found += [*text_table(names, table, [1, 1, -1, 1, -1, -1, -1, -1]), ""]
    names, table = measure_table(record)
    if table:
        found += [*text_table(names, table, [1, -1, -1, 1, -1, 1]), ""]
    found += [*verdict(record["rows"]), "", headline(record)]
    return "\n".join([*found, *notices(record)])


def markdown_table(names, rows, left=1):
    rule = ["---" if k < left else "---:" for k in range(len(names))]
    return [f"| {' | '.join(line)} |" for line in [names, rule, *rows]]


def markdown(record, pictures=()):
    """The whole record as a document; ``pictures`` are (title, file name)."""
    rows, peers = record["rows"], peers_by_section(record)
    found = ["# rnn_ext: speed and memory", "", f"**{headline(record)}**", ""]
    for heading, file in pictures:
        found += [f"![{heading}]({file})", ""]
    found += [f"- {line}" for line in lines(record)]
    names, table = mean_table(rows)
    if table:
        found += ["", "## Geometric means of the ratio", "", "Above 1: rnn_ext is faster.", ""]
        found += markdown_table(names, table, left=4)
    names, table = measure_table(record)
    if table:
        table = [[f"**{t}**" if t.startswith("NOT") else t for t in line] for line in table]
        found += ["", "## What we promise", "", *markdown_table(names, table)]
    found += ["", "## Where rnn_ext loses", ""]
    found += [
        line.replace("  ", "- ", 1) if line[0] == " " else f"{line}\n" for line in verdict(rows)
    ]
    current = None
    for row in rows:
        ran = peers[section(row)]
        columns = [name for name, _ in headings(row["mode"], ran)]
        if section(row) != current:
            current = section(row)
            found += ["", f"## {title(current)}", ""]
            found += markdown_table([*columns, ""], [], left=2)
        notes = [*remarks(row), *(f"**{loss}**" for loss in losses(row))]
        if timed(row) or "memory" in row:
            texts = [*cells(row, ran), ", ".join(notes)]
        else:
            reason = row.get("wrong") or row["skipped"][OURS]
            label = "**WRONG, not timed**: " if "wrong" in row else ""
            texts = [row["case"], row["cell"], *[""] * (len(columns) - 2), label + reason]
        found.append(f"| {' | '.join(texts)} |")
    return "\n".join([*found, "", EXPLANATION, ""])


EXPLANATION = """\
Times are medians of a call; every library runs in turn, in blocks, in one process. A ratio is the
other library's time over rnn_ext's, the median over rounds; ± is half the distance of its
quartiles. Results are checked against float64 before anything is timed. Rows of "busy" are timed
beside another process that keeps a CPU busy, and without it, in turn. GF/s counts the matrix
products only. The limit of a call is the time of its multiply-adds at the measured FMA peak, or of
reading the recurrent weights at every step at the measured bandwidth, whichever is longer; no
implementation can be faster. TBH: bytes kept for the backward pass in units of one hidden state for
every step; peak: how much more memory a training step takes at its worst."""
