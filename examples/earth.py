"""The series of forecast.py, the length of the day, and the forecasts that need no network."""

import common
import torch

YEARS, HELD_OUT = range(1984, 2025), range(2019, 2025)
LUNAR = 27  # days
EVERY = 5  # a held-out forecast begins every fifth day


def read_series():
    """(days [N] in milliseconds over 86,400 s, how many of them come before the held-out years)."""

    def read(path):
        rows = [line.split() for line in path.read_text().splitlines() if line[:1] != "#"]
        return [(int(row[0]), 1e3 * float(row[12])) for row in rows if int(row[0]) in YEARS]

    rows = common.package_data("astropy_iers_data", "data/eopc04.1962-now", read)
    years, values = zip(*rows, strict=True)
    return torch.tensor(values), sum(year < HELD_OUT[0] for year in years)


def windows(series, starts, length):  # -> [length, number of starts]
    return series[starts.to(series.device) + torch.arange(length, device=series.device)[:, None]]


def held_out(series, cut, args):
    """The histories [window, N] and the futures [horizon, N] of the forecasts that are judged."""
    first = torch.arange(cut, len(series) - args.horizon + 1, EVERY)  # the first day forecast
    history = windows(series, first - args.window, args.window)
    return history, windows(series, first, args.horizon)


def baselines(series, cut, args):
    """{name: forecasts [horizon, N]} of the three that stand beside the layer."""
    history, future = held_out(series, cut, args)
    lunar = [history[day % LUNAR - LUNAR] for day in range(args.horizon)]
    past = windows(series, torch.arange(cut - args.window), args.window + 1).double().t()
    ones = torch.ones(len(past), 1, dtype=past.dtype, device=past.device)
    weights = torch.linalg.lstsq(torch.cat([past[:, :-1], ones], 1), past[:, -1:]).solution
    days = history.double()
    for _ in range(args.horizon):
        following = weights[:-1].t() @ days[-args.window :] + weights[-1]
        days = torch.cat([days, following])
    return {
        "as the last day": history[-1:].expand_as(future),
        f"as {LUNAR} days ago": torch.stack(lunar),
        f"autoregression of {args.window} days": days[-args.horizon :].float(),
    }
