"""For all tests."""

import os

from hypothesis import HealthCheck, settings

# Before torch is imported. Tensors are small: threads would wait for each other, and for seconds where something else runs too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Time says more about the machine than about the code: on a busy one an example may take seconds.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")
