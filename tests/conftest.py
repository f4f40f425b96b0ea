"""What every test runs under: no network, no warnings about forked tokenizers, Triton's kernels interpreted.

torch's threads are left as they are.
"""

import os

from triton_switch import import_triton

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import_triton()
