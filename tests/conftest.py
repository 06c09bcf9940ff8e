"""One thread a worker: the models of the tests are small."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fedprior", deadline=None, derandomize=True, print_blob=False, database=None)
settings.load_profile("fedprior")
