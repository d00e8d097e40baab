"""Which of the fused kernels a GPU runs."""

import os

import torch

AMPERE, HOPPER = 8, 9


def generation(device: torch.device) -> int:
    """HOPPER there; AMPERE on GPUs before and after it, from compute capability 8.0 on; 0 where the
    fused kernels do not run.

    The environment variable SEGBLOCKS_GENERATION lowers it, so that they can be compared.
    """
    if device.type != "cuda":
        return 0
    major = torch.cuda.get_device_capability(device)[0]
    found = HOPPER if major == HOPPER else AMPERE if major >= AMPERE else 0
    return min(found, int(os.environ.get("SEGBLOCKS_GENERATION", found)))
