"""Section 3 of ICML 2018 in numbers and pictures: what f_T misses, and how it converges where it does not.

python -m hyperax.experiments.theory --out docs/figures --page docs/theory.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hyperax.dynamics import GradientDescent
from hyperax.experiments.effect_of_t import Sets, linear_representation
from hyperax.precision import float64
from hyperax.problem import Problem
from hyperax.rollout import rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""The T of the record."""


# Theorem 3.2 on Example 3.4: H = diag(lam_1, lam_1, lam_2, lam_2) with lam in the square [0, LARGEST]^2, which is
# compact and has H = 0 in it. Four features for two hyperparameters: no lam makes up for what w_T lacks.

RHO, LARGEST, SEED = 0.1, 2.0, 6


def features(lam: Array) -> Array:
    """H(lam)."""
    return jnp.diag(jnp.repeat(lam, 2))


def small_sets() -> Sets:
    """Eight examples of four features, drawn such that the minimiser of f lies inside the square."""
    random = np.random.default_rng(SEED)
    x = random.normal(size=(2, 8, 4))
    y = x @ np.array([[1.0], [0.6], [0.3], [-0.3]]) + 0.5 * random.normal(size=(2, 8, 1))
    return Sets(*(jnp.asarray(part) for part in (x[0], y[0], x[1], y[1])))


def constants(lam: Array, sets: Sets) -> tuple[Array, float]:
    """nu_lam, the Lipschitz constant of the gradient of L_lam, and mu = 2 rho, a modulus of strong convexity."""
    z = sets.x_train @ features(lam)
    return 2 * jnp.linalg.norm(z.T @ z / z.shape[0], 2) + 2 * RHO, 2 * RHO


class Along(NamedTuple):
    """At some lam: f_t and |w_t - w_lam| for t = 1, ..., T, f, and the rate (nu - mu) / (nu + mu)."""

    values: Array
    distances: Array
    exact: Array
    rate: Array
    start: Array


def along(lam: Array, sets: Sets, steps: int) -> Along:
    """Gradient descent with eta = 2 / (nu + mu), of which Remark 3.3 gives the rate, beside the exact solution."""
    problem, closed_form = linear_representation(RHO, features)
    nu, mu = constants(lam, sets)
    prepared = problem.prepare(lam, sets)
    w = closed_form.solve(lam, prepared)
    observe = lambda w_t: (problem.outer(w_t, lam, prepared), jnp.linalg.norm(w_t - w))
    eta = 2 / (nu + mu)  # outside of the loop over t
    values, distances = rollout(problem, GradientDescent(lambda _: eta), steps, lam, sets, observe=observe)[1]
    exact = problem.evaluate(w, lam, prepared)[0]
    return Along(values, distances, exact, (nu - mu) / (nu + mu), jnp.linalg.norm(w))


def minimisers(evaluate: Callable[[Array], Array], rounds: int = 10, side: int = 21) -> tuple[Array, Array]:
    """(argmin over the square, value there) of functions lam -> [k], by grids, each in the best cells of the last."""
    unit = jnp.stack(jnp.meshgrid(*[jnp.linspace(-1, 1, side)] * 2), -1).reshape(-1, 2)
    k = len(evaluate(jnp.full((1, 2), LARGEST / 2))[0])
    centre, radius = jnp.full((k, 2), LARGEST / 2), LARGEST / 2
    best = jnp.zeros(k)
    for _ in range(rounds):
        points = jnp.clip(centre[:, None] + radius * unit, 0.0, LARGEST)  # [k, side^2, 2]
        values = evaluate(points.reshape(-1, 2)).reshape(k, -1, k)
        own = values[jnp.arange(k), :, jnp.arange(k)]
        at = jnp.argmin(own, 1)
        centre, best = points[jnp.arange(k), at], own[jnp.arange(k), at]
        radius = 4 * radius / (side - 1)  # two cells each way
    return centre, best


