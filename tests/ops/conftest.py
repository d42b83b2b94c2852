"""As in tests/compression: TensorFlow quiet and on one thread. It reads these once, when it is imported."""

import os

os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
