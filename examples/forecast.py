"""Forecasting: how long the next days will be, from how long the last ones were.

    python examples/forecast.py             # the Earth's rotation, about a minute
    python examples/forecast.py --cell gru --hidden 128 --window 365 --horizon 90

A day is 86,400 seconds and about a millisecond: tides, the atmosphere and the Earth's core change
how fast the Earth turns. The International Earth Rotation Service measures it every day (series
EOP 20 C04, here 1984 to 2024, in the package astropy-iers-data). The layer reads --window days and
is trained to predict the next one (teacher forcing). To forecast --horizon days it is fed its own
predictions: each day's forecast is the next input.

Beside it stand three baselines: "tomorrow as today"; "as one lunar month of 27 days ago"; and the
autoregressive model of the same --window days, fitted by least squares, which a series so close to
a sum of waves suits well. All are judged on the last six years.
"""

import itertools
import sys

import common
import plots
import torch
import training
from common import InputError, positive
from earth import EVERY, HELD_OUT, LUNAR, YEARS, baselines, held_out, read_series, windows
from outputs import Checkpoint
from torch import nn
from training import Score

KIND = "rnn_ext forecast 1"
QUICK = {"hidden": 32, "window": 120, "steps": 200, "horizon": 10}


class Forecaster(nn.Module):
    """The days so far [T, B] -> each day's following day [T, B]; all in units of the training."""

    def __init__(self, layer_class, args, step):
        super().__init__()
        self.recurrent = layer_class(2, args.hidden, args.layers)
        self.readout = nn.Linear(args.hidden, 1)
        self.step = step  # how much the series changes from one day to the next

    def forward(self, days, state=None):
        before, state = state or (days[:1], None)
        change = (days - torch.cat([before, days[:-1]])) / self.step
        hidden, state = self.recurrent(torch.stack([days, change], -1), state)
        return days + self.step * self.readout(hidden).squeeze(-1), (days[-1:], state)

    @torch.no_grad()
    def forecast(self, history, horizon):  # [T, B] -> [horizon, B]
        following, state = self(history)
        days = [following[-1:]]
        while len(days) < horizon:
            following, state = self(days[-1], state)
            days.append(following)
        return torch.cat(days)


