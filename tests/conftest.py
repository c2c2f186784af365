"""For all tests."""

from hypothesis import HealthCheck, settings

# Time says more about the machine than about the code: on a busy one an example may take seconds.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")
