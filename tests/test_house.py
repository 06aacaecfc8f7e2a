"""The size of the house, as dev/house.py counts it: no ceiling is exceeded."""

import pytest
import warm


@pytest.mark.slow
def test_no_ceiling_is_exceeded():
    done = warm.python("dev/house.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
