"""Print the tables of docs/settings.md."""

from server.config.table import settings_table

print(settings_table())
