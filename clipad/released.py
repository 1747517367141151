"""What the authors' released program does otherwise than the paper writes (its ways of choosing, measuring and drawing
are the subject of notebook 05)."""

from collections.abc import Sequence

import torch


def changed_in_place(
    ordinary: Sequence[torch.Tensor],
    paths: Sequence[torch.Tensor],
    following: Sequence[tuple[torch.Tensor, torch.Tensor, bool]],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tokens of each stage as the released program reads them in the end (METHOD.md section 4).

    Its list of stages holds references, and the next block changes both tensors by `+=`: x_j becomes x_j + a_{j+1}, and
    path_j becomes path_j + s_{j+1}, unless block j+1 restarts the path and so leaves the old one alone. (Inside a
    quarter all blocks up to the next restart would add to path_j; the published stages are ends of quarters.)

    ``ordinary``, ``paths``: x_j and path_j per stage, B x T x D; ``following``: per stage what the next block adds,
    (a_{j+1}, s_{j+1}, whether it restarts the path), without an entry for a stage at the end of the network.
    """
    ordinary, paths = list(ordinary), list(paths)
    for stage, (a, s, restarts) in enumerate(following):
        ordinary[stage] = ordinary[stage] + a
        if not restarts:
            paths[stage] = paths[stage] + s
    return ordinary, paths
