"""The model that is served: finding, checking, quantizing and exporting it."""
