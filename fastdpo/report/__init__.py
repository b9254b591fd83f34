"""HTML reports of runs: sections of text, tables, figures and samples in one self-contained file."""

from fastdpo.report.html import write_report
from fastdpo.report.plots import Interval, Point, Spot, frontier, intervals, lines, require_matplotlib, training_curves
from fastdpo.report.sections import Commands, Figure, FigureGrid, Response, Sample, SampleList, Table, Text, svg

__all__ = [
    "Commands",
    "Figure",
    "FigureGrid",
    "Interval",
    "Point",
    "Response",
    "Sample",
    "SampleList",
    "Spot",
    "Table",
    "Text",
    "frontier",
    "intervals",
    "lines",
    "require_matplotlib",
    "svg",
    "training_curves",
    "write_report",
]
