"""saelib: the thin library behind the notebooks of the sparse-autoencoder replication.

Import the module you need, for example ``from saelib import training``. Nothing heavy is imported here.
"""

import warnings

# said by other libraries' progress bars on import in a notebook without widgets; ours are plain text
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.2.0"
