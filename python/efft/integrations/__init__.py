"""Use EFFT with other libraries. A module that supports a library needs that library to be installed."""