def theorem(steps: Sequence[int] = STEPS, side: int = 81) -> dict[str, Any]:
    """Theorem 3.2 in numbers: inf f_T and argmin f_T against those of f, and the uniform distances.

    Arguments:
        steps: the T.
        side: of the grid over Lambda, on which suprema are taken.

    Returns: JSON types: constants, and a row for each T.
    Cost: seconds.
    """
    with float64():
        sets, most = small_sets(), max(steps)
        everywhere = jax.jit(jax.vmap(lambda lam: along(lam, sets, most)))
        line = jnp.linspace(0, LARGEST, side)
        seen = everywhere(jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2))
        chosen = jnp.array(steps) - 1

        def objectives(lams: Array) -> Array:
            found = everywhere(lams)
            return jnp.concatenate([found.values[:, chosen], found.exact[:, None]], 1)

        where, lowest = minimisers(objectives)
        gap, distance = (jnp.max(jnp.abs(x), 0) for x in (seen.values - seen.exact[:, None], seen.distances))
        rate, start = float(jnp.max(seen.rate)), float(jnp.max(seen.start))
        half = max(most // 2, 1)
        measured = float((distance[most - 1] / distance[half - 1]) ** (1 / max(most - half, 1)))
        rows = [
            {
                "steps": T,
                "inf": float(lowest[i]),
                "inf_error": float(lowest[i] - lowest[-1]),
                "argmin": where[i].tolist(),
                "argmin_error": float(jnp.linalg.norm(where[i] - where[-1])),
                "sup_error": float(gap[T - 1]),
                "sup_distance": float(distance[T - 1]),
                "bound": rate**T * start,
            }
            for i, T in enumerate(steps)
        ]
        return {
            "rho": RHO,
            "largest": LARGEST,
            "rate": rate,
            "measured_rate": measured,
            "inf": float(lowest[-1]),
            "argmin": where[-1].tolist(),
            "rows": rows,
        }


# Figure 2: L_lam(w) = (w^2 - lam^2)^2 / 4 has the minimisers lam and -lam; E(w) = (w + 1)^2 prefers the second.

INTERVAL = (0.5, 1.5)


def two_minimisers(start: float = 0.2) -> Problem:
    """The problem of Figure 2 on Lambda = [1/2, 3/2], with w_0 on the side of the wrong minimiser."""
    return Problem(
        inner=lambda w, lam, _: (w**2 - lam**2) ** 2 / 4,
        outer=lambda w, lam, _: (w + 1) ** 2,
        init=lambda lam, _: jnp.full_like(lam, start),
    )


def missed(steps: int = 200, side: int = 401) -> dict[str, Any]:
    """f_T against f for two minimisers: lim f_T(lam) = (1 + lam)^2, f(lam) = (1 - lam)^2."""
    with float64():
        problem, lams = two_minimisers(), jnp.linspace(*INTERVAL, side)
        w = jax.jit(jax.vmap(lambda lam: rollout(problem, GradientDescent(0.2), steps, lam)[0].w))(lams)
        f_T, f = (w + 1) ** 2, (1 - lams) ** 2
        one, other = int(jnp.argmin(f_T)), int(jnp.argmin(f))
        return {
            "steps": steps,
            "inf_f_T": float(f_T[one]),
            "argmin_f_T": float(lams[one]),
            "inf_f": float(f[other]),
            "argmin_f": float(lams[other]),
            "farthest_from_lam": float(jnp.max(jnp.abs(w - lams))),
        }


def record() -> dict[str, Any]:
    """Everything that the page says in numbers."""
    return {"theorem": theorem(), "two_minimisers": missed()}


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """The generated parts of the page, by name."""
    one, two = found["theorem"], found["two_minimisers"]
    pair = lambda x: f"({x[0]:.4f}, {x[1]:.4f})"
    lines = [
        "| T | inf f_T − inf f | argmin f_T | distance to argmin f | sup \\|f_T − f\\| | sup \\|w_T − w\\| "
        "| q^T sup \\|w\\| |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['steps']} | {row['inf_error']:.2e} | {pair(row['argmin'])} | {row['argmin_error']:.2e} "
        f"| {row['sup_error']:.2e} | {row['sup_distance']:.2e} | {row['bound']:.2e} |"
        for row in one["rows"]
    ]
    return {
        "theorem": "\n".join(lines),
        "constants": f"inf f = {one['inf']:.6f} at λ = {pair(one['argmin'])}; q = {one['rate']:.4f}; the supremum of "
        f"|w_T − w_λ| falls by {one['measured_rate']:.4f} a step over the last half of the table.",
        "two": f"After T = {two['steps']} steps inf f_T = {two['inf_f_T']:.4f} at λ = {two['argmin_f_T']:.4f}, and "
        f"inf f = {two['inf_f']:.4f} at λ = {two['argmin_f']:.4f}; w_T is within {two['farthest_from_lam']:.0e} of λ "
        "everywhere, so more steps do not help.",
    }


def updated(text: str, found: dict[str, Any]) -> str:
    """The page with its blocks `<!-- name -->` to `<!-- end -->` written again."""
    for name, block in blocks(found).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)
    return text


