"""The experiments of the ShortGPT paper on one model, and the page that shows them.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853. Each experiment is a section, a file of :mod:`server.report.sections` with one
interface: what it measures, ``run``, which measures through the :class:`server.report.lab.Lab`, and
``render``, which turns the numbers into tables and plots.
"""
