"""``framecap report``: one self-contained page that shows what a captioner said about which frames."""

from framecap.report.report import ReportOptions, Written, add_arguments, run, write_report

__all__ = ["ReportOptions", "Written", "add_arguments", "run", "write_report"]