def figures(found: dict[str, Any]) -> dict[str, Figure]:
    """The pictures of the page, by name."""
    return {"bilevel": _bilevel(), "two-minimisers": _two(), "convergence": _convergence(found["theorem"])}


def _bilevel() -> Figure:
    """L_lam(w) = (w - 2)^2 + e^lam w^2, so w_lam = 2 / (1 + e^lam); E(w) = (w - 0.8)^2 (Figure 1)."""
    from matplotlib import colormaps

    from hyperax.experiments.figures import INK, new_figure, style

    minimiser, outer = lambda lam: 2 / (1 + np.exp(lam)), lambda w: (w - 0.8) ** 2
    figure = new_figure(2.9)
    left, right = figure.subplots(1, 2)
    w, lams = np.linspace(-0.4, 2.4, 200), np.linspace(-2, 2, 200)
    shown = np.linspace(-2, 2, 6)
    right.plot(lams, outer(minimiser(lams)), color=INK, linewidth=1.8)
    for lam, color in zip(shown, colormaps["viridis"](np.linspace(0.05, 0.9, len(shown))), strict=True):
        inner = lambda w, lam=lam: (w - 2) ** 2 + np.exp(lam) * w**2
        left.plot(w, inner(w), color=color, linewidth=1.6)
        left.plot(minimiser(lam), inner(minimiser(lam)), "o", color=color, markersize=6, zorder=4)
        right.plot(lam, outer(minimiser(lam)), "o", color=color, markersize=7, zorder=4)
    best = np.log(2 / 0.8 - 1)
    right.annotate(
        r"$\min f$", (best, 0), (best, 0.28), ha="center", color=INK, arrowprops={"arrowstyle": "->", "color": INK}
    )
    left.set_ylim(0, 8)
    style(left, xlabel="$w$", ylabel=r"inner objectives $L_\lambda(w)$")
    style(right, xlabel=r"$\lambda$", ylabel=r"$f(\lambda) = E(w_\lambda, \lambda)$")
    return figure


def _two() -> Figure:
    from hyperax.experiments.figures import BLUE, GREY, INK, RED, legend, new_figure, style

    figure = new_figure(3.0)
    left, right = figure.subplots(1, 2)
    w, lam = np.linspace(-1.75, 1.75, 300), 1.2
    left.plot(w, (w**2 - lam**2) ** 2 / 4, color=INK, linewidth=1.8, label=r"$L_\lambda(w)$")
    left.plot(w, (w + 1) ** 2 / 4, color=GREY, linewidth=1.4, linestyle=(0, (4, 3)), label="$E(w) / 4$")
    observe = lambda w: w
    with float64():
        path = rollout(two_minimisers(), GradientDescent(0.2), 30, jnp.asarray(lam), observe=observe)[1]
        lams = jnp.linspace(*INTERVAL, 101)
        ends = {
            T: np.asarray(jax.vmap(lambda x, T=T: rollout(two_minimisers(), GradientDescent(0.2), T, x)[0].w)(lams))
            for T in (4, 16, 200)
        }
        lams = np.asarray(lams)
    steps = np.concatenate([[0.2], np.asarray(path)])
    left.plot(steps, (steps**2 - lam**2) ** 2 / 4, "o", color=RED, markersize=4, label="$w_t$", zorder=4)
    left.plot(-lam, 0, "D", color=BLUE, markersize=6, label="the better $w$", zorder=4, clip_on=False)
    left.set_ylim(0, 1.6)
    style(left, xlabel="$w$", ylabel=rf"$\lambda$ = {lam}")
    left.legend(fontsize=8, frameon=False, loc="upper center", ncols=2)
    for (T, end), alpha in zip(ends.items(), (0.35, 0.6, 1.0), strict=True):
        right.plot(lams, (end + 1) ** 2, color=RED, alpha=alpha, linewidth=1.8, label=f"$f_T$, $T$ = {T}")
    right.plot(lams, (1 - lams) ** 2, color=BLUE, linewidth=1.8, label="$f$")
    style(right, xlabel=r"$\lambda$")
    legend(right, "best")
    return figure


