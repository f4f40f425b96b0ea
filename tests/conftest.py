"""What every test runs under: no network, no warnings about forked tokenizers. torch's threads are left as they are."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
