"""A run as one self-contained page: no scripts, and nothing fetched from anywhere."""

from offload.report.page import page
from offload.report.recorded import Trace, read_run, read_trace

__all__ = ["Trace", "page", "read_run", "read_trace"]