def _convergence(found: dict[str, Any]) -> Figure:
    from hyperax.experiments.figures import BLUE, GREEN, GREY, INK, RED, new_figure, style

    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    steps = np.array([row["steps"] for row in found["rows"]])
    of = lambda name: np.array([row[name] for row in found["rows"]])
    for name, color, label in (
        ("bound", GREY, r"$q^T \sup |w_\lambda|$"),
        ("sup_distance", INK, r"$\sup |w_T - w_\lambda|$"),
        ("sup_error", BLUE, r"$\sup |f_T - f|$"),
        ("argmin_error", GREEN, r"$|\mathrm{argmin}\, f_T - \mathrm{argmin}\, f|$"),
        ("inf_error", RED, r"$|\inf f_T - \inf f|$"),
    ):
        seen = np.abs(of(name))
        keep = seen > 1e-13
        left.semilogy(steps[keep], seen[keep], "o-", color=color, linewidth=1.5, markersize=4, label=label)
    style(left, xlabel="inner steps $T$")
    left.legend(fontsize=8, frameon=False, labelcolor=INK)
    with float64():
        line = jnp.linspace(0, LARGEST, 81)
        points = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
        values = np.asarray(jax.vmap(lambda lam: along(lam, small_sets(), 1).exact)(points).reshape(81, 81))
        line = np.asarray(line)
    right.contour(
        line, line, values, levels=np.quantile(values, np.linspace(0.02, 0.95, 10)), colors="#c3c8ce", linewidths=1
    )
    path = np.array([row["argmin"] for row in found["rows"]])
    right.plot(*path.T, "o-", color=GREEN, markersize=4, linewidth=1.2, clip_on=False, zorder=4)
    for T, at in zip(steps[:5], path, strict=False):
        right.annotate(f"{T}", at, (5, 4), textcoords="offset points", fontsize=8, color=INK)
    right.plot(*found["argmin"], "*", color=INK, markersize=10, zorder=3)
    ticks = np.linspace(0, LARGEST, 5)
    right.set_xticks(ticks, [f"{x:g}" for x in ticks])
    right.set_yticks(ticks, [f"{x:g}" for x in ticks])
    style(right, xlabel=r"$\lambda_1$", ylabel=r"$\lambda_2$", grid="both")
    return figure


def main(words: Sequence[str] | None = None) -> None:
    """Write pictures and record, and the numbers of a page."""
    from hyperax.experiments.figures import save

    parser = argparse.ArgumentParser(description="Section 3 of the paper in numbers and pictures")
    parser.add_argument("--out", default="docs/figures", help="folder for the pictures and theory.json")
    parser.add_argument("--page", help="Markdown file whose numbers are written again")
    options = parser.parse_args(words)
    out, found = Path(options.out), record()
    out.mkdir(parents=True, exist_ok=True)
    (out / "theory.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, figure in figures(found).items():
        save(figure, out / f"{name}.png")
    if options.page:
        page = Path(options.page)
        page.write_text(updated(page.read_text("utf-8"), found), "utf-8")


if __name__ == "__main__":
    main()
