"""Draws the loss curve of a training run as a PNG."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qlora_compile.errors import MissingPackageError

_REACH = 5  # steps on either side of one that its mean is taken over


def require_matplotlib() -> None:
    """Check that curves can be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingPackageError(purpose="the loss curve", package="matplotlib")


def smoothed(values: Sequence[float]) -> list[float]:
    """Return centred running means, over fewer values towards either end, so that the means of a
    straight line are the line itself, without lag."""
    means = []
    for place in range(len(values)):
        reach = min(_REACH, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        means.append(sum(window) / len(window))
    return means


def draw_loss_curve(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    title: str,
    held_out: Sequence[tuple[int, float, float | None]] = (),
) -> None:
    """Draw the training loss per step, and the `held_out` points (step, loss, standard error).

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, per step")
    axes.plot(
        steps, smoothed(losses), color="tab:blue", linewidth=2, label="training, running mean"
    )
    if held_out:
        at, means, errors = zip(*held_out, strict=True)
        axes.errorbar(
            at,
            means,
            yerr=[error or 0.0 for error in errors],
            fmt="o",
            color="tab:orange",
            capsize=4,
            zorder=3,
            label="held-out, mean ± standard error",
        )
        for step, mean in zip(at, means, strict=True):
            first = step == min(at)
            axes.annotate(
                f"{mean:.3f}",
                (step, mean),
                textcoords="offset points",
                xytext=(10 if first else -10, 0),
                ha="left" if first else "right",
                va="center",
                color="tab:orange",
                weight="bold",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
                zorder=4,
            )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")
