"""Settings: flags over ``FATHOM_*`` variables over a YAML file.

    python -m server.config

prints the tables of docs/settings.md.
"""

from server.config.allowed import allowed_values
from server.config.errors import ConfigError
from server.config.loading import CLIENT_VARIABLES, OTHER_VARIABLES, load_settings
from server.config.old_names import OLD_NAMES, warn_of_old_names
from server.config.settings import ENV_PREFIX, Settings
from server.config.table import settings_table

__all__ = [
    "CLIENT_VARIABLES",
    "ENV_PREFIX",
    "OLD_NAMES",
    "OTHER_VARIABLES",
    "ConfigError",
    "Settings",
    "allowed_values",
    "load_settings",
    "settings_table",
    "warn_of_old_names",
]
