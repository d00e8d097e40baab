"""Which of the fused kernels a GPU runs."""

import os

import torch

NONE, AMPERE, HOPPER = 0, 8, 9
_VARIABLE = "SEGBLOCKS_GENERATION"


def generation(device: torch.device) -> int:
    """HOPPER there; AMPERE on GPUs before and after it, from compute capability 8.0 on; NONE where
    the fused kernels do not run.

    The environment variable SEGBLOCKS_GENERATION lowers it, so that they can be compared.

    Raises:
        ValueError: it is none of 9, 8 and 0.
    """
    most = os.environ.get(_VARIABLE, str(HOPPER))
    if most not in map(str, (NONE, AMPERE, HOPPER)):
        raise ValueError(
            f"{_VARIABLE} is {most!r}; give 9 (Hopper's kernels where they run), 8 (those of other "
            "GPUs) or 0 (PyTorch's functions)"
        )
    if device.type != "cuda":
        return NONE
    major = torch.cuda.get_device_capability(device)[0]
    found = HOPPER if major == HOPPER else AMPERE if major >= AMPERE else NONE
    return min(found, int(most))