class ForecastLearner(training.Learner):
    SCORES = (Score("held-out error of the forecasts (ms)"),)
    LOSS_UNIT = "daily changes"

    def __init__(self, model, args, series, cut):
        super().__init__(model, args, training.falling_rate(args))
        self.args, self.series = args, series
        self.mean, self.scale = series[:cut].mean(), series[:cut].std()
        self.history, self.future = held_out(series, cut, args)
        self.batches = common.Batches(cut - args.window, args.batch, args.seed)

    def train_step(self, step):
        days = windows(self.series, self.batches(step), self.args.window + 1)
        days = (days - self.mean) / self.scale
        following, _ = self.model(days[:-1])
        errors = (following - days[1:])[self.args.window // 4 :]  # the first days say too little
        return self.descend(errors.abs().mean() / self.model.step)

    def forecast(self):  # -> [horizon, forecasts], in ms
        days = self.model.forecast((self.history - self.mean) / self.scale, self.args.horizon)
        return days * self.scale + self.mean

    def evaluate(self):
        return (self.forecast() - self.future).abs().mean().item()


def parse(arguments):
    parser = common.Parser(__doc__, hidden=64, batch=32, epochs=2, lr=5e-3)
    parser.add_argument("--window", type=positive(int), default=240, help="days that are read")
    parser.add_argument("--horizon", type=positive(int), default=30, help="days to forecast")
    args = parser.parse(arguments, "forecast", QUICK)
    common.require(astropy_iers_data="astropy-iers-data")
    if not LUNAR <= args.window <= 2000 or args.horizon > 365:
        raise InputError(f"--window takes {LUNAR} to 2000 days, --horizon up to 365")
    return args


def main(arguments):
    args = parse(arguments)
    device = common.usable_device(args.device)
    series, cut = read_series()
    series = series.to(device)
    step = (series[1:cut].diff().std() / series[:cut].std()).item()
    args.steps = training.number_of_steps(args, (cut - args.window) / args.batch)

    def build(library):
        model = Forecaster(training.layer_class(library, args), args, step).to(device)
        return ForecastLearner(model, args, series, cut)

    learners = training.learners(args, build)
    settings = {"window": args.window, "horizon": args.horizon}
    checkpoint = Checkpoint(args, KIND, settings, learners)
    print(f"data     length of the day, {YEARS[0]} to {YEARS[-1]}: {len(series):,} days, ", end="")
    print(f"{cut:,} to train; held out: {HELD_OUT[0]} to {HELD_OUT[-1]}")
    print(f"model    {training.describe(args, learners['rnn_ext'].model)}\n", flush=True)
    training.train(learners, args, args.batch * args.window, checkpoint.save, "day")
    training.report(learners, args.batch * args.window, "day")

    forecasts = baselines(series, cut, args)
    forecasts |= {name: run.forecast() for name, run in learners.items()}
    future = learners["rnn_ext"].future
    errors = {name: (days - future).abs().mean(1).cpu() for name, days in forecasts.items()}
    marks = [day for day in (1, 5, 10, 20, 30, 90, 365) if day <= args.horizon]
    heads = "".join(f"{day:8}" for day in marks)
    print(f"\n{'mean absolute error (ms), days ahead':38}{heads}     all")
    for name, error in errors.items():
        cells = "".join(f"{error[day - 1]:8.4f}" for day in marks)
        print(f"{name:38}{cells}{error.mean():8.4f}")
    naive, ours = (errors[name].mean().item() for name in ("as the last day", "rnn_ext"))
    print(f"\nthe error of rnn_ext's forecasts is {ours / naive:.0%} of that of 'as the last day'")
    draw(args, learners, series[cut:], errors, forecasts)
    training.summary(learners, args)


def draw(args, learners, measured, errors, forecasts):
    title = f"The length of the day: {args.cell.upper()}, {args.layers} x {args.hidden} units"
    colors = dict(zip(forecasts, [plots.MUTED, *plots.CYCLE[3:5]])) | plots.COLORS
    apart = -(-args.horizon // EVERY)  # forecasts from one that is drawn to the next
    with plots.figure(args.plot, title, "aa;bc", (11, 6.4), [1.25, 1]) as axes:
        shown = range(0, min(len(forecasts["rnn_ext"][0]), 6 * apart), apart)
        days = measured[: 6 * apart * EVERY].cpu()
        axes["a"].plot(days, color="#c0c0c0", linewidth=4, label="measured")
        for name, start in itertools.product(list(forecasts)[2:4], shown):
            days = range(start * EVERY, start * EVERY + args.horizon)
            look = {"color": colors[name], "label": None if start else name}
            axes["a"].plot(days, forecasts[name][:, start].cpu(), **look)
            axes["a"].axvline(days[0], color=plots.MUTED, linewidth=0.8, linestyle=":")
        axes["a"].set(title=f"Forecasts of {args.horizon} days, each begun at a dotted line")
        axes["a"].set(
            xlabel=f"days since the beginning of {HELD_OUT[0]}", ylabel="ms over 86,400 s"
        )
        axes["a"].legend(ncols=3)
        for name, error in reversed(errors.items()):
            look = {"linewidth": plots.LINE_WIDTHS.get(name, 1.4), "color": colors[name]}
            axes["b"].plot(range(1, args.horizon + 1), error, **look, label=name)
        axes["b"].set(title="Mean error of all held-out forecasts", xlabel="days ahead")
        room = 1.5 * max(error.max().item() for error in errors.values())  # for the legend
        axes["b"].set(ylabel="mean absolute error (ms)", ylim=(0, room))
        axes["b"].legend(fontsize="small", ncols=2, loc="upper left")
        plots.step_times(axes["c"], learners)


if __name__ == "__main__":
    sys.exit(common.exit_code(main, sys.argv[1:]))
