"""saelib: the thin library behind the notebooks of the sparse-autoencoder replication.

Import the module you need, for example ``from saelib import training``. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
