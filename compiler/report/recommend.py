"""Which budget to take: the smallest that reaches what was asked for, or else the knee of fidelity against cost."""

from __future__ import annotations

from collections.abc import Sequence

from otcache.schemas.structure import Quality
from otcache.schemas.targets import measured_of, parse_target

ALIKE_SSIM = 0.9995
"""From here on a mean SSIM leaves nothing that a larger budget could bring."""


def recommended(qualities: dict[int, Quality], total: int, targets: Sequence[str]) -> tuple[int, str]:
    """The budget, and why, as the end of a sentence that begins with it.

    Args:
        qualities: of each budget.
        total: model evaluations of the full run.
        targets: qualities that were asked for, which all have to hold.
    """
    budgets = sorted(qualities)
    if targets:
        wanted = [parse_target(text, "target") for text in targets]
        reaching = [b for b in budgets if all(target.holds(measured_of(qualities[b])) for target in wanted)]
        if reaching:
            return reaching[0], f"the smallest one that reaches what was asked for: {'; '.join(targets)}"
    if len(budgets) == 1:
        return budgets[0], "the only one that was compiled"
    ssim = {budget: qualities[budget].ssim.mean for budget in budgets}
    if ssim[budgets[0]] >= ALIKE_SSIM:
        return budgets[0], f"the smallest one, and its mean SSIM is {ssim[budgets[0]]:.4f} already"
    return knee(ssim, total), (
        f"the knee of mean SSIM against evaluations: farthest above the straight line from {budgets[0]} evaluations to "
        f"all {total}, so that more evaluations bring less from here on"
    )


def knee(ssim: dict[int, float], total: int) -> int:
    """The budget whose SSIM is farthest above the line from the smallest budget to the full run, which has 1.

    >>> knee({4: 0.872, 8: 0.984, 16: 0.9996}, 50)
    8
    >>> knee({4: 0.5, 8: 0.55, 16: 0.95}, 50)
    16
    """
    start = min(ssim)

    def above(budget: int) -> float:
        share = (budget - start) / max(1, total - start)
        return ssim[budget] - (ssim[start] + share * (1.0 - ssim[start]))

    return max(sorted(ssim), key=above)
