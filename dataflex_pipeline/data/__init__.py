"""Preparation of the pool and the target: files or hub data sets become tokenised rows in Parquet.

Two passes: ``scan_sources`` reads every source once and finds whatever is wrong with it before anything
is written; ``prepare`` reads again, tokenises and writes, part by part. Both stream.
"""

from __future__ import annotations

from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.chat.templates import TEMPLATES, named_template
from dataflex_pipeline.data.prepare import ingredients, prepare
from dataflex_pipeline.data.scan import Scan, scan_sources
from dataflex_pipeline.data.settings import DataSettings

__all__ = [
    "TEMPLATES",
    "ChatFormat",
    "DataSettings",
    "Scan",
    "ingredients",
    "named_template",
    "prepare",
    "scan_sources",
]
