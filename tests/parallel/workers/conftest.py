"""Ranks keep their temporary files apart: in a common folder pytest's clean-up now and then fails over another rank's."""

import os
import tempfile


def pytest_configure(config):
    folder = tempfile.TemporaryDirectory(prefix="rank-")
    os.environ["PYTEST_DEBUG_TEMPROOT"] = folder.name
    config.add_cleanup(folder.cleanup)
