"""What can be wrong with training data.

    DataError            a data set or a cache cannot be used; the message is for the user
    └── TooManyBroken    more of the samples are broken than the settings allow
    BrokenSample         one sample cannot be used; caught, counted and named, never shown alone

Each DataError says what was got, what was expected, and what to do.
"""

from engines.errors import SanaError

__all__ = ["BrokenSample", "DataError", "TooManyBroken"]


class DataError(SanaError):
    """A data set or a cache cannot be used."""


class TooManyBroken(DataError):
    """More samples are broken than the settings allow."""


class BrokenSample(Exception):
    """One sample cannot be used. The message is the reason, without the sample's name."""
